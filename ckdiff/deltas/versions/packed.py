"""A weight version that holds a packed delta: the smallest there is, for readers that are ours.

    STREAM/weight_v000007/model.safetensors.index.json       compression_format: "ckdiff-packed"
                          model-00000-of-00001.safetensors   what docs/delta-format.md describes

Engines that do not know the format refuse it, and find no tensor of a model in its file. What a
tensor was before it is said too, so that another base is told apart from damage.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.deltas.change import Patcher
from ckdiff.deltas.container import Delta
from ckdiff.deltas.form import FORMS, FRAME_BYTES
from ckdiff.deltas.parts import called
from ckdiff.deltas.registry import ENCODINGS
from ckdiff.deltas.room import Room
from ckdiff.deltas.unpacking import FrameDecoder
from ckdiff.deltas.varints import Damaged
from ckdiff.deltas.versions.checksums import content_digest
from ckdiff.deltas.versions.form import PACKED
from ckdiff.dtypes import DTYPES
from ckdiff.kernels.contents import ContentHasher
from ckdiff.kernels.delta import Merging
from ckdiff.kernels.memory import Bytes
from ckdiff.layout import bits_of

#: bytes of anonymous memory of a thread that undoes packed frames, besides what folding takes
PACKED_MEMORY = 80 << 20


class PackedFile:
    """The delta of a version, open. Raises Damaged for one that is more than a version may be."""

    def __init__(self, path: str, room: Room) -> None:
        self.delta = Delta(path, room)
        try:
            self._check()
        except BaseException:
            self.delta.close()
            raise
        changed = np.flatnonzero(self.delta.tensors.changed > 0).tolist()
        #: the tensors that change, and where they are in the delta
        self.where = {self.delta.blueprint.names[at]: at for at in changed}

    def _check(self) -> None:
        delta = self.delta
        if delta.encoding != PACKED:
            raise Damaged(f"holds a delta of the encoding {delta.encoding}, not {PACKED}")
        if delta.ranges.odd or not delta.tensors.based.all() or delta.manifest["unpaired"]:
            raise Damaged("holds a delta that changes more than values")
        if delta.manifest["lossy"] is not None:
            raise Damaged("holds a lossy delta")

    def windows(self, tensor: str) -> range:
        """The windows of a tensor."""
        at, windows = self.where[tensor], self.delta.windows
        return range(int(windows.first[at]), int(windows.first[at + 1]))

    def digest(self, tensor: str) -> str:
        """The content hash of a tensor after the version."""
        return content_digest(self.delta.tensors.tuned_hashes[self.where[tensor]])

    def size(self, tensor: str) -> int:
        """Bytes of a tensor's frames."""
        found = self.windows(tensor)
        return int(self.delta.frame_sizes[found.start : found.stop].sum())

    def nbytes(self, tensor: str) -> int:
        """Bytes of a tensor."""
        return int(self.delta.blueprint.nbytes[self.where[tensor]])

    def changed_bytes(self, tensor: str) -> int:
        """Bytes of the elements of a tensor that changed."""
        at = self.where[tensor]
        bits = DTYPES[self.delta.blueprint.dtypes[at]].bits
        return -(-int(self.delta.tensors.changed[at]) * bits // 8)

    def check_frames(self, tensor: str) -> None:
        """Hold the digests of a tensor's frames. Raises DeltaError."""
        for window in self.windows(tensor):
            self.delta.frame(window)

    def step(self, tensor: str, tools: PackedTools) -> PackedStep:
        """What the version does to a tensor, for one thread."""
        return PackedStep(self, tensor, tools)

    def patch(self, tensor: str, start: int, scratch: Bytes) -> PackedPatch:
        """The same for whoever has the tensor's bytes in parts of any size, from ``start`` on."""
        return PackedPatch(self, tensor, start, scratch)

    def patch_memory(self, tensor: str) -> int:
        """Bytes that a patch needs, at most."""
        at, found = self.where[tensor], self.windows(tensor)
        form = FORMS[self.delta.blueprint.dtypes[at]]
        size = min(form.frame, self.nbytes(tensor))
        lanes = size // form.bytes
        # a complex number is two lanes; symbols are there twice while they are read
        changed = min(lanes, 2 * int(self.delta.tensors.changed[at]))
        frame = int(self.delta.frame_sizes[found.start : found.stop].max(initial=0))
        return 3 * changed + lanes // 2 + 2 * frame + size + (1 << 20)

    def fault(self, table: TensorTable) -> str | None:
        """What a checkpoint has that the delta was not made from; None where all is the same."""
        made = self.delta.blueprint
        mine = zip(made.names, zip(made.dtypes, map(tuple, made.shapes), strict=True), strict=True)
        there = dict(zip(table.names, zip(table.dtypes, table.shapes, strict=True), strict=True))
        for name, kind in mine:
            if name not in there:
                return f"is made from {called(name)}, which the base does not have"
            if there[name] != kind:
                return f"is made from {called(name)} of another dtype or shape than the base has"
        return None


class PackedTools:
    """Buffers and the state of a decoder, for one thread."""

    def __init__(self) -> None:
        self.window, self.out = np.empty((2, FRAME_BYTES), np.uint8)
        self.patcher: Patcher = ENCODINGS[PACKED].patcher()


class PackedStep:
    """A version's change of one tensor, at work: whole windows of the delta, in their order."""

    def __init__(self, file: PackedFile, tensor: str, tools: PackedTools) -> None:
        self._delta, self._at, self._tools = file.delta, file.where[tensor], tools
        dtype = file.delta.blueprint.dtypes[self._at]
        self.window = FORMS[dtype].frame  #: bytes, but for the last one
        self._bits = int(bits_of([dtype])[0])
        self._next: Iterator[int] = iter(file.windows(tensor))
        self._sums, self._changed, self._start = np.zeros((2, 2), np.uint64), 0, 0
        self._hasher = ContentHasher()

    def apply(self, window: Bytes) -> None:
        """Change the next window in place. Raises Damaged and DeltaError."""
        number = next(self._next)
        before, after = np.zeros((2, 2), np.uint64)
        self._hasher.add(before, window, self._start, self._bits)
        out = self._tools.out[: len(window)]
        changed = self._tools.patcher.changes(self._delta, number, window, out)
        if changed:
            self._hasher.add(after, out, self._start, self._bits)
            window[:] = out
        self._sums += np.stack([before, after if changed else before])
        self._changed += changed
        self._start += len(window)

    def finish(self) -> None:
        """Hold what came in and what came out against the delta. Raises Damaged."""
        tensors, at = self._delta.tensors, self._at
        if (self._sums[0] != tensors.base_hashes[at]).any():
            raise Damaged("is not what the version was made from")
        if (self._sums[1] != tensors.tuned_hashes[at]).any():
            raise Damaged("has another digest afterwards than it says")
        if self._changed != int(tensors.changed[at]):
            raise Damaged("has another number of changed elements than it says")


class PackedPatch:
    """A version's change of one tensor, at work in parts that come as they like. See Patch.

    Hashes are held by whoever has the parts: what comes out is told from what the version says.
    """

    def __init__(self, file: PackedFile, tensor: str, start: int, scratch: Bytes) -> None:
        """Begins with the byte ``start``, a multiple of a frame's window; parts are whole words of
        64 lanes, the last one apart, and no larger than ``scratch``.
        """
        self._delta, self._scratch = file.delta, scratch
        self._form = FORMS[file.delta.blueprint.dtypes[file.where[tensor]]]
        assert start % self._form.frame == 0, "frames are decoded from their beginning"
        self._next: Iterator[int] = iter(file.windows(tensor)[start // self._form.frame :])
        self._left = 0  # bytes of the window that is at work
        self._merging: Merging | None = None  # None where nothing changes in it

    def apply(self, window: Bytes) -> None:
        """See Patch. Raises Damaged and DeltaError."""
        at = 0
        while at < len(window):
            if not self._left:
                self._begin()
            part = window[at : at + self._left]
            at += len(part)
            self._left -= len(part)
            if self._merging is None:
                continue
            base = self._scratch[: len(part)]
            base[:] = part
            fits = self._merging.add(base, part)
            if not fits or (not self._left and not self._merging.finished()):
                raise Damaged("has a frame that does not fit the base")

    def finish(self) -> None:
        """See Patch. Raises Damaged."""
        if self._left or next(self._next, None) is not None:
            raise Damaged("ends before its changes do")

    def close(self) -> None:
        """See Patch."""
        self._merging = None

    def _begin(self) -> None:
        number = next(self._next, None)
        if number is None:
            raise Damaged("goes on after its changes")
        self._left, frame = int(self._delta.windows.size[number]), self._delta.frame(number)
        self._merging = None  # and its buffers
        if frame is None:
            return
        # buffers of its own: what other frames touched of them would stay
        self._merging, changed = FrameDecoder().begin(self._form, frame, self._left)
        if not changed:
            raise Damaged("has a frame that changes nothing")
