"""How far the updates of different runs agree: overlap under every null, with controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import ckdiff
from paper.build import Build, load_weights, save_weights
from paper.measure import NULLS, cosine
from paper.model import seeded
from paper.runs import Run

#: what is asked -> the runs whose masks are held against each other
Questions = dict[str, list[str]]


def questions(runs: list[Run]) -> Questions:
    """Which runs are held against each other, by what differs between them."""
    found: Questions = {}
    arms = {"main": "adamw mixed", "task": "adamw mixed", "sgd": "sgd mixed"}
    for run in runs:
        arm = arms.get(run.group)
        if run.group == "precision":
            arm = f"{run.optimizer} {run.precision}"
        if arm is None:
            continue
        found.setdefault(f"seeds: {run.algorithm}, {run.task}, {arm}", []).append(run.name)
        if run.seed == 1 and run.task == "sort":
            found.setdefault(f"algorithms: {arm}", []).append(run.name)
        if run.seed == 1:
            found.setdefault(f"tasks: {run.algorithm}, {arm}", []).append(run.name)
        # everything else than the algorithm differs too: seed 1 of one, seed 2 of the next, ...
        if run.group == "main" and (run.algorithm, run.seed) in CROSSED:
            found.setdefault("seeds and algorithms: adamw mixed", []).append(run.name)
    ablated = [run.name for run in runs if run.group == "ablation" and run.seed == 1]
    found["ablations"] = ablated
    return {name: members for name, members in found.items() if len(members) > 1}


CROSSED = {("grpo", 1), ("dpo", 2), ("prime", 3), ("sft", 2)}


def agreement(build: Build, runs: list[Run]) -> dict[str, Any]:
    """The answer to every question, and where one update lands among the base's weights."""
    return {
        "runs": sorted(run.name for run in runs),
        "questions": {name: overlap_of(build, names) for name, names in questions(runs).items()},
        "landing": landing(build, runs),
    }


def overlap_of(build: Build, names: list[str]) -> dict[str, Any]:
    """Jaccard, containments and lifts of all pairs, cosines and shared directions; controls."""
    stores = [build.store(name) for name in names]
    tuned = [build.tuned(name) for name in names]
    row = _model_row(build, stores, tuned)
    for pair in row["pairs"]:
        pair["cosine"] = cosine(build, names[pair["a"]], names[pair["b"]])
    return {
        "runs": names,
        "elements": row["elements"],
        "sizes": row["sizes"],
        "votes": row["votes"],
        "pairs": [_short(pair) for pair in row["pairs"]],
        "controls": controls(build, names[0], names[-1]),
    }


def controls(build: Build, first: str, last: str) -> dict[str, Any]:
    """The first run's mask against a random one like the last run's, and against the last run's
    update, shuffled inside each tensor.
    """
    folder = build.root / "controls"
    folder.mkdir(exist_ok=True)
    drawn, shuffled = folder / f"{last}-random.zarr", folder / f"{last}-shuffled.zarr"
    ckdiff.random_mask(build.store(last), drawn, seed=1, rule="exact", workers=1, overwrite=True)
    made = folder / f"{last}-shuffled"
    shuffle(build, last, made)
    ckdiff.diff(build.base, made, shuffled, workers=1, overwrite=True)
    row = _model_row(build, [build.store(first), drawn, shuffled], [])
    pairs = {(pair["a"], pair["b"]): _short(pair) for pair in row["pairs"]}
    return {"random": pairs[0, 1], "shuffled": pairs[0, 2]}


def shuffle(build: Build, name: str, out: Path) -> None:
    """The base with a run's update in another order inside each tensor, stored in bfloat16."""
    base, tuned = load_weights(build.base), load_weights(build.masters(name))
    generator = seeded(0)
    made = {}
    for tensor in sorted(base):
        start = base[tensor].float()
        moves = (tuned[tensor] - start).flatten()
        order = torch.randperm(moves.numel(), generator=generator).to(moves.device)
        made[tensor] = start + moves[order].view_as(start)
    save_weights(out, made)


def _model_row(build: Build, stores: list[Path], tuned: list[Path]) -> dict[str, Any]:
    found = ckdiff.overlap(
        stores, rule="exact", by="model", nulls=NULLS, base=build.base, tuned=tuned, workers=1
    )
    (row,) = found.to_dict()["rows"]
    return dict(row)


def _short(pair: dict[str, Any]) -> dict[str, Any]:
    """A pair without what can be computed from the rest."""
    kept = ("a", "b", "intersection", "jaccard", "o1", "o2", "same_direction", "cosine")
    nulls = {
        name: {key: null[key] for key in ("lift", "expected_jaccard")}
        for name, null in pair["nulls"].items()
    }
    return {**{key: pair[key] for key in kept if key in pair}, "nulls": nulls}


def landing(build: Build, runs: list[Run]) -> dict[str, Any]:
    """Own masks against the base's smallest and its principal weights, as many of each."""
    found: dict[str, Any] = {}
    names = {run.name for run in runs}
    for full in sorted({run.of for run in runs if run.mask == "low"}):
        for kind in ("low", "principal"):
            name = f"{full}+{kind}"
            if name in names:
                mask = build.folder(name) / "mask.zarr"
                row = _model_row(build, [build.store(full), mask], [])
                found.setdefault(full, {})[kind] = _short(row["pairs"][0])
    return found
