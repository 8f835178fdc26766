"""Safetensors files of pieces: joined they are the tensors that were saved."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from given_files import all_bytes, contents_of, opened
from hypothesis import given
from hypothesis import strategies as st
from support import write_safetensors

import ckdiff
from ckdiff.checkpoints.contents import SHARDING
from ckdiff.checkpoints.formats import dcppieces
from ckdiff.errors import CheckpointError

Array = np.ndarray[Any, Any]


def write(folder: Path, name: str, tensors: dict[str, tuple[Any, Array]], info: Any = ...) -> None:
    """A file of arrays, each with its offsets; ``info`` instead of what they say, if given."""
    folder.mkdir(exist_ok=True)
    if info is ...:
        said = {n: {"saved_offsets": list(at)} for n, (at, _) in tensors.items() if at is not None}
        info = json.dumps(said)
    head: dict[str, Any] = {} if info is None else {"__metadata__": {SHARDING: info}}
    at, data = 0, b""
    names = {"float32": "F32", "uint8": "U8", "int64": "I64"}
    for n, (_, array) in tensors.items():
        head[n] = {
            "dtype": names[str(array.dtype)], "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }  # fmt: skip
        at += array.nbytes
        data += array.tobytes()
    text = json.dumps(head).encode()
    (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + data)


FULL = np.arange(48, dtype=np.float32).reshape(8, 6)


def test_halves_and_what_is_whole(tmp_path: Path) -> None:
    whole = np.arange(3, dtype=np.int64)
    nothing = np.zeros((0, 4), np.uint8)
    write(tmp_path, "a.safetensors", {"w": ((0, 0), FULL[:3]), "whole": (None, whole)})
    write(
        tmp_path,
        "b.safetensors",
        {"w": ((3, 0), FULL[3:]), "n": ((0, 0), nothing), "s": ((), np.float32(1).reshape(()))},
    )
    with opened(dcppieces, tmp_path) as checkpoint:
        assert all_bytes(checkpoint) == {
            "w": ("F32", (8, 6), FULL.tobytes()),
            "whole": ("I64", (3,), whole.tobytes()),
            "n": ("U8", (0, 4), b""),
            "s": ("F32", (), np.float32(1).tobytes()),
        }
        assert not checkpoint.in_files
        assert list(checkpoint.contents.pieces) == [0]


@given(st.data())
def test_any_grid_in_any_files(tmp_path_factory: Any, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    array = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
    edges = [sorted({0, n, *data.draw(st.sets(st.integers(0, n), max_size=2))}) for n in shape]
    for i, box in enumerate(itertools.product(*(itertools.pairwise(e) for e in edges))):
        part = np.ascontiguousarray(array[tuple(slice(low, high) for low, high in box)])
        write(folder, f"{i}.safetensors", {"w": (tuple(low for low, _ in box), part)})
    write(folder, "z.safetensors", {"other": ((0,), np.arange(2, dtype=np.uint8))})
    with opened(dcppieces, folder) as checkpoint:
        assert all_bytes(checkpoint)["w"] == ("I64", shape, array.tobytes())


def test_a_diff_counts_what_changed(tmp_path: Path) -> None:
    tuned = FULL.copy()
    tuned[2:4, 1] = -1
    for side, array, cut in (("a", FULL, 3), ("b", tuned, 5)):
        write(tmp_path / side, "1.safetensors", {"w": ((0, 0), array[:cut])})
        write(tmp_path / side, "2.safetensors", {"w": ((cut, 0), array[cut:])})
    with opened(dcppieces, tmp_path / "a") as one, opened(dcppieces, tmp_path / "b") as other:
        assert ckdiff.diff(one, other).rules["exact"]["changed"] == 2


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        (((0, 0), FULL[:3]), ((4, 0), FULL[4:]), "missing"),
        (((0, 0), FULL[:3]), ((2, 0), FULL[2:]), "overlap"),
        (((0, 0), FULL), ((0, 0), FULL), "overlap"),
        ((None, FULL), ((8, 0), FULL), None),
        (((1, 0), FULL[:3]), ((4, 0), FULL[4:]), "missing"),
        (((0, 0), FULL[:3]), ((3, 0), FULL[3:].astype(np.uint8)), "U8.*F32"),
        (((0, 0), FULL[:3]), ((3,), FULL[3]), "dimensions"),
        (((0, 0), FULL[:3]), ((1 << 61, 0), FULL[3:]), "no indices"),
        (((0, 0), FULL[:3]), ((1 << 58, 1 << 30), FULL[3:]), "too far"),
        (((0, 0), FULL[:3]), ((-3, 0), FULL[3:]), "no indices"),
        (((0, 0), FULL[:3]), ((3, 0, 0), FULL[3:]), "saved_offsets"),
    ],
)
def test_pieces_that_do_not_fit(tmp_path: Path, first: Any, second: Any, match: Any) -> None:
    write(tmp_path, "1.safetensors", {"w": first})
    write(tmp_path, "2.safetensors", {"w": second})
    if match is None:
        assert contents_of(dcppieces, tmp_path).table.shapes == [(16, 6)]
        return
    with pytest.raises(CheckpointError, match=match) as caught:
        contents_of(dcppieces, tmp_path)
    assert "w" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "info",
    [
        "", "[", "[]", "{", '{"w"}', '{"w": {}}', '{"w": {"saved_offsets": [0]}}', '{"w": 3}',
        '{"w": {"saved_offsets": [0, 0.5]}}', '{"w": {"saved_offsets": [true, 0]}}',
        '{"w": {"saved_offsets": [0, 0]}} x', '{"w": {"saved_offsets": [0, 0]},}',
        '{"w": {"saved_offsets": [0, 0]}, "w": {"saved_offsets": [1, 0]}}',
        '{"w": ' + "[" * 5000 + "]" * 5000 + "}",
        '{"w": {"saved_offsets": ' + "[" + "0," * 400_000 + "0]}}",
        '{"w": {"saved_offsets": [0, NaN]}}',
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_read(tmp_path: Path, info: str) -> None:
    write(tmp_path, "1.safetensors", {"w": ((0, 0), FULL)}, info)
    write(tmp_path, "2.safetensors", {"v": ((0, 0), FULL)})
    with pytest.raises(CheckpointError, match=SHARDING) as caught:
        contents_of(dcppieces, tmp_path)
    assert len(str(caught.value)) < 2000


def test_one_of_several_files_is_said_to_be_one(tmp_path: Path) -> None:
    """The first pieces look like whole tensors: nothing says that more follows."""
    said = "holds only parts of its tensors; give the directory to compare all of them"
    first, other = (tmp_path / "run" / f"{part}.safetensors" for part in "ab")
    for path, at in ((first, 0), (other, 4)):
        info = {SHARDING: json.dumps({"w": {"saved_offsets": [at]}})}
        write_safetensors(path, {"w": ("F32", (4,), bytes(16))}, metadata=info)
    assert any(said in note for note in ckdiff.info(first)["notes"])
    assert not ckdiff.info(tmp_path / "run").get("notes")
    other.unlink()
    assert not ckdiff.info(first).get("notes")


def test_mutations_are_refused_or_read(tmp_path: Path) -> None:
    write(tmp_path, "1.safetensors", {"w": ((0, 0), FULL[:3])})
    write(tmp_path, "2.safetensors", {"w": ((3, 0), FULL[3:])})
    raw = (tmp_path / "2.safetensors").read_bytes()
    noise = random.Random(2)
    for _ in range(300):
        bad = bytearray(raw)
        bad[noise.randrange(8, 8 + raw[0])] = noise.randrange(256)
        (tmp_path / "2.safetensors").write_bytes(bad)
        try:
            found = contents_of(dcppieces, tmp_path)
        except CheckpointError:
            continue
        assert set(found.table.names) >= {"w"}
