"""zstd frames made of blocks that do not depend on each other, and frames decoded a part at a time.

Blocks are made by the library's entropy coder from sequences that we found ourselves. Their matches
are all at distance one, so that a block means the same whatever stands before it: blocks that are
made one by one, on any thread, are a frame when a header is put before them. What the zstandard
package does not export is called in the library that it brings along.

What is wrong with a frame is a ValueError that says it as the end of a sentence.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import zstandard

from ckdiff.kernels.abi import RUNS_MARGIN
from ckdiff.kernels.memory import U8, U32, Bytes, place, room
from ckdiff.kernels.runs import Runs

BLOCK = 1 << 17  #: bytes that a block holds at most, and the window of our frames
MAGIC = b"\x28\xb5\x2f\xfd"
LONGEST_HEADER = 18  #: bytes
_WINDOW_LOG = 17
_OWN_HEAD = 6  # bytes of the header of a frame that does not say how large it is
#: level 1, window, no content size, no checksum, blocks are marked, repeated offsets are used
_SETTINGS = ((100, 1), (101, _WINDOW_LOG), (200, 0), (201, 0), (1008, 1), (1016, 1))
_LIMIT = 100  # the decoder's parameter for the largest window
_RAW, _REPEATED = 0, 1  # types of blocks
_ALL_OF_IT = 3  # of a decoder that is reset: where it is, and its parameters
_KEPT_WINDOW, _MOST_SPARE = 1 << 20, 8  # of decoders that are used again: making one is slow
_spare: list[int] = []  # taken and put back by any thread, each in one step
_FALLBACK_PART = 64  # bytes that cannot become more than 2 MiB


class FrameHead(NamedTuple):
    """What a frame's header says."""

    size: int  #: bytes of the header
    content: int  #: bytes of what the frame holds
    window: int  #: bytes that a decoder has to keep


def frame_head(raw: bytes) -> FrameHead:
    """Read the header at the start of ``raw``, which has LONGEST_HEADER bytes unless the frame is
    shorter. Raises ValueError, also where it does not say how much the frame holds.
    """
    if raw[:4] != MAGIC or len(raw) < 6:
        raise ValueError("is not a zstd frame")
    said = raw[4]
    single, dictionary = said >> 5 & 1, said & 3
    if said & 8 or dictionary:
        raise ValueError("is a zstd frame that needs a dictionary, or of an unknown kind")
    width = (single, 2, 4, 8)[said >> 6]
    at = 5 if single else 6
    if not width:
        raise ValueError("is a zstd frame that does not say how much it holds")
    if len(raw) < at + width:
        raise ValueError("ends inside the header of its zstd frame")
    content = int.from_bytes(raw[at : at + width], "little") + (256 if width == 2 else 0)
    window = content
    if not single:
        base = 1 << (10 + (raw[5] >> 3))
        window = base + (base >> 3) * (raw[5] & 7)
    return FrameHead(at + width, content, window)


def frame_header(content: int) -> bytes:
    """The header of a frame of ours that holds ``content`` bytes."""
    if content <= BLOCK:  # in one segment: the window is what it holds
        if content < 256:
            return MAGIC + struct.pack("<BB", 0x20, content)
        if content < 65536 + 256:
            return MAGIC + struct.pack("<BH", 0x60, content - 256)
        return MAGIC + struct.pack("<BI", 0xA0, content)
    window = (_WINDOW_LOG - 10) << 3
    if content < 1 << 32:
        return MAGIC + struct.pack("<BBI", 0x80, window, content)
    return MAGIC + struct.pack("<BBQ", 0xC0, window, content)


def raw_block(data: bytes) -> bytes:
    """A block, not the last, that holds ``data`` as it is."""
    return (len(data) << 3 | _RAW << 1).to_bytes(3, "little") + data


