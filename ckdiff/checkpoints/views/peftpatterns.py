"""The patterns by which PEFT gives modules their own rank or alpha, matched in bounded time.

PEFT asks ``re.match(rf"(.*\\.)?({pattern})$", module)``. A pattern comes out of a file that
somebody else wrote, and Python's own matcher can be made to run for years. So patterns are followed
here state by state: the time is bounded by the length of the name times that of the pattern, and
counted.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from ckdiff.checkpoints.formats.strictjson import shown
from ckdiff.errors import CheckpointError

_STATE_LIMIT = 4096  # of one pattern; those of real adapters have a hundred
_LENGTH_LIMIT = 1024  # characters of a pattern
_PLAIN = re.compile(r"[\w.-]+")
_ANY = -1  # a label that every character has
_HINT = "give each module its own entry, or merge the adapter with PEFT"


@dataclass(slots=True)
class Steps:
    """How many steps all matching together may take yet."""

    left: int = 20_000_000

    def spend(self, number: int, where: str) -> None:
        """Raises CheckpointError when there are none left."""
        self.left -= number
        if self.left < 0:
            raise CheckpointError(f"{where} takes too long to match", hint=_HINT)


@dataclass(slots=True)
class _States:
    """A machine whose states are numbers: where each leads without a character, and with one."""

    where: str  #: how errors name the pattern
    free: list[list[int]] = field(default_factory=list)
    begin: list[list[int]] = field(default_factory=list)  #: free, but only before any character
    end: list[list[int]] = field(default_factory=list)  #: free, but only after all characters
    step: list[list[tuple[Any, int]]] = field(default_factory=list)

    def new(self) -> int:
        if len(self.free) == _STATE_LIMIT:
            raise _unusable(self.where, "it is too long")
        for edges in (self.free, self.begin, self.end, self.step):
            edges.append([])
        return len(self.free) - 1

    def closure(self, states: Iterable[int], first: bool, last: bool) -> frozenset[int]:
        """All states that can be reached from ``states`` without a character."""
        seen, todo = set(states), list(states)
        while todo:
            state = todo.pop()
            near = list(self.free[state])
            near += self.begin[state] if first else []
            near += self.end[state] if last else []
            for other in near:
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        return frozenset(seen)


class Pattern:
    """One pattern of ``rank_pattern`` or ``alpha_pattern``.

    ``where`` is how errors name it. Raises CheckpointError for what is no pattern, and for patterns
    that look around or back: PEFT's users have no need of them.
    """

    def __init__(self, text: str, where: str) -> None:
        self.text = text
        self._where = f"{where} {shown(text, 60)}"
        self._plain = bool(_PLAIN.fullmatch(text)) and len(text) <= _LENGTH_LIMIT
        self.states = 0  #: of the machine; a plain name needs none
        self._known: dict[tuple[frozenset[int], str, bool], frozenset[int]] = {}
        if self._plain:
            return
        if len(text) > _LENGTH_LIMIT:
            raise _unusable(self._where, "it is too long")
        self._states = _States(self._where)
        try:
            with warnings.catch_warnings(action="ignore"):  # of sets that may mean more one day
                # by itself: what is no pattern must not close the group that PEFT puts it in
                tree = parser.parse(text)
            if tree.state.flags & ~re.UNICODE:
                raise _unusable(self._where, "it sets flags")
            self._first, self._last = self._machine(tree)
            self.states = len(self._states.free)
        except RecursionError:
            raise _unusable(self._where, "it is nested too deeply") from None
        except (re.error, OverflowError) as error:
            raise _unusable(self._where, str(error)) from None

    def matches(self, module: str, steps: Steps) -> bool:
        """Whether PEFT would say so. Raises CheckpointError where that takes too long."""
        steps.spend(1, self._where)
        if self._plain:
            return self._ends(module)
        states = self._states.closure([self._first], True, not module)
        for i, character in enumerate(module):
            last = i + 1 == len(module)
            states = self._next(states, character, last, steps)
            if not states:
                return False
        return self._last in states

    def _ends(self, module: str) -> bool:
        """The same for letters, digits and dots, where a dot stands for any character."""
        rest = len(module) - len(self.text)
        if rest < 0 or (rest and module[rest - 1] != "."):
            return False
        pairs = zip(self.text, module[rest:], strict=True)
        return all(wanted in (".", found) for wanted, found in pairs)

    def _next(
        self, states: frozenset[int], character: str, last: bool, steps: Steps
    ) -> frozenset[int]:
        key = (states, character, last)
        found = self._known.get(key)
        if found is None:
            steps.spend(2 * len(states) + 1, self._where)
            reached = {
                to for s in states for label, to in self._states.step[s] if _has(label, character)
            }
            found = self._states.closure(reached, False, last)
            steps.spend(2 * len(found), self._where)
            if len(self._known) >= 4096:
                self._known.clear()
            self._known[key] = found
        steps.spend(1, self._where)
        return found

    def _machine(self, tree: Any) -> tuple[int, int]:
        """``(.*\\.)?`` and then the pattern: the first state and the last."""
        states = self._states
        first, inside, middle, last = (states.new() for _ in range(4))
        states.free[first] += [middle, inside]
        states.step[inside].append((_ANY, inside))
        states.step[inside].append((_Set([ord(".")]), middle))
        self._sequence(tree, middle, last)
        return first, last

    def _sequence(self, tree: Any, first: int, last: int) -> None:
        at = first
        for kind, argument in tree:
            to = self._states.new()
            self._part(kind, argument, at, to)
            at = to
        self._states.free[at].append(last)

    def _part(self, kind: Any, argument: Any, at: int, to: int) -> None:
        states = self._states
        if kind is op.LITERAL:
            states.step[at].append((_Set([argument]), to))
        elif kind is op.NOT_LITERAL:
            states.step[at].append((_Set([argument], negated=True), to))
        elif kind is op.ANY:
            states.step[at].append((_ANY, to))
        elif kind is op.IN:
            characters = _Set([])
            for item in argument:
                if not characters.add(*item):
                    raise self._unknown(item[0])
            states.step[at].append((characters, to))
        elif kind is op.BRANCH:
            for branch in argument[1]:
                self._sequence(branch, at, to)
        elif kind is op.SUBPATTERN:
            if argument[1] or argument[2]:
                raise _unusable(self._where, "it sets flags")
            self._sequence(argument[3], at, to)
        elif kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            self._repeat(argument, at, to)
        elif kind is op.AT and argument in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
            states.begin[at].append(to)
        elif kind is op.AT and argument in (op.AT_END, op.AT_END_STRING):
            states.end[at].append(to)
        else:
            raise self._unknown(kind)

    def _unknown(self, kind: Any) -> CheckpointError:
        return _unusable(self._where, f"{str(kind).lower()} is not known here")

    def _repeat(self, argument: tuple[int, int, Any], at: int, to: int) -> None:
        low, high, body = argument
        for _ in range(low):
            at = self._once(body, at)
        if high == op.MAXREPEAT:
            loop = self._states.new()
            self._states.free[at].append(loop)
            self._states.free[self._once(body, loop)].append(loop)
            at = loop
        else:
            for _ in range(high - low):
                self._states.free[at].append(to)
                at = self._once(body, at)
        self._states.free[at].append(to)

    def _once(self, body: Any, at: int) -> int:
        end = self._states.new()
        self._sequence(body, at, end)
        return end


@dataclass(slots=True)
class _Set:
    """Characters: single ones, and ranges of them."""

    single: list[int]
    ranges: list[tuple[int, int]] = field(default_factory=list)
    classes: list[re.Pattern[str]] = field(default_factory=list)
    negated: bool = False

    def add(self, kind: Any, argument: Any) -> bool:
        """Add what is between brackets; False for what is not known here."""
        if kind is op.NEGATE:
            self.negated = True
        elif kind is op.LITERAL:
            self.single.append(argument)
        elif kind is op.RANGE:
            self.ranges.append(argument)
        elif kind is op.CATEGORY and argument in _CLASSES:
            self.classes.append(_CLASSES[argument])
        else:
            return False
        return True

    def has(self, character: str) -> bool:
        code = ord(character)
        inside = (
            code in self.single
            or any(low <= code <= high for low, high in self.ranges)
            or any(one.match(character) for one in self.classes)
        )
        return inside != self.negated


_CLASSES = {
    getattr(op, f"CATEGORY_{name}"): re.compile(rf"\{letter}")
    for name, letter in {
        "DIGIT": "d", "NOT_DIGIT": "D", "SPACE": "s", "NOT_SPACE": "S",
        "WORD": "w", "NOT_WORD": "W",
    }.items()
}  # fmt: skip


def _has(label: Any, character: str) -> bool:
    return character != "\n" if label is _ANY else label.has(character)


def _unusable(where: str, why: str) -> CheckpointError:
    return CheckpointError(f"{where} cannot be used: {why}", hint=_HINT)
