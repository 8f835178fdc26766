"""Quantised tensors by value: every scheme against whole arrays by numpy and ml_dtypes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import conformance
import naive_values as twin
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Tensor, write_safetensors

from ckdiff.checkpoints.opening import open_checkpoint
from ckdiff.checkpoints.protocol import Checkpoint, SpanReader
from ckdiff.checkpoints.views import blockscalereader, blockscaleturned
from ckdiff.checkpoints.views.blockscale import ScaledView, dequantised
from ckdiff.errors import SourceChanged

Floats = npt.NDArray[np.float32]
Shape = tuple[int, ...]
Window = list[tuple[str, int, int]]


@dataclass
class Scheme:
    """What lies in a file, and the values that it stands for."""

    seed: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Floats] = field(default_factory=dict)

    def add(self, name: str, dtype: str, shape: Shape) -> npt.NDArray[np.uint8]:
        """A tensor of any bits at all."""
        rng = np.random.default_rng([self.seed, len(self.tensors)])
        width = {"F32": 4, "BF16": 2, "F16": 2}.get(dtype, 1)
        count = int(np.prod(shape)) * width // (2 if dtype == "F4" else 1)
        data = rng.integers(0, 256, count, np.uint8)
        self.tensors[name] = dtype, shape, data.tobytes()
        return data

    def scales(self, name: str, dtype: str, shape: Shape) -> Floats:
        """Scales near one, or any power of two, as numbers."""
        rng = np.random.default_rng([self.seed, len(self.tensors)])
        if dtype in ("U8", "F8_E8M0"):
            data = rng.integers(0, 256, int(np.prod(shape)), np.uint8)
            exponents = np.where(data == 255, 0, data.astype(np.int32) - 127)
            found = np.ldexp(np.float32(1), exponents).astype(np.float32)
            found[data == 255] = np.nan
            self.tensors[name] = dtype, shape, data.tobytes()
            return found.reshape(shape)
        numbers = (rng.standard_normal(shape) * 0.01).astype(twin.LIBRARY[dtype])
        self.tensors[name] = dtype, shape, np.asarray(numbers).tobytes()
        return np.asarray(numbers, np.float32).reshape(shape)

    def eight(self, name: str, dtype: str, shape: Shape) -> Floats:
        data = self.add(name, dtype, shape)
        found: Floats = data.view(twin.LIBRARY[dtype]).astype(np.float32)
        return found.reshape(shape)

    def four(self, name: str, dtype: str, shape: Shape, stored: Shape) -> Floats:
        """``shape`` values, the low half of a byte first."""
        data = self.add(name, dtype, stored)
        return twin.F4[np.stack([data & 15, data >> 4], -1).reshape(-1)].reshape(shape)

    def product(self, name: str, elements: Floats, scales: Floats) -> None:
        """``scales`` are repeated so far that they have the shape of the elements."""
        with np.errstate(all="ignore"):
            self.values[name] = np.asarray(elements * scales, np.float32)


def spread(scales: Floats, block: tuple[int, int], shape: Shape) -> Floats:
    """Scales of blocks, one for each element of a stack of matrices."""
    wide = scales.repeat(block[0], -2).repeat(block[1], -1)
    return wide[..., : shape[-2], : shape[-1]]


def blocks(
    shape: Shape, block: tuple[int, int], *, of: str = "F32", name: str = "", dtype: str = "F8_E4M3"
) -> Callable[[Scheme], None]:
    def make(scheme: Scheme) -> None:
        grid = *shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])
        held = scheme.eight("x.weight", dtype, shape)
        scales = scheme.scales(name or "x.weight_scale_inv", of, grid)
        scheme.product("x.weight", held, spread(scales, block, shape))

    return make


def spreading(
    shape: Shape, of: Shape, as_of: Shape, *, dtype: str = "F8_E4M3", scale: str = "F32",
    names: tuple[str, str] = ("x.weight", "x.weight_scale"),
) -> Callable[[Scheme], None]:  # fmt: skip
    """Scales of the shape ``of`` that numpy broadcasts as ``as_of``."""

    def make(scheme: Scheme) -> None:
        held = scheme.eight(names[0], dtype, shape)
        scheme.product(names[0], held, scheme.scales(names[1], scale, of).reshape(as_of))

    return make


def packed(shape: Shape, held: str, of: str, names: tuple[str, str, str]) -> Callable[..., None]:
    """FP4 in groups of 32 of a row: of what is stored, of its scales, and of the values."""

    def make(scheme: Scheme) -> None:
        stored = shape if held == "F4" else (*shape[:-1], shape[-1] // 2)
        elements = scheme.four(names[0], held, shape, stored)
        scales = scheme.scales(names[1], of, (*shape[:-1], shape[-1] // 32))
        scheme.product(names[2], elements, scales.repeat(32, -1))

    return make


def grouped(
    shape: Shape, of: str, *, turned: bool = False, dot: str = "_"
) -> Callable[[Scheme], None]:
    """(..., groups, 16) bytes, as gpt-oss has them."""

    def make(scheme: Scheme) -> None:
        stored = *shape[:-1], shape[-1] // 32, 16
        elements = scheme.four(f"mlp.up_proj{dot}blocks", "U8", shape, stored)
        scales = scheme.scales(f"mlp.up_proj{dot}scales", of, stored[:-1]).repeat(32, -1)
        scheme.product("mlp.up_proj", elements, scales)
        if turned:
            found = scheme.values["mlp.up_proj"].swapaxes(1, 2)
            scheme.values["mlp.up_proj"] = np.ascontiguousarray(found)

    return make


_WEIGHT = "x.weight", "x.weight_scale", "x.weight"
_PACKED = "x.weight_packed", "x.weight_scale", "x.weight"

SCHEMES: dict[str, Callable[[Scheme], None]] = {
    "128 x 128": blocks((300, 200), (128, 128)),
    "128 x 128, smaller than one": blocks((64, 100), (128, 128)),
    "128 x 128, BF16": blocks((130, 520), (128, 128), of="BF16"),
    "128 x 128, E8M0": blocks((256, 256), (128, 128), of="F8_E8M0", name="x.scale"),
    "128 x 128, powers in plain bytes": blocks((256, 256), (128, 128), of="U8"),
    "128 x 128, a stack": blocks((3, 300, 200), (128, 128)),
    "128 x 128, E5M2": blocks((300, 200), (128, 128), dtype="F8_E5M2", name="x.qscale_weight"),
    "64 x 64": blocks((128, 192), (64, 64), name="x.weight_scale"),
    "MX of 8 bits": blocks((40, 96), (1, 32), of="F8_E8M0", name="x.weight_scale"),
    "MX of 8 bits, in plain bytes": blocks((40, 96), (1, 32), of="U8"),
    "MX of 8 bits, a stack": blocks((3, 40, 96), (1, 32), of="U8", dtype="F8_E5M2"),
    "groups of integers": blocks((40, 256), (1, 128), dtype="I8", name="x.weight_scale"),
    "a tensor": spreading((30, 20), (), ()),
    "a tensor, [1]": spreading((30, 20), (1,), (1,), scale="BF16"),
    "a tensor, [1, 1]": spreading((30, 20), (1, 1), (1, 1), dtype="F8_E5M2"),
    "a tensor, a scaled file": spreading((30, 20), (), (), names=("x.weight", "x.scale_weight")),
    "a tensor of one dimension": spreading((30,), (), ()),
    "a tensor without dimensions": spreading((), (), ()),
    "a row": spreading((30, 20), (30, 1), (30, 1)),
    "a row, [R]": spreading((30, 20), (30,), (30, 1), scale="F16"),
    "a row of a square, [R]": spreading((30, 30), (30,), (30, 1)),
    "a row, integers": spreading((30, 20), (30, 1), (30, 1), dtype="I8", scale="BF16"),
    "a row, FNUZ": spreading((30, 20), (30, 1), (30, 1), dtype="F8_E4M3FNUZ"),
    "a row of a stack": spreading((3, 30, 20), (3, 30, 1), (3, 30, 1)),
    "a row of a stack, [E, R]": spreading((3, 30, 20), (3, 30), (3, 30, 1)),
    "a matrix of a stack": spreading((3, 30, 20), (3,), (3, 1, 1)),
    "a matrix of a stack, [E, 1, 1]": spreading((3, 30, 20), (3, 1, 1), (3, 1, 1)),
    "a column": spreading((30, 20), (1, 20), (1, 20)),
    "a column of a stack": spreading(
        (3, 30, 20), (3, 1, 20), (3, 1, 20), names=("mlp.gate_up_proj", "mlp.gate_up_proj_scale")
    ),
    "kernels of a convolution": spreading((8, 4, 3, 3), (8, 1, 1, 1), (8, 1, 1, 1)),
    "FP4, U8": packed((30, 96), "U8", "U8", _WEIGHT),
    "FP4, U8 and E8M0": packed((30, 96), "U8", "F8_E8M0", _PACKED),
    "FP4, I8": packed((30, 96), "I8", "F8_E8M0", ("x.weight", "x.scale", "x.weight")),
    "FP4, I8, a stack": packed((3, 30, 32), "I8", "U8", _WEIGHT),
    "FP4, F4": packed((30, 96), "F4", "F8_E8M0", _WEIGHT),
    "groups": grouped((30, 96), "U8"),
    "groups, untold": grouped((3, 40, 96), "U8", dot="."),
    "groups, turned": grouped((3, 40, 96), "U8", turned=True),
    "groups, turned, E8M0": grouped((2, 5, 320), "F8_E8M0", turned=True),
    "groups, a row turned": grouped((2, 1, 64), "U8", turned=True),
}  # fmt: skip

#: what stays as it is beside them, odd places before what is scaled
_BESIDE: dict[str, Tensor] = {
    "a.odd": ("U8", (7,), b"seven!!"),
    "z.input_scale": ("F32", (), b"abcd"),
    "z.norm.weight": ("BF16", (3,), b"sixsix"),
}


def made(make: Callable[[Scheme], None], seed: int = 0) -> Scheme:
    scheme = Scheme(seed)
    scheme.tensors["a.odd"] = _BESIDE["a.odd"]
    make(scheme)
    scheme.tensors |= _BESIDE
    return scheme


@contextmanager
def opened(path: Path, scheme: Scheme) -> Iterator[Checkpoint]:
    write_safetensors(path, scheme.tensors)
    view, notes = dequantised(open_checkpoint(path))
    assert notes == []
    with view:
        view.fetch()
        yield view


def as_bytes(values: Floats) -> bytes:
    """One NaN for all."""
    found = values.reshape(-1).view(np.uint32).copy()
    found[np.isnan(values.reshape(-1))] = 0x7FC00000
    return found.tobytes()


def contents(scheme: Scheme) -> dict[str, bytes]:
    beside = {name: data for name, (_, _, data) in _BESIDE.items()}
    return beside | {name: as_bytes(values) for name, values in scheme.values.items()}


def read(view: Checkpoint, reader: SpanReader, window: Window) -> list[bytes]:
    return conformance.read(view, reader, window)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme(name: str, tmp_path: Path) -> None:
    scheme = made(SCHEMES[name])
    with opened(tmp_path / "m.safetensors", scheme) as view, closing(view.reader()) as reader:
        wanted, table = contents(scheme), view.table
        assert sorted(table.names) == sorted(wanted)
        for at, tensor in enumerate(table.names):
            dtype, shape, data = table.dtypes[at], table.shapes[at], wanted[tensor]
            if tensor in scheme.values:
                assert (dtype, shape) == ("F32", scheme.values[tensor].shape)
                assert view.file_index[at] == view.offset[at] == -1
            else:
                assert (dtype, shape) == _BESIDE[tensor][:2]
                assert view.offset[at] > 0
            assert table.nbytes[at] == len(data)
            assert read(view, reader, [(tensor, 0, len(data))]) == [data]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_spans(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """At any byte, in any order, with small pieces and bands, asked for early or not."""
    scheme = made(SCHEMES[data.draw(st.sampled_from(sorted(SCHEMES)))])
    path = tmp_path_factory.mktemp("spans") / "m.safetensors"
    wanted = contents(scheme)

    def span() -> tuple[str, int, int]:
        name = data.draw(st.sampled_from(sorted(wanted)))
        start = data.draw(st.integers(0, len(wanted[name])))
        most = len(wanted[name]) - start
        return name, start, data.draw(st.one_of(st.integers(0, min(9, most)), st.integers(0, most)))

    with pytest.MonkeyPatch.context() as patch, opened(path, scheme) as view:
        patch.setattr(blockscalereader, "_PIECE", 2 * data.draw(st.sampled_from([1, 7, 64, 9999])))
        patch.setattr(blockscalereader, "_SPARE", data.draw(st.sampled_from([0, 16])))
        patch.setattr(blockscaleturned, "_BAND", data.draw(st.sampled_from([1, 100, 1 << 20])))
        patch.setattr(blockscaleturned, "_ROWS", data.draw(st.sampled_from([1, 7, 256])))
        patch.setattr(blockscaleturned, "_GROUPS", data.draw(st.sampled_from([1, 2, 7])))
        windows = [[span() for _ in range(data.draw(st.integers(0, 5)))] for _ in range(2)]
        with closing(view.reader()) as reader:
            for window in windows:
                if data.draw(st.booleans()):
                    reader.prefetch(*conformance.columns(view, window))
                view.read_ahead(*conformance.columns(view, window))
                found = read(view, reader, window)
                assert found == [wanted[name][start : start + n] for name, start, n in window]


def test_pieces_longer_than_are_scaled_at_a_time(tmp_path: Path) -> None:
    """More than a piece of a tensor, whose rows are longer than one too."""
    columns = blockscalereader._PIECE + 130
    make = spreading((3, columns), (1, columns), (1, columns), scale="BF16")
    scheme = made(make)
    with opened(tmp_path / "m.safetensors", scheme) as view, closing(view.reader()) as reader:
        wanted = contents(scheme)["x.weight"]
        for start, size in [(0, len(wanted)), (4 * columns - 8, 16), (12, 8 * columns)]:
            found = read(view, reader, [("x.weight", start, size)])
            assert found == [wanted[start : start + size]]
        # two elements on both sides of the end of a row do not need all scales
        assert isinstance(view, ScaledView)
        spans = conformance.columns(view, [("x.weight", 4 * columns - 8, 16)])
        asked = blockscalereader.wanted(view.within, view.scaled, spans)
        assert sum(size for _, _, size in asked.requests) < 100


def test_memory_is_that_of_a_window(tmp_path: Path) -> None:
    scheme = made(grouped((2, 2048, 1024), "U8", turned=True))
    with opened(tmp_path / "m.safetensors", scheme) as view, closing(view.reader()) as reader:
        window = 1 << 20
        assert view.reader_memory(window) == window + blockscalereader.SCRATCH
        for start in range(0, 4 * 2 * 2048 * 1024, 4 * 1_234_567):
            reader.acquire(*conformance.columns(view, [("mlp.up_proj", start, window)]))
            reader.release()
        assert isinstance(reader, blockscalereader.ScaledReader)
        assert len(reader._buffer) <= window + 64


def test_turned_tensors_are_read_in_bands(tmp_path: Path, monkeypatch: Any) -> None:
    """Whatever the matrix is, little is asked for at a time."""
    monkeypatch.setattr(blockscaleturned, "_BAND", 1000)
    scheme = made(grouped((2, 300, 96), "U8", turned=True))
    asked: list[int] = []
    with opened(tmp_path / "m.safetensors", scheme) as view, closing(view.reader()) as reader:
        assert isinstance(reader, blockscalereader.ScaledReader)
        aside = reader._aside
        assert aside is not None
        acquire = aside.acquire

        def noted(tensors: Any, starts: Any, nbytes: Any) -> Any:
            asked.append(int(nbytes.sum()))
            return acquire(tensors, starts, nbytes)

        monkeypatch.setattr(aside, "acquire", noted)
        wanted = contents(scheme)["mlp.up_proj"]
        assert read(view, reader, [("mlp.up_proj", 0, len(wanted))]) == [wanted]
        assert max(asked) <= 1100
        assert sum(asked) == sum(len(scheme.tensors[f"mlp.up_proj_{n}"][2])
                                 for n in ("blocks", "scales"))  # fmt: skip


def test_borders_are_those_of_what_is_not_scaled(tmp_path: Path, monkeypatch: Any) -> None:
    scheme = made(SCHEMES["128 x 128"])
    with opened(tmp_path / "m.safetensors", scheme) as view:
        assert isinstance(view, ScaledView)
        places = {i: np.array([i + 1]) for i in range(len(scheme.tensors))}
        monkeypatch.setattr(type(view.inner), "borders", places)
        names = [*scheme.tensors]
        found = {view.table.names[at]: names[int(b[0]) - 1] for at, b in view.borders.items()}
        assert found == {name: name for name in _BESIDE}


@pytest.mark.parametrize("name", ["128 x 128", "groups, turned"])
def test_a_file_that_changes_gives_no_values(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    scheme = made(SCHEMES[name])
    with opened(path, scheme) as view, closing(view.reader()) as reader:
        (value,) = scheme.values
        window = [(value, 0, scheme.values[value].nbytes)]
        assert read(view, reader, window)
        data = path.read_bytes()
        path.write_bytes(data[:-99] + bytes(99))
        with pytest.raises(SourceChanged):
            read(view, reader, window)


@pytest.mark.parametrize("block", [(128, 128), (96, 96), (1, 100), (200, 3)])
def test_what_the_configuration_says_counts(tmp_path: Path, block: tuple[int, int]) -> None:
    """Where shapes alone would be taken otherwise, or not at all."""
    scheme = made(blocks((192, 200), block))
    config: dict[str, Any] = {"quantization_config": {"weight_block_size": [*block]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with opened(tmp_path / "model.safetensors", scheme) as view, closing(view.reader()) as reader:
        wanted = contents(scheme)["x.weight"]
        assert read(view, reader, [("x.weight", 0, len(wanted))]) == [wanted]


@pytest.mark.parametrize("seed", range(3))
def test_transformers_gives_the_same_of_groups(seed: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    scheme = made(grouped((3, 40, 96), "U8", turned=True), seed)
    name, (_, shape, powers) = "mlp.up_proj_scales", scheme.tensors["mlp.up_proj_scales"]
    usual = np.frombuffer(powers, np.uint8) % 40 + 100  # of which float32 has all products
    scheme.tensors[name] = "U8", shape, usual.tobytes()
    held = [
        torch.from_numpy(np.frombuffer(scheme.tensors[n][2], np.uint8).copy()).view(of)
        for n, of in (("mlp.up_proj_blocks", (3, 40, 3, 16)), (name, (3, 40, 3)))
    ]
    theirs = mxfp4.convert_moe_packed_tensors(*held, dtype=torch.float32).numpy()
    with opened(tmp_path / "m.safetensors", scheme) as view, closing(view.reader()) as reader:
        at = view.table.names.index("mlp.up_proj")
        assert view.table.shapes[at] == theirs.shape
        found = read(view, reader, [("mlp.up_proj", 0, theirs.nbytes)])
        assert found == [theirs.tobytes()]


@pytest.mark.parametrize(
    "name",
    [
        "128 x 128, powers in plain bytes",
        "64 x 64",
        "MX of 8 bits",
        "MX of 8 bits, in plain bytes",
        "128 x 128, smaller than one",
        "FP4, I8",
        "FP4, I8, a stack",
        "a tensor, [1, 1]",
        "a matrix of a stack, [E, 1, 1]",
        "a column of a stack",
    ],
)
def test_transformers_gives_the_same_of_blocks(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    scheme = made(SCHEMES[name])
    kinds = {"F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8,
             "I8": torch.int8, "F8_E8M0": torch.float8_e8m0fnu,
             "F8_E5M2": torch.float8_e5m2}  # fmt: skip
    weight, scales = [
        torch.frombuffer(bytearray(data), dtype=torch.uint8).view(kinds[dtype]).view(shape)
        for n, (dtype, shape, data) in scheme.tensors.items()
        if n not in _BESIDE
    ]
    one = fp8.Fp8Dequantize(None)._dequantize_one
    theirs = one(weight, scales, output_dtype=torch.float32).numpy()
    (value,) = scheme.values
    with opened(tmp_path / "m.safetensors", scheme) as view, closing(view.reader()) as reader:
        assert read(view, reader, [(value, 0, theirs.nbytes)]) == [as_bytes(theirs)]
