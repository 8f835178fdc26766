"""Deltas from strangers: what they may write, what they may take, and what is said about them.

Each is sealed: all of its digests are right, and it is a file that anybody can make.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zstandard
from cli_support import MOST_MEMORY, python, run
from delta_frames import KINDS, encoded, window
from delta_reseal import DATA, Loose, loosen
from support import Tensor, safetensors_header, write_index, write_safetensors

import ckdiff
from ckdiff.deltas import comparing
from ckdiff.deltas.form import FORMS, largest_frame
from ckdiff.deltas.ownheader import is_delta
from ckdiff.deltas.room import TENSOR, available_memory, header_cost

MIB = 1 << 20
INDEX = "model.safetensors.index.json"
WINDOW = 4 * MIB  # elements of BF16


def bits(seed: int, count: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """bfloat16 without NaN, away from the ends of the range."""
    return np.random.default_rng(seed).integers(0x3C00, 0x3F80, count, np.uint16)


BASE: dict[str, Tensor] = {
    "x": ("BF16", (100,), bits(1, 100).tobytes()),
    "y": ("BF16", (40,), bits(2, 40).tobytes()),
    "same": ("I32", (4,), bytes(16)),
}
TUNED: dict[str, Tensor] = {
    "x": ("BF16", (100,), (bits(1, 100) + np.eye(1, 100, 7, dtype=np.uint16)[0]).tobytes()),
    "y": ("BF16", (40,), (bits(2, 40) + np.uint16(1)).tobytes()),
    "same": BASE["same"],
    "new": ("F32", (3,), b"abcdefghijkl"),
}
SHARDS = {"x": "a.safetensors", "y": "b.safetensors", "same": "b.safetensors"}
SHARDS["new"] = "a.safetensors"


def checkpoint(folder: Path, *, index: bool = True) -> Path:
    for file in set(SHARDS.values()):
        tensors = {name: TUNED[name] for name in TUNED if SHARDS[name] == file}
        write_safetensors(folder / file, tensors)
    if index:
        write_index(folder, SHARDS)
    return folder


class Pair:
    """A base, and deltas of a directory with an index and of one without."""

    def __init__(self, folder: Path) -> None:
        self.base = write_safetensors(folder / "base.safetensors", BASE)
        self.tuned = checkpoint(folder / "tuned")
        self.loose: dict[str, Loose] = {}
        for name, encoding, side in [
            ("packed", "packed", self.tuned),
            ("indices", "indices", self.tuned),
            ("plain", "packed", checkpoint(folder / "plain", index=False)),
        ]:
            chosen: Any = encoding
            ckdiff.delta(self.base, side, folder / "delta", encoding=chosen, overwrite=True)
            self.loose[name] = loosen(folder / "delta")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


def refuse(pair: Pair, loose: Loose, folder: Path, words: str = "damaged") -> None:
    """Every reader refuses a delta, and nothing is written, nor is it replaced."""
    path = loose.seal(folder / "delta")
    for action in (
        lambda: ckdiff.info(path),
        lambda: ckdiff.apply(pair.base, path, folder / "out"),
        lambda: list(ckdiff.weight_patches(path, base=pair.base)),
    ):
        with pytest.raises(ckdiff.DeltaError, match=words):
            action()
    with pytest.raises(ckdiff.OutputError, match="is not a delta"):
        ckdiff.delta(pair.base, pair.tuned, path, overwrite=True)
    assert os.listdir(folder) == ["delta"]


# which files


def named(loose: Loose, name: str) -> Loose:
    """A delta without an index that calls its first file so."""
    loose = loose.copy()
    loose.manifest["files"][0][0] = name
    return loose


@pytest.mark.parametrize(
    "name",
    [
        "modeling_evil.py", ".bashrc", "pytorch_model.bin", "config.json", "model.safetensors.py",
        "a.SAFETENSORS", ".safetensors", ".hidden.safetensors", ".cache/x.safetensors",
        "a/.b/c.safetensors", "../x.safetensors", "a/../../x.safetensors", "/tmp/x.safetensors",
        "./x.safetensors", "a//x.safetensors", "x.safetensors/", "", "a\0.safetensors",
        "a\n.safetensors", "a\x1b[2J.safetensors", "a\x9b.safetensors", "\ud800.safetensors",
        "\u2028.safetensors", "x" * 256 + ".safetensors", "d/" * 600 + "x.safetensors",
        "b.safetensors", "b.safetensors/c.safetensors", INDEX,
    ],
)  # fmt: skip
def test_names_that_a_delta_may_not_write(name: str, pair: Pair, tmp_path: Path) -> None:
    refuse(pair, named(pair.loose["plain"], name), tmp_path)


@pytest.mark.parametrize("name", ["other.safetensors", "sub/x.safetensors", "é \udcff.safetensors"])
def test_names_that_it_may(name: str, pair: Pair, tmp_path: Path) -> None:
    path = named(pair.loose["plain"], name).seal(tmp_path / "delta")
    ckdiff.apply(pair.base, path, tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == (pair.tuned / "a.safetensors").read_bytes()


def indexed(pair: Pair, raw: bytes, name: str = INDEX) -> Loose:
    """The delta with an index of these bytes."""
    loose = pair.loose["packed"].copy()
    heads = sum(length for _, _, length in loose.manifest["files"])
    loose.parts["ckdiff.heads"] = loose.parts["ckdiff.heads"][:heads] + raw
    loose.manifest["index"] = name
    return loose


def index_of(**more: Any) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": SHARDS} | more).encode()


GOOD = index_of()
BAD_INDEXES = {
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",
    "a page": b"<html><script>alert(1)</script></html>",
    "nothing": b"",
    "a list": b"[]",
    "no map": b'{"metadata": {}}',
    "a map of numbers": index_of(weight_map={"x": 1}),
    "more behind it": GOOD + b"\n#!/bin/sh",
    "a NUL behind it": GOOD + b"\0",
    "a control character": GOOD.replace(b": ", b":\x0b", 1),
    "one in a string": index_of(note="n").replace(b'"n"', b'"\x07"'),
    "no UTF-8": index_of(note="n").replace(b'"n"', b'"\xff"'),
    "NaN": index_of(note=float("nan")),
    "a key twice": GOOD[:-1] + b', "metadata": {}}',
    "a tensor twice": GOOD.replace(b'"x":', b'"x": "a.safetensors", "x":'),
    "a tensor less": index_of(weight_map={k: v for k, v in SHARDS.items() if k != "x"}),
    "a tensor more": index_of(weight_map=SHARDS | {"z": "a.safetensors"}),
    "another tensor": index_of(weight_map={k if k != "x" else "X": v for k, v in SHARDS.items()}),
    "another file": index_of(weight_map=SHARDS | {"x": "b.safetensors"}),
    "a file that is not there": index_of(weight_map=SHARDS | {"x": "c.safetensors"}),
    "a file elsewhere": index_of(weight_map=SHARDS | {"x": "../a.safetensors"}),
    "blanks": GOOD + b" " * (2 * MIB),
    "a long text": index_of(note=[np.random.default_rng(i).bytes(250_000).hex() for i in range(4)]),
    "a deep one": index_of(note="n").replace(b'"n"', b"[" * 100_000 + b"]" * 100_000),
}


@pytest.mark.parametrize("why", BAD_INDEXES)
def test_indexes_that_the_headers_do_not_imply(why: str, pair: Pair, tmp_path: Path) -> None:
    refuse(pair, indexed(pair, BAD_INDEXES[why]), tmp_path, "index")


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "index.json", "x.py", ".safetensors.index.json", ".x.safetensors.index.json",
        "sub/model.safetensors.index.json", "../model.safetensors.index.json", "a.safetensors",
        "model.safetensors.index.a.b.json", "model.safetensors.index.\x1b.json", "",
    ],
)  # fmt: skip
def test_indexes_with_other_names(name: str, pair: Pair, tmp_path: Path) -> None:
    refuse(pair, indexed(pair, GOOD, name), tmp_path)


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (GOOD, INDEX),
        (GOOD, "model.safetensors.index.fp16.json"),
        (GOOD, "model.fp16.safetensors.index.json"),
        (json.dumps({"weight_map": SHARDS}, indent=4).encode() + b"\n", INDEX),
        (index_of(metadata={"total_size": 1.5e9, "by": None}, more=[{"a": True}]), INDEX),
    ],
)
def test_indexes_as_they_are(raw: bytes, name: str, pair: Pair, tmp_path: Path) -> None:
    ckdiff.apply(pair.base, indexed(pair, raw, name).seal(tmp_path / "d"), tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == raw


@pytest.mark.parametrize(
    ("shard", "index"),
    [("weights.bin", INDEX), (".w.safetensors", INDEX), ("a\n.safetensors", INDEX)],
)
def test_what_apply_would_refuse_is_not_made(
    shard: str, index: str, pair: Pair, tmp_path: Path
) -> None:
    write_safetensors(tmp_path / "tuned" / shard, TUNED)
    write_index(tmp_path / "tuned", dict.fromkeys(TUNED, shard), index)
    with pytest.raises(ckdiff.CheckpointError, match="cannot be rebuilt by a delta") as raised:
        ckdiff.delta(pair.base, tmp_path / "tuned" / index, tmp_path / "delta")
    assert raised.value.hint
    assert os.listdir(tmp_path) == ["tuned"]


def test_a_long_index_is_not_made_into_a_delta(pair: Pair, tmp_path: Path) -> None:
    tuned = checkpoint(tmp_path / "tuned")
    with open(tuned / INDEX, "ab") as file:
        file.write(b" " * (2 * MIB))
    with pytest.raises(ckdiff.CheckpointError, match="more than the tensors' names"):
        ckdiff.delta(pair.base, tuned, tmp_path / "delta")


def test_a_header_of_blanks_is_rebuilt(pair: Pair, tmp_path: Path) -> None:
    """What compresses well is no bomb: only what it takes of memory counts."""
    write_safetensors(tmp_path / "t.safetensors", TUNED, pad=3 * MIB)
    ckdiff.delta(pair.base, tmp_path / "t.safetensors", tmp_path / "d")
    ckdiff.apply(pair.base, tmp_path / "d", tmp_path / "o.safetensors")
    same = (tmp_path / "o.safetensors").read_bytes() == (tmp_path / "t.safetensors").read_bytes()
    assert same


# what tables say


def flag(loose: Loose, value: int) -> None:
    raw = bytearray(loose.parts["ckdiff.tensors"])
    raw[0] = value
    loose.parts["ckdiff.tensors"] = bytes(raw)


def count(loose: Loose, changes: dict[int, int], total: int = 0) -> None:
    """Change the counts of tensors, and of the manifest."""
    raw, tensors = bytearray(loose.parts["ckdiff.tensors"]), loose.tensors
    changed = np.frombuffer(raw, np.int64, tensors, 33 * tensors)
    for tensor, change in changes.items():
        changed[tensor] += change
    loose.parts["ckdiff.tensors"] = bytes(raw)
    loose.manifest["changed"] += total


def hash_of(loose: Loose, tensor: int, column: int) -> None:
    """Another hash of the base (0) or of the result (1)."""
    raw, tensors = bytearray(loose.parts["ckdiff.tensors"]), loose.tensors
    raw[tensors + 16 * (tensors * column + tensor)] ^= 1
    loose.parts["ckdiff.tensors"] = bytes(raw)


#: the tensors of the files in their order: x, new, y, same
LIES: dict[str, Callable[[Loose], None]] = {
    "a flag of 2": lambda d: flag(d, 2),
    "a tensor that lost its base": lambda d: flag(d, 0),
    "more changes than elements": lambda d: count(d, {2: 1}, 1),
    "fewer changes than none": lambda d: count(d, {0: -2}, -2),
    "changes that cancel out": lambda d: count(d, {0: -1, 3: 1}),
    "changes of a tensor without a base": lambda d: count(d, {1: 1}, 1),
    "another sum of changes": lambda d: count(d, {}, 1),
    "changes in a tensor that is the same": lambda d: hash_of(d, 3, 1),
    "a hash of a base that is not there": lambda d: hash_of(d, 1, 0),
    "other elements": lambda d: d.manifest.update(elements=143),
    "a tensor unlisted": lambda d: d.manifest.update(unpaired=[]),
    "a tensor removed that is there": lambda d: d.manifest["unpaired"].append(
        {"name": "x", "reason": "removed", "base_dtype": "U8", "base_shape": [1]}
    ),
    "no frames": lambda d: frame_sizes(d, dict.fromkeys(range(4), 0)),
}


def frame_sizes(loose: Loose, sizes: dict[int, int]) -> None:
    raw = bytearray(loose.parts["ckdiff.frames"])
    held = np.frombuffer(raw, np.uint32, loose.windows)
    for window_number, size in sizes.items():
        held[window_number] = size
    loose.parts["ckdiff.frames"] = bytes(raw)


@pytest.mark.parametrize("encoding", ["packed", "indices"])
@pytest.mark.parametrize("why", LIES)
def test_tables_that_contradict_each_other(
    why: str, encoding: str, pair: Pair, tmp_path: Path
) -> None:
    loose = pair.loose[encoding].copy()
    LIES[why](loose)
    refuse(pair, loose, tmp_path, "damaged")


@pytest.mark.parametrize("left", [{1: b""}, {0: b"", 1: b"", 2: b""}])
def test_what_is_to_be_filled_must_be_there(
    left: dict[int, bytes], pair: Pair, tmp_path: Path
) -> None:
    """A tensor without a base and without frames would be a hole."""
    loose = pair.loose["packed"].copy()
    frames = loose.frames()
    loose.set_frames([left.get(i, frame) for i, frame in enumerate(frames)])
    refuse(pair, loose, tmp_path, "not all there|other changes")


def test_a_frame_larger_than_its_window(pair: Pair, tmp_path: Path) -> None:
    """Four gigabytes of holes would be read to find that a digest is wrong."""
    loose = pair.loose["packed"].copy()
    for size in (1 << 20, 0xFFFFFFFF):
        frame_sizes(loose, {0: size})
        refuse(pair, loose, tmp_path)
    loose = pair.loose["packed"].copy()
    frames = loose.frames()
    frames[0] += bytes(1 << 20)
    loose.set_frames(frames)
    refuse(pair, loose, tmp_path, "larger than any")


@pytest.mark.parametrize("kind", KINDS)
def test_no_frame_of_ours_is_as_large_as_that(kind: str) -> None:
    width = FORMS[kind].bytes
    for seed in range(6):
        base, tuned = window(kind, 5000 + seed, [0.03, 0.2, 0.5, 0.97, 1, 1][seed], 63, seed)
        frame, _ = encoded(kind, base, tuned)
        most = largest_frame(np.array([len(base)]), np.array([width]))
        assert len(frame) < int(most[0])


def test_two_files_with_one_tensor(pair: Pair, tmp_path: Path) -> None:
    loose = pair.loose["plain"].copy()
    loose.parts["ckdiff.heads"] = loose.parts["ckdiff.heads"].replace(b'"same"', b'"x"   ')
    refuse(pair, loose, tmp_path)
    first, second = (safetensors_header({"x": ("U8", (0,), b"")}) for _ in range(2))
    heads = [len(head).to_bytes(8, "little") + head for head in (first, second)]
    loose.parts["ckdiff.heads"] = b"".join(heads)
    loose.manifest["files"] = [[f"{i}.safetensors", len(h), len(h)] for i, h in enumerate(heads)]
    loose.parts["ckdiff.tensors"] = bytes(2 * 41)
    loose.set_frames([])
    item = {"name": "x", "reason": "added", "tuned_dtype": "U8", "tuned_shape": [0]}
    loose.manifest |= {"unpaired": [item], "elements": 0, "changed": 0}
    refuse(pair, loose, tmp_path, "tensor of the same name")


# records


def records(path: Path, base: Path | None, **options: Any) -> tuple[list[Any], str]:
    """Those that are handed out before an error, and the error."""
    given: list[Any] = []
    try:
        given.extend(ckdiff.weight_patches(path, base=base, **options))
    except ckdiff.DeltaError as error:
        return given, str(error)
    return given, ""


@pytest.mark.parametrize("encoding", ["packed", "indices"])
@pytest.mark.parametrize("most", [4, 1 << 20])
def test_no_record_of_a_tensor_that_comes_out_wrong(
    encoding: str, most: int, pair: Pair, tmp_path: Path
) -> None:
    for tensor, name in [(0, "x"), (1, "new"), (2, "y")]:
        loose = pair.loose[encoding].copy()
        hash_of(loose, tensor, 1)
        path = loose.seal(tmp_path / "delta")
        given, error = records(path, pair.base, max_bytes=most)
        assert f"what it makes of {name} is wrong" in error
        assert name not in {patch.name for patch in given}
        with pytest.raises(ckdiff.DeltaError, match=f"what it makes of {name} is wrong"):
            ckdiff.apply(pair.base, path, tmp_path / "out")
    loose = pair.loose["indices"].copy()
    hash_of(loose, 1, 1)
    given, error = records(loose.seal(tmp_path / "delta"), None)  # whole ones need no base
    assert "what it makes of new is wrong" in error
    assert "new" not in {patch.name for patch in given}


def test_a_tensor_of_which_the_last_window_is_wrong(tmp_path: Path) -> None:
    values = bits(5, WINDOW + 50)
    other = values.copy()
    other[[3, 9, -2]] += 1
    sides = []
    for name, side in (("a", values), ("b", other)):
        tensors: dict[str, Tensor] = {"w": ("BF16", (len(side),), side.tobytes())}
        sides.append(write_safetensors(tmp_path / f"{name}.safetensors", tensors))
    for encoding in ("packed", "indices"):
        chosen: Any = encoding
        ckdiff.delta(*sides, tmp_path / "d", encoding=chosen, overwrite=True)
        given, error = records(tmp_path / "d", sides[0], max_bytes=6)
        assert not error
        assert np.concatenate([patch.indices for patch in given]).tolist() == [3, 9, WINDOW + 48]
        loose = loosen(tmp_path / "d")
        if encoding == "packed":
            frames = loose.frames()
            frames[1] = encoded("BF16", values[-50:].tobytes(), (values[-50:] ^ 2).tobytes())[0]
            loose.set_frames(frames)
        else:
            dtype, shape, data = loose.streams["w.values"]
            loose.streams["w.values"] = dtype, shape, data[:-2] + b"\x21\x3f"
            reseal_window(loose, 1, loose.streams["w.indices"][2][8:], b"\x21\x3f")
        given, error = records(loose.seal(tmp_path / "wrong"), sides[0], max_bytes=6)
        assert given == []
        assert "damaged" in error


def reseal_window(loose: Loose, number: int, positions: bytes, values: bytes) -> None:
    raw = bytearray(loose.parts["ckdiff.frames"])
    digests = np.frombuffer(raw, np.uint64, loose.windows, 4 * loose.windows)
    digests[number] = xxhash.xxh3_64_intdigest(positions + values)
    loose.parts["ckdiff.frames"] = bytes(raw)


def test_a_change_that_changes_nothing(pair: Pair, tmp_path: Path) -> None:
    """It is counted, and it is none."""
    loose = pair.loose["indices"].copy()
    same = BASE["x"][2][14:16]
    assert loose.streams["x.values"][2] != same
    loose.streams["x.values"] = "BF16", [1], same
    reseal_window(loose, 0, loose.streams["x.indices"][2], same)
    path = loose.seal(tmp_path / "delta")
    given, error = records(path, pair.base)
    assert (given, "changes nothing" in error) == ([], True)
    with pytest.raises(ckdiff.DeltaError, match="damaged: a change that changes nothing"):
        ckdiff.apply(pair.base, path, tmp_path / "out")
    loose = pair.loose["packed"].copy()
    frames = loose.frames()
    frames[0] = b"\0" + bytes([1, 0, 0, 128, 1, 0, 0])  # 128 elements, none changed
    loose.set_frames(frames)
    path = loose.seal(tmp_path / "delta")
    assert "changes nothing" in records(path, pair.base)[1]
    with pytest.raises(ckdiff.DeltaError, match="damaged: a frame that changes nothing"):
        ckdiff.apply(pair.base, path, tmp_path / "out")
    assert os.listdir(tmp_path) == ["delta"]


@pytest.mark.parametrize("encoding", ["packed", "indices"])
def test_a_base_that_differs_where_nothing_changed(
    encoding: str, pair: Pair, tmp_path: Path
) -> None:
    other = BASE | {"same": ("I32", (4,), b"\1" + bytes(15))}
    base = write_safetensors(tmp_path / "other.safetensors", other)
    path = pair.loose[encoding].copy().seal(tmp_path / "delta")
    assert "was not made for" in records(path, base)[1]


@pytest.mark.parametrize("source", ["packed", "indices", "checkpoint"])
def test_a_whole_tensor_that_memory_does_not_suffice_for(
    source: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pair.tuned
    if source != "checkpoint":
        path = pair.loose[source].copy().seal(tmp_path / "delta")
    monkeypatch.setattr(comparing, "available_memory", lambda: 11)
    stream = ckdiff.weight_patches(path, base=pair.base)
    with pytest.raises(ckdiff.BudgetError, match="new comes whole") as raised:
        list(stream)
    assert raised.value.hint
    assert available_memory() > MIB


def test_a_name_of_a_megabyte_in_a_message(tmp_path: Path) -> None:
    name = "\x1b[2J" + np.random.default_rng(1).bytes(MIB // 2).hex()
    sides = []
    for i in range(3):
        tensors: dict[str, Tensor] = {name: ("U8", (4,), bytes([i] * 4))}
        sides.append(write_safetensors(tmp_path / f"{i}.safetensors", tensors))
    ckdiff.delta(sides[0], sides[1], tmp_path / "d")
    wrong = loosen(tmp_path / "d")
    hash_of(wrong, 0, 1)
    wrong.seal(tmp_path / "wrong")
    for base, path in ((sides[2], "d"), (sides[0], "wrong")):
        for action in (
            lambda base=base, path=path: ckdiff.apply(base, tmp_path / path, tmp_path / "out"),
            lambda base=base, path=path: list(ckdiff.weight_patches(tmp_path / path, base=base)),
        ):
            with pytest.raises(ckdiff.DeltaError) as raised:
                action()
            assert len(raised.value.one_line()) < 1000


# the terminal


@pytest.mark.parametrize("escape", ["\x1b[31mred", "\x9b2J", "a\nb", "\u202egnp", "\x07"])
def test_nothing_of_a_delta_acts_on_the_terminal(escape: str, pair: Pair, tmp_path: Path) -> None:
    def put(loose: Loose, *keys: Any) -> Loose:
        holder: Any = loose.manifest
        for key in keys[:-1]:
            holder = holder[key]
        holder[keys[-1]] = escape
        return loose

    lossy = {"mask": "0" * 32, "rule": "exact", "left_out": 0}
    changes: list[tuple[Any, ...]] = [
        ("encoding",), ("ckdiff",), ("index",), ("files", 0, 0), ("base", "files", 0, 0),
        ("lossy", "rule"), ("lossy", "mask"), ("unpaired", 0, "name"), ("unpaired", 0, "reason"),
        ("unpaired", 0, "tuned_dtype"), ("parts", "ckdiff.heads", 1), ("elements",), (escape,),
    ]  # fmt: skip
    loose = pair.loose["packed"].copy()
    sealed = [loose.copy() for _ in range(3)]
    for key, one in zip(("version", "encoding", "format"), sealed, strict=True):
        one.metadata[key] = escape
    for keys in changes:
        sealed.append(loose.copy())
        sealed[-1].manifest["lossy"] = dict(lossy)
        put(sealed[-1], *keys)
    for one in sealed:
        path = one.seal(tmp_path / f"d{escape.replace('/', '')}")
        for arguments in (["info", str(path)], ["apply", str(pair.base), str(path), "-o", "x/y"]):
            done = run(*arguments)
            text = (done.stdout + done.stderr).replace("\n", "")
            assert done.exit_code in (0, 2)
            assert text.isprintable(), text


# memory


def sparse(path: Path, **sizes: int) -> Path:
    """A delta of holes: its parts have these sizes, and its header has all digests it can have."""
    metadata = {"format": "ckdiff-delta", "version": "1", "encoding": "packed"}
    metadata["manifest"] = "0" * 32
    tensors = {f"ckdiff.{name}": ("U8", [size], size) for name, size in sizes.items()}
    entries, at = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    listed = [[n, e["dtype"], e["shape"], e["data_offsets"]] for n, e in entries.items()]
    metadata["entries"] = xxhash.xxh3_128_hexdigest(json.dumps(listed).encode())
    if sizes["manifest"] < 1 << 27:
        metadata["manifest"] = xxhash.xxh3_128_hexdigest(bytes(sizes["manifest"]))
    header = json.dumps({"__metadata__": metadata} | entries).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + at)
    return path


def padded(stored: bytes, size: int) -> bytes:
    """A part with a hole behind it."""
    return stored + bytes(size - len(stored))


def bombs(pair: Pair, folder: Path) -> None:
    """Files of a few kilobytes, or a few megabytes, that would take gigabytes."""
    small = {"data": 0, "frames": 100, "tensors": 100, "heads": 100}
    sparse(folder / "manifest of 6 GB", manifest=6 << 30, **small)
    sparse(folder / "manifest of 90 MB", manifest=90_000_000, **small)
    sparse(folder / "manifest of 20 MB", manifest=20_000_000, **small)
    good = pair.loose["packed"]
    for name in ("tensors", "frames", "heads"):
        loose, part = good.copy(), f"ckdiff.{name}"
        stored = zstandard.ZstdCompressor().compress(loose.parts[part])
        loose.stored[part] = padded(stored, 40 * MIB)
        loose.seal(folder / f"{name} with a hole")
    compressor = zstandard.ZstdCompressor(level=1)
    for size in (100 * MIB, 1 << 30):
        loose = good.copy()
        packer = compressor.compressobj(size=size)
        pieces = [packer.compress(b" " * MIB) for _ in range(size // MIB)] + [packer.flush()]
        stored = b"".join(pieces)
        loose.stored["ckdiff.heads"] = stored
        loose.manifest["parts"]["ckdiff.heads"] = [size, xxhash.xxh3_128_hexdigest(stored)]
        loose.kept.add("ckdiff.heads")
        loose.manifest["files"] = [["a.safetensors", size, min(size, 90_000_000)]]
        loose.seal(folder / f"heads of {size // MIB} MiB of blanks")
    entry = b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    head = b"{" + b",".join(entry % i for i in range(700_000)) + b"}"
    head = len(head).to_bytes(8, "little") + head
    loose = good.copy()
    loose.parts["ckdiff.heads"] = head
    loose.manifest |= {"files": [["a.safetensors", len(head), len(head)]], "index": None}
    loose.seal(folder / "many tensors")
    huge = {"w": ("BF16", (10 << 40,), b"")}
    head = json.dumps(
        {"w": {"dtype": "BF16", "shape": list(huge["w"][1]), "data_offsets": [0, 20 << 40]}}
    ).encode()
    head = len(head).to_bytes(8, "little") + head
    loose.parts["ckdiff.heads"] = head
    size = len(head) + (20 << 40)
    loose.manifest |= {"files": [["a.safetensors", size, len(head)]]}
    loose.parts["ckdiff.frames"] = bytes(12 * (20 << 40 >> 23))
    loose.parts["ckdiff.tensors"] = bytes(41)
    loose.seal(folder / "a tensor of 20 TB")
    loose = good.copy()
    loose.text = b"[" + b"[]," * 5_000_000 + b"[]]"
    loose.seal(folder / "many lists")
    loose.text = b"{" + b",".join(b'"%x":0' % i for i in range(1_000_000)) + b"}"
    loose.seal(folder / "many keys")


WATCHED = """
import os, sys, time
import ckdiff
from pathlib import Path
base, folder = sys.argv[1:]
for path in sorted(Path(folder).iterdir()):
    for run in (
        lambda: ckdiff.info(path),
        lambda: ckdiff.apply(base, path, folder + "/out", memory="256MiB"),
        lambda: list(ckdiff.weight_patches(path, base=base)),
        lambda: ckdiff.delta(base, base, path, overwrite=True),
    ):
        seen[0] = 0
        try:
            run()
        except ckdiff.CkdiffError as error:
            assert error.one_line().isprintable()
            print(most() >> 20, path.name, type(error).__name__, error, sep="|")
        else:
            sys.exit(f"{path} was taken")
