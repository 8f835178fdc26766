"""Records of what changed: what vLLM's loader would make of them, and deltas made of them."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import naive
import numpy as np
import pytest
from checkpoint_pairs import Model, Pair, files_of, some_model, some_pair, write_side
from kernel_runs import random_bits
from support import Tensor, write_safetensors

import ckdiff
from ckdiff import WeightPatch, delta_from_patches, weight_patches
from ckdiff.deltas import weightpatch
from ckdiff.deltas.weightpatch import has_nan
from ckdiff.dtypes import DTYPES
from ckdiff.errors import CkdiffError, DeltaError, PairingError, UsageError

SOURCES = ["packed", "indices", "checkpoint"]


class Run(NamedTuple):
    """A pair of checkpoints on the disk, and a source of records."""

    base: Path
    tuned: Path
    source: Path


def make(folder: Path, model: Model, source: str, seed: int = 0) -> Run:
    base = write_side(folder / "base", model, "base", seed)
    tuned = write_side(folder / "tuned", model, "tuned", seed + 1)
    if source == "checkpoint":
        return Run(base, tuned, tuned)
    encoding: Any = source
    ckdiff.delta(base, tuned, folder / source, encoding=encoding)
    return Run(base, tuned, folder / source)


def nan(dtype: str, bits: naive.Bits) -> bool:
    """Whether there is one, by the definition of the format."""
    return any(value != value for value in (naive.value(dtype, int(b)) for b in bits))


def load(model: Model, patches: list[WeightPatch]) -> dict[str, bytes]:
    """Apply records to the base as vLLM's loader does, with all that it asks of them."""
    sides = {name: bytearray(pair.base) for name, pair in model.items()}
    for patch in patches:
        pair = model[patch.name]
        assert (patch.dtype, patch.shape) == (pair.dtype, pair.shape)
        values = np.asarray(patch.values)
        assert values.ndim == 1
        assert values.flags.writeable
        if patch.indices is None:
            assert values.nbytes == len(pair.base)
            sides[patch.name][:] = values.tobytes()
            continue
        assert pair.dtype in naive.FLOATS, "positions and values are for floats"
        where = patch.indices
        assert where.dtype == np.int32
        assert where.ndim == 1
        assert len(where) == len(values)
        assert (np.diff(where) > 0).all()
        assert not len(where) or 0 <= where[0] <= where[-1] < pair.elements
        bits = values.view(naive.as_bits(pair.dtype, b"").dtype)
        assert not nan(pair.dtype, bits), "NaN is the mark of what did not change"
        target = np.frombuffer(sides[patch.name], bits.dtype)
        target[where] = bits
    return {name: bytes(side) for name, side in sides.items()}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("most", [1, 100, 1 << 28])
def test_what_the_loader_makes_of_them(source: str, most: int, tmp_path: Path) -> None:
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        model = some_model(seed)
        run = make(folder, model, source, seed)
        patches = list(weight_patches(run.source, base=run.base, max_bytes=most))
        assert load(model, patches) == {name: pair.tuned for name, pair in model.items()}
        changed = {name for name, pair in model.items() if pair.base != pair.tuned}
        assert {patch.name for patch in patches} == changed
        for patch in patches:
            if patch.indices is not None:
                size = patch.values.nbytes + patch.indices.nbytes
                assert size <= max(most, 16)


@pytest.mark.parametrize("dtype", naive.FLOATS)
@pytest.mark.parametrize("source", SOURCES)
def test_floats_without_nan_are_positions_and_values(
    dtype: str, source: str, tmp_path: Path
) -> None:
    tuned = random_bits(dtype, 300, 1).copy()
    tuned[[nan(dtype, tuned[i : i + 1]) for i in range(300)]] = 0
    base = tuned.copy()
    base[::7] ^= 1
    model = {"x": Pair(dtype, (10, 30), base.tobytes(), tuned.tobytes())}
    model["y"] = Pair(dtype, (300,), tuned.tobytes(), tuned.tobytes())
    run = make(tmp_path, model, source)
    needed = None if source == "indices" else run.base
    (patch,) = weight_patches(run.source, base=needed)
    assert np.array_equal(patch.indices, np.arange(0, 300, 7))
    assert patch.values.tobytes() == tuned[::7].tobytes()
    pieces = list(weight_patches(run.source, base=needed, max_bytes=12 * patch.values.itemsize))
    assert len(pieces) > 3
    assert np.array_equal(np.concatenate([piece.indices for piece in pieces]), patch.indices)


