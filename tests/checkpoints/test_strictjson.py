"""JSON values are read from windows of the text, and where a window ends makes no difference."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ckdiff.checkpoints.formats import strictjson
from ckdiff.checkpoints.formats.strictjson import VALUE_LIMIT, any_value
from ckdiff.checkpoints.indexes import index_of

VALUES: list[Any] = [
    0, 123456789012, -7, 1.5, -2.5e10, True, None, "é" * 5, "x\\y", [1, [2]], {"a": {"b": 1}},
    12345678901234567890123456789,
]  # fmt: skip


@pytest.mark.parametrize("window", [1 << 10, 1 << 15])
@pytest.mark.parametrize("value", VALUES, ids=str)
def test_values_at_the_end_of_a_window(value: Any, window: int) -> None:
    text = json.dumps(value, ensure_ascii=False).encode()
    for before in range(window - len(text) - 50, window + 3):
        raw = b'["' + b"x" * (before - 5) + b'",' + text + b"]"
        found, end = any_value(raw + b",1", 0, whole_numbers=False)
        assert (found[1], end) == (value, len(raw))


def test_a_number_of_a_whole_window() -> None:
    for digits in (1000, 1022, 1023, 1024, 1025, 5000, 40_000):
        text = b"1." + b"3" * digits
        assert any_value(text + b",", 0, whole_numbers=False)[1] == len(text)
    with pytest.raises(ValueError, match="digits"):
        any_value(b"1" * 3000 + b",", 0, whole_numbers=False)


def test_values_that_are_too_long() -> None:
    for text in (b'"' + b"x" * VALUE_LIMIT + b'"', b"[" + b"1," * VALUE_LIMIT + b"1]"):
        with pytest.raises(ValueError, match="longer than"):
            any_value(text, 0, whole_numbers=False)
    text = b'"' + b"x" * (VALUE_LIMIT - 2) + b'"'
    assert any_value(text + b"}", 0, whole_numbers=False)[1] == VALUE_LIMIT


def test_many_short_values_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of short values must not cost the longest value that is allowed for each."""
    looked_at, value_in = [0], strictjson._value_in

    def counted(window: bytes, *rest: Any) -> Any:
        looked_at[0] += len(window)
        return value_in(window, *rest)

    monkeypatch.setattr(strictjson, "_value_in", counted)
    raw = b"{" + b"".join(b'"%x":1,' % i for i in range(2000)) + b'"weight_map":{"x":"a"}}'
    assert index_of(raw, "index").weight_map == {"x": "a"}
    assert looked_at[0] <= 2000 << 10


def test_a_map_of_very_many_strings_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """77 MB of pairs of nothing would take 850 MiB of memory."""
    raw = b"{" + b",".join(b'"%d":""' % i for i in range(20)) + b"}"
    found, end = strictjson.string_map(raw, 0)
    assert (len(found), end) == (20, len(raw))
    monkeypatch.setattr(strictjson, "PAIR_LIMIT", 19)
    with pytest.raises(ValueError, match="more than 19 strings"):
        strictjson.string_map(raw, 0)
