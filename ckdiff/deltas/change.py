"""What an encoding has to offer: to take windows, and to make them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.protocol import IntArray
from ckdiff.deltas.blueprint import Blueprint, Windows
from ckdiff.deltas.container import Delta
from ckdiff.deltas.contents import Contents
from ckdiff.deltas.form import FORMS
from ckdiff.deltas.parts import Tensors
from ckdiff.dtypes import DTYPES
from ckdiff.kernels.delta import Ready, no_one

Bytes = npt.NDArray[np.uint8]


@dataclass(slots=True)
class Change:
    """What became of one window."""

    data: Any  #: as the encoding's recorder takes it
    changed: int  #: elements


class Coder(Protocol):
    """An encoding at work: one for each thread."""

    def changes(self, dtype: str, base: Bytes, tuned: Bytes) -> Change:
        """Two windows."""

    def whole(self, dtype: str, tuned: Bytes) -> Change:
        """A window that has no base."""


class Recorder(Protocol):
    """An encoding's way into the file; called in the order of the windows."""

    def coder(self) -> Coder:
        """For a thread."""

    def add(self, window: int, change: Change) -> None:
        """Write a window."""

    def finish(self, manifest: dict[str, Any], tensors: Tensors) -> None:
        """Write the rest."""

    def close(self) -> None:
        """Close files, whatever happened."""


class Patcher(Protocol):
    """An encoding being undone: one for each thread."""

    def changes(
        self, delta: Delta, window: int, base: Bytes, out: Bytes, *, ready: Ready = no_one
    ) -> int:
        """Write the tuned window to ``out``; gives the changed elements.

        Where they are 0 it is the base's, and ``out`` may be as it was. ``ready`` may be told of
        pieces of ``out`` in their order, as soon as they are made and so still in the cache; what
        it was not told of is made when this returns. Raises Damaged where the changes do not fit
        the base, or are none, which may be known only after pieces were told of.
        """

    def whole(self, delta: Delta, window: int, out: Bytes) -> None:
        """Write a window that has no base to ``out``. Raises Damaged."""


class Spots(Protocol):
    """The changed elements of an open delta, read without its base. For all threads."""

    def stored_whole(self, tensor: int) -> bool:
        """Whether a tensor, where it is stored, is stored whole."""

    def whole(self, window: int) -> memoryview | None:
        """The bytes of a window of a tensor that is stored whole; None where nothing changed.

        Raises DeltaError.
        """

    def changes(self, window: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The positions in the tensor of a window's changed elements, and their tuned bits.

        Raises DeltaError.
        """


def _none(bits: IntArray) -> npt.NDArray[np.bool_]:
    return np.zeros(len(bits), np.bool_)


@dataclass(frozen=True, slots=True)
class Encoding:
    """One way to write down what became of the windows."""

    recorder: Callable[[Path, Blueprint, Windows], Recorder]
    patcher: Callable[[], Patcher]
    #: holds the tensors of a file and the sizes of windows against each other: gives how many
    #: tensors the encoding has in the file, and raises ValueError where one is not as it should be
    check: Callable[[Contents], int]
    #: raises PairingError for names of tensors that it has no place for
    check_names: Callable[[Sequence[str]], None] = lambda names: None
    #: of tensors with elements of so many bits: those of which the size of a window counts changes
    counted: Callable[[IntArray], npt.NDArray[np.bool_]] = _none
    #: and those that are stored whole where one element changed
    whole: Callable[[IntArray], npt.NDArray[np.bool_]] = _none
    #: where changes can be read without a base
    spots: Callable[[Delta], Spots] | None = None


class Merger(Protocol):
    """Makes the tuned windows of a delta out of the base's and something else."""

    @property
    def inputs(self) -> Sequence[Path]:
        """What is read besides checkpoints."""

    def merge(self, tensor: int, base: Bytes, tuned: Bytes, start: int) -> tuple[Bytes, int]:
        """The merged window, and the changed elements that are left out of it.

        ``start`` is the window's first byte. It holds until this thread's next call.
        """

    def check(self) -> None:
        """Called once everything was merged: hold what was met against what was said of it."""

    def to_dict(self, left_out: int) -> dict[str, Any] | None:
        """What makes the delta lossy, for its manifest; None where nothing does."""


_PIECE = 3 << 16  # bytes that are unpacked to bits at a time; whole elements of any width


def differing_elements(dtype: str, one: Bytes, other: Bytes) -> int:
    """How many elements differ in two runs of whole bytes."""
    lane = f"<u{FORMS[dtype].bytes}"
    lanes = int(np.count_nonzero(one.view(lane) != other.view(lane)))
    return changed_elements(dtype, lanes, one, other)


def changed_elements(dtype: str, lanes: int, one: Bytes, other: Bytes) -> int:
    """How many elements differ in two windows of which ``lanes`` lanes do.

    A lane is an element, but for complex numbers, which are two, and elements that share bytes.
    """
    bits = DTYPES[dtype].bits
    if lanes == 0 or bits == 8 * FORMS[dtype].bytes:
        return lanes
    if bits >= 8:
        pairs = (one ^ other).reshape(-1, bits // 8)
        return int(pairs.any(axis=1).sum())
    count = 0
    for at in range(0, len(one), _PIECE):
        differing = np.unpackbits(
            one[at : at + _PIECE] ^ other[at : at + _PIECE], bitorder="little"
        )
        count += int(differing.reshape(-1, bits).any(axis=1).sum())
    return count
