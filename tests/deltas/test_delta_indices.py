"""The indices encoding: what other tools read in the file, what is rebuilt, and what is refused."""

from __future__ import annotations

import gc
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from checkpoint_pairs import Model, Pair, files_of, some_model, some_pair, write_side
from kernel_runs import random_bits
from safetensors import safe_open
from support import Tensor, write_index, write_safetensors

from ckdiff.checkpoints.formats.safetensors import parse_header
from ckdiff.deltas import indices, streamplan, streams
from ckdiff.deltas.applying import apply
from ckdiff.deltas.change import Change
from ckdiff.deltas.container import Delta, DeltaWriter
from ckdiff.deltas.creating import delta
from ckdiff.errors import CkdiffError, DeltaError, OutputError, PairingError

DTYPES = list(naive.FORMATS)
PARTS = {"ckdiff.frames", "ckdiff.tensors", "ckdiff.heads", "ckdiff.manifest"}


def stored(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes, int]]:
    """Every tensor of a file: dtype, shape, bytes, and where they begin."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = parse_header(raw[8:start], len(raw) - start, path.name)
    columns = zip(
        header.names, header.dtypes, header.shapes, header.begins, header.nbytes, strict=True
    )
    return {n: (d, s, raw[b : b + z], int(b)) for n, d, s, b, z in columns}


def expected(model: Model) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What a delta of a model says, besides the parts of every delta."""
    found = {}
    for name, pair in model.items():
        bits = naive.FORMATS[pair.dtype].bits
        if pair.base == pair.tuned:
            continue
        if bits < 8:
            found[name] = pair.dtype, pair.shape, pair.tuned
            continue
        size = bits // 8
        pieces = [
            [side[i : i + size] for i in range(0, len(side), size)]
            for side in (pair.base, pair.tuned)
        ]
        where = [i for i, (x, y) in enumerate(zip(*pieces, strict=True)) if x != y]
        data = np.array(where, "<i4").tobytes()
        found[name + ".indices"] = "I32", (len(where),), data
        values = b"".join(pieces[1][i] for i in where)
        found[name + ".values"] = pair.dtype, (len(where),), values
    return found


def make(folder: Path, model: Model, seed: int = 0) -> tuple[Path, Path, Path]:
    base = write_side(folder / "base", model, "base", seed)
    tuned = write_side(folder / "tuned", model, "tuned", seed + 1)
    delta(base, tuned, folder / "delta", encoding="indices")
    return base, tuned, folder / "delta"


