"""The claims about training with masks, about ablations and about lottery tickets."""

from __future__ import annotations

from collections.abc import Callable

from paper.claims import (
    CAVEAT,
    FAILS,
    HOLDS,
    UNTESTED,
    Claim,
    Found,
    agree,
    everywhere_sparse,
    full_rank,
    layers_alike,
    plateau,
    rounding,
    sft_dense,
)
from paper.results import Results, Spread, density, gain, share_of_gain, spread
from paper.retrain import FULL, counterpart

RANDOM = ("random1", "random2")
CLOSE = 0.9  #: share of the gain, or of weights, from which the full run is recovered


def shares(results: Results, full: str, kinds: tuple[str, ...], weights: str = "") -> Spread:
    """Shares of a full run's gain with these kinds of mask; also of the other seed's run."""
    found = []
    for name in (full, counterpart(full, seed=2)):
        for kind in kinds:
            runs = results.masked(name, kind) if name in results.runs else []
            found += [share_of_gain(each, results.runs[name], weights) for each in runs]
    return Spread(tuple(share for share in found if share is not None))


def suffices(results: Results) -> Found:
    lines, verdicts = [], []
    for full in FULL:
        own, drawn = (shares(results, full, k) for k in (("own",), RANDOM))
        if not own.values or not drawn.values:
            continue
        stored = [shares(results, full, kinds, "stored").mean for kinds in (("own",), RANDOM)]
        lines.append(
            f"{full}: own {own}, random {drawn} of the gain; of the stored model's gain "
            f"{stored[0]:.3f} and {stored[1]:.3f}"
        )
        verdicts.append(own.mean >= CLOSE and own.mean - drawn.mean >= 0.1)
    if not verdicts:
        return Found(UNTESTED, "no full run gained enough")
    text = (
        "; ".join(lines)
        + ". Judged by the weights that the forward pass sees. In mixed precision it is nearly so "
        "by construction: a weight outside the mask hardly ever changes what that is."
    )
    return Found(HOLDS if all(verdicts) else CAVEAT if any(verdicts) else FAILS, text)


def same_weights(results: Results) -> Found:
    lines, verdicts = [], []
    for full in FULL:
        own = results.masked(full, "own")
        if not own or full not in results.runs:
            continue
        like = own[0]["measured"]["like_full"]["masters"]
        moved = results.runs[full]["measured"]["density_f32"]
        base = {rule: 1 - moved[rule] for rule in ("atol=1e-5", "atol=1e-4")}
        said = [
            f"within {rule[5:]} {like[rule]:.3f} (untrained base {value:.3f})"
            for rule, value in base.items()
        ]
        lines.append(f"{full}: {', '.join(said)}")
        verdicts.append(like["atol=1e-5"] >= CLOSE and like["atol=1e-5"] - base["atol=1e-5"] > 0.05)
    if not verdicts:
        return Found(UNTESTED, "a run is missing")
    text = "; ".join(lines) + ". A tolerance that the untrained base passes says nothing."
    return Found(HOLDS if all(verdicts) else CAVEAT if any(verdicts) else FAILS, text)


def little_effect(*names: str) -> Callable[[Results], Found]:
    """Whether these ablations leave density where it was."""

    def judge(results: Results) -> Found:
        usual = [
            each for each in results.of(group="ablation") if _label(each["run"]["name"]) == "on"
        ]
        lines, same = [], []
        for name in names:
            runs = [e for e in results.of(group="ablation") if _label(e["run"]["name"]) == name]
            if not runs or not usual:
                continue
            clip = spread(runs, lambda each: each["clip_fraction"])
            kl = spread(runs, lambda each: each["kl"])
            lines.append(
                f"{name}: density {spread(runs, density)}, reward gained {spread(runs, gain)}, "
                f"clip fraction {clip.mean:.4f}, KL {kl.mean:.3f}"
            )
            same.append(abs(spread(runs, density).mean - spread(usual, density).mean) < 0.05)
        if not lines:
            return Found(UNTESTED, "a run is missing")
        text = f"Without: density {spread(usual, density)}, reward gained {spread(usual, gain)}; "
        verdict = HOLDS if all(same) else CAVEAT if any(same) else FAILS
        return Found(verdict, text + "; ".join(lines) + ".")

    return judge


def _label(name: str) -> str:
    return name.split("-", 3)[-1]


def ticket(*kinds: str) -> Callable[[Results], Found]:
    """Whether a ticket of such a kind reaches what the full run does, at its best learning rate."""

    def judge(results: Results) -> Found:
        lines, best = [], []
        for kind in kinds:
            for run in (e for e in results.runs.values() if e["run"]["group"] == "ticket"):
                if run["run"]["mask"] != kind:
                    continue
                share = share_of_gain(run, results.runs[run["run"]["of"]])
                if share is not None:
                    began = run["start"]["masters"]["reward"]
                    lines.append(
                        f"{kind}, lr {run['run']['lr']:g}: {share:.0%} (began at {began:.3f})"
                    )
                    best.append(share)
        if not best:
            return Found(UNTESTED, "no full run gained enough")
        text = "Share of the full run's gain: " + "; ".join(lines) + "."
        return Found(HOLDS if max(best) >= CLOSE else FAILS, text)

    return judge


_TABLE_1 = "69–96 % of weights unchanged at 1e-5 (arXiv 2505.11711, Table 1)"
CLAIMS = (
    Claim("RL changes 5–30 % of the weights, whatever the algorithm", _TABLE_1, everywhere_sparse),
    Claim("SFT is dense", "6–15 % of weights unchanged", sft_dense),
    Claim(
        "The sparsity is of storage in bfloat16, not of the update",
        "arXiv 2509.04259: in float32 it vanishes",
        rounding,
    ),
    Claim(
        "Another seed finds the same subnetwork, far beyond chance",
        "Jaccard .434, by chance .225",
        agree("seeds: "),
    ),
    Claim("So does other data", "Jaccard .236, by chance .117", agree("tasks: ")),
    Claim("So does another algorithm", "Jaccard .270, by chance .090", agree("algorithms: ")),
    Claim("Also where seed and algorithm differ", "the same row", agree("seeds and algorithms")),
    Claim("Training the subnetwork alone recovers the score", "equal or better", suffices),
    Claim(
        "It recovers the weights too",
        "94.0 % (DPO), 90.5 % (PRIME) within 1e-5; all within 1e-4",
        same_weights,
    ),
    Claim(
        "A KL term hardly matters", "69.8 against 68.8 % unchanged", little_effect("kl.1", "kl1")
    ),
    Claim(
        "Clipping hardly matters",
        "no number",
        little_effect("epochs", "epochs-noclip", "nogradclip"),
    ),
    Claim(
        "On-policy data hardly matters",
        "arXiv 2507.17107; 2505.11711 holds the contrary",
        little_effect("off", "halfoff"),
    ),
    Claim("The size of the batch hardly matters", "no number", little_effect("small", "large")),
    Claim("All layers alike, norms almost never", "layer by layer similar", layers_alike),
    Claim("The update is of full rank", "99.2–99.8 % of it", full_rank),
    Claim("Density comes to rest", "80 % unchanged at the end, 8 % returned", plateau),
    Claim("A winning ticket: pruned and rewound", "no number", ticket("kept", "kept80", "drawn")),
    Claim(
        "A random percent does as well",
        "arXiv 2602.01599: random 1 % masks match",
        ticket("percent", "percent2"),
    ),
)
