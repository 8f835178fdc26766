"""Lottery tickets: pruned by magnitude and rewound, and random ones of one percent.

The lottery ticket hypothesis (arXiv 1803.03635) prunes the smallest weights of a trained network,
sets them to zero, puts the others back to where they began and trains these. The subnetwork of an
RL update is something else: what is outside it keeps the base's value. Both are run here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paper.build import Build, load_weights, save_weights
from paper.runs import Run, of

#: kind of mask -> what it is
TICKETS = {
    "kept": "the largest weights of the trained model, as many as it changed; the rest is pruned",
    "kept80": "the largest 80 % of the trained model's weights; the rest is pruned",
    "drawn": "random weights, as many as it changed; the rest is pruned",
    "percent": "a random one percent, the rest frozen at the base",
    "percent2": "another random one percent",
}
PERCENT = {"percent": 1, "percent2": 2}  #: kind -> seed
RATES = (1e-6, 1e-5, 1e-4)  #: the fewer weights, the larger a step they may need


def ticket_runs() -> list[Run]:
    """Of GRPO's main run; each also at larger learning rates than the full run's."""
    from paper.retrain import again

    full = of("grpo", "main")

    def ticket(kind: str, lr: float, start: str) -> Run:
        changed: dict[str, Any] = {"lr": lr, "group": "ticket", "start": start}
        return again(full, kind, f"lr{lr:g}", **changed)

    pruned = [
        ticket(kind, lr, "pruned") for kind in ("kept", "kept80", "drawn") for lr in RATES[:2]
    ]
    return [*pruned, *(ticket(kind, lr, "base") for kind in PERCENT for lr in RATES)]


def ticket_mask(build: Build, run: Run) -> Path:
    """The store of the weights that a ticket trains."""
    import ckdiff
    from paper.retrain import density

    own, out = build.store(run.of), build.mask(run)
    options: dict[str, Any] = {"rule": "exact", "workers": 1, "overwrite": True}
    if run.mask in PERCENT:
        like = _some(build, run, 0.01)
        ckdiff.random_mask(like, out, seed=PERCENT[run.mask], **options)
        return out
    if run.mask == "drawn":
        ckdiff.random_mask(own, out, seed=1, **options)
        return out
    share = 0.8 if run.mask == "kept80" else density(own)
    every, low = _some(build, run, 1.0), out.with_name("low.zarr")
    ckdiff.principal(build.tuned(run.of), low, like=own, kind="low", alpha=1 - share, **options)
    ckdiff.combine("difference", [every, low], out, **options)
    return out


def _some(build: Build, run: Run, share: float) -> Path:
    """A store that marks a share of every matrix."""
    import ckdiff

    out = build.folder(run.name) / f"share-{share:g}.zarr"
    ckdiff.principal(
        build.base, out, like=build.store(run.of), kind="low", alpha=share, rule="exact",
        workers=1, overwrite=True,
    )  # fmt: skip
    return out


def start_of(build: Build, run: Run, mask: Path | None) -> Path:
    """The checkpoint that a run begins with: the base, or the base with zeros outside the mask.

    Vectors, which no mask of matrices marks, are never pruned.
    """
    import ckdiff

    if run.start == "base":
        return build.base
    assert mask is not None, "what is pruned is said by a mask"
    folder = build.folder(run.name)
    zeros, pruned, out = folder / "zeros", folder / "pruned.zarr", folder / "start"
    save_weights(zeros, {name: each * 0 for name, each in load_weights(build.base).items()})
    every = _some(build, run, 1.0)
    ckdiff.combine("difference", [every, mask], pruned, rule="exact", workers=1, overwrite=True)
    ckdiff.graft(build.base, zeros, pruned, out, rule="exact", workers=1, overwrite=True)
    return out
