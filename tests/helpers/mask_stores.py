"""Mask stores with chosen masks, for tests: made the honest way, by diffing checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import naive
import numpy as np
import numpy.typing as npt
from support import write_safetensors

import ckdiff

Flags = npt.NDArray[np.bool_]
#: dtype name, shape, the bits of the elements
Base = Mapping[str, tuple[str, tuple[int, ...], npt.NDArray[Any]]]


def make_base(folder: Path, tensors: Base) -> Path:
    """A checkpoint in one file."""
    content = {
        name: (dtype, shape, np.ascontiguousarray(bits).tobytes())
        for name, (dtype, shape, bits) in tensors.items()
    }
    return write_safetensors(folder / "model.safetensors", content)


def make_store(
    out: Path, base: Base, masks: Mapping[str, Flags], skip: Sequence[str] = ()
) -> ckdiff.MaskStore:
    """A store whose ``exact`` masks are ``masks``; tensors in ``skip`` are not in it."""
    tuned = {
        name: (dtype, shape, bits ^ masks[name].reshape(bits.shape).astype(bits.dtype))
        for name, (dtype, shape, bits) in base.items()
        if name not in skip
    }
    folder = out.with_suffix(".checkpoints")
    ckdiff.diff(make_base(folder / "base", base), make_base(folder / "tuned", tuned), out)
    return ckdiff.open_store(out)


def random_base(rng: np.random.Generator, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> Any:
    """Tensors of random bits; floats are finite weights of many binades."""
    base = {}
    for name, (dtype, shape) in shapes.items():
        count = int(np.prod(shape))
        if dtype == "BF16":
            values = rng.standard_normal(count) * np.exp2(rng.integers(-12, 3, count))
            bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        else:
            bits = rng.integers(0, 256, count, dtype=np.uint8)
        assert naive.FORMATS[dtype].bits == 8 * bits.itemsize
        base[name] = dtype, shape, bits
    return base
