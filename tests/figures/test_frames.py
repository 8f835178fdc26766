"""Records as frames: the same numbers in both libraries, and what is missing stays missing."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckdiff.errors import UsageError
from ckdiff.figures.frames import columns, pandas_frame, polars_frame

NUMBERS = {
    "whole": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(allow_nan=False),
    "some_whole": st.none() | st.integers(0, 2**53),
    "some_float": st.none() | st.floats(allow_nan=False),
    "text": st.text(max_size=5),
    "some_text": st.none() | st.text(max_size=5),
    "yes": st.booleans(),
    "list": st.lists(st.integers(0, 9), max_size=3),
    "nothing": st.none(),
}


@settings(max_examples=30)
@given(st.lists(st.fixed_dictionaries(NUMBERS), max_size=6))
def test_frames_have_what_the_records_have(drawn: list[dict[str, object]]) -> None:
    records: list[dict[str, Any]] = drawn
    names = list(NUMBERS)
    assert list(pandas_frame(records, names).columns) == names
    many = polars_frame(records, names)
    assert many.columns == names
    assert many.to_dicts() == records
    found = pandas_frame(records, names).to_dict("records")
    for row, record in zip(found, records, strict=True):
        for name, value in record.items():
            if value is None:
                assert row[name] is None or row[name] != row[name] or "NA" in repr(row[name])
            else:
                assert row[name] == value


def test_types_of_columns() -> None:
    records: list[dict[str, Any]] = [
        {"n": 1, "m": None, "x": 1, "y": None},
        {"n": 2, "m": 2**53 + 1, "x": 0.5, "y": 2.0},
    ]
    frame = pandas_frame(records)
    assert list(map(str, frame.dtypes)) == ["int64", "Int64", "float64", "float64"]
    assert frame["m"][1] == 2**53 + 1  # no float in between
    assert math.isnan(frame["y"][0])
    assert list(map(str, polars_frame(records).dtypes)) == ["Int64", "Int64", "Float64", "Float64"]


def test_what_is_no_unicode_can_be_a_name() -> None:
    """A file's name that is not UTF-8, say."""
    records = [{"name": "a\udcff"}, {"name": "b"}]
    for frame in (pandas_frame(records), polars_frame(records)):
        assert list(frame["name"]) == ["a\\udcff", "b"]


def test_records_of_unlike_keys() -> None:
    assert columns([{"a": 1}, {"b": 2}], ["z"]) == {
        "z": [None, None],
        "a": [1, None],
        "b": [None, 2],
    }


@pytest.mark.parametrize(("make", "name"), [(pandas_frame, "pandas"), (polars_frame, "polars")])
def test_without_the_library(make: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=rf"ckdiff\[{name}\]'.*ckdiff\[notebook\]"):
        make([])
