"""Small models that change step by step, and streams of their versions, for the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support import Tensor, write_safetensors

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "embed.weight": ("BF16", (40, 64)),
    "layers.0.w": ("BF16", (128, 64)),
    "layers.0.scale": ("F32", ()),
    "layers.1.w": ("F16", (77, 3)),
    "layers.1.q": ("I8", (1000,)),
    "norm": ("F32", (64,)),
    "none": ("F32", (0, 4)),
}
WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1}


def start(seed: int = 0) -> dict[str, Tensor]:
    """A model."""
    rng = np.random.default_rng(seed)
    return {
        name: (dtype, shape, rng.bytes(int(np.prod(shape, dtype=np.int64)) * WIDTHS[dtype]))
        for name, (dtype, shape) in SHAPES.items()
    }


def step(model: dict[str, Tensor], seed: int, share: float = 0.03) -> dict[str, Tensor]:
    """The model with some elements of most of its tensors changed."""
    rng = np.random.default_rng(seed)
    found = {}
    for at, (name, (dtype, shape, data)) in enumerate(model.items()):
        values = np.frombuffer(data, f"<u{WIDTHS[dtype]}").copy()
        if (at + seed) % 4 and len(values):
            marked = rng.random(len(values)) < share
            marked[int(rng.integers(len(values)))] = True
            values[marked] ^= rng.integers(1, 100, int(marked.sum())).astype(values.dtype)
        found[name] = dtype, shape, values.tobytes()
    return found


def write_model(folder: Path, model: dict[str, Tensor]) -> Path:
    """A checkpoint directory with a config."""
    folder.mkdir(parents=True)
    write_safetensors(folder / "model.safetensors", dict(model))
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return folder


def write_steps(folder: Path, count: int) -> list[Path]:
    """Checkpoints m0 to m{count}, each a step from the one before."""
    model, made = start(), []
    for i in range(count + 1):
        made.append(write_model(folder / f"m{i}", model))
        model = step(model, i)
    return made


def changed_bytes(one: dict[str, Tensor], other: dict[str, Tensor]) -> int:
    """How many bytes of tensors differ."""
    return sum(
        int(np.count_nonzero(np.frombuffer(one[n][2], "u1") != np.frombuffer(other[n][2], "u1")))
        for n in one
    )