"""


def test_what_is_declared_takes_no_memory(pair: Pair, tmp_path: Path) -> None:
    bombs(pair, tmp_path)
    count = len(os.listdir(tmp_path))
    done = python(MOST_MEMORY + WATCHED, str(pair.base), str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert len(lines) == 4 * count
    assert max(int(line[0]) for line in lines) < 256, done.stdout
    assert {line[2] for line in lines} <= {"DeltaError", "BudgetError", "OutputError"}
    assert len(os.listdir(tmp_path)) == count


def test_memory_is_allowed_by_whoever_asks(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A delta whose tables are large is applied where --memory is."""
    tensors: dict[str, Tensor] = {f"{i}.{'n' * 2000}": ("U8", (0,), b"") for i in range(12_000)}
    base = write_safetensors(tmp_path / "base.safetensors", BASE | tensors)
    tuned = write_safetensors(tmp_path / "tuned.safetensors", TUNED | tensors)
    ckdiff.delta(base, tuned, tmp_path / "d", memory="1GiB")
    with pytest.raises(ckdiff.BudgetError, match="declares tables") as raised:
        ckdiff.apply(base, tmp_path / "d", tmp_path / "o.safetensors", memory="160MiB")
    assert raised.value.hint == "raise --memory"
    ckdiff.apply(base, tmp_path / "d", tmp_path / "o.safetensors", memory="512MiB")
    assert (tmp_path / "o.safetensors").read_bytes() == tuned.read_bytes()


