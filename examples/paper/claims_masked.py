"""The claims about training with masks, and the list of all claims."""

from __future__ import annotations

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
from paper.claims_ablated import CLOSE, little_effect, ticket
from paper.results import Results, Spread, share_of_gain, spread
from paper.retrain import FULL, counterpart

NEAR = ("atol=1e-5", "atol=1e-4")
RANDOM = ("random1", "random2")


def shares(results: Results, full: str, kinds: tuple[str, ...], weights: str = "") -> Spread:
    """Shares of a full run's gain with these kinds of mask; also of the other seed's run."""
    found = []
    for name in (full, counterpart(full, seed=2)):
        for kind in kinds:
            runs = results.masked(name, kind) if name in results.runs else []
            found += [share_of_gain(each, results.runs[name], weights) for each in runs]
    return Spread(tuple(share for share in found if share is not None))


def suffices(results: Results) -> Found:
    rows, verdicts = [], []
    for full in FULL:
        own, drawn = (shares(results, full, k) for k in (("own",), RANDOM))
        if not own.values or not drawn.values:
            continue
        stored = [shares(results, full, kinds, "stored") for kinds in (("own",), RANDOM)]
        rows.append((f"`{full}`", own, drawn, *stored))
        verdicts.append(own.mean >= CLOSE and own.mean - drawn.mean >= 0.1)
    if not verdicts:
        return Found(UNTESTED, "No such run is here, or no full run gained enough.")
    text = (
        "Share of the full run's gain, judged by the weights that the forward pass sees. In mixed "
        "precision the own mask recovers it nearly by construction: a weight outside the mask "
        "hardly ever changes what the forward pass sees."
    )
    head = ("full run", "own mask", "random masks", "own, stored model", "random, stored model")
    verdict = HOLDS if all(verdicts) else CAVEAT if any(verdicts) else FAILS
    return Found(verdict, text, head, rows)


def same_weights(results: Results) -> Found:
    rows, verdicts = [], []
    for full in FULL:
        names = [name for name in (full, counterpart(full, seed=2)) if name in results.runs]
        own = [each for name in names for each in results.masked(name, "own")]
        if not own:
            continue
        moved = results.runs[full]["measured"]["density_f32"]
        base = [1 - moved[rule] for rule in NEAR]
        like = [
            spread(own, lambda each, rule=rule: each["measured"]["like_full"]["masters"][rule])
            for rule in NEAR
        ]
        pairs = zip(like, base, strict=True)
        rows.append((f"`{full}`", *(x for one, two in pairs for x in (one, f"{two:.3f}"))))
        verdicts.append(min(like[0].values) >= CLOSE and min(like[0].values) - base[0] > 0.05)
    if not verdicts:
        return Found(UNTESTED, "No such run is here.")
    text = (
        "Share of the float32 weights that equal the full run's when the own mask is trained. A "
        "tolerance that the untrained base passes says nothing."
    )
    head = ("full run", "within 1e-5", "the untrained base", "within 1e-4", "the untrained base")
    verdict = HOLDS if all(verdicts) else CAVEAT if any(verdicts) else FAILS
    return Found(verdict, text, head, rows)


_TABLE_1 = "69–96 % of weights unchanged at 1e-5 (arXiv 2505.11711, Table 1)"
CLAIMS = (
    Claim("RL changes 5–30 % of the weights, whatever the algorithm", _TABLE_1, everywhere_sparse),
    Claim("SFT is dense", "6–15 % of weights unchanged", sft_dense),
    Claim(
        "The sparsity is of storage in bfloat16, not of the update",
        "arXiv 2509.04259: in float32 it vanishes",
        rounding,
        "precisions",
    ),
    Claim(
        "Another seed finds the same subnetwork, far beyond chance",
        "Jaccard .434, by chance .225 (lift 1.65)",
        agree("seeds: "),
        "agreement",
    ),
    Claim(
        "So does other data, here another task",
        "Jaccard .236, by chance .117 (lift 1.83)",
        agree("tasks: "),
    ),
    Claim(
        "So does another algorithm",
        "Jaccard .270, by chance .090 (lift 2.57), where seed and data differ too",
        agree("algorithms: "),
    ),
    Claim("Also where seed and algorithm differ", "the same row", agree("seeds and algorithms")),
    Claim(
        "Training the subnetwork alone recovers the score",
        "equal or better",
        suffices,
        "retraining",
    ),
    Claim(
        "It recovers the weights too",
        "94.0 % (DPO), 90.5 % (PRIME) within 1e-5; all within 1e-4",
        same_weights,
    ),
    Claim(
        "A KL term hardly matters",
        "69.8 against 68.8 % unchanged",
        little_effect("kl.1", "kl1", "kl.1-lr1e-06"),
    ),
    Claim(
        "Clipping hardly matters",
        "no number",
        little_effect("epochs-noclip", "nogradclip"),
    ),
    Claim(
        "On-policy data hardly matters",
        "arXiv 2507.17107; 2505.11711 holds the contrary",
        little_effect("off", "halfoff"),
    ),
    Claim("The size of the batch hardly matters", "no number", little_effect("small", "large")),
    Claim("All layers alike, norms almost never", "layer by layer similar", layers_alike),
    Claim("The update is of full rank", "99.2–99.8 % of it", full_rank),
    Claim("Density comes to rest", "80 % unchanged at the end, 8 % returned", plateau, "dynamics"),
    Claim(
        "A winning ticket: pruned and rewound",
        "no number",
        ticket("kept", "kept80", control="drawn"),
    ),
    Claim(
        "A random percent does as well",
        "arXiv 2602.01599: random 1 % masks match",
        ticket("percent", "percent2"),
    ),
)
