"""The masks that the tests of exports and imports share, and a checkpoint that they fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from support import write_index, write_safetensors

Flags = dict[str, npt.NDArray[np.bool_]]

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "layers.10.w": ("BF16", (33, 100)),
    "layers.2.w": ("BF16", (700,)),
    "scalar": ("BF16", ()),
    "empty": ("BF16", (0, 3)),
    "bytes": ("U8", (5, 3, 1)),
    "large": ("U8", (1 << 20, 5)),  # more than a window and a piece
}
ORDER = ["bytes", "empty", "large", "layers.2.w", "layers.10.w", "scalar"]


def shards(folder: Path, extra: bool = True) -> Path:
    """A checkpoint with the tensors of SHAPES in two shards, and one that the store lacks."""
    groups = {"model-1.safetensors": ORDER[:2] + ORDER[4:], "model-2.safetensors": ORDER[2:4]}
    weight_map = {}
    for file, names in groups.items():
        tensors = {}
        for name in names:
            shape = SHAPES[name][1]
            tensors[name] = ("U8", shape, bytes(int(np.prod(shape))))
        if extra:
            tensors[f"other.{file[6]}"] = ("U8", (2,), b"12")
        write_safetensors(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    write_index(folder, weight_map)
    return folder
