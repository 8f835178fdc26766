"""Rules: every spelling of a rule is the same rule, and has one canonical text."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ckdiff.dtypes import DTYPES
from ckdiff.errors import CkdiffError, RuleError
from ckdiff.rules import EXACT, ROUNDED, Rule, parse_rules


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        ("exact", "exact"),
        (" Exact\n", "exact"),
        ("exact@bf16", "exact@bf16"),
        ("EXACT@BFloat16", "exact@bf16"),
        ("exact@fp16", "exact@f16"),
        ("exact@float16", "exact@f16"),
        ("exact@float32", "exact@f32"),
        ("atol=1e-05", "atol=1e-5"),
        ("atol=1E-5", "atol=1e-5"),
        ("atol=0.00001", "atol=1e-5"),
        ("atol=.00001", "atol=1e-5"),
        ("atol=+10e-6", "atol=1e-5"),
        ("atol=1e-5@bf16", "atol=1e-5@bf16"),
        ("atol=0", "atol=0"),
        ("atol=-0.0", "atol=0"),
        ("atol=0e9", "atol=0"),
        ("atol=1", "atol=1"),
        ("atol=1.0", "atol=1"),
        ("atol=100", "atol=100"),
        ("atol=1000", "atol=1e3"),
        ("atol=0.5", "atol=0.5"),
        ("atol=0.1", "atol=0.1"),
        ("atol=0.25", "atol=0.25"),
        ("atol=1234.5", "atol=1234.5"),
        ("atol=1e22", "atol=1e22"),
        ("atol=5e-324", "atol=5e-324"),
        ("atol=1.7976931348623157e308", "atol=1.7976931348623157e308"),
        ("rtol=0.001", "rtol=1e-3"),
        ("rtol=1e-3", "rtol=1e-3"),
        ("rtol=1.0e-3", "rtol=1e-3"),
        ("rtol=0.3333333333333333", "rtol=0.3333333333333333"),
        ("ulp=0", "ulp=0"),
        ("ulp=007", "ulp=7"),
        ("ulp=18446744073709551615", "ulp=18446744073709551615"),
        ("ulp=1@f16", "ulp=1@f16"),
    ],
)
def test_spellings(spelling: str, canonical: str) -> None:
    rule = Rule.parse(spelling)
    assert str(rule) == canonical
    assert Rule.parse(canonical) == rule
    assert Rule.parse(rule) is rule


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "exactly", "exact=", "exact=1", "exact@", "exact@bf8", "exact@f64", "exact@exact",
        "@bf16", "atol", "atol=", "atol=x", "atol=-1", "atol=-1e-9", "atol=nan", "atol=inf",
        "atol=1e309", "atol=1_000", "atol=0x10", "atol=1e-5@", "atol=1e-5@bf16@f16", "atol==1",
        "atol = 1", "atol=1 ulp=2", "rtol=-0.1", "rtol=infinity", "ulp", "ulp=", "ulp=-1",
        "ulp=1.0",
        "ulp=1e3", "ulp=18446744073709551616", "ulp=" + "9" * 5000, "ulp=٣", "ulp=1_0", "tol=1",
        "close=1", "exact,atol=1", "=1", "atol=1;exact", "../exact", "atol=1/2", "exact\0",
    ],
)  # fmt: skip
def test_what_is_not_a_rule(text: str) -> None:
    with pytest.raises(RuleError) as caught:
        Rule.parse(text)
    assert isinstance(caught.value, CkdiffError)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert "\n" not in caught.value.one_line()


@pytest.mark.parametrize("thing", [None, 1, 1e-5, b"exact", ["exact"]])
def test_rules_are_text(thing: object) -> None:
    with pytest.raises(RuleError):
        Rule.parse(thing)  # type: ignore[arg-type]


@given(
    st.sampled_from(["atol", "rtol"]),
    st.floats(0, allow_nan=False, allow_infinity=False),
    st.sampled_from(["", "@bf16", "@f16", "@f32"]),
)
@example("atol", 9007199254740993.0, "")
@example("rtol", 2.0**-1074, "@f32")
def test_the_text_is_the_number(kind: str, number: float, target: str) -> None:
    rule = Rule.parse(f"{kind}={number!r}{target}")
    assert rule.value == number
    assert math.copysign(1, rule.value) == 1
    text = str(rule)
    assert Rule.parse(text) == rule
    assert hash(Rule.parse(text)) == hash(rule)
    assert "e-0" not in text
    assert "+" not in text
    assert len(text) <= len(f"{kind}={number!r}{target}")


@given(st.integers(0, 2**64 - 1))
def test_ulps_are_exact(ulps: int) -> None:
    rule = Rule.parse(f"ulp={ulps}")
    assert rule.ulps == ulps
    assert str(rule) == f"ulp={ulps}"


@given(st.text(max_size=20))
def test_any_text_is_a_rule_or_a_rule_error(text: str) -> None:
    for attempt in (text, f"atol={text}", f"ulp={text}", f"exact@{text}"):
        try:
            rule = Rule.parse(attempt)
        except RuleError:
            continue
        assert Rule.parse(str(rule)) == rule


def test_a_rule_counts_once() -> None:
    rules = parse_rules(["atol=1e-5", "exact", "atol=0.00001", Rule.parse("ulp=1"), "EXACT"])
    assert [str(r) for r in rules] == ["atol=1e-5", "exact", "ulp=1"]
    assert parse_rules("exact") == [EXACT]
    assert parse_rules(Rule.parse("ulp=1")) == [Rule.parse("ulp=1")]
    assert parse_rules([]) == []


def test_which_dtypes_a_rule_rounds() -> None:
    rounds = {
        target: {d.name for d in DTYPES.values() if Rule.parse(f"exact@{target}").rounds(d)}
        for target in ROUNDED
    }
    assert rounds == {
        "bf16": {"F64", "F32", "F16"},
        "f16": {"F64", "F32", "BF16"},
        "f32": {"F64"},
    }
    assert Rule.parse("ulp=1@bf16").rounds(DTYPES["F64"]) == DTYPES["BF16"]


def test_where_numeric_rules_mean_exact() -> None:
    raw = {"BOOL", "C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"}
    for text in ("atol=1", "rtol=0", "ulp=3@bf16"):
        assert {d.name for d in DTYPES.values() if Rule.parse(text).falls_back(d)} == raw
    assert not any(EXACT.falls_back(d) for d in DTYPES.values())
    assert not any(Rule.parse("exact@bf16").falls_back(d) for d in DTYPES.values())
