"""The renaming that pairs the most names of two checkpoints.

It gives the tuned names another leading part, or takes parts out of them that the base's names
never have, as wrappers of a module put them in anywhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

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

#: whether a tensor of the base and one of the tuned side, of these names, could be the same
Fit = Callable[[str, str], bool]


@dataclass(frozen=True, slots=True)
class Leading:
    """The tuned names begin with ``new`` instead of ``old``."""

    old: str
    new: str

    def __call__(self, name: str) -> str:
        return self.new + name[len(self.old) :] if name.startswith(self.old) else name

    def expressions(self) -> list[str]:
        """What ``--rename`` takes, in order."""
        return [f"^{re.escape(self.old)}={self.new}"]

    def in_words(self) -> str:
        """The renaming, where no option does it."""
        old, new = self.old, self.new
        if old and new:
            return f"the tuned names begin with {old!r} where the base's begin with {new!r}"
        if old:
            return f"the tuned names begin with {old!r}, and the base's do not"
        return f"the base's names begin with {new!r}, and the tuned ones do not"

    def length(self) -> int:
        return len(self.old) + len(self.new)


@dataclass(frozen=True, slots=True)
class Inner:
    """The tuned names lose ``parts``, which end with a dot or a slash, wherever these stand."""

    parts: tuple[str, ...]

    def __call__(self, name: str) -> str:
        return re.sub(self._pattern(), "", name)

    def expressions(self) -> list[str]:
        """What ``--rename`` takes, in order."""
        return [f"{self._pattern()}="]

    def in_words(self) -> str:
        """The renaming, where no option does it."""
        return f"the tuned names have {' and '.join(map(repr, self.parts))} in them"

    def length(self) -> int:
        return sum(map(len, self.parts))

    def _pattern(self) -> str:
        parts = "|".join(map(re.escape, self.parts))
        return parts if len(self.parts) == 1 else f"({parts})"


@dataclass(frozen=True, slots=True)
class Both:
    """The one, and then the other, as names of a whole model need that an adapter wraps."""

    leading: Leading
    inner: Inner

    def __call__(self, name: str) -> str:
        return self.inner(self.leading(name))

    def expressions(self) -> list[str]:
        """What ``--rename`` takes, in order."""
        return [*self.leading.expressions(), *self.inner.expressions()]

    def in_words(self) -> str:
        """The renaming, where no option does it."""
        return f"{self.leading.in_words()}, and {self.inner.in_words()}"

    def length(self) -> int:
        return self.leading.length() + self.inner.length()


Renaming = Leading | Inner | Both


def best_renaming(
    base: Collection[str], tuned: Collection[str], fit: Fit
) -> tuple[Renaming, int] | None:
    """The renaming of the tuned names that pairs the most tensors which fit, and how many.

    None where nearly all names are paired already, or no renaming pairs more than are.
    """
    in_base = base if isinstance(base, (set, dict)) else set(base)
    smaller = min(len(base), len(tuned))
    already = sum(name in in_base for name in tuned)
    if already >= _NEARLY_ALL * smaller:
        return None
    best: tuple[int, bool, int, Renaming] | None = None
    for renaming in _likely(in_base, tuned):
        pairs = _pairs(renaming, in_base, tuned, fit)
        if pairs is None or pairs <= already or pairs < _WORTH * smaller:
            continue
        candidate = pairs, isinstance(renaming, Leading), -renaming.length(), renaming
        if best is None or candidate[:3] > best[:3]:
            best = candidate
    return None if best is None else (best[3], best[0])


def as_option(renaming: Renaming) -> str:
    """``--rename`` with the renaming, for a shell."""
    import shlex

    options = []
    for expression in renaming.expressions():
        line = expression.replace("\n", "\\n")
        quoted = f"'{line}'" if "'" not in line else shlex.quote(line)
        options.append(f"--rename {quoted}")
    return " ".join(options)


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
    votes: Counter[Leading] = Counter()
    for name in sample:
        others = next((partners[tail] for tail in _tails(name) if partners[tail]), [])
        # several partners may ask for the same: each name has one vote for it
        votes.update({renaming for other in others for renaming in _heads(name, other)})
    order = sorted(votes.items(), key=lambda item: (-item[1], item[0].length(), item[0].old))
    leading = [renaming for renaming, count in order[:_TRIED] if count >= order[0][1] * _WORTH]
    known = {part for name in base for part in _PART.findall(name)}
    inner = _inner(base, known, sample)
    both = [Both(head, more) for head in leading
            for more in _inner(base, known, list(map(head, sample)))]  # fmt: skip
    return [*leading, *inner, *both]


def _inner(base: Collection[str], known: set[str], sample: Collection[str]) -> list[Inner]:
    """The renaming that takes out of names all but the ``known`` parts, which are those of the
    base's names, if that pairs some.
    """
    foreign: dict[str, None] = {}
    for name in sample:
        parts = _PART.findall(name)
        kept = "".join(part for part in parts if part in known)
        if kept != name and kept in base:
            foreign.update(dict.fromkeys(part for part in parts if part not in known))
    return [Inner(tuple(foreign))] if 0 < len(foreign) <= _TRIED else []


def _tails(name: str) -> list[str]:
    """The last parts of a name, most of them first."""
    parts = _PART.findall(name)
    return ["".join(parts[-count:]) for count in range(min(_TAIL, len(parts)), 0, -1)]


def _heads(name: str, other: str) -> Iterator[Leading]:
    """What both names begin with before the longest end that they share, in whole parts."""
    mine, theirs = _PART.findall(name), _PART.findall(other)
    same = 0
    while same < min(len(mine), len(theirs)) and mine[-1 - same] == theirs[-1 - same]:
        same += 1
    old, new = mine[: len(mine) - same], theirs[: len(theirs) - same]
    if same and old != new and not any(c in part for part in new for c in "=\\"):
        yield Leading("".join(old), "".join(new))


def _pairs(
    renaming: Renaming, base: Collection[str], tuned: Collection[str], fit: Fit
) -> int | None:
    """How many tensors it pairs; None where two would get one name."""
    found = {renaming(name): name for name in tuned}
    if len(found) != len(tuned):
        return None
    return sum(name in base and fit(name, before) for name, before in found.items())
