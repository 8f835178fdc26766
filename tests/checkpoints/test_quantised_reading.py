"""Quantised tensors by value: every scheme against whole arrays by numpy and ml_dtypes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import conformance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_schemes import (
    BESIDE,
    SCHEMES,
    Scheme,
    as_bytes,
    blocks,
    contents,
    grouped,
    made,
    spreading,
)
from support import write_safetensors

from ckdiff.checkpoints.opening import open_checkpoint
from ckdiff.checkpoints.protocol import Checkpoint, SpanReader
from ckdiff.checkpoints.views import blockscalereader, blockscaleturned
from ckdiff.checkpoints.views.blockscale import ScaledView, dequantised
from ckdiff.errors import SourceChanged

Window = list[tuple[str, int, int]]


@contextmanager
def opened(path: Path, scheme: Scheme) -> Iterator[Checkpoint]:
    write_safetensors(path, scheme.tensors)
    view, notes = dequantised(open_checkpoint(path))
    assert notes == []
    with view:
        view.fetch()
        yield view


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
                assert (dtype, shape) == BESIDE[tensor][:2]
                assert view.offset[at] > 0
            assert table.nbytes[at] == len(data)
            assert read(view, reader, [(tensor, 0, len(data))]) == [data]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_spans(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """At any byte, in any order, with small bands, asked for early or not."""
    scheme = made(SCHEMES[data.draw(st.sampled_from(sorted(SCHEMES)))])
    path = tmp_path_factory.mktemp("spans") / "m.safetensors"
    wanted = contents(scheme)

    def span() -> tuple[str, int, int]:
        name = data.draw(st.sampled_from(sorted(wanted)))
        start = data.draw(st.integers(0, len(wanted[name])))
        most = len(wanted[name]) - start
        return name, start, data.draw(st.one_of(st.integers(0, min(9, most)), st.integers(0, most)))

    with pytest.MonkeyPatch.context() as patch, opened(path, scheme) as view:
        patch.setattr(blockscalereader, "_SPARE", data.draw(st.sampled_from([0, 16])))
        patch.setattr(blockscaleturned, "_BAND", data.draw(st.sampled_from([1, 100, 1 << 20])))
        windows = [[span() for _ in range(data.draw(st.integers(0, 5)))] for _ in range(2)]
        with closing(view.reader()) as reader:
            for window in windows:
                if data.draw(st.booleans()):
                    reader.prefetch(*conformance.columns(view, window))
                view.read_ahead(*conformance.columns(view, window))
                found = read(view, reader, window)
                assert found == [wanted[name][start : start + n] for name, start, n in window]


def test_long_rows(tmp_path: Path) -> None:
    """Whose scales are as many as their elements."""
    columns = (1 << 18) + 130
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
        assert view.reader_memory(window) == window * 3 + blockscalereader.SCRATCH
        assert isinstance(reader, blockscalereader.ScaledReader)
        turning = reader._turning
        assert turning is not None
        for size in (window, 4 * window):  # matrices that are large, and some that are not
            for start in range(0, 4 * 2 * 2048 * 1024 - size, 4 * 1_234_567):
                for part in [("mlp.up_proj", start, size)], [("mlp.up_proj", start + 8000, 4000)]:
                    reader.acquire(*conformance.columns(view, part))
                    reader.release()
                    held = [*turning._parts, *{**turning._before, **turning._whole}.values()]
                    most = turning.memory(max(size, 4 * window)) if size > window else window // 2
                    rooms = [*(x.room for x in held), *turning._free]
                    assert sum(room.nbytes for room in rooms) <= most + 1000
            assert len(reader._values) <= size + 64


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
        assert found == {name: name for name in BESIDE}


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
        if n not in BESIDE
    ]
    one = fp8.Fp8Dequantize(None)._dequantize_one
    theirs = one(weight, scales, output_dtype=torch.float32).numpy()
    (value,) = scheme.values
    with opened(tmp_path / "m.safetensors", scheme) as view, closing(view.reader()) as reader:
        assert read(view, reader, [(value, 0, theirs.nbytes)]) == [as_bytes(theirs)]
