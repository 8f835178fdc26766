"""Which names of two checkpoints mean the same weights, in whatever spelling and however fused.

Only tensors that do not pair as they are take part. What is found is pairs of positions: what it
makes of them, ``unfusing`` says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.checkpoints.views.fusions import (
    HALVES,
    ROWS,
    STACKS,
    UNSAFE,
    WHOLE,
    Key,
    Reading,
    Share,
    member,
    read,
    rows_of,
    shards_of,
    stacks_of,
    unsafe_of,
)
from ckdiff.checkpoints.views.spellings import SPELLINGS, Spelling

#: names of different make that a spelling is tried on
_SAMPLE = 400
#: a spelling is believed when so many of the names that it changes are then found
_BELIEVED = 0.9
#: or all but one, where there are so many: one may have lost its partner
_SPARED = 3
#: numbers of layers and experts; not those in a word, such as norm1's, which tell tensors apart
_NUMBERS = re.compile(r"(?<=\.)[0-9]+(?=\.)")
_TWICE = -1

#: tensors whose names differ in numbers alone: positions and names
Make = list[tuple[int, str]]
Kind = Literal["rows", "stack", "shards", "unsafe"]


class Found(NamedTuple):
    """The parts, among the other side's tensors, of one fused tensor."""

    kind: Kind
    keys: tuple[Key, ...]  #: what the parts are called, one for each role
    #: for each role the positions of its parts by their number: 0 alone where there is but one
    parts: tuple[dict[int, int], ...]
    share: Share = WHOLE  #: which of the numbers are those of the fused tensor


@dataclass(slots=True)
class Index:
    """The tensors of a side that are still to be matched, by what their names say."""

    table: TensorTable
    names: dict[int, str]  #: by position, in the spelling that is tried
    exact: dict[str, int] = field(default_factory=dict)  #: position, -1 where two have the name
    keys: dict[Key, int] = field(default_factory=dict)
    members: dict[Key, dict[int, int]] = field(default_factory=dict)
    readings: dict[int, Reading] = field(default_factory=dict)  #: by position
    _fronts: set[str] = field(default_factory=set)  #: what stands before the numbers

    def __post_init__(self) -> None:
        for position, name in self.names.items():
            self.exact[name] = _TWICE if name in self.exact else position
            reading = self.readings[position] = read(name)
            key: Key = (reading.home, reading.leaf, reading.tail)
            self.keys[key] = _TWICE if key in self.keys else position
            one = member(reading)
            if one is not None:
                row = self.members.setdefault(one[0], {})
                row[one[1]] = _TWICE if one[1] in row else position
                self._fronts.add(one[0][0])

    def find(self, reading: Reading) -> Found | None:
        """The tensors of this side that a tensor so called, of the other side, may hold."""
        if reading.leaf in ROWS:
            for keys in rows_of(reading):
                if any(key in self.keys for key in keys):
                    return Found("rows", keys, self._alone(keys))
        if reading.home in self._fronts or reading.home.endswith(HALVES):
            for keys, share in stacks_of(reading):
                if any(key in self.members for key in keys):
                    rows = tuple(self.members.get(key, {}) for key in keys)
                    return Found("stack", keys, rows, share)
        shards = shards_of(reading)
        if shards[0] in self._fronts and shards in self.members:
            return Found("shards", (shards,), (self.members[shards],))
        if reading.leaf in UNSAFE:
            for keys in unsafe_of(reading):
                if any(key in self.keys for key in keys):
                    return Found("unsafe", keys, self._alone(keys))
        return None

    def _alone(self, keys: tuple[Key, ...]) -> tuple[dict[int, int], ...]:
        return tuple({0: self.keys[key]} if key in self.keys else {} for key in keys)

    def holds(self, reading: Reading) -> bool:
        """Whether a tensor of this side may hold one so called."""
        if any((reading.home, leaf, reading.tail) in self.keys for leaf in _fused_rows(reading)):
            return True
        one = member(reading)
        return one is not None and any(key in self.keys for key in _holders(one[0]))


def _reversed(table: dict[str, tuple[tuple[str, ...], ...]]) -> dict[str, tuple[str, ...]]:
    """From the leaf of a part to the leaves of the fused tensors that it may be in."""
    found: dict[str, dict[str, None]] = {}
    for fused, ways in table.items():
        for leaf in (leaf for leaves in ways for leaf in leaves):
            found.setdefault(leaf, {})[fused] = None
    return {leaf: tuple(fused) for leaf, fused in found.items()}


