"""Inner chunks of mask as zstd frames, faster than a general compressor makes them.

Where changes are scattered, nothing repeats and all that can be gained is that set bits are rare:
the bytes are Huffman-coded with one of a few dozen ready-made codes, one for each density, in
which a byte's code depends on its number of set bits. A frame is then one block of literals without
any match, which is plain zstd (RFC 8878): every decoder reads it. Where the bytes do not look
scattered (stripes, runs, nearly empty or nearly full pieces) the zstd library does its work.

Which way a piece goes depends on its bits alone, so that a store's bytes do too.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from functools import cache
from itertools import accumulate, repeat
from operator import mul

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from ckdiff.errors import CkdiffError
from ckdiff.kernels import entropy
from ckdiff.kernels.abi import LONGEST, PIECE, STREAM

Bytes = npt.NDArray[np.uint8]
#: codes of pairs of bytes, those of bytes, and the description of their tree
Table = tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32], bytes]

# What decides about bytes is made of integers, sums and products, which every machine rounds alike;
# logarithms and powers differ between C libraries.
#: densities that have a code, a factor of 1.12 apart; what is sparser or denser goes to the library
LEVELS = list(accumulate(repeat(1.12, 30), mul, initial=0.014))
#: set bits from which on each level is the nearest one by the logarithm; the last is too dense
FIRST_BITS = [
    6936, 7768, 8701, 9745, 10914, 12224, 13690, 15333, 17173, 19234, 21542, 24127, 27022, 30264,
    33896, 37963, 42519, 47621, 53336, 59736, 66904, 74933, 83924, 93995, 105275, 117907, 132056,
    147903, 165651, 185529, 207793, 232728,
]  # fmt: skip
#: how far the share of zero bytes may be from that of scattered bits
_SCATTERED = 0.02
#: frames larger than this are not worth decoding: stored raw
_WORTHWHILE = int(PIECE * 0.98)

_MAGIC = (0xFD2FB528).to_bytes(4, "little")
# one segment (no window), content checksum, content size in two bytes with 256 subtracted
_FRAME = _MAGIC + bytes([0b01_1_0_0_1_00]) + (PIECE - 256).to_bytes(2, "little")
_RAW, _COMPRESSED = 0, 2


def skewed_compressor(*, window_log: int, checksum: bool) -> zstandard.ZstdCompressor:
    """The library's compressor for skewed bytes in which nothing repeats.

    A small match table and matches of at least 7 bytes keep it from finding "repeats" that cost
    more than they save.
    """
    parameters = zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST,
        hash_log=6,
        chain_log=6,
        min_match=7,
        target_length=0,
        window_log=window_log,
        write_content_size=1,
        write_checksum=int(checksum),
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


class MaskEncoder:
    """Encodes pieces of PIECE bytes; one for each worker, since buffers are not shared.

    ``alike`` says that pieces that come after each other are mostly of one density. It changes how
    fast they are encoded, and not what becomes of them.
    """

    def __init__(self, *, alike: bool = True) -> None:
        self._alike = alike
        self._coder = entropy.Coder(2 if alike else 1)
        # what is left to it: on masks twice as fast as its level 1, and smaller
        self._zstd = skewed_compressor(window_log=16, checksum=True)
        self._zero = self._zstd.compress(bytes(PIECE))

    def encode(self, piece: Bytes) -> bytes:
        """The zstd frame of a contiguous piece of PIECE bytes."""
        bits, zeros = self._coder.survey(piece)
        if bits == 0:
            return self._zero
        level = bisect_right(FIRST_BITS, bits) - 1
        scattered = abs(zeros / PIECE - _power(1 - bits / (8 * PIECE), 8)) < _SCATTERED
        if not scattered or not 0 <= level < len(LEVELS):
            return self._zstd.compress(piece.data)
        codes, single, tree = code_table(level)
        streams = self._coder.encode(piece, codes if self._alike else single)
        literals = len(tree) + 6 + sum(map(len, streams))
        block = 5 + literals + 1
        checksum = (xxhash.xxh64_intdigest(piece.data) & 0xFFFFFFFF).to_bytes(4, "little")
        if block > _WORTHWHILE:
            return b"".join((_FRAME, _block_header(_RAW, PIECE), piece.data, checksum))
        # literals: Huffman-coded with their tree, four streams, both sizes in 18 bits
        head = 2 | 3 << 2 | PIECE << 4 | literals << 22
        jump = b"".join(len(stream).to_bytes(2, "little") for stream in streams[:3])
        return b"".join((
            _FRAME, _block_header(_COMPRESSED, block), head.to_bytes(5, "little"), tree, jump,
            *streams, b"\0", checksum,  # no sequences
        ))  # fmt: skip


def _power(x: float, k: int) -> float:
    found = 1.0
    for _ in range(k):
        found *= x
    return found


def _block_header(kind: int, size: int) -> bytes:
    last = 1
    return (last | kind << 1 | size << 3).to_bytes(3, "little")


@cache
def code_table(level: int) -> Table:
    """The Huffman code for scattered bits of density LEVELS[level]."""
    p = LEVELS[level]
    weights_of = [_power(p, k) * _power(1 - p, 8 - k) for k in range(9)]
    lengths = limited_lengths([weights_of[symbol.bit_count()] for symbol in range(256)])
    longest = max(lengths)
    weights = [longest + 1 - length for length in lengths]
    codes = np.zeros(256, np.uint32)
    code = 0
    # zstd's canonical order: longest codes first, equal lengths by symbol
    for weight in range(1, longest + 1):
        for symbol in range(256):
            if weights[symbol] == weight:
                codes[symbol] = code
                code += 1
        code >>= 1
    # of a pair the second byte goes first into the bit stream, which is read backwards
    width = np.array(lengths, np.uint32)
    both = codes[:, None] | codes[None, :] << width[:, None]
    entries = both << np.uint32(5) | (width[:, None] + width[None, :])
    single = codes << np.uint32(5) | width
    return np.ascontiguousarray(entries.reshape(-1)), single, describe_tree(weights)


def limited_lengths(frequencies: list[float], longest: int = LONGEST) -> list[int]:
    """Optimal code lengths of at most ``longest`` bits (package-merge, Larmore and Hirschberg)."""
    leaves = sorted((f, (symbol,)) for symbol, f in enumerate(frequencies))
    packages: list[tuple[float, tuple[int, ...]]] = []
    for _ in range(longest):
        merged = list(heapq.merge(leaves, packages))
        packages = [
            (a[0] + b[0], a[1] + b[1]) for a, b in zip(merged[::2], merged[1::2], strict=False)
        ]
    lengths = [0] * len(frequencies)
    for _, symbols in packages[: len(frequencies) - 1]:
        for symbol in symbols:
            lengths[symbol] += 1
    return lengths


def describe_tree(weights: list[int]) -> bytes:
    """zstd's tree description: all weights but the last, FSE-coded (RFC 8878, 4.2.1)."""
    symbols = weights[:-1]
    log = 6
    counts = normalised(symbols, 1 << log)
    table = _Bits()
    table.add(log - 5, 4)
    remaining = (1 << log) + 1
    for count in counts:
        # a value is written in just enough bits for what can still follow, and small values
        # one bit shorter while there is slack (RFC 8878, 4.1.1)
        value, width = count + 1, remaining.bit_length()
        slack = (1 << width) - 1 - remaining
        if value < slack:
            table.add(value, width - 1)
        else:
            half = 1 << (width - 1)
            table.add(value + slack if value >= half else value, width)
        if count <= 0:
            raise CkdiffError("runs of zeros in the tree of a code", hint="please report it")
        remaining -= count
    data = table.whole_bytes() + _fse(symbols, counts, log)
    if len(data) > 127:
        raise CkdiffError("the tree of a code is too long to be described", hint="please report it")
    return bytes([len(data)]) + data


