"""Running the kernels by hand, and bits that are worth running them on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import naive
import numpy as np
import numpy.typing as npt

from ckdiff.dtypes import DTYPES
from ckdiff.kernels import BLOCK, Comparing, Kernels, Results, abi, hashing
from ckdiff.rules import Rule

if TYPE_CHECKING:
    from ckdiff.kernels.gpu.device import Device
    from ckdiff.kernels.gpu.kernels import DeviceKernels


@cache
def kernels(dtypes: tuple[str, ...], rules: tuple[str, ...], stats: bool = False) -> Kernels:
    return Kernels(
        [DTYPES[name] for name in dtypes], [Rule.parse(r) for r in rules], with_statistics=stats
    )


def on_device(
    device: Device,
    dtypes: Sequence[str],
    rules: Sequence[str],
    *,
    stats: bool = False,
    memory: int = 1 << 30,
) -> DeviceKernels:
    """The same on a device, in windows as small as can be: there are several pieces."""
    from ckdiff.kernels.gpu.kernels import DeviceKernels

    cpu, of = kernels(tuple(dtypes), tuple(rules), stats), [DTYPES[name] for name in dtypes]
    parsed = [Rule.parse(rule) for rule in rules]
    return DeviceKernels(cpu, of, parsed, device, window=BLOCK, workers=1, memory=memory)


@dataclass
class Outcome:
    masks: dict[str, npt.NDArray[np.uint8]]  # packed
    changed: dict[str, int]
    hashes: list[str]
    statistics: npt.NDArray[np.float64] | None

    def flags(self, rule: str, count: int) -> npt.NDArray[np.bool_]:
        return np.unpackbits(self.masks[rule], count=count, bitorder="little").view(bool)

    def unlike(self, other: Outcome) -> list[str]:
        """What is not the same: rules, and all else."""
        wrong = [
            rule
            for rule, mask in other.masks.items()
            if (self.masks[rule] != mask).any() or self.changed[rule] != other.changed[rule]
        ]
        rows = [
            None if one.statistics is None else one.statistics.tobytes() for one in (self, other)
        ]
        same = {"hashes": self.hashes == other.hashes, "statistics": rows[0] == rows[1]}
        return [*wrong, *(name for name, fine in same.items() if not fine)]


def run(
    dtype: str,
    rules: Sequence[str],
    base: bytes,
    tuned: bytes,
    *,
    offset: int = 0,
    cuts: Sequence[int] = (),
    stats: bool = False,
    using: Comparing | None = None,
) -> Outcome:
    """Run the kernels on one tensor whose bytes start ``offset`` bytes past an aligned address.

    What lies around the tensors differs between the sides. ``cuts`` are elements, multiples of
    512, at which the tensor is handed over in several segments. ``using`` is what runs instead; it
    must be for that dtype, ``exact`` and the rules.
    """
    bits = DTYPES[dtype].bits
    count = len(base) * 8 // bits
    every = tuple(dict.fromkeys(["exact", *rules]))
    padded = -(-count // 512) * 512
    masks = [np.zeros(padded // 8 + 64, np.uint8) for _ in every]
    for m in masks:
        m[padded // 8 :] = 0xEE
    sides = []
    for data, filler in ((base, 0x55), (tuned, 0xAA)):
        buffer = np.full(len(data) + offset + 128, filler, np.uint8)
        buffer[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        sides.append(buffer)
    edges = [0, *cuts, count]
    segments = [
        [
            sides[0].ctypes.data + offset + first * bits // 8,
            sides[1].ctypes.data + offset + first * bits // 8,
            stop - first,
            first,
            0,
            first // 512,
            0,
        ]
        for first, stop in itertools.pairwise(edges)
    ]
    into = Results(1, len(every), with_statistics=stats)
    table = np.array(segments, np.int64).reshape(-1, abi.SEG_COLUMNS)
    (using or kernels((dtype,), every, stats)).run(table, masks, into)
    for m in masks:
        assert (m[padded // 8 :] == 0xEE).all(), "written past the end"
        flags = np.unpackbits(m[: padded // 8], bitorder="little")
        assert not flags[count:].any(), "padding bits are set"
    low = into.hashes[0].tolist()
    return Outcome(
        {r: m[: -(-count // 8)] for r, m in zip(every, masks, strict=True)},
        dict(zip(every, into.changed[0].tolist(), strict=True)),
        [hashing.finish(low[0], low[1], len(base)), hashing.finish(low[2], low[3], len(tuned))],
        None if into.statistics is None else into.statistics[0],
    )


def specials(dtype: str) -> list[int]:
    """Bit patterns at which something changes: zeros, subnormals, powers, limits, NaNs."""
    f = naive.FORMATS[dtype]
    top = 1 << f.bits - 1
    if dtype in naive.INTEGERS:
        edge = [1 << k for k in range(f.bits)]
        out = {0, *edge, *(k - 1 for k in edge), *(k + 1 for k in edge), 2 * top - 1, 2 * top - 2}
        return sorted(out)
    if dtype in naive.RAW:
        return [0, 1, top, 2 * top - 1]
    one = 1 << f.mantissa
    infinity = (1 << f.exponent) - 1 << f.mantissa
    positive = {
        0, 1, 2, 3, one - 1, one, one + 1, f.bias << f.mantissa, (f.bias << f.mantissa) + 1,
        (f.bias << f.mantissa) - 1, infinity - 1, infinity, infinity + 1, infinity | one >> 1,
        infinity | one - 1, top - 1,
    }  # fmt: skip
    for t in ("F16", "BF16", "F32"):  # around the limits and the smallest numbers of a target
        g = naive.FORMATS[t]
        cut = f.mantissa - g.mantissa
        if cut > 0 and f.exponent >= g.exponent:
            highest = (g.bias + f.bias + 1 << f.mantissa) - (1 << cut)
            for power in (1 - g.bias, 1 - g.bias - g.mantissa, -g.bias - g.mantissa, 0):
                if power + f.bias > 0:
                    positive |= {(power + f.bias << f.mantissa) + k for k in (-1, 0, 1)}
                    for steps in (1, 2, 3):  # halfway between two neighbours, and beside it
                        half = (power + f.bias << f.mantissa) + steps * (1 << cut - 1)
                        positive |= {half - 1, half, half + 1}
            positive |= {highest + k * (1 << cut - 1) + d for k in (0, 1, 2) for d in (-1, 0, 1)}
    kept = {p for p in positive if 0 <= p < top}
    return sorted(kept | {p | top for p in kept})


def random_bits(dtype: str, count: int, seed: int) -> naive.Bits:
    width = max(naive.FORMATS[dtype].bits, 8) // 8
    return np.frombuffer(np.random.default_rng(seed).bytes(count * width), f"<u{width}")


def tough_pairs(dtype: str, count: int) -> tuple[naive.Bits, naive.Bits]:
    """Specials with specials, and random elements with what lies close to them."""
    kind = random_bits(dtype, 1, 0).dtype
    known = np.array(specials(dtype), kind)
    x, y = (grid.ravel() for grid in np.meshgrid(known, known))
    noise = random_bits(dtype, count, 1)
    near = noise + np.random.default_rng(2).integers(-3, 4, count).astype(np.int64).astype(kind)
    half = kind.itemsize * 4
    rough = noise ^ (random_bits(dtype, count, 3) >> kind.type(half))
    flip = noise ^ kind.type(1 << 8 * kind.itemsize - 1)
    other = np.random.default_rng(4).choice(known, count)
    xs = [x, noise, noise, noise, noise, noise]
    ys = [y, near, rough, flip, other, random_bits(dtype, count, 5)]
    return np.concatenate(xs), np.concatenate(ys)


def some_elements(dtype: str, count: int, seed: int) -> tuple[bytes, bytes]:
    """Random elements, some of them equal and some special."""
    noise = random.Random(seed)
    size = count * naive.FORMATS[dtype].bits // 8
    base = bytearray(noise.randbytes(size))
    tuned = bytearray(base)
    width = naive.FORMATS[dtype].bits // 8
    known = specials(dtype)
    for i in range(0, size, max(width, 1)):
        choice = noise.random()
        if choice < 0.3:
            tuned[i] ^= noise.randrange(256)
        elif choice < 0.4 and width:
            for side in (base, tuned):
                side[i : i + width] = noise.choice(known).to_bytes(width, "little")
    return bytes(base), bytes(tuned)
