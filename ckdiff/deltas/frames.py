"""The packed encoding: a frame for each window in which something changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ckdiff.deltas.blueprint import Blueprint, Windows
from ckdiff.deltas.change import Bytes, Change, Encoding, changed_elements
from ckdiff.deltas.container import Delta, DeltaWriter
from ckdiff.deltas.contents import Contents, Stream
from ckdiff.deltas.form import FORMS, Form, largest_frame
from ckdiff.deltas.packing import FrameEncoder
from ckdiff.deltas.parts import DATA, Tensors, called
from ckdiff.deltas.unpacking import FrameDecoder
from ckdiff.deltas.varints import Damaged
from ckdiff.kernels.delta import Ready, no_one


class PackedCoder:
    """See Coder."""

    def __init__(self) -> None:
        self._encoder = FrameEncoder()

    def changes(self, dtype: str, base: Bytes, tuned: Bytes) -> Change:
        """See Coder."""
        frame, lanes = self._encoder.encode(FORMS[dtype], base, tuned)
        return Change(frame, changed_elements(dtype, lanes, base, tuned))

    def whole(self, dtype: str, tuned: Bytes) -> Change:
        """See Coder."""
        return Change(self._encoder.encode_whole(FORMS[dtype], tuned), 0)


class PackedRecorder:
    """See Recorder."""

    def __init__(self, path: Path, blueprint: Blueprint, windows: Windows) -> None:
        self._blueprint = blueprint
        self._sizes = np.zeros(len(windows), np.uint32)
        self._digests = np.zeros(len(windows), np.uint64)
        self._writer = DeltaWriter(path)

    def coder(self) -> PackedCoder:
        """See Recorder."""
        return PackedCoder()

    def add(self, window: int, change: Change) -> None:
        """See Recorder."""
        if change.data:
            self._sizes[window] = len(change.data)
            self._digests[window] = xxhash.xxh3_64_intdigest(change.data)
            self._writer.append(change.data)

    def finish(self, manifest: dict[str, Any], tensors: Tensors) -> None:
        """See Recorder."""
        self._writer.end(DATA)
        frames = self._sizes.tobytes() + self._digests.tobytes()
        self._writer.finish(manifest, self._blueprint, tensors, frames)

    def close(self) -> None:
        """See Recorder."""
        self._writer.close()


class PackedPatcher:
    """See Patcher."""

    def __init__(self) -> None:
        self._decoder = FrameDecoder()

    def changes(
        self, delta: Delta, window: int, base: Bytes, out: Bytes, *, ready: Ready = no_one
    ) -> int:
        """See Patcher. Raises DeltaError."""
        frame = delta.frame(window)
        if frame is None:
            return 0
        lanes = self._decoder.decode(_form(delta, window), frame, base, out, ready=ready)
        if not lanes:
            raise Damaged("a frame that changes nothing")
        return changed_elements(_dtype(delta, window), lanes, base, out)

    def whole(self, delta: Delta, window: int, out: Bytes) -> None:
        """See Patcher. Raises DeltaError."""
        frame = delta.frame(window)
        if frame is None:
            raise Damaged("a window without a base has no bytes")
        self._decoder.decode_whole(_form(delta, window), frame, out)


def _dtype(delta: Delta, window: int) -> str:
    return delta.blueprint.dtypes[int(delta.windows.tensor[window])]


def _form(delta: Delta, window: int) -> Form:
    return FORMS[_dtype(delta, window)]


def _check(contents: Contents) -> int:
    """See Encoding: no frame may be larger than the largest that its window can have."""
    blueprint, windows, sizes = contents.blueprint, contents.windows, contents.sizes
    tensor = windows.tensor
    lane = np.array([FORMS[dtype].bytes for dtype in blueprint.dtypes], np.int64)[tensor]
    wrong = sizes > largest_frame(windows.size, lane)
    if wrong.any():
        name = blueprint.names[int(tensor[int(wrong.argmax())])]
        raise ValueError(f"a frame of {called(name)} is larger than any")
    if not contents.has(Stream(DATA, "U8", (int(sizes.sum()),))):
        raise ValueError("the frames are not all of the data")
    return 1


ENCODING = Encoding(PackedRecorder, PackedPatcher, _check)
