"""The indices encoding: positions and values of what changed, in a file that other tools read.

What streamplan.py describes is written in the order of the windows into one temporary file for each
width of items, and put together at the end, the widest first: so everything is aligned to its own
width, which readers that map the file ask for.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import xxhash

from ckdiff.checkpoints.formats.safetensors import HEADER_LIMIT
from ckdiff.deltas.blueprint import Blueprint, Windows
from ckdiff.deltas.change import Change, Encoding, changed_elements
from ckdiff.deltas.container import Delta, DeltaWriter
from ckdiff.deltas.contents import Stream
from ckdiff.deltas.parts import Tensors
from ckdiff.deltas.streamplan import Plan, check, check_names
from ckdiff.deltas.streams import Bits, Bytes, streams_of
from ckdiff.deltas.varints import Damaged
from ckdiff.dtypes import DTYPES
from ckdiff.errors import OutputError
from ckdiff.kernels.delta import PIECE, Ready, no_one
from ckdiff.outputs.writing import write_all

_SLICE = 1 << 18  # elements whose positions are in memory as machine words
_SPARSE = 1 / 8  # where more differs than this, bits take less memory than positions
_OWN_PARTS = 2048  # bytes of the header that what every delta has takes at most
#: of the entry of a stream, besides its name and shape: 2 offsets, the dtype, punctuation
_ENTRY = 112


@dataclass(slots=True)
class _Spots:
    """The changed elements of a window."""

    values: Bits
    where: npt.NDArray[np.signedinteger] | None = None  #: positions in the window, or else
    flags: Bytes | None = None  #: a bit for each element

    def positions(self) -> Iterator[npt.NDArray[np.signedinteger]]:
        """The positions in order, in pieces."""
        if self.where is not None:
            yield self.where
        if self.flags is not None:
            for first in range(0, len(self.flags), _SLICE // 8):
                flags = np.unpackbits(self.flags[first : first + _SLICE // 8])
                yield np.flatnonzero(flags) + first * 8


@dataclass(slots=True)
class _Whole:
    """All bytes of a window."""

    data: bytes
    anyway: bool  #: whether they are stored even if nothing of the tensor changed


class IndicesCoder:
    """See Coder."""

    def changes(self, dtype: str, base: Bytes, tuned: Bytes) -> Change:
        """See Coder."""
        bits = DTYPES[dtype].bits
        width = max(bits // 8, 1)
        x, y = base.view(f"<u{width}"), tuned.view(f"<u{width}")
        differ = np.not_equal(x, y)
        changed = int(np.count_nonzero(differ))
        if bits < 8:
            changed = changed_elements(dtype, changed, base, tuned)
            return Change(_Whole(y.tobytes(), anyway=False), changed)
        if not changed:
            return Change(None, 0)
        if changed < len(differ) * _SPARSE:
            where = np.flatnonzero(differ).astype(np.int32)
            return Change(_Spots(y[where], where), changed)
        return Change(_Spots(y[differ], flags=np.packbits(differ)), changed)

    def whole(self, dtype: str, tuned: Bytes) -> Change:
        """See Coder."""
        return Change(_Whole(tuned.tobytes(), anyway=True), 0)


class IndicesRecorder:
    """See Recorder."""

    def __init__(self, path: Path, blueprint: Blueprint, windows: Windows) -> None:
        self._path, self._blueprint, self._windows = path, blueprint, windows
        self._plan = Plan(blueprint, windows)
        self._sizes = np.zeros(len(windows), np.uint32)
        self._digests = np.zeros(len(windows), np.uint64)
        self._spools: dict[tuple[int, bool], IO[bytes]] = {}
        self._changed = False  # whether a tensor that is stored whole if it changed, did
        self._open = ExitStack()

    def coder(self) -> IndicesCoder:
        """See Recorder."""
        return IndicesCoder()

    def add(self, window: int, change: Change) -> None:
        """See Recorder."""
        if isinstance(change.data, _Spots):
            self._add_spots(window, change.data)
        elif isinstance(change.data, _Whole):
            self._add_whole(window, change)

    def finish(self, manifest: dict[str, Any], tensors: Tensors) -> None:
        """See Recorder. Raises OutputError where the format allows no such header."""
        streams: list[tuple[int, bool, Stream]] = []
        sizes = self._sizes.astype(np.int64)
        for tensor, positions, values in self._plan.streams(sizes, tensors.based):
            if positions is not None:
                streams.append((self._plan.positions(tensor).itemsize, True, positions))
            streams.append((int(self._plan.width[tensor]), False, values))
        # stable: within a spool they are in the order in which they were written
        streams.sort(key=lambda stream: (-stream[0], not stream[1]))
        writer = DeltaWriter(self._path, reserved=_header_room(streams))
        self._open.callback(writer.close)
        at = dict.fromkeys(self._spools, 0)
        for width, is_positions, stream in streams:
            size = _nbytes(stream)
            if size:
                key = width, is_positions
                writer.append_file(self._spools[key].fileno(), at[key], size)
                at[key] += size
            writer.end(stream.name, stream.dtype, stream.shape)
        frames = self._sizes.tobytes() + self._digests.tobytes()
        writer.finish(manifest, self._blueprint, tensors, frames)

    def close(self) -> None:
        """See Recorder."""
        self._open.close()

    # inside

    def _add_spots(self, window: int, spots: _Spots) -> None:
        tensor = int(self._windows.tensor[window])
        first = int(self._windows.start[window]) // int(self._plan.width[tensor])
        dtype = self._plan.positions(tensor)
        digest = xxhash.xxh3_64()
        spool = self._spool(dtype.itemsize, positions=True)
        for piece in spots.positions():
            data = (piece + dtype.type(first)).astype(dtype, copy=False).tobytes()
            digest.update(data)
            write_all(spool.fileno(), data)
        values = spots.values.tobytes()
        digest.update(values)
        write_all(self._spool(spots.values.itemsize, positions=False).fileno(), values)
        self._sizes[window] = len(spots.values)
        self._digests[window] = digest.intdigest()

    def _add_whole(self, window: int, change: Change) -> None:
        """Write a window; if it was the tensor's last one and none changed, take all back."""
        tensor, found = int(self._windows.tensor[window]), change.data
        first, stop = self._windows.first[tensor : tensor + 2].tolist()
        spool = self._spool(int(self._plan.width[tensor]), positions=False)
        write_all(spool.fileno(), found.data)
        self._sizes[window] = len(found.data)
        self._digests[window] = xxhash.xxh3_64_intdigest(found.data)
        self._changed = found.anyway or change.changed > 0 or (window > first and self._changed)
        if window + 1 == stop and not self._changed:
            size = int(self._sizes[first:stop].sum(dtype=np.int64))
            spool.seek(-size, 2)
            spool.truncate()
            self._sizes[first:stop] = self._digests[first:stop] = 0

    def _spool(self, width: int, *, positions: bool) -> IO[bytes]:
        """A file without a name beside the output: gone however the process ends."""
        key = width, positions
        if key not in self._spools:
            spool = tempfile.TemporaryFile(dir=self._path.parent, buffering=0)  # noqa: SIM115
            self._spools[key] = self._open.enter_context(spool)
        return self._spools[key]


