"""Small runs: checkpoints in which some elements move, and some return."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import naive
from naive_timeline import Told, Way, tell, ways
from support import write_safetensors

#: name -> dtype, shape, the bytes of each checkpoint
Run = dict[str, tuple[str, tuple[int, ...], list[bytes]]]

SHAPES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "model.embed.weight": ("BF16", (37, 16)),
    "model.layers.0.mlp.weight": ("BF16", (40, 33)),
    "model.layers.0.norm.weight": ("F32", (7,)),
    "model.layers.1.mlp.weight": ("BF16", (64, 16)),
    "model.layers.1.scale": ("F8_E4M3", ()),
    "model.empty": ("BF16", (0, 4)),
}


def some_run(seed: int, checkpoints: int, share: float = 0.1) -> Run:
    """Random bytes, of which a share is drawn anew, or taken back, at each step."""
    chance = random.Random(seed)
    run: Run = {}
    for name, (dtype, shape) in SHAPES.items():
        size = naive.FORMATS[dtype].bits // 8
        for n in shape:
            size *= n
        sides = [chance.randbytes(size)]
        for _ in range(checkpoints - 1):
            now = bytearray(sides[-1])
            for i in range(size):
                if chance.random() < share:
                    now[i] = sides[0][i] if chance.random() < 0.4 else chance.randrange(256)
            sides.append(bytes(now))
        run[name] = dtype, shape, sides
    return run


def write_run(root: Path, run: Run) -> list[Path]:
    """A directory for each checkpoint, as a trainer names them."""
    count = len(next(iter(run.values()))[2])
    found = []
    for i in range(count):
        folder = root / f"checkpoint-{100 * i}"
        tensors = {name: (dtype, shape, sides[i]) for name, (dtype, shape, sides) in run.items()}
        write_safetensors(folder / "model.safetensors", tensors)
        found.append(folder)
    return found


def told(run: Run, rule: str) -> dict[str, Told]:
    """The naive twin of each tensor."""
    return {name: tell(rule, dtype, sides) for name, (dtype, _, sides) in run.items()}


def total(every: Mapping[str, Told], counts: str) -> list[int]:
    """The sum over tensors of a list of counts."""
    columns: Sequence[Sequence[int]] = [getattr(one, counts) for one in every.values()]
    return [sum(column) for column in zip(*columns, strict=True)]


def went(run: Run) -> dict[str, list[Way]]:
    """How each tensor went, step by step."""
    return {name: ways(dtype, sides) for name, (dtype, _, sides) in run.items()}
