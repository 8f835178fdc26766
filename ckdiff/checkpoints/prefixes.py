"""The renaming of one leading part that pairs the most names of two checkpoints."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator

#: of a name, with what ends it: components of a pipeline end with a slash
_PART = re.compile(r"[^./]*[./]|[^./]+")
_SAMPLE = 200  # names of the tuned side whose partners are looked for
_PARTNERS = 400  # names of the base that one of them is held against
_TRIED = 6  # renamings that are counted on all names
#: parts at the end of a name, at most, by which partners are found
_TAIL = 3
#: a renaming is worth saying when it pairs this share of the smaller checkpoint
_WORTH = 0.3
#: where this share is paired already, nobody needs one
_NEARLY_ALL = 0.9

#: what the tuned names begin with, and what they would begin with
Renaming = tuple[str, str]


def best_renaming(base: Collection[str], tuned: Collection[str]) -> tuple[Renaming, int] | None:
    """The renaming of a leading part of the tuned names that pairs the most, and how many.

    None where nearly all are paired already, or none pairs more than are.
    """
    in_base = base if isinstance(base, (set, dict)) else set(base)
    smaller = min(len(base), len(tuned))
    already = sum(name in in_base for name in tuned)
    if already >= _NEARLY_ALL * smaller:
        return None
    best: tuple[int, int, Renaming] | None = None
    for renaming in _likely(in_base, tuned):
        pairs = _pairs(renaming, in_base, tuned)
        if pairs is None or pairs <= already or pairs < _WORTH * smaller:
            continue
        candidate = pairs, -sum(map(len, renaming)), renaming
        if best is None or candidate[:2] > best[:2]:
            best = candidate
    return None if best is None else (best[2], best[0])


def as_option(renaming: Renaming) -> str:
    """``--rename`` with the renaming, for a shell."""
    import shlex

    old, new = renaming
    expression = f"^{re.escape(old)}={new}".replace("\n", "\\n")
    quoted = f"'{expression}'" if "'" not in expression else shlex.quote(expression)
    return f"--rename {quoted}"


def in_words(renaming: Renaming) -> str:
    """The renaming, where no option does it."""
    old, new = renaming
    if old and new:
        return f"the tuned names begin with {old!r} where the base's begin with {new!r}"
    if old:
        return f"the tuned names begin with {old!r}, and the base's do not"
    return f"the base's names begin with {new!r}, and the tuned ones do not"


def _likely(base: Collection[str], tuned: Collection[str]) -> list[Renaming]:
    """Renamings that would pair some name of a sample, the most frequent first."""
    names = [name for name in tuned if name not in base]
    sample = names[:: max(1, len(names) // _SAMPLE)]
    partners: dict[str, list[str]] = {tail: [] for name in sample for tail in _tails(name)}
    for name in base:
        for tail in _tails(name):
            found = partners.get(tail)
            if found is not None and len(found) < _PARTNERS:
                found.append(name)
    votes: Counter[Renaming] = Counter()
    for name in sample:
        others = next((partners[tail] for tail in _tails(name) if partners[tail]), [])
        # several partners may ask for the same: each name has one vote for it
        votes.update({renaming for other in others for renaming in _heads(name, other)})
    order = sorted(votes.items(), key=lambda item: (-item[1], sum(map(len, item[0])), item[0]))
    return [renaming for renaming, count in order[:_TRIED] if count >= order[0][1] * _WORTH]


def _tails(name: str) -> list[str]:
    """The last parts of a name, most of them first."""
    parts = _PART.findall(name)
    return ["".join(parts[-count:]) for count in range(min(_TAIL, len(parts)), 0, -1)]


def _heads(name: str, other: str) -> Iterator[Renaming]:
    """What both names begin with before the longest end that they share, in whole parts."""
    mine, theirs = _PART.findall(name), _PART.findall(other)
    same = 0
    while same < min(len(mine), len(theirs)) and mine[-1 - same] == theirs[-1 - same]:
        same += 1
    old, new = mine[: len(mine) - same], theirs[: len(theirs) - same]
    if same and old != new and not any(c in part for part in new for c in "=\\"):
        yield "".join(old), "".join(new)


def _pairs(renaming: Renaming, base: Collection[str], tuned: Collection[str]) -> int | None:
    """How many names it pairs; None where two would get one name."""
    old, new = renaming
    found = {new + name[len(old) :] if name.startswith(old) else name for name in tuned}
    return None if len(found) != len(tuned) else sum(name in base for name in found)