class IndicesPatcher:
    """See Patcher."""

    def changes(
        self, delta: Delta, window: int, base: Bytes, out: Bytes, *, ready: Ready = no_one
    ) -> int:
        """See Patcher. Raises DeltaError."""
        streams = streams_of(delta)
        if not delta.frame_sizes[window]:
            return 0
        tensor = int(delta.windows.tensor[window])
        if streams.stored_whole(tensor):
            self.whole(delta, window, out)
            return changed_elements(delta.blueprint.dtypes[tensor], len(out), base, out)
        positions, values = streams.changes(window)
        first = positions.dtype.type(streams.elements(window)[0])
        below = 0
        for start, stop in _pieces(positions, int(first), len(out), values.itemsize):
            piece = out[start : start + PIECE]
            piece[:] = base[start : start + PIECE]
            target = piece.view(f"<u{values.itemsize}")
            before = first + positions.dtype.type(start // values.itemsize)
            for low in range(below, stop, _SLICE):
                part = slice(low, min(low + _SLICE, stop))
                spots = positions[part] - before
                if (target[spots] == values[part]).any():
                    raise Damaged("a change that changes nothing")
                target[spots] = values[part]
            below = stop
            ready(start, piece)
        return len(positions)

    def whole(self, delta: Delta, window: int, out: Bytes) -> None:
        """See Patcher. Raises DeltaError."""
        data = streams_of(delta).whole(window)
        if data is None:
            raise delta.damaged("a window without a base has no bytes")
        out[:] = np.frombuffer(data, np.uint8)


def _pieces(
    positions: npt.NDArray[Any], first: int, size: int, width: int
) -> Iterator[tuple[int, int]]:
    """Where each piece of a window begins, and how many of the positions lie before its end."""
    # in the dtype of the positions: numpy would make a copy of all of them in a wider one
    most = int(np.iinfo(positions.dtype).max)
    for start in range(0, size, PIECE):
        end = first + (start + PIECE) // width
        last = start + PIECE >= size
        place = positions.dtype.type(min(end, most))
        yield start, len(positions) if last else int(np.searchsorted(positions, place))


def _nbytes(stream: Stream) -> int:
    size = DTYPES[stream.dtype].nbytes(int(np.prod(stream.shape, dtype=np.int64)))
    assert size is not None
    return size


def _header_room(streams: list[tuple[int, bool, Stream]]) -> int:
    """Bytes that are enough for the header; what follows it is aligned to 8."""
    room = _OWN_PARTS
    for _, _, stream in streams:
        name = json.dumps(stream.name, ensure_ascii=False).encode("utf-8", "surrogatepass")
        room += len(name) + len(str(list(stream.shape))) + _ENTRY
    room += -room % 8
    if room > HEADER_LIMIT:
        raise OutputError(
            f"the header would have {room:,} bytes, more than the format allows",
            hint="use the packed encoding",
        )
    return room


ENCODING = Encoding(
    IndicesRecorder,
    IndicesPatcher,
    check,
    check_names,
    counted=lambda bits: bits >= 8,
    whole=lambda bits: bits < 8,
    spots=streams_of,
)