@pytest.mark.parametrize("seed", range(6))
def test_the_file_says_what_changed_and_rebuilds_it(seed: int, tmp_path: Path) -> None:
    model = some_model(seed)
    base, tuned, path = make(tmp_path, model, seed)
    found = stored(path)
    assert found.keys() >= PARTS
    assert {n: v[:3] for n, v in found.items() if n not in PARTS} == expected(model)
    for name, (dtype, _, _, begin) in found.items():
        if name not in PARTS:
            assert begin % max(naive.FORMATS[dtype].bits // 8, 1) == 0, "readers may map it"
    apply(base, path, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tuned)
    assert sorted(os.listdir(tmp_path)) == ["base", "delta", "out", "tuned"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workers", [1, 3])
def test_every_dtype_at_every_density(dtype: str, workers: int, tmp_path: Path) -> None:
    model = {"some": some_pair(dtype, (40, 8), 1)}
    x, y = (random_bits(dtype, 320, seed) for seed in (3, 4))
    some = model["some"]
    model["same"] = Pair(dtype, (320,), some.base, some.base)
    model["all"] = Pair(dtype, (320,), bytes(len(some.base)), b"\xff" * len(some.base))
    model["none"] = Pair(dtype, (0, 4), b"", b"")
    one = bytearray(some.base)
    one[-1] ^= 1
    model["one"] = Pair(dtype, (320,), some.base, bytes(one))
    assert len(x) == len(y)
    base = write_side(tmp_path / "base", model, "base", 5)
    tuned = write_side(tmp_path / "tuned", model, "tuned", 6)
    made = delta(base, tuned, tmp_path / "delta", encoding="indices", workers=workers)
    apply(base, tmp_path / "delta", tmp_path / "out", workers=workers)
    assert files_of(tmp_path / "out") == files_of(tuned)
    found = stored(tmp_path / "delta")
    assert {n: v[:3] for n, v in found.items() if n not in PARTS} == expected(model)
    changed = sum(int(pair.masks(["exact"])["exact"].sum()) for pair in model.values())
    assert made.changed == changed


def test_what_bits_alone_tell_apart_is_a_change(tmp_path: Path) -> None:
    base = np.array([0.0, -0.0, 1.0], "<f4")
    tuned = np.array([-0.0, -0.0, 1.0], "<f4")
    nans = np.array([0x7FC00000, 0x7FC00000], "<u4"), np.array([0x7FC00000, 0x7FC00001], "<u4")
    model = {
        "zeros": Pair("F32", (3,), base.tobytes(), tuned.tobytes()),
        "nans": Pair("F32", (2,), nans[0].tobytes(), nans[1].tobytes()),
        "pairs": Pair("C64", (), bytes(8), bytes(7) + b"\x80"),
    }
    _, _, path = make(tmp_path, model)
    found = stored(path)
    for name, where in (("zeros", [0]), ("nans", [1]), ("pairs", [0])):
        assert np.frombuffer(found[name + ".indices"][2], "<i4").tolist() == where
    assert found["pairs.values"][:2] == ("C64", (1,))


def test_torch_reads_it_and_can_apply_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    load = pytest.importorskip("safetensors.torch").load_file
    known = {"BF16", "F16", "F32", "F64", "I64", "I8", "BOOL", "F8_E4M3", "C64"}
    model = {dtype: some_pair(dtype, (30, 4), i) for i, dtype in enumerate(sorted(known))}
    model = {
        n: Pair(p.dtype, p.shape, *map(sane(p.dtype), (p.base, p.tuned))) for n, p in model.items()
    }
    for side in ("base", "tuned"):
        tensors = {n: (p.dtype, p.shape, getattr(p, side)) for n, p in model.items()}
        write_safetensors(tmp_path / f"{side}.safetensors", tensors)
    sides = [load(tmp_path / f"{side}.safetensors") for side in ("base", "tuned")]
    path = tmp_path / "delta.safetensors"
    delta(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", path, encoding="indices")
    update = load(path)
    for name, tensor in sides[0].items():
        bits = getattr(torch, f"uint{8 * tensor.element_size()}")
        if tensor.element_size() > 1:
            bits = getattr(torch, f"int{8 * tensor.element_size()}")
        flat = tensor.view(bits).reshape(-1)
        where = update[name + ".indices"]
        assert where.dtype == torch.int32
        assert update[name + ".values"].dtype == tensor.dtype
        flat[where.long()] = update[name + ".values"].view(bits)
        assert torch.equal(flat, sides[1][name].view(bits).reshape(-1)), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["encoding"] == "indices"


def sane(dtype: str) -> Callable[[bytes], bytes]:
    """Torch makes its own bools of other bytes than 0 and 1."""
    return (lambda data: bytes(b & 1 for b in data)) if dtype == "BOOL" else (lambda data: data)


def side_files(folder: Path, shards: list[dict[str, Tensor]]) -> Path:
    weight_map = {}
    for i, tensors in enumerate(shards):
        file = f"model-{i}.safetensors"
        write_safetensors(folder / file, tensors, {"format": "pt"}, pad=3 * i)
        weight_map |= dict.fromkeys(tensors, file)
    write_index(folder, weight_map)
    return folder


def noise(count: int, seed: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8).tobytes()


def unlike(folder: Path) -> tuple[Path, Path]:
    """Two checkpoints with every way of not having a base."""
    kept = noise(4000, 1)
    base = side_files(folder / "base", [
        {"kept": ("BF16", (2000,), kept), "removed": ("F32", (5,), noise(20, 2))},
        {"reshaped": ("F16", (8, 4), noise(64, 3)), "retyped": ("F16", (16,), noise(32, 4)),
         "four": ("F4", (64,), noise(32, 5))},
    ])  # fmt: skip
    tuned = side_files(folder / "tuned", [
        {"added": ("F64", (3,), noise(24, 6)), "empty": ("I32", (0, 7), b""),
         "scalar": ("U64", (), noise(8, 7)), "six": ("F6_E2M3", (8,), noise(6, 8))},
        {"kept": ("BF16", (2000,), kept[:100] + noise(200, 9) + kept[300:]),
         "reshaped": ("F16", (4, 8), noise(64, 3)), "retyped": ("BF16", (16,), noise(32, 4)),
         "four": ("F4", (64,), noise(32, 5))},
    ])  # fmt: skip
    return base, tuned


def test_tensors_without_a_base_are_there_whole(tmp_path: Path) -> None:
    base, tuned = unlike(tmp_path)
    delta(base, tuned, tmp_path / "delta", encoding="indices")
    found = stored(tmp_path / "delta")
    whole = {"added", "empty", "scalar", "six", "reshaped", "retyped"}
    assert found.keys() == PARTS | whole | {"kept.indices", "kept.values"}
    assert found["empty"][:2] == ("I32", (0, 7))
    assert found["scalar"][:2] == ("U64", ())
    apply(base, tmp_path / "delta", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tuned)


def test_nothing_changed(tmp_path: Path) -> None:
    model = {name: Pair(p.dtype, p.shape, p.base, p.base) for name, p in some_model(3).items()}
    base, tuned, path = make(tmp_path, model)
    assert stored(path).keys() == PARTS
    apply(base, path, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tuned)


def large(folder: Path) -> tuple[Path, Path]:
    """Tensors of several windows: one in which all changed, one sparse, one with windows alike."""
    count = (8 << 20) + 4096
    one = np.random.default_rng(1).integers(0, 1 << 16, count, np.uint16)
    two = one.copy()
    two[::101] += 1
    three = one.copy()
    three[-5:] += 1
    nibbles = np.zeros(9 << 20, np.uint8)
    other = nibbles.copy()
    other[5 << 20] = 1
    names = {
        "all": (one, ~one),
        "also": (~one, one),
        "sparse": (one, two),
        "end": (one, three),
        "same": (one, one),
    }
    for i, side in enumerate(("base", "tuned")):
        tensors = {n: ("BF16", (count,), pair[i].tobytes()) for n, pair in names.items()}
        tensors["four"] = "F4", (18 << 20,), (nibbles, other)[i].tobytes()
        tensors["fours"] = "F4", (18 << 20,), nibbles.tobytes()
        write_safetensors(folder / side / "a.safetensors", tensors)
    return folder / "base", folder / "tuned"


def test_tensors_of_many_windows_in_bounded_memory(tmp_path: Path) -> None:
    base, tuned = large(tmp_path)
    tracemalloc.start()
    try:
        delta(base, tuned, tmp_path / "delta", encoding="indices", workers=2)
        made = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        apply(base, tmp_path / "delta", tmp_path / "out", workers=2)
        applied = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # a few windows in flight, not what they add up to
    assert made < 60 << 20 < 100 << 20 < (tmp_path / "delta").stat().st_size
    assert applied < 2 * 56 << 20  # what outcome.py allows two workers
    assert files_of(tmp_path / "out") == files_of(tuned)
    found = stored(tmp_path / "delta")
    assert found.keys() == PARTS | {"four"} | {
        f"{name}.{part}"
        for name in ("all", "also", "sparse", "end")
        for part in ("indices", "values")
    }
    where = np.frombuffer(found["sparse.indices"][2], "<i4")
    assert np.array_equal(where, np.arange(0, (8 << 20) + 4096, 101))


def test_positions_of_huge_tensors_are_wide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamplan, "_NARROW", 100)
    model = {"wide": some_pair("F32", (100,), 1), "narrow": some_pair("F64", (99,), 2)}
    base, tuned, path = make(tmp_path, model)
    found = stored(path)
    assert found["wide.indices"][0] == "I64"
    assert found["narrow.indices"][0] == "I32"
    assert all(found[name][3] % 8 == 0 for name in ("wide.indices", "narrow.values"))
    apply(base, path, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tuned)


def test_without_the_systems_copying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    model = some_model(11)
    _, _, path = make(tmp_path / "one", model)

    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    (tmp_path / "two").mkdir()
    assert make(tmp_path / "two", model)[2].read_bytes() == path.read_bytes()
    monkeypatch.delattr(os, "copy_file_range")
    (tmp_path / "three").mkdir()
    assert make(tmp_path / "three", model)[2].read_bytes() == path.read_bytes()


@pytest.mark.parametrize("order", ["ip", "pi", "ii", "ipi"])
def test_chains_with_packed_deltas(order: str, tmp_path: Path) -> None:
    models = [some_pair("BF16", (3000,), 1), some_pair("F32", (50,), 2), some_pair("F4", (64,), 3)]
    sides = []
    for step in range(len(order) + 1):
        tensors = {}
        for i, pair in enumerate(models):
            data = bytearray(pair.base)
            for j in range(step * 7, len(data), 40):
                data[j] ^= step
            tensors[f"t{i}"] = pair.dtype, pair.shape, bytes(data)
        if step:
            tensors[f"new{step % 2}"] = "F16", (step,), noise(2 * step, step)
        sides.append(tmp_path / f"side{step}.safetensors")
        write_safetensors(sides[-1], tensors)
    deltas = []
    for i, letter in enumerate(order):
        deltas.append(tmp_path / f"delta{i}")
        encoding: Any = {"i": "indices", "p": "packed"}[letter]
        delta(sides[i], sides[i + 1], deltas[-1], encoding=encoding)
    apply(sides[0], deltas, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == sides[-1].read_bytes()


@pytest.mark.parametrize(
    "names", [("a", "a.indices"), ("a", "a.values"), ("ckdiff.heads",), ("ckdiff.x",)]
)
def test_names_that_would_be_taken_for_others(names: tuple[str, ...], tmp_path: Path) -> None:
    model = {name: some_pair("F32", (4,), i) for i, name in enumerate(names)}
    with pytest.raises(PairingError, match="could not be told apart") as raised:
        make(tmp_path, model)
    assert "packed" in (raised.value.hint or "")
    assert sorted(os.listdir(tmp_path)) == ["base", "tuned"]
    delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta")


def test_a_header_that_the_format_does_not_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indices, "HEADER_LIMIT", 3000)
    with pytest.raises(OutputError, match="header"):
        make(tmp_path, some_model(5))
    assert sorted(os.listdir(tmp_path)) == ["base", "tuned"]


def test_odd_names_fit_into_the_header(tmp_path: Path) -> None:
    odd = ["\x01" * 200, '"\\' * 100, "\U0001f600" * 50, "é" * 300, "\u2028 x", " "]
    model = {name: some_pair("U8", (9,), i) for i, name in enumerate(odd)}
    base, tuned, path = make(tmp_path, model)
    apply(base, path, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tuned)


def test_another_base_leaves_nothing(tmp_path: Path) -> None:
    model = some_model(7)
    _, tuned, path = make(tmp_path, model)
    with pytest.raises(DeltaError, match="was not made for"):
        apply(tuned, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DeltaWriter, "append_file", full)
    with pytest.raises(OutputError, match="No space left"):
        make(tmp_path, some_model(9))
    assert sorted(os.listdir(tmp_path)) == ["base", "tuned"]


# -- damage ----------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    base, tuned = unlike(tmp_path)
    delta(base, tuned, tmp_path / "delta", encoding="indices")
    yield base, tmp_path / "delta"
    assert not (tmp_path / "out").exists()
    assert sorted(os.listdir(tmp_path)) == ["base", "delta", "tuned"]


def test_every_part_flipped(made: tuple[Path, Path]) -> None:
    base, path = made
    raw = path.read_bytes()
    places = [0, 3, 8, 9, 60, 300, 8 + int.from_bytes(raw[:8], "little") - 1]
    for _, _, data, begin in stored(path).values():
        places += [begin, begin + len(data) // 2, begin + len(data) - 1] if data else []
    for place in places:
        for flip in (1, 0x80):
            path.write_bytes(raw[:place] + bytes([raw[place] ^ flip]) + raw[place + 1 :])
            with pytest.raises(CkdiffError):
                apply(base, path, path.parent / "out")


def test_the_tensor_that_is_damaged_is_named(made: tuple[Path, Path]) -> None:
    base, path = made
    raw = path.read_bytes()
    for name in ("kept.indices", "kept.values", "added", "scalar", "six"):
        place = stored(path)[name][3]
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
        with pytest.raises(DeltaError, match=f"changes of {name.partition('.')[0]} are not what"):
            apply(base, path, path.parent / "out")
        path.write_bytes(raw)


def test_every_part_cut(made: tuple[Path, Path]) -> None:
    base, path = made
    raw = path.read_bytes()
    ends = [0, 7, 8, 100] + [begin + len(data) - 1 for _, _, data, begin in stored(path).values()]
    for end in ends:
        path.write_bytes(raw[:end])
        with pytest.raises(CkdiffError):
            apply(base, path, path.parent / "out")


Entries = dict[str, Any]


def rename(entries: Entries, old: str, new: str) -> None:
    entries[new] = entries.pop(old)


def set_entry(entries: Entries, name: str, **fields: Any) -> None:
    entries[name] |= fields


def swap(entries: Entries, one: str, other: str) -> None:
    entries[one], entries[other] = entries[other], entries[one]


HEADERS: dict[str, Callable[[Entries], None]] = {
    "another dtype of positions": lambda e: set_entry(e, "kept.indices", dtype="U32"),
    "another dtype of values": lambda e: set_entry(e, "kept.values", dtype="F16"),
    "positions in two dimensions": lambda e: set_entry(
        e, "kept.indices", shape=[1, *e["kept.indices"]["shape"]]
    ),
    "fewer values": lambda e: set_entry(
        e, "kept.values", dtype="F32", shape=[e["kept.values"]["shape"][0] // 2]
    ),
    "no positions": lambda e: rename(e, "kept.indices", "kept.indexes"),
    "no values": lambda e: rename(e, "kept.values", "other.values"),
    "another tensor's": lambda e: rename(e, "added", "removed"),
    "another shape": lambda e: set_entry(e, "added", shape=[3, 1]),
    "another whole dtype": lambda e: set_entry(e, "added", dtype="I64"),
    "a tensor too many": lambda e: e.update(extra=dict(e["empty"])),
    "two tensors swapped": lambda e: swap(e, "reshaped", "added"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies(case: str, made: tuple[Path, Path]) -> None:
    base, path = made
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:start])
    HEADERS[case](entries)
    header = json.dumps(entries, separators=(",", ":")).encode()
    assert len(header) <= start - 8
    path.write_bytes(raw[:8] + header.ljust(start - 8) + raw[start:])
    with pytest.raises(DeltaError, match="damaged"):
        apply(base, path, path.parent / "out")


#: positions that a writer could put there, with all digests right, for a tensor of 10 elements
HOSTILE = [[-1, 3], [3, 10], [2, 2], [5, 4], [1 << 31, 3], [-(1 << 31), 1]]


@pytest.mark.parametrize("positions", HOSTILE)
@pytest.mark.parametrize("narrow", [True, False])
def test_positions_that_lie(
    positions: list[int], narrow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not narrow:
        monkeypatch.setattr(streamplan, "_NARROW", 1)

    def lie(*_: Any) -> Change:
        where = np.array(positions, np.int64)
        spots = indices._Spots(np.array([7, 7], "<u4"), where.astype("<i4") if narrow else where)
        return Change(spots, 2)

    model = {"x": some_pair("F32", (10,), 1)}
    with monkeypatch.context() as patch:
        patch.setattr(indices.IndicesCoder, "changes", lie)
        base, _, path = make(tmp_path, model)
    with pytest.raises(DeltaError, match="positions in x make no sense"):
        apply(base, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0, 39, 41, 80])
def test_whole_tensors_of_other_sizes(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lie(*_: Any) -> Change:
        return Change(indices._Whole(bytes(size), anyway=True), 0)

    monkeypatch.setattr(indices.IndicesCoder, "whole", lie)
    monkeypatch.setattr(indices, "_nbytes", lambda stream: size)  # what is copied into the file
    write_safetensors(tmp_path / "base.safetensors", {"x": ("F32", (1,), bytes(4))})
    tensors: dict[str, Tensor] = {"x": ("F32", (1,), bytes(4)), "y": ("F32", (10,), bytes(40))}
    write_safetensors(tmp_path / "tuned.safetensors", tensors)
    path = tmp_path / "delta"
    delta(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", path, encoding="indices")
    with pytest.raises(CkdiffError):
        apply(tmp_path / "base.safetensors", path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_more_changes_than_elements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lie(*_: Any) -> Change:
        return Change(indices._Spots(np.zeros(12, "<u4"), np.arange(12, dtype=np.int32)), 10)

    monkeypatch.setattr(indices.IndicesCoder, "changes", lie)
    base, _, path = make(tmp_path, {"x": some_pair("F32", (10,), 1)})
    with pytest.raises(DeltaError, match="x has another size"):
        apply(base, path, tmp_path / "out")


def test_streams_are_looked_through_once(tmp_path: Path) -> None:
    _, _, path = make(tmp_path, some_model(2))
    with Delta(str(path)) as opened:
        assert streams.streams_of(opened) is streams.streams_of(opened)
        assert opened in streams._open
    del opened
    gc.collect()
    assert path not in [Path(known.path) for known in streams._open], "nothing keeps a closed one"