def test_what_a_header_takes_is_known_before_it_is_parsed() -> None:
    """By what no tensor can do without; a name that looks like a part of one changes nothing."""
    for names in (["a", "b"], ['"data_offsets":', ":,:,"], ["é" * 50, "\U0001f600"]):
        raw = safetensors_header(dict.fromkeys(names, ("U8", (1, 0, 3), b"")))
        assert header_cost(raw, TENSOR) >= 2 * TENSOR + 6 * 28
    pairs = safetensors_header({}, {str(i): "data_offsets" for i in range(1000)})
    assert header_cost(pairs, TENSOR) > 1000 * 100


# what is in the way


def test_only_a_delta_that_is_understood_is_replaced(pair: Pair, tmp_path: Path) -> None:
    newer = pair.loose["packed"].copy()
    newer.metadata["version"] = "3"
    path = newer.seal(tmp_path / "delta")
    before = path.read_bytes()
    with pytest.raises(ckdiff.OutputError):
        ckdiff.delta(pair.base, pair.tuned, path, overwrite=True)
    assert path.read_bytes() == before
    for action in (ckdiff.info, lambda p: list(ckdiff.weight_patches(p, base=pair.base))):
        with pytest.raises(ckdiff.DeltaError, match="of version 3"):
            action(path)


