"""A model as it is published: the tensors that the stream has, in its dtypes and its order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ckdiff.checkpoints.places.heldtorch import torch_of
from ckdiff.checkpoints.protocol import Checkpoint, IntArray, SpanReader, TensorTable
from ckdiff.conversions.dtypes import chosen_dtypes
from ckdiff.dtypes import DTYPES
from ckdiff.kernels.casting import narrow
from ckdiff.kernels.memory import bytes_at

_SLACK = 1 << 16  # bytes of a buffer besides the window


class PublishedView(Checkpoint):
    """Some tensors of a checkpoint, floats rounded on the way. It closes nothing."""

    def __init__(self, source: Checkpoint, positions: Sequence[int], dtypes: Sequence[str]) -> None:
        """``positions`` in the source's table; ``dtypes`` what each of them becomes."""
        table = source.table
        self.label, self.source = source.label, source
        self.positions = np.array(positions, np.int64)
        self.stored = [table.dtypes[i] for i in positions]
        self.bits = np.array(
            [(DTYPES[a].bits, DTYPES[b].bits) for a, b in zip(self.stored, dtypes, strict=True)],
            np.int64,
        ).reshape(-1, 2)
        self.cast = np.array(
            [one != other for one, other in zip(self.stored, dtypes, strict=True)], bool
        )
        nbytes = table.nbytes[self.positions]
        self.table = TensorTable(
            [table.names[i] for i in positions],
            list(dtypes),
            [table.shapes[i] for i in positions],
            np.where(self.cast, nbytes * self.bits[:, 1] // self.bits[:, 0], nbytes),
        )

    def reader(self) -> SpanReader:
        """See Checkpoint."""
        reader = self.source.reader()
        return _CastReader(self, reader) if self.cast.any() else _PlacedReader(self, reader)

    def reader_memory(self, window: int) -> int:
        """See Checkpoint."""
        if not self.cast.any():
            return self.source.reader_memory(window)
        most = int((-(-self.bits[:, 0] // self.bits[:, 1]))[self.cast].max())
        return self.source.reader_memory(window * most) + window + _SLACK

    def fingerprint(self) -> list[Any]:
        """See Checkpoint."""
        return ["published", self.source.fingerprint(), self.table.dtypes]

    def verify(self) -> None:
        """See Checkpoint."""
        self.source.verify()

    def missing_bytes(self) -> Mapping[tuple[str, ...], int]:
        """See Checkpoint."""
        return self.source.missing_bytes()

    def fetch(self) -> None:
        """See Checkpoint."""
        self.source.fetch()


class _PlacedReader:
    """A SpanReader where nothing is rounded."""

    def __init__(self, view: PublishedView, inner: SpanReader) -> None:
        self._positions, self._inner = view.positions, inner

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        """See SpanReader."""
        return self._inner.acquire(self._positions[tensors], starts, nbytes)

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See SpanReader."""
        self._inner.prefetch(self._positions[tensors], starts, nbytes)

    def release(self) -> None:
        """See SpanReader."""
        self._inner.release()

    def close(self) -> None:
        """See SpanReader."""
        self._inner.close()


class _CastReader(_PlacedReader):
    """A SpanReader where some tensors are. Spans begin and end between elements."""

    def __init__(self, view: PublishedView, inner: SpanReader) -> None:
        super().__init__(view, inner)
        self._view = view
        self._buffer = np.empty(0, np.uint8)

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        """See SpanReader."""
        view = self._view
        first, size = self._stored(tensors, starts), self._stored(tensors, nbytes)
        addresses = super().acquire(tensors, first, size)
        chosen = np.flatnonzero(view.cast[tensors]).tolist()
        needed = int(nbytes[chosen].sum())
        if needed > len(self._buffer):
            self._buffer = np.empty(needed, np.uint8)
        at = 0
        for i in chosen:
            tensor, length = int(tensors[i]), int(nbytes[i])
            out = self._buffer[at : at + length]
            source = bytes_at(int(addresses[i]), int(size[i]))
            narrow(source, view.stored[tensor], view.table.dtypes[tensor], out)
            addresses[i] = int(self._buffer.__array_interface__["data"][0]) + at
            at += length
        return addresses

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See SpanReader."""
        super().prefetch(tensors, self._stored(tensors, starts), self._stored(tensors, nbytes))

    def close(self) -> None:
        """See SpanReader."""
        self._buffer = np.empty(0, np.uint8)
        super().close()

    def _stored(self, tensors: IntArray, nbytes: IntArray) -> IntArray:
        """How many bytes of the source so many bytes of tensors are."""
        view, bits = self._view, self._view.bits[tensors]
        found: IntArray = np.where(view.cast[tensors], nbytes * bits[:, 0] // bits[:, 1], nbytes)
        return found


def as_published(
    source: Checkpoint, like: TensorTable | None, wanted: str | None, same: Mapping[str, Any]
) -> PublishedView:
    """``source`` as the next version has it.

    Floats get the dtype of the tensor of their name in ``like``, what the stream has come to, else
    the dtype ``wanted``; all else keeps its own. What ``like`` lacks is left out where it is the
    memory of a tensor that it has: a tied weight. ``same`` tells of each name which memory that is.
    The order is ``like``'s, and then the source's.
    """
    table = source.table
    kinds = {} if like is None else dict(zip(like.names, like.dtypes, strict=True))
    chosen, _ = chosen_dtypes(table, wanted)
    here = {name: i for i, name in enumerate(table.names)}
    known = {same[name] for name in kinds if name in here and name in same}
    order = [here[name] for name in kinds if name in here]
    order += [
        i for i, name in enumerate(table.names) if name not in kinds and same.get(name) not in known
    ]
    dtypes = [
        kinds[table.names[i]]
        if castable(table.dtypes[i], kinds.get(table.names[i]))
        else (table.dtypes[i] if table.names[i] in kinds else chosen[i])
        for i in order
    ]
    return PublishedView(source, order, dtypes)


def castable(stored: str, wanted: str | None) -> bool:
    """Whether a tensor can be published in a dtype."""
    if wanted is None or stored == wanted:
        return wanted is not None
    one, other = DTYPES[stored], DTYPES[wanted]
    return one.kind == other.kind == "float" and (one.bits >= 16 or other.holds(one))


def memory_of(given: object) -> dict[str, Any]:
    """Which memory each tensor of a module or a flat mapping is; nothing of all else."""
    state = getattr(given, "state_dict", None)
    content = state() if callable(state) and not isinstance(given, Mapping) else given
    found: dict[str, Any] = {}
    if isinstance(content, Mapping):
        for name, value in content.items():
            if torch_of(value) is not None and hasattr(value, "data_ptr"):
                place = str(value.device), value.data_ptr()
                found[name] = *place, tuple(value.shape), tuple(value.stride()), str(value.dtype)
            elif isinstance(value, np.ndarray):
                data = value.__array_interface__["data"][0]
                found[name] = "numpy", data, value.shape, value.strides, str(value.dtype)
    return {name: key for name, key in found.items() if key[1]}
