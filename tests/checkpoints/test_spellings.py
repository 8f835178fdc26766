"""Rules that say how names are spelled: told without them where they cannot apply."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from ckdiff.checkpoints.views.spelled_language import RULES as LANGUAGE
from ckdiff.checkpoints.views.spelled_vision import RULES as VISION
from ckdiff.checkpoints.views.spellings import Spelling

TEXTS = (LANGUAGE | VISION).values()
RULES = sorted({rule for text in TEXTS for rule in text.split()})
PIECES = sorted({piece for rule in RULES for piece in re.findall(r"\w+", rule)})


def plainly(rules: str, name: str) -> tuple[str, bool]:
    """What a spelling makes of a name, rule by rule."""
    proof = False
    for rule in rules.split():
        pattern, _, to = rule.removeprefix("!").rpartition(">")
        before, name = name, re.sub(pattern, to, name, count=1)
        proof |= name != before and not rule.startswith("!")
    return name, proof


def one_match(pattern: str) -> str:
    """Something that a pattern matches, as short as can be."""
    pattern = re.sub(r"\(\?<?!(?:[^()]|\([^()]*\))*\)", "", pattern)  # what must not be there
    pattern = re.sub(r"(\([^()]*\)|\\.|\w)\?", "", pattern)
    pattern = re.sub(r"\\d\+?", "7", pattern).replace(".*", "")
    pattern = re.sub(r"\[(.)[^]]*\]", r"\1", pattern)
    pattern = re.sub(r"\(([^()|]*)\|?[^()]*\)", r"\1", pattern)
    return pattern.replace("^", "").replace("\\", "")


def test_every_rule_finds_what_it_matches() -> None:
    found = 0
    for rule in RULES:
        name = one_match(rule.removeprefix("!").rpartition(">")[0])
        for around in (name, f"{name}x", f"a{name}b", f"model.{name}.weight"):
            assert Spelling("", rule).apply(around) == plainly(rule, around)
        found += plainly(rule, name)[0] != name
    assert found == len(RULES)


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=8), st.sampled_from(sorted(TEXTS)))
def test_a_spelling_is_its_rules_in_order(pieces: list[str], rules: str) -> None:
    name = ".".join(pieces)
    assert Spelling("", rules).apply(name) == plainly(rules, name)


@given(st.text("ab.?*+|^\\d", max_size=6), st.text("ab.d7", max_size=8))
def test_no_pattern_loses_a_match(pattern: str, name: str) -> None:
    try:
        re.compile(pattern)
    except re.error:
        return
    rule = pattern.replace(">", "") + ">X"
    assert Spelling("", rule).apply(name) == plainly(rule, name)
