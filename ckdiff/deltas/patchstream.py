"""A delta, or two checkpoints -> records of what changed, one tensor after the other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Protocol

import numpy as np

from ckdiff.checkpoints.opening import Given, open_in
from ckdiff.checkpoints.pairing import pair
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.checkpoints.views.canonical import as_file, with_files
from ckdiff.deltas.blueprint import Blueprint
from ckdiff.deltas.change import Encoding, differing_elements
from ckdiff.deltas.comparing import Compared, Copier, Piece
from ckdiff.deltas.container import Delta
from ckdiff.deltas.links import Links
from ckdiff.deltas.ownheader import is_delta
from ckdiff.deltas.parts import called
from ckdiff.deltas.registry import ENCODINGS
from ckdiff.deltas.room import Room
from ckdiff.deltas.streams import Bits, Bytes, Positions
from ckdiff.deltas.varints import Damaged
from ckdiff.deltas.weightpatch import WeightPatch, has_nan, make_patch, sparse
from ckdiff.dtypes import DTYPES
from ckdiff.errors import DeltaError, UsageError, printable
from ckdiff.kernels.contents import ContentHasher
from ckdiff.layout import bits_of
from ckdiff.options import checked_int, checked_path


def weight_patches(
    source: Given,
    *,
    base: Given | None = None,
    max_bytes: int = 256 << 20,
    as_torch: bool = False,
) -> Iterator[WeightPatch]:
    """Yield the changes as records for vLLM's ``load_checkpoint_weight_patches``.

    ``source`` is a delta or a checkpoint. A checkpoint needs ``base``; so do packed deltas, and
    whole records of tensors that have a base. Records come in the order of the tuned files. For
    floating-point tensors they hold positions and new values, at most ``max_bytes`` in one record,
    so a tensor may have several records. Tensors of other dtypes, with a NaN among the new values,
    or without a base are sent whole, in one record. Removed tensors have no record. One record
    (twice while it is put together) and a few windows are in memory. The arrays are numpy's, or
    torch's with ``as_torch``.

    With ``base``, a tensor is made and verified before its first record is returned: the base, the
    result and the number of changed elements must be what the delta says, or DeltaError is raised,
    as in ``apply``. Without ``base``, whole tensors are verified too; for others, only digests and
    positions are verified, not that the result is right.

    vLLM takes whole records and others in separate calls. Errors are raised only when the iterator
    reaches them: take all records before you apply the first one. Raises UsageError,
    CheckpointError, SourceChanged, PairingError and DeltaError, and BudgetError for a delta whose
    tables are larger than the memory allowed by default and for a whole tensor larger than the free
    memory.
    """
    most = checked_int("max_bytes", max_bytes)
    if most < 1:
        raise UsageError(f"max_bytes must be at least 1, not {most}")
    if as_torch not in (True, False):
        raise UsageError(f"as_torch must be True or False, not {as_torch!r}")
    if isinstance(source, (str, os.PathLike)):
        source = checked_path("the delta", source)
    return _stream(source, base, most, as_torch)


def _stream(given: Given, base: Given | None, most: int, as_torch: bool) -> Iterator[WeightPatch]:
    with ExitStack() as stack:
        below = None if base is None else open_in(stack, base)
        source: _Source
        if isinstance(given, str) and is_delta(given):
            room = Room(hint="ckdiff apply takes --memory; compare the files that it makes")
            source = _DeltaSource(stack.enter_context(Delta(given, room)), below)
        elif below is None:
            raise UsageError(
                f"{_called(given)} is not a delta",
                hint="to make records of a checkpoint, give base=",
            )
        else:
            source = _PairSource(below, open_in(stack, given))
        for tensor in range(len(source.blueprint.names)):
            yield from _records(source, tensor, most, as_torch)
        source.verify()


def _called(given: Given) -> str:
    """What was given, for a message: not all that is in it."""
    return printable(given) if isinstance(given, str) else f"a {type(given).__name__}"


def _records(source: _Source, tensor: int, most: int, as_torch: bool) -> Iterator[WeightPatch]:
    """The records of one tensor."""
    blueprint = source.blueprint
    name, dtype = blueprint.names[tensor], DTYPES[blueprint.dtypes[tensor]]
    shape = blueprint.shapes[tensor]

    def whole() -> WeightPatch:
        width = max(dtype.bits // 8, 1)
        values = source.whole(tensor).view(f"<u{width}")
        return make_patch(name, shape, dtype.name, values, None, as_torch=as_torch)

    if source.is_new(tensor) or (not sparse(dtype) and source.differs(tensor)):
        yield whole()
        return
    source.prove(tensor)
    if not sparse(dtype):
        return
    held, count = list[Piece](), 0
    for positions, values in source.changes(tensor):
        if has_nan(dtype, values):
            yield whole()  # in whichever order they are applied, it agrees with those before
            return
        room = max(1, most // (positions.itemsize + values.itemsize))
        at = 0
        while at < len(positions):
            part = slice(at, at + room - count)
            held.append((positions[part], values[part]))
            count += len(held[-1][0])
            at += len(held[-1][0])
            if count == room:
                yield make_patch(name, shape, dtype.name, *_joined(held), as_torch=as_torch)
                held, count = [], 0
    if held:
        yield make_patch(name, shape, dtype.name, *_joined(held), as_torch=as_torch)


def _joined(pieces: list[Piece]) -> tuple[Bits, Positions]:
    """Values and positions in arrays of their own, which may be written to."""
    positions: Positions = np.concatenate([piece[0] for piece in pieces])
    return np.concatenate([piece[1] for piece in pieces]), positions


class _Source(Protocol):
    """Where records are made from. A tensor is known by its position in the blueprint."""

    blueprint: Blueprint

    def is_new(self, tensor: int) -> bool:
        """Whether the base has no such tensor, or not with this name and this shape."""

    def differs(self, tensor: int) -> bool:
        """Whether a tensor changed."""

    def prove(self, tensor: int) -> None:
        """Raise DeltaError unless a tensor is what it is said to be, as far as can be told."""

    def changes(self, tensor: int) -> Iterator[Piece]:
        """Positions and bits of changed elements, of whole bytes, in order."""

    def whole(self, tensor: int) -> Bytes:
        """All bytes of a tensor, proved like ``prove`` does."""

    def verify(self) -> None:
        """Raise SourceChanged if what was read is no longer what was opened."""


class _PairSource(Compared):
    """Two checkpoints."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        # only what counts: files may hold more
        tuned = with_files(tuned) if tuned.as_stored() is tuned else as_file(tuned)
        blueprint = Blueprint.of_checkpoint(tuned)
        super().__init__(blueprint, blueprint.windows())
        self._sides = base, tuned
        self._base, self._tuned = Copier(base), Copier(tuned)
        paired = pair(base.table, tuned.table, options=False)
        self._index = np.full(len(blueprint.names), -1, np.int64)
        self._index[paired.tuned_index] = paired.base_index

    def is_new(self, tensor: int) -> bool:
        return bool(self._index[tensor] < 0)

    def differs(self, tensor: int) -> bool:
        for _, start, base, tuned in self.spans(tensor):
            self._copy(tensor, start, base, tuned)
            if not np.array_equal(base, tuned):
                return True
        return False

    def prove(self, tensor: int) -> None:
        pass  # a checkpoint is what it is

    def changes(self, tensor: int) -> Iterator[Piece]:
        for _, start, base, tuned in self.spans(tensor):
            self._copy(tensor, start, base, tuned)
            yield self.changed(tensor, start, base, tuned)

    def whole(self, tensor: int) -> Bytes:
        result = self.room_for(tensor)
        for _, start, _, tuned in self.spans(tensor):
            self._tuned(tensor, start, result[start : start + len(tuned)])
        return result

    def verify(self) -> None:
        for side in self._sides:
            side.verify()

    def _copy(self, tensor: int, start: int, base: Bytes, tuned: Bytes) -> None:
        self._base(int(self._index[tensor]), start, base)
        self._tuned(tensor, start, tuned)