_IN_ROWS = _reversed(ROWS | UNSAFE)
_IN_STACKS = _reversed(STACKS)


def _fused_rows(reading: Reading) -> tuple[str, ...]:
    return _IN_ROWS.get(reading.leaf, ())


def _holders(key: Key) -> Iterator[Key]:
    """The keys of tensors that may hold a numbered row."""
    home, leaf, tail = key
    if leaf == "shard":
        front, _, last = home.rpartition(".")
        yield front, last, tail
        return
    homes = [home]
    if home.endswith(".experts"):
        homes.append(home.removesuffix(".experts") + ".text_moe.experts")
    for each in homes:
        for fused in (*_IN_STACKS.get(leaf, ()), leaf):
            yield each, fused, tail
        if leaf.endswith("s"):
            yield each, leaf[:-1], tail


class Guess(NamedTuple):
    """Under which spelling two sides are looked at."""

    chain: tuple[Spelling, ...]  #: applied one after the other; none: the names as they are
    old: int  #: the side whose names they change: 0 base, 1 tuned
    score: int

    def name(self, name: str) -> str:
        """The name in this spelling."""
        for spelling in self.chain:
            name, _ = spelling.apply(name)
        return name


def best_guess(sides: Sequence[Index], tried: Sequence[Guess]) -> Guess | None:
    """The spelling under which most kinds of names find each other; None where none does.

    What was tried before is not tried again, but other spellings are, on top of it: a model in
    another one has names that both have changed.
    """
    samples = [_sample(side.names.items()) for side in sides]
    best = Guess((), 0, 0)
    if all(guess.chain for guess in tried):
        best = Guess((), 0, _score(sides[0], samples[0], sides[1], None))
    seen = {(guess.chain, guess.old) for guess in tried}
    for old in (0, 1):
        for chain in [(), *(guess.chain for guess in tried if guess.chain and guess.old == old)]:
            before = Guess(chain, old, 0)
            if len(samples[old]) <= best.score:
                continue  # nothing finds more: rules are compiled where they are needed
            sample = [[(i, before.name(name)) for i, name in make] for make in samples[old]]
            for spelling in SPELLINGS:
                if spelling in chain or ((*chain, spelling), old) in seen:
                    continue
                score = _score(sides[old], sample, sides[1 - old], spelling)
                if score > best.score:
                    best = Guess((*chain, spelling), old, score)
    return best if best.score else None


def _sample(names: Iterable[tuple[int, str]]) -> list[Make]:
    """The first and the last tensor of each make of name, numbers aside; of some makes where there
    are too many."""
    makes: dict[str, Make] = {}
    for one in names:
        make = makes.setdefault(_NUMBERS.sub("#", one[1]), [one])
        make[1:] = [one] if one is not make[0] else []
    found = list(makes.values())
    return found[:: -(-len(found) // _SAMPLE)] if len(found) > _SAMPLE else found


def _score(old: Index, sample: list[Make], new: Index, spelling: Spelling | None) -> int:
    """How many of the sampled makes are found; 0 where too many changed ones are not."""
    score = changed = found = 0
    proven = spelling is None
    for make in sample:
        hit = differs = proof = False
        for position, name in make:
            renamed, proves = (name, False) if spelling is None else spelling.apply(name)
            differs, proof = differs or renamed != name, proof or proves
            hit = _lands(old.table.shapes[position], renamed, new)
            if hit:
                break
        score += hit
        changed += differs
        found += differs and hit
        proven = proven or (proof and hit)
    believed = found >= _BELIEVED * changed or (found >= _SPARED and found == changed - 1)
    return score if proven and believed else 0


def _lands(shape: tuple[int, ...], name: str, new: Index) -> bool:
    other = new.exact.get(name, _TWICE)
    if other != _TWICE:
        return new.table.shapes[other] == shape or turned(shape, new.table.shapes[other])
    reading = read(name)
    return new.find(reading) is not None or new.holds(reading)


def turned(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether a stack of matrices is of the other's shape once each is transposed."""
    return len(one) == 3 and other == (one[0], one[2], one[1])
