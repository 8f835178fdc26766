"""Records of what changed, and the base they belong to -> a delta."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.opening import Given, open_in
from ckdiff.deltas.change import Bytes
from ckdiff.deltas.creating import Making
from ckdiff.deltas.form import FRAME_BYTES
from ckdiff.deltas.outcome import DeltaResult
from ckdiff.deltas.registry import ENCODINGS
from ckdiff.deltas.weightpatch import PatchReader, Read, WeightPatch
from ckdiff.errors import UsageError
from ckdiff.layout import bits_of
from ckdiff.options import Observer, Options, checked_observer, checked_output, checked_text
from ckdiff.outputs.place import write_errors
from ckdiff.outputs.writing import write_all
from ckdiff.running.runners import interruptible
from ckdiff.running.threads import PerThread

_SLICE = 1 << 18  # elements that are put at a time


def delta_from_patches(
    base: Given,
    patches: Iterable[WeightPatch | Any],
    out: str | os.PathLike[str],
    *,
    encoding: str = "packed",
    overwrite: bool = False,
    workers: int | None = None,
    memory: str | int | None = None,
    observer: Observer | None = None,
) -> DeltaResult:
    """Write the delta from ``base`` to ``base`` with ``patches`` applied, for ``ckdiff apply``.

    A patch is a WeightPatch, a ``CheckpointWeightPatch`` of vLLM, or anything else with their
    fields, in numpy or torch: names, shapes and dtypes are those of the base, the values are of
    that dtype or its bits (nothing is converted), indices are unique in a patch and in any order.
    Tensors may come in any order. If a tensor has several patches, later ones win. One patch is in
    memory at a time; the others are on the output's disk until the delta is written.

    Raises UsageError for something that is not a patch, PairingError for a patch that does not fit
    the base, and the errors of ``delta``.
    """
    ENCODINGS.check(checked_text("encoding", encoding))
    options = Options(overwrite=overwrite, workers=workers, memory=memory)
    observer = checked_observer(observer)
    path = checked_output(out)
    try:
        listed = iter(patches)
    except TypeError:
        raise UsageError("patches must be a list of them, or something like one") from None
    with ExitStack() as stack:
        opened = open_in(stack, base)
        work = Making(opened, opened, path, encoding, options, observer)
        with write_errors(path):
            spool = tempfile.TemporaryFile(dir=path.parent, buffering=0)  # noqa: SIM115
        stack.callback(spool.close)
        plan = work.blueprint  # in its order tensors are merged
        reader = PatchReader(plan.names, plan.dtypes, plan.shapes)
        kept = _Patches(spool, path, plan.dtypes)
        with interruptible("nothing was written"):
            for patch in listed:
                kept.add(reader.read(patch))
            kept.ready()
            work.merger = kept
            return work.run()


@dataclass(frozen=True, slots=True)
class _Kept:
    """Where a patch lies in the spool: byte offsets, and how many items."""

    positions: int  #: -1 where all elements are there
    count: int
    values: int


class _Patches:
    """See Merger: puts patches that were kept in a file into windows of the base."""

    def __init__(self, spool: IO[bytes], out: Path, dtypes: list[str]) -> None:
        self.inputs: list[Path] = []
        self._spool, self._out, self._size = spool, out, 0
        self._kept: dict[int, list[_Kept]] = {}
        self._width = np.maximum(bits_of(dtypes) // 8, 1)
        self._data: Bytes = np.empty(0, np.uint8)
        self._buffer = PerThread(lambda: np.empty(FRAME_BYTES, np.uint8))

    def add(self, read: Read) -> None:
        """Keep a patch. Raises OutputError."""
        positions = -1 if read.positions is None else self._append(read.positions.view(np.uint8))
        count = 0 if read.positions is None else len(read.positions)
        values = self._append(read.values)
        found = self._kept.setdefault(read.tensor, [])
        if read.positions is None:
            found.clear()  # nothing of those before is left
        found.append(_Kept(positions, count, values))

    def ready(self) -> None:
        """All were added."""
        if self._size:
            with write_errors(self._out):
                self._data = np.asarray(np.memmap(self._spool, np.uint8, "r"))

    def merge(self, tensor: int, base: Bytes, tuned: Bytes, start: int) -> tuple[Bytes, int]:
        """See Merger."""
        patches = self._kept.get(tensor)
        if not patches:
            return base, 0
        size = len(base)
        buffer, width = self._buffer()[:size], int(self._width[tensor])
        buffer[:] = base
        first, end = start // width, (start + size) // width
        target = buffer.view(f"<u{width}")
        for kept in patches:
            if kept.positions < 0:
                buffer[:] = self._data[kept.values + start : kept.values + start + size]
                continue
            positions = self._items(kept.positions, kept.count, "<i8")
            values = self._items(kept.values, kept.count, target.dtype.str)
            low, high = np.searchsorted(positions, [first, end]).tolist()
            for at in range(low, high, _SLICE):
                part = slice(at, min(at + _SLICE, high))
                target[positions[part] - first] = values[part]
        return buffer, 0

    def check(self) -> None:
        """See Merger: patches were verified as they were read."""

    def to_dict(self, left_out: int) -> None:
        """See Merger: the delta has all that there is."""

    # inside

    def _append(self, data: Bytes) -> int:
        """Append bytes at a multiple of 8, so that numbers can be looked at in place."""
        begin = self._size + -self._size % 8
        with write_errors(self._out):
            write_all(self._spool.fileno(), bytes(begin - self._size))
            write_all(self._spool.fileno(), data.data)
        self._size = begin + len(data)
        return begin

    def _items(self, begin: int, count: int, dtype: str) -> npt.NDArray[Any]:
        kind = np.dtype(dtype)
        return self._data[begin : begin + count * kind.itemsize].view(kind)
