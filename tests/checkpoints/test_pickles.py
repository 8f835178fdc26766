"""Pickles of all protocols against Python's own reader, and what becomes of what is not known."""

from __future__ import annotations

import argparse
import collections
import pickle
import pickletools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckdiff.checkpoints.formats.pickledvalues import Odd, Record, Word, as_bytes, children, walk
from ckdiff.checkpoints.formats.pickles import read_pickle
from ckdiff.errors import CheckpointError

PROTOCOLS = range(6)


def read(raw: bytes, step: int = 1 << 20, **options: Any) -> Any:
    pieces = [raw[at : at + step] for at in range(0, len(raw), step)]
    return read_pickle(pieces, len(raw), "f", **options)


def plain(value: Any) -> Any:
    """What Python reads, with sets and keys as ours are."""
    if isinstance(value, dict):
        return [(plain(key), plain(inner)) for key, inner in value.items()]
    if isinstance(value, list | set | frozenset):
        return [plain(inner) for inner in value]
    if isinstance(value, tuple):
        return tuple(plain(inner) for inner in value)
    if isinstance(value, bytearray):
        return bytes(value)
    return value


def ours(value: Any) -> Any:
    data = as_bytes(value)
    if data is not None:
        return data
    if isinstance(value, Odd):
        return ours(value.value)
    if isinstance(value, dict):
        return [(ours(key), ours(inner)) for key, inner in value.items()]
    if isinstance(value, list):
        return [ours(inner) for inner in value]
    return tuple(ours(inner) for inner in value) if isinstance(value, tuple) else value


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.text(), st.binary(),
    st.floats(allow_nan=False),
)  # fmt: skip
KEYS = st.one_of(st.text(), st.integers(), st.tuples(st.text(), st.integers()))
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v) | st.dictionaries(KEYS, v) | st.tuples(v, v), max_leaves=12
)


@settings(max_examples=150, deadline=None)
@given(VALUES, st.sampled_from(PROTOCOLS), st.sampled_from([1, 3, 1 << 20]), st.booleans())
def test_plain_values(value: Any, protocol: int, step: int, optimized: bool) -> None:
    raw = pickle.dumps(value, protocol)
    if optimized:  # the memo is numbered with gaps, or anew
        raw = pickletools.optimize(raw)
    assert ours(read(raw, step)) == plain(value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_containers_of_classes(protocol: int) -> None:
    found = read(pickle.dumps(collections.OrderedDict(a=1, b=2), protocol))
    assert found == {"a": 1, "b": 2}
    assert read(pickle.dumps(collections.defaultdict(list, a=1), protocol)) == {"a": 1}
    assert sorted(read(pickle.dumps({"a", "b"}, protocol))) == ["a", "b"]
    assert sorted(read(pickle.dumps(frozenset("ab"), protocol))) == ["a", "b"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_not_known_is_a_record(protocol: int) -> None:
    space = argparse.Namespace(rate=0.5, inner=argparse.Namespace(name="x"))
    found = read(pickle.dumps(space, protocol))
    assert isinstance(found, Record)
    assert found.name == "argparse.Namespace"
    assert found.field("rate") == 0.5
    assert found.field("inner").fields == {"name": "x"}
    assert found.field("missing", 7) == 7
    counted = read(pickle.dumps(collections.Counter("aab"), protocol))
    assert counted.args == ({"a": 2, "b": 1},)
    assert any(isinstance(v, Word) is False and v == 2 for v in walk(counted))
    assert "Namespace" in repr(found)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_and_generators_of_numpy_are_records(protocol: int) -> None:
    content = [np.arange(5), np.float64(0.5), np.random.get_state(), np.random.default_rng(1)]
    found = read(pickle.dumps(content, protocol))
    assert len(found) == 4
    assert all(isinstance(v, Record | tuple) for v in found)
    assert sum(1 for _ in walk(found)) > 20


def test_old_texts() -> None:
    assert read(b"S'a\\n\\x41'\n.") == "a\nA"
    assert read(b"U\3abc.") == "abc"
    assert read(b"T\2\0\0\0\xff\xfe.") == b"\xff\xfe"
    assert read(b"I01\n.") is True
    assert read(b"L12L\n.") == 12


def test_long_texts_and_data_are_passed_over() -> None:
    found = read(pickle.dumps({"a": "x" * (2 << 20), "b": b"y" * (2 << 20), "c": 1}, 4), 4096)
    assert found["c"] == 1
    assert type(found["a"]) is type(found["b"]) is Record


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "ends early"),
        (b"N", "ends early"),
        (b"N.x", "goes on after its end"),
        (b".", "damaged"),
        (b"NN.", "damaged"),
        (b"h\0.", "damaged"),
        (b"t.", "damaged"),
        (b"NNNs.", "damaged"),
        (b"}NNsNNs.", "two values for one name"),
        (b"\xff.", "not known"),
        (b"P1\n.", "refers to something that is not in the file"),
        (b"\x82\1.", "refers to something that is not in the file"),
        (b"N}b.", "sets what no object has"),
        (b"ca\nb\n}b.", "sets what no object has"),
        (b"ca\nb\n)\x81}b}b.", "sets the state of one object twice"),
        (b"X\4\0\0\0\xff\xff\xff\xff.", "not valid text"),
        (b"Sabc\n.", "damaged"),
        (b"Ixyz\n.", "impossible number"),
        (b"\x8a\5\1.", "ends early"),
        (b"p-1\n.", "damaged"),
        (b"Np-1\n.", "damaged"),
    ],
)
def test_what_is_damaged_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read(raw)
    with pytest.raises(CheckpointError, match="too long"):
        read(pickle.dumps(list(range(1000))), limit=100)


def test_children_say_where() -> None:
    content = read(pickle.dumps({"a": [1, {2: 3}], (1, 2): 4}, 2))
    assert [label for label, _ in children(content)] == ["a", "a key", "a key"]
    assert dict(children(content["a"])) == {"0": 1, "1": {2: 3}}
    assert list(children(content["a"][1])) == [("2", 3)]
