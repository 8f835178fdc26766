"""Which scale is whose: the dtypes and shapes of a quantised tensor and of its scales."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ckdiff.dtypes import DTYPES
from ckdiff.kernels.scaling import QUANTISED, Scaling

_EIGHT_BITS = tuple(name for name in QUANTISED if name.startswith("F8_"))
_POWERS = ("F8_E8M0", "U8")  # a power of two in a byte, also as it is stored for want of the dtype
GROUP = 32  #: elements of a group in the MX formats
_BLOCK = 128  # rows and columns of a block, where nothing says otherwise
_LEAST = 16  # of a block that only its shape tells of

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """What a table says of a tensor."""

    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Declared:
    """What the configuration beside the weights says."""

    block: tuple[int, int] | None = None  #: rows and columns that share a scale
    fp4: bool = False  #: weights of I8 are two FP4 in a byte, whatever their scales are


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that come of a quantised tensor and its scales."""

    shape: Shape  #: of the values
    scaling: Scaling | None  #: None where there are no elements


def grid_of(
    elements: Kind, scales: Kind, declared: Declared, *, as_experts: bool = False
) -> Grid | None:
    """How elements are scaled; None where dtypes or shapes do not say it beyond doubt.

    Scales are one for all, one for each index of the first dimensions, or a grid over the blocks of
    the last two. Powers of two are only taken for scales of blocks. ``as_experts``: a stack that
    may be (experts, in, out), of which FBGEMM has scales of ``out`` as (experts, out, 1).
    """
    held = _held(elements, scales, declared)
    factor = "F8_E8M0" if scales.dtype == "U8" else scales.dtype
    if held is None or (factor != "F8_E8M0" and not DTYPES["F32"].holds(DTYPES[factor])):
        return None
    if not prod(held.shape):
        return Grid(held.shape, None)
    if held.dtype == "F4":
        *lead, columns = held.shape
        return None if columns % 2 else Grid(held.shape, _in_groups(factor, prod(lead), columns))
    found = _turned(held.shape, scales.shape) if as_experts else None
    if found is None:
        found = _blocks(held.shape, scales.shape, declared)
    if found is None or (as_experts and _is_either(held.shape, scales.shape)):
        return None
    matrices, rows, columns, block = found
    if scales.dtype == "U8" and not _is_group(block[1]):
        return None
    try:
        scaling = Scaling(held.dtype, factor, rows, columns, block, matrices)
    except ValueError:
        return None
    return Grid(held.shape, scaling) if scaling.scales == prod(scales.shape) else None


def mx_grid(blocks: Kind, scales: Kind, *, turned: bool) -> Grid | None:
    """FP4 in groups of 32, (..., groups, 16) bytes, with a power of two for each of them.

    The values are (..., rows, 32 * groups); ``turned`` ones of three dimensions have the last two
    exchanged: the ``scaling`` is that of what is stored.
    """
    if blocks.dtype != "U8" or scales.dtype not in _POWERS or len(blocks.shape) < 2:
        return None
    *lead, groups, width = blocks.shape
    if width != GROUP // 2 or scales.shape != blocks.shape[:-1]:
        return None
    columns = groups * GROUP
    turned = turned and len(lead) == 2
    shape = (lead[0], columns, lead[1]) if turned else (*lead, columns)
    if not prod(shape):
        return Grid(shape, None)
    matrices, rows = (lead[0], lead[1]) if turned else (1, prod(lead))
    return Grid(shape, _in_groups("F8_E8M0", rows, columns, matrices))


def _in_groups(factor: str, rows: int, columns: int, matrices: int = 1) -> Scaling:
    return Scaling("F4", factor, rows, columns, (1, GROUP), matrices)


def _held(elements: Kind, scales: Kind, declared: Declared) -> Kind | None:
    """What the bytes of quantised elements are: those of FP4 have two in each."""
    powers = scales.dtype in _POWERS
    shape, of = elements.shape, scales.shape
    grouped = bool(shape) and shape[:-1] == of[:-1] and len(shape) == len(of)
    if elements.dtype in _EIGHT_BITS:
        return elements
    if elements.dtype == "F4":
        in_groups = grouped and of[-1] == -(-shape[-1] // GROUP)
        return elements if powers and in_groups else None
    if elements.dtype in ("I8", "U8") and (powers or (declared.fp4 and elements.dtype == "I8")):
        in_groups = grouped and of[-1] * GROUP // 2 == shape[-1]
        return Kind("F4", (*shape[:-1], 2 * shape[-1])) if in_groups else None
    return elements if elements.dtype == "I8" else None


def _is_group(columns: int) -> bool:
    """Whether so many columns may share a power of two that is stored as a plain byte."""
    return columns >= GROUP // 2 and columns & (columns - 1) == 0


def _blocks(
    shape: Shape, of: Shape, declared: Declared
) -> tuple[int, int, int, tuple[int, int]] | None:
    """Matrices, rows, columns, and the rows and columns of a block."""
    every, leading = prod(shape), of
    while leading and leading[-1] == 1:
        leading = leading[:-1]
    if not leading:
        return 1, 1, every, (1, every)
    known = len(leading)
    if len(of) <= len(shape) and known < len(shape) and leading == shape[:known]:
        columns = every // prod(leading)
        return 1, prod(leading), columns, (1, columns)
    if len(of) != len(shape) or len(shape) < 2 or of[:-2] != shape[:-2]:
        return None
    block = _block(shape[-2:], of[-2:], declared.block)
    if block is None or block == (1, 1):
        return None
    return prod(shape[:-2]), shape[-2], shape[-1], block


def _turned(shape: Shape, of: Shape) -> tuple[int, int, int, tuple[int, int]] | None:
    """The same where scales of columns lie as those of rows would."""
    if len(shape) != 3 or shape[1] in (1, shape[2]) or of != (shape[0], shape[2], 1):
        return None
    return shape[0], shape[1], shape[2], (shape[1], 1)


def _is_either(shape: Shape, of: Shape) -> bool:
    """Whether scales may be those of rows and of columns."""
    return len(shape) == 3 and shape[1] == shape[2] > 1 and of == (*shape[:2], 1)


def _block(sizes: Shape, counts: Shape, declared: tuple[int, int] | None) -> tuple[int, int] | None:
    """The size of the blocks of a matrix, of which there are ``counts`` down and across."""
    pairs = list(zip(sizes, counts, strict=True))
    if declared is not None and all(
        -(-n // b) == count for (n, count), b in zip(pairs, declared, strict=True)
    ):
        return min(declared[0], sizes[0]), min(declared[1], sizes[1])
    down, across = (_side(n, count) for n, count in pairs)
    return None if down is None or across is None else (down, across)


def _side(size: int, count: int) -> int | None:
    """The one size of block of which there are ``count`` in ``size``; None if it may be another."""
    if not 1 <= count <= size:
        return None
    if count in (1, size):
        return size // count
    if -(-size // _BLOCK) == count:
        return _BLOCK
    # of the sizes that would do the largest is less than twice the smallest
    power = 1 << (-(-size // count) - 1).bit_length()
    exact = None if size % count else size // count
    if -(-size // power) != count:
        power = exact or 0
    found = power if exact in (None, power) else 0
    return found if found >= _LEAST else None
