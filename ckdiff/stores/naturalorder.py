"""Whether many names are in natural order, told from whole columns of their characters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ckdiff.layout import IntArray
from ckdiff.naming import natural_key

_WIDEST = 256  # characters of a name; longer ones are compared one by one
_ROWS = 1 << 14  # names that are compared at a time


def ascending(names: Sequence[str]) -> bool:
    """Whether names are in natural order, each once. Raises ValueError for what is no text.

    Their keys tell, but making 100,000 of them takes as long as everything else about opening a
    store: of plain names only the places are looked at where a name differs from the one before.
    """
    longest = max(map(len, names), default=0)
    text = "".join(names)
    text.encode()  # raises UnicodeEncodeError, a ValueError, for half a surrogate pair
    if longest > _WIDEST or not text.isascii() or "\0" in text:
        return _ascending_keys(names)
    for first in range(0, len(names), _ROWS):
        block = names[first : first + _ROWS + 1]
        chars = np.array(block, f"S{longest + 2}").view(np.uint8).reshape(len(block), -1)
        found = _ascending_rows(chars)
        if not (_ascending_keys(block) if found is None else found):
            return False
    return True


def _ascending_keys(names: Sequence[str]) -> bool:
    keys = list(map(natural_key, names))
    return all(before < after for before, after in pairwise(keys))


def _ascending_rows(chars: npt.NDArray[np.uint8]) -> bool | None:
    """``ascending`` of names as rows of characters; None where a number has leading zeros."""
    digit = (chars - ord("0")) < 10  # unsigned: what is below wraps around
    zero = chars == ord("0")
    if (zero[:, 0] & digit[:, 1]).any() or (~digit[:, :-2] & zero[:, 1:-1] & digit[:, 2:]).any():
        return None
    before, after = chars[:-1], chars[1:]
    rows = np.arange(len(before))
    at = (before != after).argmax(1)
    one, other = before[rows, at].astype(np.int16), after[rows, at].astype(np.int16)
    if (one == other).any():  # they differ nowhere
        return False
    digits = digit[rows, at], digit[rows + 1, at]
    inside = (at > 0) & digit[rows, np.maximum(at - 1, 0)]  # the number began before
    lengths = [_run(digit, rows + i, at, found) for i, found in enumerate(digits)]
    # the end of a name comes before a number, and that before any text
    ranks = [np.where(found & ~inside, 1, np.where(char > 0, char + 2, 0))
             for char, found in zip((one, other), digits, strict=True)]  # fmt: skip
    numbers = (digits[0] & digits[1]) | inside
    by_length = numbers & (lengths[0] != lengths[1])
    less = np.where(
        by_length,
        lengths[0] < lengths[1],
        np.where(digits[0] & digits[1], one < other, ranks[0] < ranks[1]),
    )
    return bool(less.all())


def _run(
    digit: npt.NDArray[np.bool_], rows: IntArray, at: IntArray, begins: npt.NDArray[np.bool_]
) -> IntArray:
    """How many digits follow each other from column ``at`` on."""
    length = begins.astype(np.int64)
    going = np.flatnonzero(begins)
    step = 1
    while len(going):
        going = going[digit[rows[going], at[going] + step]]  # the last column is no digit
        length[going] += 1
        step += 1
    return length
