"""Training again with a mask: the run's own, other runs', random ones, and those known early.

The same prompts, seeds and steps as the full run; the gradient is clipped by its full norm and
then masked. Every mask is made by ckdiff from stores and from the base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, cast

from paper.build import Build
from paper.runs import Run

#: kind of mask -> what it is
MASKS = {
    "own": "the weights that the full run changed in the stored model",
    "seed": "those of the run with another seed",
    "task": "those of the run on the other task",
    "random1": "a random mask with the own mask's count in each tensor",
    "random2": "another one",
    "low": "the smallest weights of the base, as many",
    "principal": "the largest entries of the base's low-rank reconstruction, as many",
    "early10": "the weights that had changed after a tenth of the steps",
    "early33": "the weights that had changed after a third of the steps",
}
EARLY = {"early10": 10, "early33": 3}  #: part of the steps
#: the runs that are repeated: AdamW mixed and with a float32 forward, SGD, DPO, PPO
FULL = ("grpo-sort-1", "grpo-sort-1-f32", "grpo-sort-1-sgd-f32", "dpo-sort-1-f32", "ppo-sort-1-f32")
#: of these with the other seed, own and random only, for the spread
AGAIN = ("grpo-sort-2", "grpo-sort-2-f32", "grpo-sort-2-sgd-f32")


def again(full: Run, kind: str, label: str = "", **changed: Any) -> Run:
    """The run that repeats ``full`` with a mask of this kind."""
    name = f"{full.name}+{kind}" + (f"-{label}" if label else "")
    fields = {"group": "retrain", **changed, "name": name, "mask": kind, "of": full.name}
    return dataclasses.replace(full, **fields)


def retraining_runs(full: Iterable[Run]) -> list[Run]:
    """Every mask for every full run."""
    every = {run.name: run for run in full}
    found = [again(every[name], kind) for name in FULL for kind in MASKS]
    return [*found, *(again(every[name], kind) for name in AGAIN for kind in ("own", "random1"))]


def counterpart(name: str, *, task: str | None = None, seed: int | None = None) -> str:
    """The name of the same run on another task or with another seed."""
    algorithm, old_task, old_seed, *label = name.split("-", 3)
    parts = (algorithm, task or old_task, str(seed or old_seed), *label)
    return "-".join(parts)


def lenders(run: Run) -> list[str]:
    """The runs whose changes a run's mask is made of."""
    other = {
        "seed": counterpart(run.of, seed=2 if "-1" in run.of else 1),
        "task": counterpart(run.of, task="sum"),
    }
    return [run.of, other[run.mask]] if run.mask in other else [run.of]


def early_step(run: Run) -> int:
    """Which checkpoint is the last within that part of the steps, counted from 1."""
    within = [step for step in run.checkpoints if step <= run.steps / EARLY[run.mask]]
    return max(1, len(within))


def mask_of(build: Build, run: Run) -> Path:
    """The store that a masked run trains with; made if it is not another run's."""
    import ckdiff
    from paper.tickets import TICKETS, ticket_mask

    own = build.store(run.of)
    if run.mask in ("own", "seed", "task"):
        return build.store(lenders(run)[-1])
    if run.mask in EARLY:
        return build.timeline(run.of) / "masks" / f"step-{early_step(run):05d}.zarr"
    if run.mask in TICKETS:
        return ticket_mask(build, run)
    out = build.mask(run)
    if run.mask.startswith("random"):
        seed = int(run.mask.removeprefix("random"))
        ckdiff.random_mask(own, out, seed=seed, rule="exact", workers=1, overwrite=True)
    else:
        share, kind = density(own), cast("Literal['low', 'principal']", run.mask)
        ckdiff.principal(
            build.base, out, like=own, kind=kind, alpha=share, rule="exact", workers=1,
            overwrite=True,
        )  # fmt: skip
    return out


def density(store: Path, rule: str = "exact") -> float:
    """Which share of all elements a store marks."""
    import ckdiff

    (row,) = ckdiff.open_store(store).summary(by="model")
    found: float = row["rules"][rule]["density"]
    return found
