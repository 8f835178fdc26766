"""The zstd library's decoder as C functions, for calling it from native loops."""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any


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
