"""How published checkpoints spell names that libraries hold under others.

One spelling for each family that is told apart: its rules, in order, turn the published name into
the one in memory. A rule is ``PATTERN>NAME``, a regular expression and what takes the place of its
first match. One that begins with ``!`` proves nothing: it moves a part of the model that has the
same name in many models, and counts only beside another rule that found something.

Fused tensors get a leaf of ``fusions`` here, where theirs does not say how their rows are ordered.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ckdiff.checkpoints.views.spelled_language import RULES as LANGUAGE
from ckdiff.checkpoints.views.spelled_vision import RULES as VISION


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    name: str
    proof: bool


class Spelling:
    """The rules of one family; compiled when they are first applied, which is rare."""

    __slots__ = ("_rules", "_text", "name")

    def __init__(self, name: str, rules: str) -> None:
        self.name = name
        self._text = rules
        self._rules: tuple[_Rule, ...] = ()

    def apply(self, name: str) -> tuple[str, bool]:
        """The name after the rules, and whether one changed it that proves something."""
        if not self._rules:
            self._rules = tuple(map(_rule, self._text.split()))
        proof = False
        for pattern, to, proves in self._rules:
            before = name
            name = pattern.sub(to, name, count=1)
            proof = proof or (proves and name != before)
        return name, proof


def _rule(text: str) -> _Rule:
    pattern, _, name = text.removeprefix("!").rpartition(">")
    return _Rule(re.compile(pattern), name, not text.startswith("!"))


SPELLINGS = tuple(Spelling(name, rules) for name, rules in (LANGUAGE | VISION).items())