def zero_blocks(size: int) -> bytes:
    """Blocks, none of them the last, that hold ``size`` zeros."""
    whole = (BLOCK << 3 | _REPEATED << 1).to_bytes(3, "little") + b"\0"
    found, rest = whole * (size // BLOCK), size % BLOCK
    return found + ((rest << 3 | _REPEATED << 1).to_bytes(3, "little") + b"\0" if rest else b"")


def last_block(blocks: bytes) -> int:
    """Where the last of some blocks begins."""
    at = begin = 0
    while at < len(blocks):
        begin, head = at, int.from_bytes(blocks[at : at + 3], "little")
        at += 3 + (1 if head >> 1 & 3 == _REPEATED else head >> 3)
    if at != len(blocks) or not blocks:
        raise ValueError("these are no whole blocks")
    return begin


def ended(blocks: bytes) -> bytes:
    """The same blocks, the last of which says that it is the frame's last."""
    at = last_block(blocks)
    return blocks[:at] + bytes([blocks[at] | 1]) + blocks[at + 1 :]


class _Buffer(ctypes.Structure):
    """What the library calls ZSTD_inBuffer and ZSTD_outBuffer."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("pos", ctypes.c_size_t),
    )


_P, _S, _I = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_CALLS: dict[str, tuple[Any, list[Any]]] = {
    "ZSTD_isError": (ctypes.c_uint, [_S]),
    "ZSTD_createCCtx": (_P, []),
    "ZSTD_freeCCtx": (_S, [_P]),
    "ZSTD_CCtx_setParameter": (_S, [_P, _I, _I]),
    "ZSTD_compressSequences": (_S, [_P, _P, _S, _P, _S, _P, _S]),
    "ZSTD_compressSequencesAndLiterals": (_S, [_P, _P, _S, _P, _S, _P, _S, _S, _S]),
    "ZSTD_createDCtx": (_P, []),
    "ZSTD_freeDCtx": (_S, [_P]),
    "ZSTD_DCtx_reset": (_S, [_P, _I]),
    "ZSTD_DCtx_setParameter": (_S, [_P, _I, _I]),
    "ZSTD_decompressStream": (_S, [_P, ctypes.POINTER(_Buffer), ctypes.POINTER(_Buffer)]),
}


@cache
def _library() -> dict[str, Any] | None:
    """The functions; None where the package does not export all of them."""
    for module in ("zstandard._cffi", "zstandard.backend_c"):
        try:
            spec = importlib.util.find_spec(module)
            if spec is None or spec.origin is None:
                continue
            library = ctypes.CDLL(spec.origin)
            found = {name: getattr(library, name) for name in _CALLS}
        except (ImportError, OSError, AttributeError):
            continue
        for name, (result, arguments) in _CALLS.items():
            found[name].restype, found[name].argtypes = result, arguments
        return found
    return None


def encodes_sequences() -> bool:
    """Whether a SequenceEncoder can be made."""
    return _library() is not None


class SequenceEncoder:
    """Makes blocks of the sequences of windows of at most ``window`` bytes; for one thread."""

    def __init__(self, window: int) -> None:
        calls = _library()
        if calls is None:
            raise ValueError("the zstandard package does not export what makes blocks of sequences")
        self._calls = calls
        self._context = calls["ZSTD_createCCtx"]()
        if not self._context:
            raise MemoryError
        for setting, value in _SETTINGS:
            if calls["ZSTD_isError"](
                calls["ZSTD_CCtx_setParameter"](self._context, setting, value)
            ):
                raise ValueError("the zstd library does not know what blocks of sequences need")
        # a block that does not become smaller is stored as it is
        self._out = np.empty(window + window // 128 + 1024, np.uint8)

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._calls["ZSTD_freeCCtx"](self._context)

    def blocks(self, runs: Runs, base: Bytes, tuned: Bytes, *, first: bool) -> bytes:
        """Blocks, none of them marked as the last, that hold ``base ^ tuned``, which is not empty.

        ``first`` says that they begin a frame. That a block repeats a byte is said in four bytes,
        but not in a frame's first one: older decoders fail there.
        """
        equal = np.diff(runs.ends[:, 3], prepend=0) == 0
        if first:
            equal[0] = False
        if not equal.any():
            return self._made(runs, base, tuned)
        found, count = [], len(equal)
        borders = [0, *(np.flatnonzero(equal[1:] != equal[:-1]) + 1).tolist(), count]
        for begin, stop in pairwise(borders):
            low, high = begin * BLOCK, min(stop * BLOCK, len(base))
            if equal[begin]:
                found.append(zero_blocks(high - low))
            else:
                part = runs.of_blocks(begin, stop)
                found.append(self._made(part, base[low:high], tuned[low:high]))
        return b"".join(found)

    def _made(self, runs: Runs, base: Bytes, tuned: Bytes) -> bytes:
        literals, sequences, size = runs.literals, runs.sequences, len(base)
        made = self._calls["ZSTD_compressSequencesAndLiterals"](
            self._context, room(self._out, U8), len(self._out),
            place(sequences, U32), len(sequences), place(literals, U8), len(literals),
            len(literals) + RUNS_MARGIN, size,
        )  # fmt: skip
        if self._calls["ZSTD_isError"](made):  # some block does not become smaller
            exclusive = base ^ tuned
            made = self._calls["ZSTD_compressSequences"](
                self._context, room(self._out, U8), len(self._out),
                place(sequences, U32), len(sequences), place(exclusive, U8), size,
            )  # fmt: skip
        if self._calls["ZSTD_isError"](made):
            raise ValueError(f"the zstd library made no blocks of {len(sequences):,} sequences")
        blocks = self._out[_OWN_HEAD:made].tobytes()
        at = last_block(blocks)
        return blocks[:at] + bytes([blocks[at] & 0xFE]) + blocks[at + 1 :]


class FrameDecoder:
    """Decodes exactly one frame, a part at a time; for one thread at a time.

    ``more`` gives the next bytes of the frame, none at its end. A window of more than
    ``largest_window`` bytes is refused by the library.
    """

    def __init__(self, more: Callable[[], bytes], largest_window: int) -> None:
        self._more = more
        self._calls = _library()
        self._ended = False
        if self._calls is None:
            tool = zstandard.ZstdDecompressor(max_window_size=largest_window)
            self._slow, self._held = tool.decompressobj(), b""
            return
        self._kept = largest_window <= _KEPT_WINDOW
        self._context = self._calls["ZSTD_createDCtx"]() if not self._kept else self._spared()
        if not self._context:
            raise MemoryError
        self._calls["ZSTD_DCtx_setParameter"](
            self._context, _LIMIT, max(10, (largest_window - 1).bit_length())
        )
        self._given, self._at = b"", 0

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Give its memory back; may be called more than once."""
        context, self._context = getattr(self, "_context", None), None
        if not context or self._calls is None:
            return
        if self._kept and len(_spare) < _MOST_SPARE:
            self._calls["ZSTD_DCtx_reset"](context, _ALL_OF_IT)
            _spare.append(context)
        else:
            self._calls["ZSTD_freeDCtx"](context)

    def _spared(self) -> Any:
        assert self._calls is not None
        try:
            return _spare.pop()
        except IndexError:
            return self._calls["ZSTD_createDCtx"]()

    def fill(self, out: Bytes) -> None:
        """Decode as many bytes as ``out`` has. Raises ValueError."""
        done = 0
        while done < len(out):
            if self._ended:
                raise ValueError("holds less than its zstd frame says")
            done += self._some(out[done:])

    def finish(self) -> None:
        """Raise ValueError unless the frame ended with what was decoded, and nothing follows it."""
        while not self._ended:
            if self._some(np.empty(1, np.uint8)):
                raise ValueError("holds more than its zstd frame says")
        left = self._slow.unused_data if self._calls is None else self._given[self._at :]
        if left or self._more():
            raise ValueError("has something after its zstd frame")

    def _some(self, out: Bytes) -> int:
        if self._calls is None:
            return self._slowly(out)
        if self._at == len(self._given):
            self._given, self._at = self._more(), 0
        given = ctypes.c_char_p(self._given)
        source = _Buffer(ctypes.cast(given, ctypes.c_void_p), len(self._given), self._at)
        target = _Buffer(room(out, U8), len(out), 0)
        left = self._calls["ZSTD_decompressStream"](
            self._context, ctypes.byref(target), ctypes.byref(source)
        )
        if self._calls["ZSTD_isError"](left):
            raise ValueError("is damaged, or a zstd frame that needs too much memory")
        stuck = source.pos == self._at and not target.pos
        self._at, self._ended = source.pos, left == 0
        if stuck and not self._ended and self._at == len(self._given):
            raise ValueError("ends before its zstd frame does")
        return int(target.pos)

    def _slowly(self, out: Bytes) -> int:
        """What is done where the library's functions cannot be called."""
        while not self._held and not self._slow.eof:
            if not self._at_hand():
                raise ValueError("ends before its zstd frame does")
        count = min(len(out), len(self._held))
        out[:count] = np.frombuffer(self._held, np.uint8, count)
        self._held = self._held[count:]
        self._ended = self._slow.eof and not self._held
        return count

    def _at_hand(self) -> bool:
        """Decode a little more; False where there is nothing more."""
        given = self._more()
        for at in range(0, len(given), _FALLBACK_PART):
            try:
                self._held += self._slow.decompress(given[at : at + _FALLBACK_PART])
            except zstandard.ZstdError:
                raise ValueError("is damaged, or not one zstd frame") from None
        return bool(given)