def normalised(symbols: list[int], size: int) -> list[int]:
    """Counts of 0..max(symbols) scaled to sum up to ``size``, none below 1."""
    found = [symbols.count(value) for value in range(max(symbols) + 1)]
    counts = [max(1, count * size // len(symbols)) for count in found]
    counts[counts.index(max(counts))] += size - sum(counts)
    return counts


class _Bits:
    """A little-endian bit string."""

    def __init__(self) -> None:
        self._value = 0
        self._length = 0

    def add(self, value: int, width: int) -> None:
        self._value |= value << self._length
        self._length += width

    def whole_bytes(self) -> bytes:
        return self._value.to_bytes(-(-self._length // 8), "little")


def _fse(symbols: list[int], counts: list[int], log: int) -> bytes:
    """Two interleaved FSE states over the symbols, written from the last to the first."""
    size = 1 << log
    spread = [0] * size
    position, step = 0, (size >> 1) + (size >> 3) + 3
    for symbol, count in enumerate(counts):
        for _ in range(count):
            spread[position] = symbol
            position = (position + step) % size
    upcoming = list(counts)
    states: list[list[tuple[int, int, int]]] = [[] for _ in counts]  # (state, bits, base)
    for state, symbol in enumerate(spread):
        number = upcoming[symbol]
        upcoming[symbol] += 1
        width = log - (number.bit_length() - 1)
        states[symbol].append((state, width, (number << width) - size))
    # Each state starts at the last symbol it gives, in its state with the most bits: the decoder
    # stops when the next update asks for more bits than there are.
    current = [-1, -1]
    out = _Bits()
    for i in range(len(symbols) - 1, -1, -1):
        which, symbol = i % 2, symbols[i]
        if current[which] < 0:
            current[which] = max(states[symbol], key=lambda s: s[1])[0]
            continue
        for state, width, start in states[symbol]:
            if start <= current[which] < start + (1 << width):
                out.add(current[which] - start, width)
                current[which] = state
                break
    out.add(current[1], log)
    out.add(current[0], log)
    out.add(1, 1)
    return out.whole_bytes()


assert STREAM * 4 == PIECE
