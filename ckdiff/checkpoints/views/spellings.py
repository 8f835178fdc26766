"""How published checkpoints spell names that libraries hold under others.

One spelling for each family that is told apart: its rules, in order, turn the published name into
the one in memory. A rule is ``PATTERN>NAME``, a regular expression and what takes the place of its
first match. One that begins with ``!`` proves nothing: it moves a part of the model that has the
same name in many models, and counts only beside another rule that found something.

Fused tensors get a leaf of ``fusions`` here, where theirs does not say how their rows are ordered.
"""

from __future__ import annotations

import re

from ckdiff.checkpoints.views.spelled_language import RULES as LANGUAGE
from ckdiff.checkpoints.views.spelled_vision import RULES as VISION

#: what of a pattern says nothing plain: what is in brackets, and classes of characters
_OTHER = re.compile(r"\((?:[^()]|\([^()]*\))*\)|\[[^]]*\]|\\[^.]")
_PLAIN = re.compile(r"(?:\w|\\\.)+(?![?*{])")


class _Rule:
    """One of them; compiled when it is first needed, as most never are: names that lack what each
    match has are told without.
    """

    __slots__ = ("_found", "_pattern", "_text", "_to", "proof")

    def __init__(self, text: str) -> None:
        self._text, _, self._to = text.removeprefix("!").rpartition(">")
        self._found = needed(self._text)
        self._pattern: re.Pattern[str] | None = None
        #: whether it proves something where it changes a name
        self.proof = not text.startswith("!")

    def apply(self, name: str) -> str:
        """The name after this rule."""
        if self._found not in name:
            return name
        if self._pattern is None:
            self._pattern = re.compile(self._text)
        return self._pattern.sub(self._to, name, count=1)


def needed(pattern: str) -> str:
    """The longest text found that is in all that a pattern matches; it may be empty."""
    plain = _OTHER.sub(" ", pattern)
    if "|" in plain or "(" in plain:
        return ""
    found = (piece.replace("\\", "") for piece in _PLAIN.findall(plain))
    return max(found, key=len, default="")


class Spelling:
    """The rules of one family; read when they are first applied, which is rare."""

    __slots__ = ("_rules", "_text", "name")

    def __init__(self, name: str, rules: str) -> None:
        self.name = name
        self._text = rules
        self._rules: tuple[_Rule, ...] = ()

    def apply(self, name: str) -> tuple[str, bool]:
        """The name after the rules, and whether one changed it that proves something."""
        if not self._rules:
            self._rules = tuple(map(_Rule, self._text.split()))
        proof = False
        for rule in self._rules:
            before = name
            name = rule.apply(name)
            proof = proof or (rule.proof and name != before)
        return name, proof


SPELLINGS = tuple(Spelling(name, rules) for name, rules in (LANGUAGE | VISION).items())