class _DeltaSource(Compared):
    """A delta, and its base where there is one. Nothing of another base's tensor is given."""

    def __init__(self, delta: Delta, base: Checkpoint | None) -> None:
        super().__init__(delta.blueprint, delta.windows)
        self._delta, self._side = delta, base
        encoding: Encoding = ENCODINGS[delta.encoding]
        self._patcher = encoding.patcher()
        self._spots = None if encoding.spots is None else encoding.spots(delta)
        self._base = None if base is None else Copier(base)
        self._links = None if base is None else Links(base, [delta])
        self._hasher = ContentHasher()
        self._bits = bits_of(self.blueprint.dtypes)
        #: the window that is in the buffers, and its changes: small tensors are not made twice
        self._made, self._count = -1, 0

    def is_new(self, tensor: int) -> bool:
        return not self._based(tensor) or tensor in self._delta.ranges.odd

    def _based(self, tensor: int) -> bool:
        return bool(self._delta.tensors.based[tensor])

    def differs(self, tensor: int) -> bool:
        return bool(self._delta.tensors.changed[tensor])

    def prove(self, tensor: int) -> None:
        if self._base is not None or self.is_new(tensor):
            for _ in self._proved(tensor):
                pass
        elif self._spots is not None and not self._spots.stored_whole(tensor):
            for window, *_ in self.spans(tensor):
                self._spots.changes(window)  # raises for what is not as it was written

    def changes(self, tensor: int) -> Iterator[Piece]:
        for window, start, base, tuned in self.spans(tensor):
            if not self._delta.frame_sizes[window]:
                continue
            if self._spots is not None:
                yield self._spots.changes(window)
            else:
                self._make(tensor, window, start, base, tuned)
                yield self.changed(tensor, start, base, tuned)

    def whole(self, tensor: int) -> Bytes:
        result = self.room_for(tensor)
        for start, tuned in self._proved(tensor):
            result[start : start + len(tuned)] = tuned
        return result

    def verify(self) -> None:
        self._delta.check()
        if self._side is not None:
            self._side.verify()

    # inside

    def _proved(self, tensor: int) -> Iterator[tuple[int, Bytes]]:
        """First byte and bytes of each tuned window; at the end all are known to be right.

        Raises DeltaError, at the end at the latest.
        """
        tensors, bits = self._delta.tensors, int(self._bits[tensor])
        base_sums, sums, changed = np.zeros(2, np.uint64), np.zeros(2, np.uint64), np.zeros(2, "i8")
        for window, start, base, tuned in self.spans(tensor):
            changed[0] += self._make(tensor, window, start, base, tuned)
            if self._reads_base(tensor):
                held = self._held(tensor, start, base)
                self._hasher.add(base_sums, base[:held], start, bits)
                dtype = self.blueprint.dtypes[tensor]
                changed[1] += differing_elements(dtype, base[held:], tuned[held:])
            self._hasher.add(sums, tuned, start, bits)
            yield start, tuned
        name = called(self.blueprint.names[tensor])
        if self._reads_base(tensor):
            if (base_sums != tensors.base_hashes[tensor]).any():
                raise self._other_base(tensor)
            if tuple(changed) != (tensors.changed[tensor], self._delta.ranges.fresh[tensor]):
                raise self._delta.damaged(f"other elements of {name} changed than it counts")
        if (sums != tensors.tuned_hashes[tensor]).any():
            raise self._delta.damaged(f"what it makes of {name} is wrong")

    def _reads_base(self, tensor: int) -> bool:
        """Whether the base's tensor is read when a window of it is made."""
        return self._base is not None and self._based(tensor)

    def _make(self, tensor: int, window: int, start: int, base: Bytes, out: Bytes) -> int:
        """Fill ``out`` with the tuned window, and ``base`` with the base's if there is one.

        Gives how many elements changed.
        """
        if self._made == window:
            return self._count
        self._made = -1
        try:
            self._count = self._fill(tensor, window, start, base, out)
        except Damaged as error:
            if self._reads_base(tensor) and not self._is_base(tensor):
                raise self._other_base(tensor) from None
            raise self._delta.damaged(str(error)) from None
        self._made = window
        return self._count

    def _fill(self, tensor: int, window: int, start: int, base: Bytes, out: Bytes) -> int:
        stored = self._spots is not None and self._spots.stored_whole(tensor)
        if not self._based(tensor) or (stored and self._base is None and self.differs(tensor)):
            self._patcher.whole(self._delta, window, out)
            return 0
        if self._base is None or self._links is None:
            raise UsageError(
                f"the records of {called(self.blueprint.names[tensor])} cannot be made from the "
                "delta alone",
                hint="give base=",
            )
        self._copy(tensor, start, base)
        changed = self._patcher.changes(self._delta, window, base, out)
        if not changed:
            out[:] = base
        return changed

    def _held(self, tensor: int, start: int, base: Bytes) -> int:
        """How many bytes of a window the base has; zeros follow."""
        return min(max(0, int(self._delta.ranges.nbytes[tensor]) - start), len(base))

    def _copy(self, tensor: int, start: int, base: Bytes) -> None:
        assert self._base is not None
        assert self._links is not None
        held, begin = self._held(tensor, start, base), int(self._delta.ranges.begin[tensor])
        if held:
            self._base(int(self._links.origin[tensor]), begin + start, base[:held])
        base[held:] = 0

    def _is_base(self, tensor: int) -> bool:
        """Whether the base's tensor is the one that the delta was made from."""
        sums = np.zeros(2, np.uint64)
        for _, start, base, _ in self.spans(tensor):
            self._copy(tensor, start, base)
            held = base[: self._held(tensor, start, base)]
            self._hasher.add(sums, held, start, int(self._bits[tensor]))
        return bool((sums == self._delta.tensors.base_hashes[tensor]).all())

    def _other_base(self, tensor: int) -> DeltaError:
        assert self._links is not None
        return self._links.other_base(self.blueprint.names[tensor])
