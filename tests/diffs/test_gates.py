"""What gates say of results, whoever made them."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
from diff_results import HOSTILE, lacking, result
from hypothesis import given
from hypothesis import strategies as st

from ckdiff.diffs.gates import Gates, judge
from ckdiff.diffs.result import Verdict
from ckdiff.errors import UsageError

TIED = {"name": "head", "same_as": "a", "side": "tuned"}


def said(verdicts: list[Verdict]) -> dict[str, bool]:
    return {verdict.gate: verdict.ok for verdict in verdicts}


def test_nothing_asked_is_nothing_said() -> None:
    assert judge(result({"a": 1}), Gates()) == []
    assert judge(result({"a": 1}), Gates(allow_unpaired=True)) == []
    assert not Gates(allow_unpaired=True, by_rule=True).asked


@pytest.mark.parametrize("limit", [0.0, 0.1, 0.15, 0.2, 1])
def test_densities(limit: float) -> None:
    found = result({"a": 0, "b": 3})  # 3 of 20
    above, unpaired = judge(found, Gates(fail_above=limit))
    assert (above.ok, above.value, above.threshold) == (limit >= 0.15, 0.15, limit)
    below, _ = judge(found, Gates(fail_below=limit))
    assert below.ok == (limit <= 0.15)
    assert (unpaired.gate, unpaired.ok, unpaired.value) == ("unpaired", True, 0)
    if not above.ok:
        assert above.reason == f"the exact density 0.15 exceeds --fail-above {limit:g}"


def test_densities_that_look_alike_are_told_apart() -> None:
    found = result({"a": 1_000_001}, elements=10_000_000)
    (verdict,) = judge(found, Gates(fail_above=0.1, allow_unpaired=True))
    assert "0.1000001 exceeds --fail-above 0.1" in verdict.reason


def test_the_first_rule_is_judged() -> None:
    found = result({"a": 9}, rules={"atol=1.0": {"a": 0}})
    assert said(judge(found, Gates(fail_above=0)))["fail-above"]
    assert not said(judge(found, Gates(fail_below=0.1)))["fail-below"]
    assert said(judge(found, Gates(exit_code=True, by_rule=True))) == {"exit-code": True}
    assert said(judge(found, Gates(exit_code=True))) == {"exit-code": False}


REASONS = ["added", "removed", "reshaped", "retyped", "missing"]


@pytest.mark.parametrize("reason", REASONS)
def test_what_was_not_compared_fails(reason: str) -> None:
    found = result({"a": 0}, unpaired=[lacking("x.y", reason), lacking("z", reason)])
    for gates in (Gates(fail_above=1), Gates(fail_below=0)):
        *_, verdict = judge(found, gates)
        assert (verdict.gate, verdict.ok, verdict.value) == ("unpaired", False, 2)
        assert verdict.reason.startswith(
            f"2 of 3 tensors were not compared, such as x.y ({reason})"
        )
    assert said(judge(found, Gates(fail_above=1, allow_unpaired=True))) == {"fail-above": True}
    (verdict,) = judge(found, Gates(exit_code=True, by_rule=True))
    assert (verdict.ok, verdict.value) == (False, 2)
    (lenient,) = judge(found, Gates(exit_code=True, allow_unpaired=True))
    assert not lenient.ok  # it speaks of densities only


def test_tied_tensors_fail_no_gate() -> None:
    found = result({"a": 0}, unpaired=[lacking("head")], tied=[TIED])
    asked = Gates(fail_above=0, exit_code=True, expect_unchanged=["*"])
    assert all(verdict.ok for verdict in judge(found, asked))
    (said,) = [verdict.reason for verdict in judge(found, asked) if verdict.gate == "unpaired"]
    assert said == "all 1 tensors were compared; 1 more on one side only, tied to others of it"
    for only in (Gates(expect_changed=["head"]), Gates(expect_unchanged=["head"])):
        (verdict,) = judge(found, only)
        assert verdict.ok
        assert verdict.reason.endswith(
            "is tied to another tensor, and was compared under its name only"
        )
    two = result({"a": 0}, unpaired=[lacking("head"), lacking("x")], tied=[TIED])
    assert judge(two, asked)[1].value == 1


def test_exit_code_looks_at_dtypes_where_no_rule_says_what_counts() -> None:
    retyped = [{"name": "a", "base": "F32", "tuned": "BF16"}]
    found = result({"a": 0}, retyped=retyped)
    assert found.differs
    assert said(judge(found, Gates(exit_code=True))) == {"exit-code": False}
    assert said(judge(found, Gates(exit_code=True, by_rule=True))) == {"exit-code": True}
    assert said(judge(found, Gates(fail_above=0))) == {"fail-above": True, "unpaired": True}


def test_expectations() -> None:
    found = result({"m.a": 0, "m.b": 2, "n": 0}, unpaired=[lacking("m.c"), lacking("n2")])
    changed, unchanged = judge(found, Gates(expect_changed=["m.*"], expect_unchanged=["n"]))
    assert (changed.ok, changed.value, changed.tensors) == (False, 2, ("m.a", "m.c"))
    assert changed.reason == (
        "--expect-changed 'm.*': 1 of 3 matching tensors is bit-identical and "
        "1 of 3 matching tensors was not compared: m.a, m.c"
    )
    assert (unchanged.ok, unchanged.value, unchanged.glob) == (True, 0, "n")
    (wrong,) = judge(found, Gates(expect_unchanged=["m.b"], allow_unpaired=True))
    assert not wrong.ok
    (lost,) = judge(found, Gates(expect_unchanged=["n2"], allow_unpaired=True))
    assert lost.tensors == ("n2",)


GROWN = {"resized": [{"name": "e", "base": [8, 2], "tuned": [9, 2], "rows": 8}]}
RETYPED = {"retyped": [{"name": "e", "base": "F32", "tuned": "BF16"}]}


@pytest.mark.parametrize("unlike", [GROWN, RETYPED, GROWN | RETYPED])
@pytest.mark.parametrize("count", [0, 1])
def test_other_rows_or_dtypes_are_not_called_bit_identical(
    unlike: dict[str, Any], count: int
) -> None:
    found = result({"e": count, "w": 0}, **unlike)
    asked = Gates(exit_code=True, expect_changed=["e"], expect_unchanged=["e"])
    leaving, changed, unchanged = judge(found, asked)
    assert (leaving.ok, changed.ok, unchanged.ok) == (False, count > 0, False)
    for verdict in (changed, unchanged):
        assert not verdict.reason.removesuffix(": e").endswith((" is bit-identical", "unchanged"))
        assert ("equal " in verdict.reason) == (count == 0)
    assert "all" not in unchanged.reason


def test_rows_that_only_one_side_has_are_said() -> None:
    assert result({"e": 0, "w": 0}, **GROWN).tensors_identical == 1
    found = result({"e": 0, "w": 0}, rules={"atol=1": {"e": 0, "w": 0}}, **GROWN)
    leaving = judge(found, Gates(exit_code=True, by_rule=True))[0]
    assert (leaving.ok, leaving.value) == (False, 1)
    assert leaving.reason == "1 tensor of another number of rows, such as e"
    _, unpaired = judge(found, Gates(fail_above=1))
    assert unpaired.ok  # what both sides have was compared, as was asked for
    assert unpaired.reason == "all 2 tensors were compared, 1 of them in part"


def test_what_matches_nothing_is_an_error() -> None:
    found = result({"a": 0}, unpaired=[lacking("b")])
    for asked in (Gates(expect_changed=["c"]), Gates(expect_unchanged=["a", "c*"])):
        with pytest.raises(UsageError, match=r"'c.*' matches no tensor"):
            judge(found, asked)
    found.unmatched = ["--exclude 'x'"]
    with pytest.raises(UsageError, match="--exclude 'x' matches no tensor"):
        judge(found, Gates(exit_code=True))
    assert judge(found, Gates()) == []


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), "0.5", True, [1]])
@pytest.mark.parametrize("name", ["fail_above", "fail_below"])
def test_no_density(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        Gates(**{name: value})  # type: ignore[arg-type]


def test_other_arguments() -> None:
    assert Gates(expect_changed="*.w").expected == [("--expect-changed", "*.w")]
    with pytest.raises(UsageError, match="exit_code"):
        Gates(exit_code="no")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="expect_changed"):
        Gates(expect_changed=[1])  # type: ignore[list-item]


def test_reasons_are_one_safe_line() -> None:
    found = result({HOSTILE: 3, "b" * 5000: 0}, unpaired=[lacking(HOSTILE + "x")])
    asked = Gates(fail_above=0, exit_code=True, expect_changed=["*"], expect_unchanged=["*"])
    for verdict in judge(found, asked):
        assert verdict.reason.isprintable()
        assert len(verdict.reason) < 2000


NAMES = st.text("ab.*[", min_size=1, max_size=4)


@given(
    paired=st.dictionaries(NAMES, st.integers(0, 3), min_size=1, max_size=5),
    more=st.lists(NAMES, max_size=3, unique=True),
    glob=NAMES,
)
def test_expectations_like_a_twin(paired: dict[str, int], more: list[str], glob: str) -> None:
    lost = [name for name in more if name not in paired]
    found = result(paired, unpaired=[lacking(name) for name in lost])
    matching = [name for name in [*paired, *lost] if fnmatch.fnmatchcase(name, glob)]
    asked = Gates(expect_changed=[glob], expect_unchanged=[glob])
    if not matching:
        with pytest.raises(UsageError):
            judge(found, asked)
        return
    changed, unchanged = judge(found, asked)
    assert changed.tensors == tuple(n for n in matching if n in lost or not paired[n])
    assert unchanged.tensors == tuple(n for n in matching if n in lost or paired[n])


def test_json() -> None:
    found = result(
        {"a": 0, "b": 1},
        unpaired=[
            lacking("x", shape=(3, 5)),
            lacking("s", shape=()),
            {"name": "m", "reason": "missing"},
            {**lacking("r", "reshaped"), "tuned_shape": [7, 2]},
        ],
    )
    assert found.uncompared == {"tensors": 4, "elements": 15 + 1 + 0 + 14}
    assert found.tensors_identical == 1
    assert found.unpaired["missing"] == ["m"]
    assert found.ok
    found.gates = judge(found, Gates(fail_above=0.5, expect_changed=["a"]))
    data = found.to_dict()
    assert not data["ok"]
    assert [gate["gate"] for gate in data["gates"]] == ["fail-above", "unpaired", "expect-changed"]
    assert {"gate", "threshold", "value", "ok"} <= data["gates"][0].keys()
    assert (data["gates"][2]["glob"], data["gates"][2]["tensors"]) == ("a", ["a"])
    for key in ("base", "tuned", "version", "retyped", "resized", "tied", "uncompared"):
        assert key in data
