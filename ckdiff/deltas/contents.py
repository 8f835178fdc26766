"""Which tensors the file of a delta has: its parts, and those of its encoding, and no others."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.formats.safetensors import Header
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.deltas.blueprint import Blueprint, Windows
from ckdiff.deltas.parts import FRAMES, HEADS, MANIFEST, TENSORS

_PARTS = TENSORS, HEADS, FRAMES, MANIFEST  # of every delta


class Stream(NamedTuple):
    """One tensor of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Contents:
    """What the file of a delta has, and what its tables say that it has."""

    def __init__(
        self,
        header: Header,
        blueprint: Blueprint,
        windows: Windows,
        sizes: IntArray,
        based: npt.NDArray[np.bool_],
    ) -> None:
        self.header, self.blueprint, self.windows = header, blueprint, windows
        self.sizes = sizes  #: of the windows' frames, or parts
        self.based = based  #: for each rebuilt tensor, whether it has a base

    @cached_property
    def _where(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.header.names)}

    def has(self, stream: Stream) -> bool:
        """Whether the file has this tensor, as it should be."""
        at = self._where.get(stream.name, -1)
        return at >= 0 and (self.header.dtypes[at], self.header.shapes[at]) == stream[1:]

    def check(self, own: Callable[[Contents], int]) -> None:
        """Raise ValueError where the file has other tensors than it should, or windows have other
        sizes; ``own`` is the encoding's ``check``.
        """
        header = self.header
        for name in _PARTS:
            at = self._where.get(name, -1)
            if at < 0 or header.dtypes[at] != "U8" or len(header.shapes[at]) != 1:
                raise ValueError(f"{name} is not as it should be")
        if len(_PARTS) + own(self) != len(header.names):
            raise ValueError("tensors that should not be there")
