"""Frames of packed deltas made and read between watched zones, and windows worth trying."""

from __future__ import annotations

from functools import cache

import naive_delta as naive
import numpy as np
import numpy.typing as npt
from hypothesis import HealthCheck, settings

from ckdiff.deltas.form import FORMS
from ckdiff.deltas.packing import FrameEncoder
from ckdiff.deltas.unpacking import FrameDecoder

Bytes = npt.NDArray[np.uint8]
GUARD, ZONE = 256, 0xA5  # bytes around every buffer, and what is in them
#: one dtype of each kind of lanes
KINDS = ["U8", "F8_E4M3", "U16", "BF16", "U32", "F32", "U64", "F64"]
QUICK = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


@cache
def coders(portable: bool) -> tuple[FrameEncoder, FrameDecoder]:
    """An encoder and a decoder whose own buffers have zones after every row that must stay."""
    made = FrameEncoder(portable=portable), FrameDecoder(portable=portable)
    for coder in made:
        for name, buffer in buffers(coder):
            wider = np.full((*buffer.shape[:-1], buffer.shape[-1] + GUARD), ZONE, np.uint8)
            setattr(coder, name, wider[..., :-GUARD])
    return made


def buffers(coder: object) -> list[tuple[str, Bytes]]:
    arrays = [(name, x) for name, x in vars(coder).items() if isinstance(x, np.ndarray)]
    return [(name, x) for name, x in arrays if x.dtype == np.uint8]


def zones_intact(coder: object) -> bool:
    return all((x.base[..., -GUARD:] == ZONE).all() for _, x in buffers(coder))


class Guarded:
    """A buffer at a chosen distance from an aligned address, between zones that must stay."""

    def __init__(self, size: int, offset: int, data: bytes = b"", filler: int = ZONE) -> None:
        self._all = np.full(size + 2 * GUARD + 64, filler, np.uint8)
        start = -self._all.ctypes.data % 64 + GUARD + offset
        self._expected = self._all.copy()
        self._inside = slice(start, start + size)
        self.array = self._all[self._inside]
        self.array[: len(data)] = np.frombuffer(data, np.uint8)

    def intact(self) -> bool:
        self._expected[self._inside] = self.array
        return bool((self._all == self._expected).all())


def encoded(
    dtype: str, base: bytes, tuned: bytes, *, offset: int = 0, portable: bool = False
) -> tuple[bytes, int]:
    """The frame of a window, its sides at addresses of any alignment, and its changed lanes."""
    sides = Guarded(len(base), offset, base), Guarded(len(tuned), 3 * offset % 64, tuned, 0x5A)
    encode = coders(portable)[0].encode
    found = encode(FORMS[dtype], sides[0].array, sides[1].array)
    assert sides[0].intact()
    assert sides[1].intact()
    assert zones_intact(coders(portable)[0])
    assert sides[0].array.tobytes() == base
    assert sides[1].array.tobytes() == tuned
    return found


def decoded(
    dtype: str, frame: bytes, base: bytes, *, offset: int = 0, portable: bool = False
) -> tuple[bytes, int]:
    """The tuned window and its changed lanes; nothing around the buffers may have been touched."""
    source, out = Guarded(len(base), offset, base), Guarded(len(base), 5 * offset % 64)
    decode = coders(portable)[1].decode
    try:
        changed = decode(FORMS[dtype], memoryview(frame), source.array, out.array)
    finally:
        assert source.intact()
        assert out.intact()
        assert zones_intact(coders(portable)[1])
        assert source.array.tobytes() == base
    return out.array.tobytes(), changed


def there_and_back(
    dtype: str, base: bytes, tuned: bytes, *, offset: int = 0, slowly: bool = True
) -> bytes:
    """The frame of a window, after everything that reads and makes frames has agreed on it."""
    frame, changed = encoded(dtype, base, tuned, offset=offset)
    assert encoded(dtype, base, tuned, offset=offset + 1, portable=True) == (frame, changed)
    width = FORMS[dtype].bytes
    sides = [np.frombuffer(side, f"u{width}") for side in (base, tuned)]
    assert changed == np.count_nonzero(sides[0] != sides[1])
    if not changed:
        assert frame == b""
        return frame
    for portable in (False, True):
        found = decoded(dtype, frame, base, offset=offset, portable=portable)
        assert found == (tuned, changed)
    if slowly:
        naive.check(dtype, frame, base, tuned)
        assert naive.decode(dtype, frame, base) == tuned
    return frame


def specials(width: int) -> list[int]:
    """Patterns at the edges of the ranges of floats and integers."""
    exponents = {8: (2, 3), 16: (7, 10), 32: (23,), 64: (52,)}[width]
    top = 1 << (width - 1)
    found = {0, 1, 2, top - 1, top - 2}
    for mantissa in exponents:
        infinity = top - (1 << mantissa)
        found |= {(1 << mantissa) - 1, 1 << mantissa, infinity - 1, infinity, infinity + 1}
    return sorted(found | {x | top for x in found})


def window(dtype: str, lanes: int, density: float, reach: int, seed: int) -> tuple[bytes, bytes]:
    """Two windows: patterns of all sorts, steps of up to ``reach`` bits, likelier if small."""
    width = 8 * FORMS[dtype].bytes
    rng = np.random.default_rng(seed)
    kind = f"u{width // 8}"
    base = (
        rng.integers(0, 1 << width, lanes, kind, endpoint=False)
        if width < 64
        else (rng.integers(0, (1 << 64) - 1, lanes, kind, endpoint=True))
    )
    odd = rng.random(lanes) < 0.1
    base[odd] = rng.choice(np.array(specials(width), kind), int(odd.sum()))
    lengths = rng.integers(0, reach, lanes, endpoint=True)
    steps = rng.integers(0, 1 << 63, lanes, "u8") >> (64 - lengths.clip(1)).astype("u8")
    steps |= np.uint64(1) << lengths.clip(0, width - 1).astype("u8")
    steps = np.where(rng.random(lanes) < 0.5, steps, -steps).astype(kind)
    # the changed ones: most where the magnitude is small
    small = (base & np.array((1 << (width - 1)) - 1, kind)) < 1 << (width - 2)
    chance = np.where(small, min(1, 1.8 * density), 0.2 * density if density < 1 else 1)
    tuned = np.where(rng.random(lanes) < chance, base + steps, base).astype(kind)
    return base.tobytes(), tuned.tobytes()
