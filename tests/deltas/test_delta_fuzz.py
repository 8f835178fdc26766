"""Deltas changed at random and sealed again: an error of ours, or the right result.

Every digest of these is right, so nothing but the values themselves can be checked.
``CKDIFF_FUZZ=20000`` runs the whole campaign.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from delta_reseal import DATA, Loose, loosen
from support import Tensor, write_index, write_safetensors

import ckdiff
from ckdiff import budget
from ckdiff.checkpoints.formats.safetensors import parse_header

ROUNDS = int(
    os.environ.get("CKDIFF_FUZZ", "80")
)  # of each delta and kind of mutation; of some half as many

Contents = dict[str, tuple[str, tuple[int, ...], bytes]]


def noise(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


def model() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two sides with every way of having a base, and of having none."""
    weights = (np.random.default_rng(1).standard_normal(900, np.float32) * 0.02).view(np.uint32)
    bits = (weights >> 16).astype(np.uint16)
    moved = bits.copy()
    moved[::7] += 1
    base: dict[str, Tensor] = {
        "a.w": ("BF16", (30, 30), bits.tobytes()), "b.w": ("F32", (40,), noise(2, 160)),
        "same": ("F16", (50,), noise(3, 100)), "four": ("F4", (8, 4), noise(4, 16)),
        "complex": ("C64", (9,), noise(5, 72)), "step": ("I64", (), noise(6, 8)),
        "empty": ("BF16", (0, 3), b""), "gone": ("U8", (5,), noise(7, 5)),
        "reshaped": ("U8", (8,), noise(8, 8)), "retyped": ("F32", (4,), noise(9, 16)),
        "twin": ("F16", (50,), noise(10, 100)),
    }  # fmt: skip
    tuned = {name: tensor for name, tensor in base.items() if name != "gone"}
    tuned["a.w"] = "BF16", (30, 30), moved.tobytes()
    for name in ("b.w", "four", "complex", "step", "twin"):
        dtype, shape, data = base[name]
        raw = bytearray(data)
        raw[0] ^= 1
        raw[len(raw) // 2] ^= 0x10
        tuned[name] = dtype, shape, bytes(raw)
    tuned["reshaped"] = "U8", (2, 4), noise(11, 8)
    tuned["retyped"] = "I32", (4,), noise(12, 16)
    tuned["added"] = "BF16", (6,), noise(13, 12)
    return base, tuned


def resized() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two sides of other rows, and a base with tensors that the other has apart."""
    base, tuned = model()
    base["grown"], base["shrunk"] = ("BF16", (5, 8), noise(20, 80)), ("F32", (9,), noise(21, 36))
    tuned["grown"] = "BF16", (7, 8), noise(20, 80)[:-1] + b"\0" + noise(22, 32)
    tuned["shrunk"] = "F32", (4,), noise(21, 36)[:16]
    layer, both = "model.layers.0.mlp.", noise(23, 96)
    base[layer + "gate_up_proj.weight"] = "BF16", (6, 8), both
    tuned[layer + "gate_proj.weight"] = "BF16", (3, 8), both[:47] + b"\1"
    tuned[layer + "up_proj.weight"] = "BF16", (3, 8), both[48:]
    return base, tuned


def sharded(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    where = {}
    for i, names in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        file = f"model-{i}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in names}, pad=i)
        where |= dict.fromkeys(names, file)
    write_index(folder, where)
    return folder


@dataclass
class Case:
    """A delta and what it makes."""

    base: Path
    loose: Loose
    files: dict[str, bytes]
    tensors: Contents


def contents(out: Path) -> tuple[dict[str, bytes], Contents]:
    """Files, and the tensors in them."""
    paths = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    files = {str(path.relative_to(out)): path.read_bytes() for path in paths}
    tensors: Contents = {}
    for name, raw in files.items():
        if name.endswith(".json"):
            continue
        start = 8 + int.from_bytes(raw[:8], "little")
        header = parse_header(raw[8:start], len(raw) - start, name)
        for i, tensor in enumerate(header.names):
            begin, size = int(header.begins[i]), int(header.nbytes[i])
            tensors[tensor] = header.dtypes[i], header.shapes[i], raw[begin : begin + size]
    return files, tensors


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("cases")
    sides = model()
    base = write_safetensors(folder / "base.safetensors", sides[0])
    alone = write_safetensors(folder / "tuned.safetensors", sides[1])
    shards = sharded(folder / "tuned", sides[1])
    store = ckdiff.diff(base, alone, folder / "all.zarr").store
    assert store is not None
    half = ckdiff.random_mask(store, folder / "half.zarr", seed=3)
    sides = resized()
    other = write_safetensors(folder / "other.safetensors", sides[0])
    rows = write_safetensors(folder / "other-tuned.safetensors", sides[1])
    found = {}
    for name, tuned, options in [
        ("packed", shards, {}),
        ("indices", shards, {"encoding": "indices"}),
        ("lossy", alone, {"mask": half}),
        ("indices of a file", alone, {"encoding": "indices"}),
        ("rows", rows, {}),
        ("rows, indices", rows, {"encoding": "indices"}),
    ]:
        path = folder / f"{name}.delta"
        base = other if tuned == rows else base
        ckdiff.delta(base, tuned, path, **options)  # type: ignore[arg-type]
        ckdiff.apply(base, path, folder / f"{name}.safetensors")
        files, tensors = contents(folder / f"{name}.safetensors")
        found[name] = Case(base, loosen(path), files, tensors)
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is slow and has nothing to do with the bytes: the disk, and looking for limits."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(budget, "cgroup_limit", lambda: None)


# mutations of values

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 2**31, 2**63 - 1, 2**63, 10**30, 0.5, 1e308, "", "x", "\0",
    "\x1b[31m", "\udcff", "\ud800", "é", "../x", "/x", ".x", "a.safetensors", "x" * 300, [], [[]],
    {}, {"x": 1}, "exact", "0" * 32, "BF16", "added", "packed", "indices",
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if not isinstance(value, (dict, list)):
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from places(inner, (*path, key))


def change_value(manifest: Any, rng: random.Random) -> None:
    """Change, remove, add or move one value somewhere."""
    path = rng.choice(list(places(manifest)))
    holder = manifest
    for key in path[:-1]:
        holder = holder[key]
    key, what = path[-1], rng.randrange(8)
    value = holder[key]
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[rng.choice(["x", "more", "\x1b[2J", key + " "])] = value
    elif what == 1:
        holder.insert(key, value)
    elif what == 2 and type(value) is int:
        holder[key] = value + rng.choice([-1, 1, 8, -8, 512, 1 << 40])
    elif what == 3 and isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        holder[key] = (
            value[:at] + rng.choice(["", "\n", "\x9b", "0", "/", "\u202e"]) + value[at + 1 :]
        )
    elif what == 4:
        other = rng.choice(list(places(manifest)))
        source = manifest
        for step in other:
            source = source[step]
        holder[key] = json.loads(json.dumps(source))
    elif what == 5 and type(value) is int:
        holder[key] = rng.choice([float(value), str(value), bool(value), [value]])
    else:
        holder[key] = rng.choice(ODD)


def of_the_manifest(loose: Loose, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if rng.random() < 0.08 and isinstance(loose.manifest.get("parts"), dict):
            loose.kept |= {"ckdiff.tensors", "ckdiff.heads", "ckdiff.frames"}
        change_value(loose.manifest, rng)
    if rng.random() < 0.15:
        text = json.dumps(loose.manifest).encode()
        at = rng.randrange(len(text))
        loose.text = rng.choice(
            [
                text[:at],
                text + b" {}",
                text.replace(b"{", b'{"elements":1,', 1),
                text.replace(b"0", b"0" * 5000, 1),
                text.replace(b"[", b"[" * 50_000, 1),
                text[:at] + b"\xff" + text[at:],
                text.replace(b": ", b": NaN ", 1),
                b"\xef\xbb\xbf" + text,
                bytes(1000),
            ]
        )


def of_the_metadata(loose: Loose, rng: random.Random) -> None:
    if rng.random() < 0.3:
        del loose.metadata[rng.choice(["format", "version", "encoding"])]
        return
    key = rng.choice(["format", "version", "encoding", "x", "encoding", "version"])
    loose.metadata[key] = rng.choice(
        ["packed", "indices", "1", "2", "\x1b[1m", "", "1.0", "x" * 999]
    )


# mutations of tables and frames


def altered(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed in one of the ways that bytes are."""
    raw, what = bytearray(data), rng.randrange(7)
    at = rng.randrange(len(raw) + 1)
    if what == 0:
        return bytes(raw[:at])
    if what == 1:
        return bytes(raw[:at] + noise(at, rng.choice([1, 4, 8, 41])) + raw[at:])
    if what == 2:
        return bytes(raw) * 2
    if not raw:
        return b"\0"
    for _ in range(rng.choice([1, 1, 2, 5])):
        raw[rng.randrange(len(raw))] = rng.choice([0, 1, 2, 0x80, 0xFF, rng.randrange(256)])
    return bytes(raw)


def of_a_table(loose: Loose, rng: random.Random) -> None:
    name = rng.choice(["ckdiff.tensors", "ckdiff.tensors", "ckdiff.heads", "ckdiff.frames"])
    count = loose.tensors
    if name == "ckdiff.tensors" and rng.random() < 0.5:  # consistent with the manifest
        raw = bytearray(loose.parts[name])
        changed = np.frombuffer(raw, np.int64, count, 33 * count)
        one, other = rng.sample(range(count), 2)
        step = rng.choice([1, -1, 3])
        changed[one] += step
        if rng.random() < 0.5:
            changed[other] -= step
        else:
            loose.manifest["changed"] += step
        loose.parts[name] = bytes(raw)
    elif name == "ckdiff.tensors" and rng.random() < 0.5:  # one row for another, or flags
        raw = bytearray(loose.parts[name])
        one, other = rng.sample(range(count), 2)
        begin, width = rng.choice([(0, 1), (count, 16), (17 * count, 16), (33 * count, 8)])
        source = begin + other * width
        raw[begin + one * width : begin + (one + 1) * width] = raw[source : source + width]
        loose.parts[name] = bytes(raw)
    else:
        loose.parts[name] = altered(loose.parts[name], rng)
    if rng.random() < 0.1:
        loose.stored[name] = altered(loose.parts[name], rng)


def of_the_frames(loose: Loose, rng: random.Random) -> None:
    if DATA in loose.streams:
        frames = loose.frames()
        one, other = rng.sample(range(len(frames)), 2)
        what = rng.randrange(6)
        if what == 0:
            frames[one], frames[other] = frames[other], frames[one]
        elif what == 1:
            frames[one] = b""
        elif what == 2:
            frames[one] = frames[other]
        elif what == 3:
            frames[one] += bytes(rng.choice([1, 4096, 1 << 20]))
        else:
            frames[one] = altered(frames[one], rng)
        loose.set_frames(frames)
        return
    name = rng.choice(list(loose.streams))
    dtype, shape, data = loose.streams[name]
    what = rng.randrange(4)
    if what == 0:
        loose.streams[name] = rng.choice(["I32", "U32", "F32", "BF16", "U8"]), shape, data
    elif what == 1:
        other = rng.choice(list(loose.streams))
        loose.streams[name], loose.streams[other] = loose.streams[other], loose.streams[name]
    else:
        for _ in range(rng.choice([1, 2])):
            raw = bytearray(data)
            if raw:
                raw[rng.randrange(len(raw))] = rng.choice([0, 1, 0xFF, rng.randrange(256)])
            data = bytes(raw)
        loose.streams[name] = dtype, shape, data
    seal_windows(loose)


def seal_windows(loose: Loose) -> None:
    """Make the digests of an indices delta's windows right: here each tensor is one window."""
    sizes = np.frombuffer(loose.parts["ckdiff.frames"], np.uint32, loose.windows)
    digests = []
    for at, name in enumerate(names_of(loose)):
        found = b"".join(
            loose.streams[key][2]
            for key in (name, f"{name}.indices", f"{name}.values")
            if key in loose.streams
        )
        digests.append(xxhash.xxh3_64_intdigest(found) if sizes[at] else 0)
    loose.parts["ckdiff.frames"] = sizes.tobytes() + np.array(digests, np.uint64).tobytes()


def names_of(loose: Loose) -> list[str]:
    """Tensors with a window, in the order of the files."""
    heads, at, found = loose.parts["ckdiff.heads"], 0, list[str]()
    for _, _, length in loose.manifest["files"]:
        header = json.loads(heads[at + 8 : at + length])
        at += length
        found += [
            name
            for name, entry in header.items()
            if name != "__metadata__" and entry["data_offsets"][0] < entry["data_offsets"][1]
        ]
    return found


Mutation = Callable[[Loose, random.Random], None]
MUTATIONS: dict[str, Mutation] = {
    "manifest": of_the_manifest,
    "metadata": lambda loose, rng: [of_the_metadata, of_the_manifest][rng.random() < 0.7](
        loose, rng
    ),
    "table": of_a_table,
    "frames": of_the_frames,
}


def refused(action: Callable[[], Any]) -> Any:
    """What an action gives, or the error; anything but one of ours ends the test."""
    try:
        return action()
    except ckdiff.CkdiffError as error:
        line = error.one_line()
        assert line.isprintable()
        assert len(line) < 2000
        return error


def applied(case: Case, patches: list[Any]) -> Contents:
    """What records make of the base."""
    raw = case.base.read_bytes()
    found = {name: bytearray(data) for name, (_, _, data) in contents(case.base)[1].items()}
    assert raw
    for patch in patches:
        values = np.asarray(patch.values)
        if patch.indices is None:
            found[patch.name] = bytearray(values.tobytes())
        else:
            bits = np.frombuffer(found[patch.name], f"<u{values.itemsize}")
            bits[patch.indices] = values.view(bits.dtype)
    return {
        name: (dtype, shape, bytes(found[name])) for name, (dtype, shape, _) in case.tensors.items()
    }


NAMES = ["packed", "indices", "lossy", "indices of a file", "rows", "rows, indices"]


@pytest.mark.parametrize("kind", MUTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_sealed_mutations(name: str, kind: str, cases: dict[str, Case], tmp_path: Path) -> None:
    case, rng = cases[name], random.Random(f"{name} {kind}")
    path, out = tmp_path / "delta", tmp_path / "out.safetensors"
    errors, whole = 0, ckdiff.info(case.loose.copy().seal(tmp_path / "whole"))
    rounds = ROUNDS // 2 if "rows" in name and kind != "manifest" else ROUNDS
    for number in range(rounds):
        loose = case.loose.copy()
        MUTATIONS[kind](loose, rng)
        loose.seal(path)
        told = refused(lambda: ckdiff.info(path))
        made = refused(lambda: ckdiff.apply(case.base, path, out))
        given = refused(lambda: list(ckdiff.weight_patches(path, base=case.base)))
        if isinstance(made, ckdiff.CkdiffError):
            errors += 1
            assert not out.exists(), number
            assert isinstance(given, ckdiff.CkdiffError), (number, made)
            if number % 4 == 0:
                refused(lambda: list(ckdiff.weight_patches(path)))
            continue
        files, tensors = contents(out)
        assert tensors == case.tensors, number
        if loose.parts["ckdiff.heads"] == case.loose.parts["ckdiff.heads"]:
            assert sorted(files.values()) == sorted(case.files.values()), number
        assert all(file.endswith((".", ".safetensors", ".index.json")) for file in files)
        assert applied(case, given) == case.tensors, number
        for key in ("elements", "changed", "tensors", "paired", "rebuilt_size", "encoding"):
            assert told[key] == whole[key], (number, key)
        _remove(out)
    assert errors > rounds / 3
    assert [entry.name for entry in tmp_path.iterdir() if "partial" in entry.name] == []


def _remove(out: Path) -> None:
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink()


def test_what_is_sealed_again_is_the_same_delta(cases: dict[str, Case], tmp_path: Path) -> None:
    """The mutations above start from what works."""
    for case in cases.values():
        loose = case.loose.copy()
        if DATA in loose.streams:
            loose.set_frames(loose.frames())
        else:
            seal_windows(loose)
        path, out = loose.seal(tmp_path / "delta"), tmp_path / "out.safetensors"
        ckdiff.apply(case.base, path, out)
        assert contents(out)[0] == case.files
        assert applied(case, list(ckdiff.weight_patches(path, base=case.base))) == case.tensors
        _remove(out)
