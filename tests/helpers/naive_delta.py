"""Frames of a packed delta, read and checked as docs/delta-format.md says: slow and obvious.

No code of the package is used. Windows and lanes are Python integers and lists of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import zstandard

#: dtype -> (bits of a lane, ordered, bytes of a window)
LANES = {
    **dict.fromkeys(["BOOL", "U8", "I8", "F4", "F8_E8M0"], (8, False, 1 << 22)),
    **dict.fromkeys(["F6_E2M3", "F6_E3M2"], (8, False, 3 << 20)),
    **dict.fromkeys(["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], (8, True, 1 << 22)),
    **dict.fromkeys(["I16", "U16"], (16, False, 1 << 23)),
    **dict.fromkeys(["F16", "BF16"], (16, True, 1 << 23)),
    **dict.fromkeys(["I32", "U32"], (32, False, 1 << 23)),
    **dict.fromkeys(["F32", "C64"], (32, True, 1 << 23)),
    **dict.fromkeys(["I64", "U64"], (64, False, 1 << 23)),
    "F64": (64, True, 1 << 23),
}
NONE, ALL, BITS, GAPS = range(4)


class Refused(Exception):
    """The bytes are not a frame, or not one for this base."""


def need(condition: object, why: str) -> None:
    if not condition:
        raise Refused(why)


def lanes_of(data: bytes, width: int) -> list[int]:
    size = width // 8
    need(len(data) % size == 0, "half a lane")
    return [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]


def bytes_of(lanes: list[int], width: int) -> bytes:
    return b"".join(lane.to_bytes(width // 8, "little") for lane in lanes)


def bits_of(data: bytes, count: int) -> list[int]:
    return [data[i // 8] >> i % 8 & 1 for i in range(count)]


class Bytes:
    """What is left of a frame."""

    def __init__(self, data: bytes) -> None:
        self.left = data

    def take(self, size: int) -> bytes:
        need(len(self.left) >= size, "too short")
        found, self.left = self.left[:size], self.left[size:]
        return found

    def number(self, limit: int) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            need(value <= limit, "a number above its limit")
            if byte < 128:
                need(byte or shift == 7, "a number longer than it need be")
                return value

    def coded(self, stored: int, size: int) -> bytes:
        data = self.take(stored)
        if stored == size:
            return data
        try:
            need(zstandard.frame_content_size(data) == size, "another content size")
            found = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
        except zstandard.ZstdError:
            raise Refused("not zstd") from None
        need(len(found) == size, "another size")
        return bytes(found)


# -- steps -----------------------------------------------------------------------------------------


def place(lane: int, width: int, ordered: bool) -> int:
    if not ordered:
        return lane
    return lane ^ ((1 << width) - 1 if lane >> (width - 1) else 1 << (width - 1))


def at_place(number: int, width: int, ordered: bool) -> int:
    if not ordered:
        return number
    return number ^ (1 << (width - 1) if number >> (width - 1) else (1 << width) - 1)


def z_between(base: int, tuned: int, width: int, ordered: bool) -> int:
    half = 1 << (width - 1)
    step = place(tuned, width, ordered) - place(base, width, ordered)
    step = (step + half) % (2 * half) - half
    return 2 * step - 1 if step > 0 else -2 * step - 2


def moved(base: int, z: int, width: int, ordered: bool) -> int:
    need(z + 1 < 1 << width, "no step at all")
    step = z // 2 + 1 if z % 2 else -(z // 2) - 1
    return at_place((place(base, width, ordered) + step) % (1 << width), width, ordered)


def symbol_of(z: int, width: int) -> tuple[int, int, int]:
    """(symbol, extra bits, how many those are)."""
    if z < 16:
        return z, 0, 0
    fine, power = 1 if width == 64 else 2, z.bit_length() - 1
    below = power - fine
    return 16 + ((power - 4) << fine) + (z >> below) - (1 << fine), z & ((1 << below) - 1), below


def extra_size(symbol: int, width: int) -> int:
    if symbol < 16:
        return 0
    fine = 1 if width == 64 else 2
    power = 4 + ((symbol - 16) >> fine)
    need(power < width, "a step longer than a lane")
    return power - fine


def z_of(symbol: int, extra: int, width: int) -> int:
    if symbol < 16:
        return symbol
    fine, below = 1 if width == 64 else 2, extra_size(symbol, width)
    return ((1 << fine) + (symbol - 16) % (1 << fine) << below) + extra


# -- reading ---------------------------------------------------------------------------------------


@dataclass
class Class:
    least: int
    elements: int = 0
    changed: int = 0
    mode: int = NONE
    paired: bool = False
    low: int = 0
    gap_bytes: int = 0
    positions: int = 0  # stored sizes, here and below
    symbols: int = 0
    rest_size: int = 0
    rest: int = 0
    flags: tuple[int, ...] = ()  # one for each element
    steps: tuple[int, ...] = ()  # symbols


@dataclass
class Changes:
    """A frame of changes, taken apart."""

    classes: list[Class]
    extra: list[int]


def parse(frame: bytes, width: int, lanes: int) -> Changes:
    """The frame of changes of a window of some lanes."""
    data = Bytes(frame)
    need(data.take(1) == b"\0", "another kind")
    count, shift, extra = data.number(8), data.number(63), data.number(1 << 26)
    need(count, "no classes")
    classes: list[Class] = []
    left = -(-lanes // 64) * 64
    for c in range(count):
        one = Class(0)
        if c:
            one.least = data.number(1 << 63) << shift
            need(classes[-1].least < one.least < 1 << (width - 1), "classes not in order")
        one.elements = data.number(left)
        left -= one.elements
        one.changed = data.number(one.elements)
        how = data.number(263)
        one.mode, one.paired, one.low = how & 3, bool(how & 4), how >> 3
        need(one.low == 0 or one.mode == GAPS, "low bits of what has none")
        need(one.changed or not one.paired, "pairs of nothing")
        if one.mode == BITS:
            one.positions = data.number((one.elements + 7) // 8)
        elif one.mode == GAPS:
            one.gap_bytes = data.number(1 << 20)
            one.positions = data.number(one.gap_bytes)
        else:
            need(one.changed == (one.elements if one.mode == ALL else 0), "not the mode")
        if one.changed:
            one.symbols = data.number((one.changed + 1) // 2 if one.paired else one.changed)
        if one.paired:
            one.rest_size = data.number(one.changed)
            one.rest = data.number(one.rest_size)
        classes.append(one)
    need(left == 0, "classes are not all of the window")
    extra_bits = bits_of(data.take((extra + 7) // 8), extra)
    for one in classes:
        one.flags = tuple(_flags(data, one))
        one.steps = tuple(_steps(data, one))
    need(not data.left, "something left over")
    return Changes(classes, extra_bits)


def _flags(data: Bytes, one: Class) -> list[int]:
    if one.mode in (NONE, ALL):
        return [one.mode] * one.elements
    if one.mode == BITS:
        flags = bits_of(data.coded(one.positions, (one.elements + 7) // 8), one.elements)
        need(sum(flags) == one.changed, "another number of bits")
        return flags
    inverse = 2 * one.changed > one.elements
    marked = one.elements - one.changed if inverse else one.changed
    gaps = data.coded(one.positions, one.gap_bytes)
    size = marked * one.low
    need(size <= 1 << 23, "too many low bits")
    low = bits_of(data.take((size + 7) // 8), size)
    flags = [int(inverse)] * one.elements
    high, at, found = 0, -1, 0
    for byte in gaps:
        high += byte
        if byte == 255:
            continue
        need(found < marked, "too many gaps")
        part = low[found * one.low : (found + 1) * one.low]
        at += 1 + (high << one.low) + sum(bit << i for i, bit in enumerate(part))
        need(at < one.elements, "a gap past the end")
        flags[at] = 1 - inverse
        high, found = 0, found + 1
    need(found == marked and not (gaps and gaps[-1] == 255), "gaps that do not add up")
    return flags


def _steps(data: Bytes, one: Class) -> list[int]:
    if not one.changed:
        return []
    if not one.paired:
        return list(data.coded(one.symbols, one.changed))
    pairs = data.coded(one.symbols, (one.changed + 1) // 2)
    rest = list(data.coded(one.rest, one.rest_size))
    halves = [half for byte in pairs for half in (byte & 15, byte >> 4)][: one.changed]
    need(halves.count(15) == len(rest), "another number of large symbols")
    return [rest.pop(0) if half == 15 else half for half in halves]


def class_of(lane: int, classes: list[Class], width: int) -> int:
    magnitude = lane & ((1 << (width - 1)) - 1)
    return max(c for c, one in enumerate(classes) if one.least <= magnitude)


def decode(dtype: str, frame: bytes, base: bytes) -> bytes:
    """The tuned window."""
    width, ordered, _ = LANES[dtype]
    lanes = lanes_of(base, width)
    found = parse(frame, width, len(lanes))
    padded = lanes + [0] * (-len(lanes) % 64)
    flags = [iter(one.flags) for one in found.classes]
    steps = [iter(one.steps) for one in found.classes]
    out, at = [], 0
    for lane in padded:
        c = class_of(lane, found.classes, width)
        flag = next(flags[c], None)
        need(flag is not None, "more lanes in a class than it has")
        if flag:
            symbol = next(steps[c])
            size = extra_size(symbol, width)
            bits = found.extra[at : at + size]
            need(len(bits) == size, "no extra bits left")
            at += size
            z = z_of(symbol, sum(bit << i for i, bit in enumerate(bits)), width)
            lane = moved(lane, z, width, ordered)
        out.append(lane)
    need(at == len(found.extra), "extra bits left over")
    return bytes_of(out[: len(lanes)], width)


def decode_whole(dtype: str, frame: bytes, size: int) -> bytes:
    """A window of ``size`` bytes that has no base."""
    data, bytes_each = Bytes(frame), LANES[dtype][0] // 8
    need(data.take(1) == b"\1", "another kind")
    lanes = size // bytes_each
    stored = [data.number(lanes) for _ in range(bytes_each)]
    planes = [data.coded(one, lanes) for one in stored]
    need(not data.left, "something left over")
    return bytes(plane[i] for i in range(lanes) for plane in planes)


# -- checking a writer -----------------------------------------------------------------------------


def check(dtype: str, frame: bytes, base: bytes, tuned: bytes) -> Changes:
    """Hold every stream of a frame, but for the writer's choices, against what it has to be."""
    width, ordered, _ = LANES[dtype]
    sides = [lanes_of(side, width) for side in (base, tuned)]
    found = parse(frame, width, len(sides[0]))
    flags: list[list[int]] = [[] for _ in found.classes]
    steps: list[list[int]] = [[] for _ in found.classes]
    extra: list[int] = []
    for old, new in zip(*(side + [0] * (-len(side) % 64) for side in sides), strict=True):
        c = class_of(old, found.classes, width)
        flags[c].append(int(old != new))
        if old != new:
            symbol, rest, size = symbol_of(z_between(old, new, width, ordered), width)
            steps[c].append(symbol)
            extra += [rest >> i & 1 for i in range(size)]
    assert found.extra == extra
    for one, its_flags, its_steps in zip(found.classes, flags, steps, strict=True):
        assert list(one.flags) == its_flags
        assert list(one.steps) == its_steps
        assert one.mode not in (BITS, GAPS) or 0 < one.changed < one.elements
        assert one.mode != GAPS or min(one.changed, one.elements - one.changed) * 8 < one.elements
        if one.paired:  # a large symbol is in the rest, and only that
            assert one.rest_size == sum(step >= 15 for step in its_steps)
    return found
