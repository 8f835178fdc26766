"""Which elements of a matrix are the smallest: found by counting, a window at a time.

The bits of a number without its sign are ordered like its magnitude. Sixteen of them at a time, the
highest first, a histogram says in which class the limit lies; after one pass (16-bit floats) to
four (64 bits) the limit is a single magnitude. What is below it is taken, and of what is equal to
it the first ones by address. Nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.dtypes import DTYPES
from ckdiff.errors import CkdiffError
from ckdiff.kernels.memory import Bytes

Keys = npt.NDArray[Any]  # unsigned

_DIGIT = 16  # bits


def magnitudes(data: Bytes, dtype: str) -> Keys:
    """Unsigned numbers that are ordered like the absolute values of the elements in ``data``.

    Both zeros are 0. A NaN is larger than everything else. Elements must be numbers of whole bytes.
    """
    form = DTYPES[dtype]
    if not form.numeric or form.bits % 8:
        raise CkdiffError(f"{dtype} has no magnitudes", hint="please report it")
    unsigned: Any = np.dtype(f"<u{form.bits // 8}")
    bits: Keys = data.view(unsigned)
    sign = unsigned.type(1 << (form.bits - 1))
    if form.kind == "uint":
        return bits
    if form.kind == "int":
        return np.where(bits & sign, ~bits + unsigned.type(1), bits)
    size: Keys = bits & ~sign
    if form.special == "fnuz":  # its only NaN has the bits of a negative zero
        size[bits == sign] = np.iinfo(unsigned).max
    return size


@dataclass(frozen=True, slots=True)
class Limit:
    """The elements of a tensor that are taken: all below ``key``, and the first ``equal`` at it."""

    key: int
    equal: int


def smallest(windows: Callable[[], Iterator[Keys]], bits: int, wanted: int) -> Limit:
    """The limit of the ``wanted`` smallest of what ``windows`` gives, each time it is called.

    ``bits`` are those of an element; ``wanted`` is at least 1 and at most the number of elements.
    """
    left, prefix = wanted, 0
    for shift in range(max(bits - _DIGIT, 0), -1, -_DIGIT):
        counts = np.zeros(1 << min(_DIGIT, bits), np.int64)
        for keys in windows():
            inside = keys
            if shift + _DIGIT < bits:
                inside = keys[keys >> keys.dtype.type(shift + _DIGIT) == prefix]
            digits = (inside >> keys.dtype.type(shift)).astype(np.uint64) & np.uint64(0xFFFF)
            counts += np.bincount(digits.astype(np.int64), minlength=len(counts))
        upto = np.cumsum(counts)
        digit = int(np.searchsorted(upto, left))
        left -= int(upto[digit] - counts[digit])
        prefix = prefix << _DIGIT | digit
    return Limit(prefix, left)


def taken(keys: Keys, limit: Limit, before: int) -> tuple[npt.NDArray[np.bool_], int]:
    """Which of the next elements are taken, where ``before`` equal ones came already.

    Gives how many came now as well.
    """
    found: npt.NDArray[np.bool_] = keys < limit.key
    equal = np.flatnonzero(keys == limit.key)
    found[equal[: max(0, limit.equal - before)]] = True
    return found, before + len(equal)
