"""The box on top of the page: what a reader should take home."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from paper.claims import CAVEAT, ENOUGH, FAILS, HOLDS, RL, UNTESTED, Found, lifts
from paper.results import (
    Result,
    Results,
    Spread,
    course,
    density,
    density_at,
    density_f32,
    gain,
    spread,
)

PLURAL = {HOLDS: "hold", CAVEAT: "hold with a caveat", FAILS: "fail", UNTESTED: UNTESTED}


def box(results: Results, found: Sequence[Found]) -> str:
    """Sparsity, dtype, size of the update, optimizer and chance, in numbers of these runs."""
    lines = [_verdicts(found), "", *_sparsity(results), *_dtype(results), *_size(results)]
    lines += [*_optimizer(results), *_chance(results), ""]
    lines += [
        "So report a density together with the dtype, the learning rate and the optimizer. Judge",
        "an overlap by a null that knows magnitudes. And compare a mask that recovers a score with",
        "a random mask of the same size and with the untrained base.",
    ]
    return "\n".join(f"> {line}".rstrip() for line in lines)


def _verdicts(found: Sequence[Found]) -> str:
    counts = Counter(each.verdict for each in found)
    said = [
        f"{counts[each]} {each if counts[each] == 1 else PLURAL[each]}"
        for each in (HOLDS, CAVEAT, FAILS, UNTESTED)
        if counts[each]
    ]
    return f"**Of {len(found)} sentences** {', '.join(said)}."


def _sparsity(results: Results) -> list[str]:
    runs = [each for name in RL for each in results.of(algorithm=name) if gain(each) >= ENOUGH]
    return [
        "- *Sparsity* depends on the run and on the file, not on RL: the runs of eight RL",
        f"  algorithms that learnt changed {spread(runs, density)} of the stored weights.",
    ]


def _dtype(results: Results) -> list[str]:
    main = results.of(algorithm="grpo", task="sort", group="main")
    halves = results.of(algorithm="grpo", task="sort", precision="bf16", optimizer="adamw")
    return [
        f"- *Dtype*: the same GRPO runs changed {spread(main, density_f32)} of their float32",
        f"  weights, and {spread(main, density)} once stored in bfloat16; trained in bfloat16",
        f"  throughout, GRPO changed {spread(halves, density)}.",
    ]


def _size(results: Results) -> list[str]:
    """The smallest and the largest learning rate."""
    runs = [
        each
        for group in ("main", "sweep")
        for each in results.of(algorithm="grpo", task="sort", group=group)
    ]
    rates = sorted({float(each["run"]["lr"]) for each in runs})
    if len(rates) < 2:
        return []
    said = []
    for rate in (rates[0], rates[-1]):
        there = [each for each in runs if each["run"]["lr"] == rate]
        at = f"{rate:g}".replace("e-0", "e-")
        said.append(f"{spread(there, density)} at {at}, gaining {spread(there, gain)} reward")
    return ["- *Size of the update*: GRPO with AdamW changed", f"  {said[0]},", f"  and {said[1]}."]


def _optimizer(results: Results) -> list[str]:
    """Densities at one gain with AdamW and SGD, where both got there."""
    arms: dict[str, list[Result]] = {
        name: [
            each
            for group in groups
            for each in results.of(algorithm="grpo", task="sort", group=group)
        ]
        for name, groups in (("adamw", ("main", "sweep")), ("sgd", ("sgd",)))
    }
    most = [
        max((point["gained"] for each in runs for point in course(each)), default=0.0)
        for runs in arms.values()
    ]
    level = 0.9 * min(most)
    if level <= 0:
        return []
    found = {name: spread(runs, lambda one: density_at(one, level)) for name, runs in arms.items()}
    return [
        f"- *Optimizer*: at the checkpoints where GRPO had gained {level:.3f} reward, AdamW had",
        f"  changed {found['adamw']}, SGD {found['sgd']}.",
    ]


def _chance(results: Results) -> list[str]:
    lines = ["- *Chance*, first knowing each tensor's density, then also the weights' sizes:"]
    for what, start in (("seeds", "seeds: "), ("tasks", "tasks: ")):
        lifted = [_lift(results, start, null) for null in ("tensor", "magnitude")]
        if not lifted[0].values:
            continue
        inside, given = (f"{each.median:.2f}" for each in lifted)
        count = len(lifted[0].values)
        lines.append(
            f"  two {what} share {inside} and {given} times as many weights as by chance "
            f"(medians of {count} pairs);"
        )
    if len(lines) == 1:
        return []
    return [*lines, "  the two differ because small weights change most easily."]


def _lift(results: Results, start: str, null: str) -> Spread:
    asked = results.question(start).values()
    return Spread(tuple(value for each in asked for value in lifts(each, null).values), "pair")
