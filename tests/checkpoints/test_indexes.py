"""What the files of a checkpoint hold against what its index says of them, or without one."""

from __future__ import annotations

import pytest
from folders import index
from hypothesis import given
from hypothesis import strategies as st

from ckdiff.checkpoints.indexes import Listed, check_unlisted, index_of, joined_by_index
from ckdiff.errors import CheckpointError

Held = list[tuple[str, list[str]]]


def test_the_index_is_the_list() -> None:
    held: Held = [("m.safetensors", ["a", "stale", "b"])]
    listed = joined_by_index("dir", {"a": "m.safetensors", "b": "m.safetensors"}, held)
    assert (listed.kept, listed.missing) == ([[True, False, True]], ())
    (warning,) = listed.warnings
    assert "1 tensor " in warning
    assert "'stale' of m.safetensors" in warning
    held.append(("n.safetensors", ["old", "older"]))
    (warning,) = joined_by_index("dir", {"a": "m.safetensors", "b": "m.safetensors"}, held).warnings
    assert "3 tensors " in warning
    assert "such as 'stale'" in warning


def test_a_name_in_two_files_is_the_index_s() -> None:
    held: Held = [("1", ["a", "b"]), ("2", ["b", "a"])]
    listed = joined_by_index("dir", {"a": "1", "b": "2"}, held)
    assert listed == Listed([[True, False], [True, False]], (), ())


def test_a_name_that_its_file_lacks() -> None:
    held: Held = [("1", ["a"]), ("2", ["b"])]
    listed = joined_by_index("dir", {"a": "1", "mtp.fc.weight": "2", "b": "2"}, held)
    assert (listed.kept, listed.missing) == ([[True], [True]], ("mtp.fc.weight",))
    (warning,) = listed.warnings
    assert "1 tensor that its files lack, 'mtp.fc.weight' of 2" in warning
    listed = joined_by_index("dir", {"a": "2", "b": "2"}, held)
    assert (listed.kept, listed.missing) == ([[False], [True]], ("a",))
    assert listed.warnings[0].endswith("it is in 1")


def test_warnings_are_lines() -> None:
    name = "\x1b[2J\n" * 1000
    listed = joined_by_index("dir", {name: "1", "a": "1"}, [("1", ["a", f"{name}x"])])
    for warning in listed.warnings:
        assert warning.isprintable()
        assert len(warning) < 1000


@given(
    weight_map=st.dictionaries(st.sampled_from("abcde"), st.sampled_from("12"), min_size=1),
    held=st.fixed_dictionaries(
        dict.fromkeys("12", st.lists(st.sampled_from("abcdefg"), unique=True))
    ),
)
def test_every_name_counts_once_or_is_missing(
    weight_map: dict[str, str], held: dict[str, list[str]]
) -> None:
    listed = joined_by_index("dir", weight_map, list(held.items()))
    kept = [
        (name, file)
        for (file, names), flags in zip(held.items(), listed.kept, strict=True)
        for name, flag in zip(names, flags, strict=True)
        if flag
    ]
    expected = {name: file for name, file in weight_map.items() if name in held[file]}
    assert dict(kept) == expected
    assert len(kept) == len(expected)
    assert set(listed.missing) == weight_map.keys() - expected.keys()
    unnamed = {name for names in held.values() for name in names} - weight_map.keys()
    assert len(listed.warnings) == bool(unnamed) + bool(listed.missing)


def test_files_that_no_index_lists_are_one_model() -> None:
    check_unlisted("dir", [("1", ["a", "b"]), ("2", ["c"])])
    names = [f"x-{i}-of-2.safetensors" for i in (1, 2)] + ["y.safetensors"]
    with pytest.raises(CheckpointError) as raised:
        check_unlisted("dir", [(names[0], ["a"]), (names[1], ["b"]), (names[2], ["b", "c"])])
    line = raised.value.one_line()
    for words in (
        "'b'",
        f"both {names[1]} and {names[2]}",
        f"{names[0]} to {names[1]}, {names[2]}",
    ):
        assert words in line


def test_what_an_index_says() -> None:
    found = index_of(index({"a": "./x", "b": "d/./x"}, total_size=1.5e9), "index")
    assert found.weight_map == {"a": "x", "b": "d/x"}
    assert found.metadata == {"total_size": 1.5e9}
    for raw in (b'{"weight_map":{"a":"x"}}', b'{"metadata":[1],"weight_map":{"a":"x"}} \n'):
        assert index_of(raw, "index").metadata == {}
