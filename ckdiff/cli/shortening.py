"""Names in little room: what differs stays different.

Where names stand below each other, one that is cut must not look like another: ``model.la…weight``
is true of every matrix of a model. So the names of a column are shortened together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["shorten", "shortened", "text_width"]

_PARTS = re.compile(r"([0-9]+|[./_-])")
_FIRST = re.compile(r"[^./]*[./]")
_SENSIBLE = 2000  #: characters of a name that is looked at part by part
_LONGEST_PART = 8  #: characters of a part of an abbreviated name, to begin with


def text_width(text: str) -> int:
    """Columns that a text takes on a terminal."""
    if text.isascii() or text.replace("…", "").isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def shorten(text: str, width: int, mark: str = "…") -> str:
    """``text`` in at most ``width`` columns: its middle goes, for names differ at both ends.

    At least two characters stay, and the mark.
    """
    if text_width(text) <= width:
        return text
    keep = max(width - len(mark), 2)
    head = keep // 2
    return _first(text, head) + mark + _last(text, keep - head)


def shortened(texts: Iterable[str], width: int, mark: str = "…") -> list[str]:
    """Every text in at most ``width`` columns, those that differ so that they still do.

    One way is taken for all: without the middle; or without what most of them begin with and end
    with, too; or with the parts of each abbreviated, numbers whole. What is still the same gets a
    number. Where ``width`` is less than six columns nothing can be promised.
    """
    asked = list(texts)
    names = list(dict.fromkeys(asked))
    long = [name for name in names if text_width(name) > width]
    if not long:
        return asked
    taken = set(names).difference(long)
    made = _middle(long, width, mark)
    least = _alike(made, taken)
    for way in (_apart, _abbreviated):
        if least and (alike := _alike(other := way(long, width, mark), taken)) < least:
            made, least = other, alike
    named = dict(zip(long, _numbered(made, taken, width), strict=True))
    return [named.get(text, text) for text in asked]


def _alike(made: Sequence[str], taken: set[str]) -> int:
    """How many of them cannot be told from another."""
    return sum(n for text, n in Counter(made).items() if n > 1 or text in taken)


def _middle(names: Sequence[str], width: int, mark: str) -> list[str]:
    return [shorten(name, width, mark) for name in names]


def _apart(names: Sequence[str], width: int, mark: str) -> list[str]:
    """Without what most begin and end with, as far as that is whole parts; then the middle."""
    return [
        shorten(before * mark + rest + after * mark, width, mark)
        for before, rest, after in _trimmed(names)
    ]


def _abbreviated(names: Sequence[str], width: int, mark: str) -> list[str]:
    """``…10.mlp.exp.117.up_`` for ``model.layers.10.mlp.experts.117.up_proj.weight``."""
    return [_brief(rest, width, before * mark, mark) for before, rest, _ in _trimmed(names)]


def _trimmed(names: Sequence[str]) -> list[tuple[bool, str, bool]]:
    """Each name without what is the same in all of the largest family, those that have the first
    part in common; and whether something is missing before it and after it.
    """
    firsts = [_FIRST.match(name) for name in names]
    heads = ["" if first is None else first[0] for first in firsts]
    ((family, many),) = Counter(heads).most_common(1)
    if not family or many < 2:
        return [(False, name, False) for name in names]
    of_it = [name for name, head in zip(names, heads, strict=True) if head == family]
    begin = _common_parts(of_it)
    end = _common_parts([name[begin:][::-1] for name in of_it])
    return [
        (True, name[begin : len(name) - end], end > 0) if head == family else (False, name, False)
        for name, head in zip(names, heads, strict=True)
    ]


def _common_parts(names: Sequence[str]) -> int:
    """How many characters are whole parts that all names begin with."""
    first, last = min(names), max(names)  # what these two share, all others share
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), None)
    shared = first[:same] if same is not None else first[: len(last)]
    return max(shared.rfind("."), shared.rfind("/")) + 1


def _brief(name: str, width: int, before: str, mark: str) -> str:
    """The longest abbreviation that fits, after ``before``; else its two ends."""
    text = before + name
    if len(name) <= _SENSIBLE:
        pieces = _PARTS.split(name)
        numbers = [piece.isdecimal() for piece in pieces]
        lengths = [len(piece) for piece in pieces]
        for most in range(_LONGEST_PART, 0, -1):
            least = sum(map(min, lengths, [most] * len(lengths))) if name.isascii() else 0
            if most > 1 and least > width:  # it cannot fit, so that nobody needs to look
                continue
            text = before + "".join(
                piece if whole else _first(piece, most)
                for piece, whole in zip(pieces, numbers, strict=True)
            )
            if text_width(text) <= width:
                return text
    return shorten(text, width, mark)


def _numbered(made: Sequence[str], taken: set[str], width: int) -> list[str]:
    """``made``, in which what cannot be told from another ends in ``~2``, ``~3`` and so on."""
    used = set(taken)
    last: Counter[str] = Counter()
    room = width - len(f"~{len(made) + len(taken) + 1}")
    out = []
    for text in made:
        unique = text
        if text in used and room > 0:
            begin = _first(text, room)  # counted by what it begins with: no number is tried twice
            while unique in used:
                last[begin] += 1
                unique = f"{begin}~{last[begin] + 1}"
        used.add(unique)
        out.append(unique)
    return out


def _first(text: str, columns: int) -> str:
    """As much of the beginning as fits into so many columns."""
    if text.isascii() or len(text) <= columns // 2:
        return text[:columns]
    end = min(columns, len(text))
    while end and text_width(text[:end]) > columns:
        end -= 1
    return text[:end]


def _last(text: str, columns: int) -> str:
    """As much of the end as fits into so many columns."""
    if text.isascii():
        return text[len(text) - columns :]
    begin = max(len(text) - columns, 0)
    while begin < len(text) and text_width(text[begin:]) > columns:
        begin += 1
    return text[begin:]
