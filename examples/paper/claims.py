"""The claims, one by one: what was published, what is found here, and what follows.

The limits of each verdict are in the code. They were written down before the matrix was run, when
a trial of some of its arms was known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paper.results import (
    Result,
    Results,
    Spread,
    density,
    density_at,
    density_f32,
    density_tolerant,
    gain,
    spread,
)

HOLDS, CAVEAT, FAILS, UNTESTED = "holds", "holds with a caveat", "fails", "cannot be tested here"
RL = ("grpo", "rloo", "ppo", "prime", "dpo", "simpo", "kto", "orpo")
ENOUGH = 0.06  #: reward gained from which a run has learnt something
BEYOND = 1.1  #: lift from which masks agree beyond a null


@dataclass(frozen=True)
class Found:
    """A verdict, and the numbers it rests on: some sentences, and rows under a head."""

    verdict: str
    ours: str
    head: tuple[str, ...] = ()
    rows: Sequence[Sequence[object]] = ()


@dataclass(frozen=True)
class Claim:
    """A sentence of the papers."""

    title: str
    published: str
    judge: Callable[[Results], Found]
    figure: str = ""  #: shows what the verdict rests on


def everywhere_sparse(results: Results) -> Found:
    learnt = [each for name in RL for each in results.of(algorithm=name) if gain(each) >= ENOUGH]
    if not learnt:
        return Found(UNTESTED, "No run gained enough reward.")
    main = [each for each in learnt if each["run"]["group"] == "main"]
    inside = [0.05 <= density(each) <= 0.30 for each in learnt]
    trained = [each for each in learnt if each["run"]["precision"] != "bf16"]
    text = (
        f"{sum(inside)} of {len(inside)} RL runs that gained at least {ENOUGH} reward lie there. "
        f"They changed {spread(learnt, density)} of the stored weights, by more than 1e-5 "
        f"{spread(learnt, density_tolerant)}; those of the main arm {spread(main, density)}. "
        f"Of float32 weights those that have them changed {spread(trained, density_f32)}."
    )
    mains = [0.05 <= density(each) <= 0.30 for each in main]
    return Found(HOLDS if all(inside) else CAVEAT if mains and all(mains) else FAILS, text)


def sft_dense(results: Results) -> Found:
    sft, grpo = (results.of(algorithm=name, group="main", task="sort") for name in ("sft", "grpo"))
    if not sft or not grpo:
        return Found(UNTESTED, "No such run is here.")
    level = 0.8 * min(gain(each) for each in [*sft, *grpo])
    equal = [spread(each, lambda one: density_at(one, level)) for each in (sft, grpo)]
    text = (
        f"At the end SFT {spread(sft, density)}, GRPO {spread(grpo, density)}; "
        f"where both had gained {level:.3f} reward: SFT {equal[0]}, GRPO {equal[1]}."
    )
    if not all(each.values for each in equal):
        return Found(UNTESTED, text)
    if min(map(density, sft)) >= 0.85 and max(map(density, grpo)) <= 0.5:
        return Found(HOLDS, text)
    if min(equal[0].values) > max(equal[1].values):
        return Found(CAVEAT, "Denser than GRPO at the same gain, but not dense. " + text)
    return Found(FAILS, "No denser than GRPO at the same gain. " + text)


def lifts(question: Result, null: str) -> Spread:
    """The lift of every pair of an answer; a pair without one is left out."""
    found = (pair["nulls"][null]["lift"] for pair in question["pairs"])
    return Spread(tuple(each for each in found if each is not None), "pair")


def agree(start: str) -> Callable[[Results], Found]:
    """Whether the runs of each such question agree beyond chance; all questions are in a table."""

    def judge(results: Results) -> Found:
        asked = results.question(start)
        known = {name: each for name, each in asked.items() if lifts(each, "tensor").values}
        if not known:
            return Found(UNTESTED, "No pair of runs has masks to compare.")
        by_null = {
            null: {name: lifts(each, null).mean for name, each in known.items()}
            for null in ("tensor", "magnitude")
        }
        tensor, magnitude = (Spread(tuple(each.values()), "group") for each in by_null.values())
        jaccards = [pair["jaccard"] for each in known.values() for pair in each["pairs"]]
        least = min(by_null["magnitude"], key=lambda name: by_null["magnitude"][name])
        text = (
            f"Jaccard {Spread(tuple(jaccards), 'pair')}; lift inside tensors {tensor}, given "
            f"magnitudes {magnitude}, least for {least.partition(': ')[2] or least}."
        )
        inside, given = (sum(x >= BEYOND for x in each.values) for each in (tensor, magnitude))
        why = (
            f"A lift of at least {BEYOND} inside tensors in {inside} of {len(known)} groups, given "
            f"magnitudes in {given}. "
        )
        if inside == len(known):
            return Found(HOLDS if given == len(known) else CAVEAT, why + text)
        return Found(CAVEAT if inside else FAILS, why + text)

    return judge


def layers_alike(results: Results) -> Found:
    runs = [each for name in RL for each in results.of(algorithm=name, group="main")]
    runs = [each for each in runs if density(each) > 0]
    if not runs:
        return Found(UNTESTED, "No run changed anything.")

    def ratio(result: Result) -> float | None:
        found = [v for k, v in result["measured"]["layers"].items() if ".layers." in k]
        return float(max(found) / min(found)) if min(found, default=0) > 0 else None

    def norms(result: Result) -> float:
        found = [v for k, v in result["measured"]["modules"].items() if "norm" in k]
        return float(sum(found) / len(found))

    uneven, normed = spread(runs, ratio), spread(runs, norms)
    text = f"Densest over sparsest layer {uneven}; density of norms {normed}."
    if not uneven.values or max(uneven.values) > 2:
        return Found(FAILS, text)
    return Found(HOLDS if max(normed.values) < 0.02 else CAVEAT, text)


def full_rank(results: Results) -> Found:
    runs = [each for name in RL for each in results.of(algorithm=name, group="main")]
    runs = [each for each in runs if density(each) > 0]
    share = spread(runs, lambda each: each["measured"]["structure"]["rank_share_stored"])
    few = spread(runs, lambda each: each["measured"]["structure"]["rank99_share_stored"])
    text = (
        f"Rank over the smaller dimension {share}; the share that holds 99 % of the energy {few}. "
        "Rounding to bfloat16 alone makes a matrix of full rank."
    )
    if not share.values:
        return Found(UNTESTED, text)
    return Found(HOLDS if min(share.values) >= 0.95 else FAILS, text)


def plateau(results: Results) -> Found:
    runs = [each for each in results.of(algorithm="grpo") if density(each) > 0]
    runs = [each for each in runs if each["run"]["group"] in ("main", "sgd")]

    def grown(result: Result) -> float:
        steps = [point["density"] for point in result["measured"]["steps"]]
        return 1 - float(steps[int(0.8 * len(steps)) - 1] / steps[-1])

    def part(key: str) -> Spread:
        return spread(
            runs,
            lambda each: (
                each["measured"]["timeline"][key] / each["measured"]["timeline"]["elements"]
            ),
        )

    late = spread(runs, grown)
    text = (
        f"Share of the final density that the last fifth of the steps added: {late}; "
        f"never touched {part('never')}, touched and returned {part('returned')}."
    )
    if not late.values:
        return Found(UNTESTED, text)
    return Found(HOLDS if max(late.values) < 0.05 else FAILS, text)


def rounding(results: Results) -> Found:
    runs = [each for each in results.of(algorithm="grpo") if each["run"]["precision"] != "bf16"]
    runs = [each for each in runs if gain(each, "masters") >= ENOUGH]
    halves = results.of(algorithm="grpo", precision="bf16", task="sort")
    text = (
        f"Of float32 weights {spread(runs, density_f32)} changed; of the same runs, stored in "
        f"bfloat16, {spread(runs, density)}; of runs in bfloat16 throughout "
        f"{spread(halves, density)}, for a gain of {spread(halves, gain)} reward."
    )
    if not runs:
        return Found(UNTESTED, text)
    return Found(HOLDS if min(map(density_f32, runs)) >= 0.99 else FAILS, text)
