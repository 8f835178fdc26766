"""Copies of weights beside them on their device, so that only what changed comes from there.

A copy is what the snapshot was made of last. It is compared with the weight on the device, and what
differs goes from there into the copy and, rounded, into the snapshot: whatever is written to the
weight meanwhile, the two stay the same. Where much differs the copy becomes the weight, and all of
it is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ckdiff.checkpoints.places.heldtorch import HeldOnDevice, held_tensor
from ckdiff.checkpoints.places.memory import MemoryCheckpoint
from ckdiff.checkpoints.protocol import IntArray, SpanReader
from ckdiff.conversions.dtypes import DTYPE_NAMES
from ckdiff.dtypes import DTYPES
from ckdiff.errors import CkdiffError
from ckdiff.kernels.casting import narrow
from ckdiff.rules import EXACT, Rule
from ckdiff.sync.casting import PublishedView

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckdiff.kernels.gpu.compact import Changed
    from ckdiff.kernels.memory import Bytes

_AT_ONCE = 1 << 16  # changed elements that come over together
_PLACE = 8  # bytes of a position
#: what elements are compared as, unless they are rounded: integers of their width
_RAW = {1: "U8", 2: "I16", 4: "I32", 8: "I64"}


class Shadow:
    """The copies, by name; none where there is no room for them, or no code for the device."""

    def __init__(self) -> None:
        self.copies: dict[str, Any] = {}
        self.why: str | None = None  #: why it has to be done without
        self._said = False

    def over(
        self, view: PublishedView, old: Callable[[str], Bytes], note: Callable[[str], None]
    ) -> PublishedView:
        """The view, to be read once, each tensor from its begin to its end, while the snapshot
        becomes what it is. An error on the way leaves neither this nor the snapshot fit for use.

        ``old`` gives the snapshot's bytes of a tensor by its name.
        """
        if not isinstance(view.source, MemoryCheckpoint):
            self.copies = {}  # from now on they are not what the snapshot is
        elif self.why is None:
            try:
                found = _Shadowed(view, view.source, old, self)
                return found if found.weights else view
            except RuntimeError as error:  # CUDA's own, such as that its memory is full
                self.why = str(error).partition("\n")[0]
        if self.why is not None and not self._said:
            self.copies, self._said = {}, True
            note(f"warning: from here on all weights are copied from their device: {self.why}")
        return view


class _Shadowed(PublishedView):
    """A model in memory, with the tensors that lie packed on a device replaced by their copies."""

    def __init__(
        self,
        view: PublishedView,
        source: MemoryCheckpoint,
        old: Callable[[str], Bytes],
        shadow: Shadow,
    ) -> None:
        self.old, self._shadow, self._whole = old, shadow, view
        self.weights: dict[int, Any] = {}  # by place in the source: those that have copies
        self._filled: set[int] = set()
        held = list(source.held)
        for place in view.positions.tolist():
            one, name = held[place], source.table.names[place]
            if not isinstance(one, HeldOnDevice) or not one.tensor.is_contiguous():
                shadow.copies.pop(name, None)  # from now on it is not what the snapshot is
                continue
            weight = self.weights[place] = one.tensor.detach()
            copy = shadow.copies.get(name)
            if copy is not None and _kind(copy) == _kind(weight):
                self._filled.add(place)
            else:
                copy = shadow.copies[name] = weight.new_empty(weight.shape)
            found = held_tensor(copy, one.torch, name, source.label)
            assert not isinstance(found, str)  # of the dtype that the tensor has
            held[place] = found
        named = zip(source.table.names, held, strict=True)
        copies = MemoryCheckpoint(source.label, list(named))
        super().__init__(copies, view.positions.tolist(), view.table.dtypes)

    def reader(self) -> SpanReader:
        """See Checkpoint."""
        return _ShadowReader(self, super().reader())

    def reader_memory(self, window: int) -> int:
        """See Checkpoint."""
        return super().reader_memory(window) + window + 4 * _PLACE * _AT_ONCE

    def verify(self) -> None:
        """See Checkpoint."""
        self._whole.verify()

    def advance(self, tensor: int) -> Changed | None:
        """Make a copy what its tensor is. Gives which elements of it differed, and their bits now;
        None where all are to be read.
        """
        place, name = int(self.positions[tensor]), self.table.names[tensor]
        weight = self.weights.get(place)
        if weight is None:
            return None
        copy = self._shadow.copies[name].data  # whose readers are not told that we write to it
        found = self._changed(tensor, copy, weight) if place in self._filled else None
        if found is None:
            copy.copy_(weight)
        else:
            copy.view(-1).view(found.values.dtype)[found.positions] = found.values
        return found

    def _changed(self, tensor: int, copy: Any, weight: Any) -> Changed | None:
        from ckdiff.kernels.gpu.compact import Changed, changed_positions
        from ckdiff.kernels.gpu.tables import RAW

        width, stored = weight.element_size(), self.stored[tensor]
        raw, target = RAW[8 * width], DTYPE_NAMES.get(self.table.dtypes[tensor])
        rule, sides = Rule("exact", target=target), (copy.view(-1), weight.view(-1))
        if not self.cast[tensor] or rule.rounds(DTYPES[stored]) is None:
            stored, rule, sides = _RAW[width], EXACT, (sides[0].view(raw), sides[1].view(raw))
        try:
            # rules know one NaN, and what is published knows them all
            if rule is not EXACT and weight.sum().isnan():
                return None
            most = weight.nbytes // (2 * (_PLACE + width))
            found = changed_positions(*sides, stored, rule=rule, most=most)
        except (CkdiffError, RuntimeError) as error:  # no code for this device, or no memory there
            self._shadow.why = str(error).partition("\n")[0]
            return None
        return None if found is None else Changed(found.positions, found.values.view(raw))


def _kind(tensor: Any) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


class _ShadowReader:
    """A SpanReader of one span at a time: a window of the snapshot with what changed in it."""

    def __init__(self, view: _Shadowed, inner: SpanReader) -> None:
        self._view, self._inner = view, inner
        self._tensor = -1
        self._changed: Changed | None = None
        self._buffer = np.empty(0, np.uint8)

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        """See SpanReader."""
        tensor = int(tensors.item())
        if tensor != self._tensor:
            self._changed, self._tensor = self._view.advance(tensor), tensor
        if self._changed is None:
            return self._inner.acquire(tensors, starts, nbytes)
        start, size = int(starts.item()), int(nbytes.item())
        return np.array([self._patched(self._changed, start, size)], np.int64)

    def _patched(self, changed: Changed, start: int, size: int) -> int:
        """Where a window is."""
        import torch

        view, tensor = self._view, self._tensor
        stored, kind = view.stored[tensor], view.table.dtypes[tensor]
        old = view.old(view.table.names[tensor])[start : start + size]
        width = max(1, DTYPES[kind].bits // 8)
        edges = changed.positions.new_tensor([start // width, (start + size) // width])
        low, high = torch.searchsorted(changed.positions, edges).tolist()
        if low == high:
            return int(old.__array_interface__["data"][0])
        if size > len(self._buffer):
            self._buffer = np.empty(size, np.uint8)
        window = self._buffer[:size]
        window[:] = old
        for at in range(low, high, _AT_ONCE):
            part = slice(at, min(at + _AT_ONCE, high))
            places = changed.positions[part].cpu().numpy() - start // width
            values, words = changed.values[part].cpu().numpy(), window.view(f"u{width}")
            if view.cast[tensor]:
                rounded = np.empty(len(places) * width, np.uint8)
                narrow(values.view(np.uint8), stored, kind, rounded)
                values = rounded
            words[places] = values.view(words.dtype)
        return int(window.__array_interface__["data"][0])

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See SpanReader. There is nothing to wait for."""

    def release(self) -> None:
        """See SpanReader."""
        if self._changed is None:
            self._inner.release()

    def close(self) -> None:
        """See SpanReader."""
        self._changed, self._buffer = None, np.empty(0, np.uint8)
        self._inner.close()
