"""The zstd library's decoder, called from a native loop over many frames."""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import zstandard

from ckdiff.kernels.abi import DECODE_COLUMNS
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import I64, U8, Bytes, Int64, place, room, within


@dataclass(frozen=True, slots=True)
class _Library:
    create: Any
    free: Any
    decompress: int


@cache
def _library() -> _Library | None:
    """None where the zstandard package does not export the functions."""
    # The package has the library twice; how it was built decides which copy exports it.
    for module in ("zstandard._cffi", "zstandard.backend_c"):
        try:
            spec = importlib.util.find_spec(module)
            if spec is None or spec.origin is None:
                continue
            library = ctypes.CDLL(spec.origin)
            create, free = library.ZSTD_createDCtx, library.ZSTD_freeDCtx
            decompress = ctypes.cast(library.ZSTD_decompressDCtx, ctypes.c_void_p).value
        except (ImportError, OSError, AttributeError):
            continue
        create.restype = ctypes.c_void_p
        free.argtypes = [ctypes.c_void_p]
        return _Library(create, free, decompress or 0)
    return None


class Decoder:
    """A decoder's state, for one thread at a time. ``function`` is 0 where there is none."""

    def __init__(self) -> None:
        library = _library()
        self._free = None if library is None else library.free
        self.function = 0 if library is None else library.decompress
        self.state: int = 0 if library is None else library.create() or 0
        if not self.state:
            self.function = 0

    def __del__(self) -> None:
        if self._free is not None and self.state:
            self._free(self.state)


_local = threading.local()


def decoder() -> Decoder:
    """This thread's decoder."""
    if not hasattr(_local, "decoder"):
        _local.decoder = Decoder()
    found: Decoder = _local.decoder
    return found


def decode(frames: Int64, source: Bytes, target: Bytes, size: int) -> int:
    """Decode frames of ``size`` bytes each; how many were right before one was wrong.

    Of each, ``frames`` has where in ``target`` it goes, where in ``source`` it begins, and how long
    it is there: 0 for nothing but zeros.
    """
    if frames.shape[1] != DECODE_COLUMNS:
        raise ValueError(f"frames have {DECODE_COLUMNS} columns")
    if not len(frames):
        return 0
    within(int(frames.min()), int(frames[:, 0].max()) + size, len(target))
    within(0, int((frames[:, 1] + frames[:, 2]).max()), len(source))
    tool = decoder()
    if not tool.function:
        return _decode_slowly(frames, source, target, size)
    table = frames.copy()
    table[:, 0] += room(target, U8)
    table[:, 1] += place(source, U8)
    return int(
        c_function("decode").ctypes(
            place(table, I64), len(table), size, tool.function, tool.state
        )
    )  # fmt: skip


def _decode_slowly(frames: Int64, source: Bytes, target: Bytes, size: int) -> int:
    """What the native loop does, where the library's functions cannot be called directly."""
    decompressor = zstandard.ZstdDecompressor()
    for i, (to, at, length) in enumerate(frames.tolist()):
        if not length:
            target[to : to + size] = 0
            continue
        try:
            found = decompressor.decompress(source[at : at + length].tobytes(), size)
        except zstandard.ZstdError:
            return i
        if len(found) != size:
            return i
        target[to : to + size] = np.frombuffer(found, np.uint8)
    return len(frames)