@pytest.mark.parametrize("dtype", naive.FLOATS)
def test_nan_is_found(dtype: str) -> None:
    width = naive.FORMATS[dtype].bits
    if width <= 16:
        bits = np.arange(1 << width, dtype=f"<u{width // 8}")
    else:
        bits = random_bits(dtype, 2000, 3).copy()
        known = {"F32": 0x7F800000, "F64": 0x7FF << 52}[dtype]
        bits[:4] = [known, known + 1, known | 1 << width - 1, (known | 1 << width - 1) + 1]
    for i in range(0, len(bits), max(len(bits) // 4096, 1)):
        one = bits[i : i + 1]
        assert has_nan(DTYPES[dtype], one) == nan(dtype, one), hex(int(one[0]))
    assert has_nan(DTYPES[dtype], bits)


@pytest.mark.parametrize("source", SOURCES)
def test_records_in_torch(source: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    dtypes = [name for name in naive.FORMATS if DTYPES[name].bits >= 8 and name != "BOOL"]
    model = {dtype: some_pair(dtype, (6, 5), i) for i, dtype in enumerate(dtypes)}
    for side in ("base", "tuned"):
        tensors = {n: (p.dtype, p.shape, getattr(p, side)) for n, p in model.items()}
        write_safetensors(tmp_path / f"{side}.safetensors", tensors)
    run = Run(*(tmp_path / f"{side}.safetensors" for side in ("base", "tuned", "tuned")))
    if source != "checkpoint":
        encoding: Any = source
        ckdiff.delta(run.base, run.tuned, tmp_path / source, encoding=encoding)
        run = run._replace(source=tmp_path / source)
    tuned = load_file(run.tuned)
    patches = list(weight_patches(run.source, base=run.base, as_torch=True))
    assert {patch.name for patch in patches} == set(model)
    for patch in patches:
        expected = tuned[patch.name]
        assert patch.dtype is expected.dtype
        assert patch.values.dtype is expected.dtype
        assert patch.shape == tuple(expected.shape)
        if patch.indices is None:
            assert patch.values.shape == (30,)
            found = patch.values
        else:
            assert patch.indices.dtype is torch.int32
            found = patch.values
            expected = expected.view(torch.uint8).reshape(30, -1)[patch.indices.long()]
        assert torch.equal(found.view(torch.uint8), expected.reshape(-1).view(torch.uint8))
    back = delta_from_patches(run.base, patches, tmp_path / "back", encoding="indices")
    ckdiff.apply(run.base, back.out, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == run.tuned.read_bytes()


def test_fields_are_those_of_vllm() -> None:
    assert WeightPatch._fields == ("name", "shape", "dtype", "values", "indices")


def test_tensors_without_a_base_come_whole(tmp_path: Path) -> None:
    kept = random_bits("F32", 50, 1).tobytes()
    base: dict[str, Tensor] = {"kept": ("F32", (50,), kept), "gone": ("F32", (1,), bytes(4)),
                               "other": ("F16", (4,), bytes(8))}  # fmt: skip
    tuned: dict[str, Tensor] = {"kept": ("F32", (50,), kept), "new": ("F32", (2, 1), b"12345678"),
                                "other": ("BF16", (4,), bytes(8)), "none": ("F32", (0,), b"")}  # fmt: skip  # noqa: E501
    write_safetensors(tmp_path / "base.safetensors", base)
    write_safetensors(tmp_path / "tuned.safetensors", tuned)
    for encoding in ("packed", "indices"):
        chosen: Any = encoding
        path = tmp_path / encoding
        ckdiff.delta(
            tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", path, encoding=chosen
        )
        found = {patch.name: patch for patch in weight_patches(path)}  # no base is needed
        assert found.keys() == {"new", "other", "none"}
        assert found["new"].values.tobytes() == b"12345678"
        assert found["other"].dtype == "BF16"
        assert all(patch.indices is None for patch in found.values())


def test_sub_byte_tensors_are_bytes_and_torch_has_no_records_of_them(tmp_path: Path) -> None:
    model = {"x": some_pair("F4", (8, 6), 1), "y": some_pair("F6_E2M3", (8,), 2)}
    run = make(tmp_path, model, "indices")
    patches = list(weight_patches(run.source))
    assert {p.name: p.values.tobytes() for p in patches} == {n: p.tuned for n, p in model.items()}
    pytest.importorskip("torch")
    with pytest.raises(UsageError, match="no dtype"):
        list(weight_patches(run.source, as_torch=True))


# -- refusals --------------------------------------------------------------------------------------


def test_a_base_that_is_needed_is_asked_for(tmp_path: Path) -> None:
    model = {"x": some_pair("I32", (50,), 1)}
    for source in SOURCES:
        folder = tmp_path / source
        folder.mkdir()
        run = make(folder, model, source)
        with pytest.raises(UsageError, match=r"is not a delta|alone") as raised:
            list(weight_patches(run.source))
        assert "base=" in (raised.value.hint or "")


@pytest.mark.parametrize("source", ["packed", "indices"])
def test_nothing_is_made_of_another_base(source: str, tmp_path: Path) -> None:
    run = make(tmp_path, {"x": some_pair("I32", (5000,), 1)}, source)
    with pytest.raises(DeltaError, match="was not made for"):
        next(weight_patches(run.source, base=run.tuned))


def test_a_damaged_delta_is_noticed(tmp_path: Path) -> None:
    values = np.arange(1000, dtype="<f4")
    model = {"x": Pair("F32", (1000,), values.tobytes(), (values + 1).tobytes())}
    for source in ("packed", "indices"):
        folder = tmp_path / source
        folder.mkdir()
        run = make(folder, model, source)
        raw = bytearray(run.source.read_bytes())
        raw[8 + int.from_bytes(raw[:8], "little") + 9] ^= 1
        run.source.write_bytes(raw)
        with pytest.raises(DeltaError, match="damaged"):
            list(weight_patches(run.source, base=run.base))


@pytest.mark.parametrize(
    "arguments", [{"max_bytes": 0}, {"max_bytes": "1"}, {"as_torch": "no"}], ids=str
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        weight_patches("anything", **arguments)


def test_a_base_that_is_rewritten_meanwhile(tmp_path: Path) -> None:
    values = np.arange(1000, dtype="<f4")
    model = {f"x{i}": Pair("F32", (1000,), values.tobytes(), (-values - 1).tobytes()) for i in "ab"}
    run = make(tmp_path, model, "packed")
    patches = weight_patches(run.source, base=run.base)
    next(patches)
    for file in run.base.iterdir():
        file.write_bytes(file.read_bytes())
    with pytest.raises(CkdiffError):
        list(patches)


# -- deltas from records ---------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["packed", "indices"])
@pytest.mark.parametrize("source", SOURCES)
def test_deltas_from_records(source: str, encoding: Any, tmp_path: Path) -> None:
    model = some_model(4)
    run = make(tmp_path, model, source)
    patches = list(weight_patches(run.source, base=run.base, max_bytes=64))
    random.Random(1).shuffle(patches)
    made = delta_from_patches(run.base, iter(patches), tmp_path / "made", encoding=encoding)
    assert made.changed == sum(
        int(p.masks(["exact"])["exact"].sum()) for p in model.values() if p.dtype != "C64"
    ) + sum(
        sum(p.base[i : i + 8] != p.tuned[i : i + 8] for i in range(0, len(p.base), 8))
        for p in model.values()
        if p.dtype == "C64"
    )
    assert made.lossy is None
    ckdiff.apply(run.base, tmp_path / "made", tmp_path / "out")
    # the files are the base's; what is in them is the tuned side's
    assert files_of(tmp_path / "out").keys() == files_of(run.base).keys()
    assert list(weight_patches(tmp_path / "out", base=run.tuned)) == []
    assert sorted(os.listdir(tmp_path)) == sorted({"base", "tuned", "made", "out", run.source.name})


def test_many_windows(tmp_path: Path) -> None:
    count = (8 << 20) + 77
    base = np.zeros(count, "<u2")
    tuned = base.copy()
    where = np.array([0, 5, (4 << 20) - 1, 4 << 20, count - 1])
    tuned[where] = 0x3F80
    write_safetensors(tmp_path / "a.safetensors", {"x": ("BF16", (count,), base.tobytes())})
    write_safetensors(tmp_path / "b.safetensors", {"x": ("BF16", (count,), tuned.tobytes())})
    patch = WeightPatch("x", (count,), "BF16", tuned[where[::-1]], where[::-1].astype(np.int64))
    delta_from_patches(tmp_path / "a.safetensors", [patch], tmp_path / "delta", encoding="indices")
    ckdiff.apply(tmp_path / "a.safetensors", tmp_path / "delta", tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    (found,) = weight_patches(tmp_path / "delta")
    assert np.array_equal(found.indices, where)
    whole = WeightPatch("x", (count,), "BF16", tuned)
    delta_from_patches(tmp_path / "a.safetensors", [whole], tmp_path / "delta", overwrite=True)
    (found,) = weight_patches(tmp_path / "delta", base=tmp_path / "a.safetensors")
    assert np.array_equal(found.indices, where)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors: dict[str, Tensor] = {
        "x": ("F32", (2, 3), bytes(24)), "h": ("BF16", (4,), bytes(8)),
        "q": ("F8_E4M3", (4,), bytes(4)), "four": ("F4", (4,), bytes(2)),
        "none": ("F32", (0,), b""),
    }  # fmt: skip
    return write_safetensors(tmp_path / "base.safetensors", tensors)


def made_of(base: Path, patches: Any) -> dict[str, bytes]:
    """What the base becomes."""
    delta_from_patches(base, patches, base.parent / "delta", overwrite=True)
    out = base.parent / "out.safetensors"
    ckdiff.apply(base, base.parent / "delta", out, overwrite=True)
    raw, start = out.read_bytes(), 8 + int.from_bytes(out.read_bytes()[:8], "little")
    return {"x": raw[start : start + 24], "h": raw[start + 24 : start + 32],
            "q": raw[start + 32 : start + 36], "four": raw[start + 36 : start + 38]}  # fmt: skip


def floats(*values: float) -> Any:
    return np.array(values, "<f4")


def at(*positions: int) -> Any:
    return np.array(positions, np.int32)


def test_later_records_win(base: Path) -> None:
    shape = (2, 3)
    patches = [
        WeightPatch("x", shape, "F32", floats(1, 2, 3), at(4, 0, 2)),
        WeightPatch("x", shape, "F32", floats(7), at(0)),
    ]
    assert made_of(base, patches)["x"] == floats(7, 0, 3, 0, 1, 0).tobytes()
    assert made_of(base, patches[::-1])["x"] == floats(2, 0, 3, 0, 1, 0).tobytes()
    whole = WeightPatch("x", shape, "F32", floats(9, 9, 9, 9, 9, 9))
    assert made_of(base, [*patches, whole])["x"] == whole.values.tobytes()
    assert made_of(base, [whole, patches[1]])["x"] == floats(7, 9, 9, 9, 9, 9).tobytes()
    assert made_of(base, []) == {"x": bytes(24), "h": bytes(8), "q": bytes(4), "four": bytes(2)}


def test_values_in_any_shape_of_their_dtype(base: Path) -> None:
    torch = pytest.importorskip("torch")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    want = np.array([0, 0x3F80, 0, 0], "<u2").tobytes()
    ones: list[Any] = [np.array([0x3F80], "<u2"), np.array([1], ml_dtypes.bfloat16),
            torch.ones(1, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)[::2]]  # fmt: skip  # noqa: E501
    for values in ones:
        for dtype in ("BF16", torch.bfloat16):
            for where in (at(1), at(1).astype(np.int64), torch.tensor([1])):
                patch = WeightPatch("h", (4,), dtype, values, where)
                assert made_of(base, [patch])["h"] == want
    patch = WeightPatch("x", (2, 3), "F32", floats(5).view("<u4"), at(5))
    assert made_of(base, [patch])["x"] == floats(0, 0, 0, 0, 0, 5).tobytes()
    for values in (np.array([0x38], "u1"), np.array([1], ml_dtypes.float8_e4m3fn),
                   torch.ones(1).to(torch.float8_e4m3fn)):  # fmt: skip
        patch = WeightPatch("q", (4,), "F8_E4M3", values, at(3))
        assert made_of(base, [patch])["q"] == b"\0\0\0\x38"
    patch = WeightPatch("four", (4,), "F4", np.array([0x12, 0x34], "u1"))
    assert made_of(base, [patch])["four"] == b"\x12\x34"
    empty = [
        WeightPatch("none", (0,), "F32", floats()),
        WeightPatch("none", (0,), "F32", floats(), at()),
        WeightPatch("h", (4,), torch.bfloat16, torch.ones(0, dtype=torch.bfloat16), at()),
    ]
    assert made_of(base, empty)["h"] == bytes(8)


def wrong(**fields: Any) -> Callable[[], Any]:
    return lambda: WeightPatch("x", (2, 3), "F32", floats(1, 2), at(0, 1))._replace(**fields)


WRONG: dict[str, tuple[Callable[[], Any], type[CkdiffError], str]] = {
    "name": (wrong(name="y"), PairingError, "has no y"),
    "name that is none": (wrong(name=3), PairingError, "has no 3"),
    "shape": (wrong(shape=(3, 2)), PairingError, r"is \[2, 3\] in the base, not \[3, 2\]"),
    "dtype": (wrong(dtype="F16"), PairingError, "is F32 in the base, not F16"),
    "values' dtype": (wrong(values=np.ones(2)), PairingError, "has float64"),
    "values' order": (wrong(values=np.ones(2, ">f4")), PairingError, "F32"),
    "integers for floats": (wrong(values=np.ones(2, "<i4")), PairingError, "has int32"),
    "values' number": (wrong(values=floats(1)), PairingError, "another number of values"),
    "dense too short": (wrong(indices=None), PairingError, "of all 24"),
    "two dimensions": (wrong(values=floats(1, 2).reshape(2, 1)), PairingError, "one dimension"),
    "lists": (wrong(indices=[[0], [1]]), PairingError, "one dimension"),
    "indices' dtype": (wrong(indices=np.array([0.0, 1.0])), PairingError, "int32 or int64"),
    "small indices": (wrong(indices=np.array([0, 1], np.int16)), PairingError, "int32 or int64"),
    "unsigned indices": (wrong(indices=np.array([0, 1], "u4")), PairingError, "int32 or int64"),
    "negative": (wrong(indices=at(-1, 1)), PairingError, "out of range"),
    "too large": (wrong(indices=at(6, 1)), PairingError, "out of range"),
    "huge": (wrong(indices=np.array([0, 1 << 62])), PairingError, "out of range"),
    "twice": (wrong(indices=at(1, 1)), PairingError, "the same index twice"),
    "no record": (lambda: ("x", floats(1)), UsageError, "name, shape, dtype"),
    "elements of less than a byte": (
        lambda: WeightPatch("four", (4,), "F4", np.array([1], "u1"), at(1)),
        PairingError, "cannot be patched",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_records_that_do_not_fit(case: str, base: Path) -> None:
    patch, kind, words = WRONG[case]
    good = WeightPatch("h", (4,), "BF16", np.array([1], "<u2"), at(1))
    with pytest.raises(kind, match=words) as raised:
        delta_from_patches(base, [good, patch()], base.parent / "delta")
    assert "\n" not in raised.value.one_line()
    assert os.listdir(base.parent) == ["base.safetensors"]


@pytest.mark.parametrize("field", ["values", "indices"])
def test_torch_records_that_do_not_fit(field: str, base: Path) -> None:
    torch = pytest.importorskip("torch")
    for tensor in (torch.ones(2, 1, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float16)):
        patch = WeightPatch("x", (2, 3), torch.float32, torch.ones(2), torch.tensor([0, 1]))
        with pytest.raises(PairingError):
            delta_from_patches(base, [patch._replace(**{field: tensor})], base.parent / "delta")
    patch = WeightPatch("x", (2, 3), torch.float16, torch.ones(2), torch.tensor([0, 1]))
    with pytest.raises(PairingError, match=re.escape("torch.float16")):
        delta_from_patches(base, [patch], base.parent / "delta")
    for values in (torch.ones(4, dtype=torch.int8), torch.ones(1), torch.ones(0)):
        patch = WeightPatch("q", (4,), "F8_E4M3", values)
        with pytest.raises(PairingError, match="q is F8_E4M3, and the patch has torch"):
            delta_from_patches(base, [patch], base.parent / "delta")
    patch = WeightPatch("x", (2, 3), torch.float32, torch.ones(2, device="meta"), at(0, 1))
    with pytest.raises(PairingError, match="without plain data"):
        delta_from_patches(base, [patch], base.parent / "delta")


def test_a_failing_trainer_leaves_nothing(base: Path) -> None:
    def patches() -> Iterator[WeightPatch]:
        yield WeightPatch("x", (2, 3), "F32", floats(1), at(1))
        raise RuntimeError("the trainer stopped")

    with pytest.raises(RuntimeError, match="the trainer stopped"):
        delta_from_patches(base, patches(), base.parent / "delta")
    assert os.listdir(base.parent) == ["base.safetensors"]
    arguments: Any = 3
    with pytest.raises(UsageError, match="patches"):
        delta_from_patches(base, arguments, base.parent / "delta")
    with pytest.raises(CkdiffError, match="cannot write"):
        delta_from_patches(base, [], base.parent / "missing" / "delta")
    unknown: Any = "zip"
    with pytest.raises(UsageError, match="no encoding"):
        delta_from_patches(base, [], base.parent / "delta", encoding=unknown)


def test_torch_names_are_torchs() -> None:
    torch = pytest.importorskip("torch")
    for name in weightpatch._TORCH:
        assert weightpatch.torch_dtype(name).itemsize * 8 == DTYPES[name].bits
        assert isinstance(weightpatch.torch_dtype(name), torch.dtype)