@pytest.mark.parametrize("key", ["format", "version"])
def test_a_delta_without_its_metadata_is_no_checkpoint(
    key: str, pair: Pair, tmp_path: Path
) -> None:
    loose = pair.loose["indices"].copy()
    del loose.metadata[key]
    path = loose.seal(tmp_path / "delta")
    with pytest.raises(ckdiff.DeltaError):
        list(ckdiff.weight_patches(path, base=pair.base))
    with pytest.raises(ckdiff.DeltaError):
        ckdiff.info(path)


def test_a_delta_is_known_wherever_its_header_says_so(pair: Pair, tmp_path: Path) -> None:
    """The header is looked through in pieces, and the word may be in two of them."""
    raw = pair.loose["packed"].copy().seal(tmp_path / "delta").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:start]
    for blanks in range(MIB - header.index(b"ckdiff-delta") - 16, MIB + 4, 3):
        longer = b"{" + b" " * blanks + header[1:]
        written = len(longer).to_bytes(8, "little") + longer + raw[start:]
        (tmp_path / "delta").write_bytes(written)
        assert is_delta(str(tmp_path / "delta"))
    assert ckdiff.info(tmp_path / "delta")["kind"] == "delta"
    for path in (pair.base, tmp_path, tmp_path / "none"):
        assert not is_delta(str(path))


def test_the_pieces_make_the_delta(pair: Pair, tmp_path: Path) -> None:
    """What the tests above change works before it is changed."""
    for name, loose in pair.loose.items():
        path = loose.copy().seal(tmp_path / name)
        ckdiff.apply(pair.base, path, tmp_path / f"{name}.out")
        for file in set(SHARDS.values()):
            made = (tmp_path / f"{name}.out" / file).read_bytes()
            assert made == (pair.tuned / file).read_bytes()
        given, error = records(path, pair.base)
        assert ({patch.name for patch in given}, error) == ({"x", "y", "new"}, "")
        assert DATA in loose.streams or name == "indices"
