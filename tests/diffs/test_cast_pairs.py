"""Pairs of two float dtypes: one answer, whatever the windows, the way and the interruptions."""

from __future__ import annotations

import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from quantised_schemes import SCHEMES, as_bytes, blocks, made, packed
from support import write_safetensors

import ckdiff
from ckdiff.diffs import task
from ckdiff.diffs.casting import Casting
from ckdiff.diffs.plan import plan
from ckdiff.diffs.task import LARGEST_WINDOW, SMALLEST_WINDOW, DiffTask
from ckdiff.kernels import BLOCK, Kernels
from ckdiff.options import Options
from ckdiff.stores.chunkresult import ChunkResult

LIBRARY: dict[str, Any] = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}
#: a pair each, in one model: some whole units, some ragged, some more than a window
TENSORS = {
    "a.w": ("BF16", "F32", SMALLEST_WINDOW + 3 * 512),
    "b.w": ("F32", "BF16", SMALLEST_WINDOW // 2 + 77),
    "c.w": ("F16", "F32", 200_003),
    "d.w": ("F16", "BF16", 66_000),
    "e.w": ("F8_E4M3", "BF16", 5 * 512),
    "f.w": ("F32", "F64", 9_001),
    "g.w": ("BF16", "BF16", 40_000),
    **{f"s.{i}": ("BF16", "F32", size) for i, size in enumerate([1, 63, 511, 512, 513, 1024])},
}
RULES = ("exact", "atol=0.25", "exact@bf16")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Both sides, of which about one of ten elements is not the same, NaNs and zeros among them."""
    rng = np.random.default_rng(11)
    both: list[dict[str, Any]] = [{}, {}]
    with np.errstate(all="ignore"):
        for name, (one, other, size) in TENSORS.items():
            values = rng.standard_normal(size).astype(LIBRARY["F8_E4M3"]).astype(np.float32)
            values[rng.random(size) < 0.01] = -0.0
            values[rng.random(size) < 0.01] = np.nan
            moved = np.where(rng.random(size) < 0.1, values * 1.5, values)
            for side, dtype, numbers in zip(both, (one, other), (values, moved), strict=True):
                data: npt.NDArray[Any] = numbers.astype(LIBRARY[dtype])
                side[name] = (dtype, (size,), data.tobytes())
    folder = tmp_path_factory.mktemp("pair")
    return (
        write_safetensors(folder / "base.safetensors", both[0]),
        write_safetensors(folder / "tuned.safetensors", both[1]),
    )


def said(found: ckdiff.DiffResult) -> dict[str, Any]:
    """Everything that is in a result and its store."""
    table, store = found.table, found.store
    assert store is not None
    store.check()
    kept = {
        "changed": {rule: [*table.changed[rule]] for rule in found.rules},
        "hashes": [[*table.base_hashes], [*table.tuned_hashes]],
        "masks": {
            (name, rule): np.asarray(store.mask(name, rule)).tobytes()
            for name in table.names
            for rule in found.rules
        },
    }
    if table.statistics is not None:
        for column in fields(table.statistics):
            kept[column.name] = [*map(str, getattr(table.statistics, column.name))]
    return kept


def found(pair: tuple[Path, Path], out: Path, **more: Any) -> dict[str, Any]:
    return said(ckdiff.diff(*pair, out, **{"workers": 1, "device": "cpu", **more}))


def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where bytes are hashed where they lie: windows are widened before."""
    monkeypatch.setattr(DiffTask, "_makes", False)


def in_small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "largest_window", lambda sides: SMALLEST_WINDOW)


@pytest.mark.parametrize("rules", [RULES[:1], RULES], ids=len)
@pytest.mark.parametrize("stats", [False, True])
def test_windows_and_ways_say_the_same(
    pair: tuple[Path, Path], rules: tuple[str, ...], stats: bool, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"rules": rules, "stats": stats}
    with pytest.MonkeyPatch.context() as patch:
        slowly(patch)
        wanted = found(pair, tmp_path / "slowly", **more)
    assert sum(wanted["changed"]["exact"]) > 50_000
    assert found(pair, tmp_path / "late", **more) == wanted
    with pytest.MonkeyPatch.context() as patch:
        in_small_windows(patch)
        assert found(pair, tmp_path / "small", workers=2, **more) == wanted
    turned = found(pair[::-1], tmp_path / "turned", **more)
    assert turned["changed"]["exact"] == wanted["changed"]["exact"]
    assert turned["hashes"] == wanted["hashes"][::-1]


def test_hashes_are_those_of_each_side_by_itself(pair: tuple[Path, Path], tmp_path: Path) -> None:
    late = found(pair, tmp_path / "late")
    for side, path in enumerate(pair):
        alone = ckdiff.diff(path, path, verify=True)
        assert late["hashes"][side] == [*alone.table.base_hashes]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    chunk = 1 << 17
    monkeypatch.setattr("ckdiff.layout.CHUNK", chunk)
    for module in ("schema", "maskbits"):  # such stores are none: readers must believe in them
        monkeypatch.setattr(f"ckdiff.stores.{module}.OBJECT", chunk // 8)
    return chunk


@pytest.mark.usefixtures("small_chunks")
def test_a_run_that_was_stopped_goes_on(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = found(pair, tmp_path / "whole", rules=RULES)
    compare = DiffTask.__call__

    def stopped(self: DiffTask, chunk: int, stop: threading.Event) -> ChunkResult:
        if chunk == 3:
            raise KeyboardInterrupt
        return compare(self, chunk, stop)

    with monkeypatch.context() as patch:
        patch.setattr(DiffTask, "__call__", stopped)
        with pytest.raises((ckdiff.Interrupted, KeyboardInterrupt)):
            found(pair, tmp_path / "x", rules=RULES)
    again = ckdiff.diff(*pair, tmp_path / "x", rules=RULES, workers=1)
    assert 0 < again.bytes_resumed < again.bytes_read
    assert said(again) == wanted


def test_no_buffer_grows_with_the_window(pair: tuple[Path, Path]) -> None:
    """What a plan says that it takes, and what it would if windows were widened before."""

    def planned(base: Path, tuned: Path) -> tuple[int, int]:
        options = Options(memory=8 << 30, workers=1, device="cpu")
        with plan(base, tuned, None, options) as made:
            return made.allotment.window, made.allotment.needed

    windows, needed = zip(planned(*pair), planned(pair[0], pair[0]), strict=True)
    assert windows == (LARGEST_WINDOW, LARGEST_WINDOW)
    rooms = 2 * 8 * BLOCK  # both sides have something narrow, and the widest is float64
    assert 0 <= needed[0] - needed[1] - rooms < 100_000
    casting = Casting(["F32", "F64", "BF16"], ({0: "BF16"}, {1: "F32"}))
    assert casting.memory(LARGEST_WINDOW, late=False) == 2 * 8 * LARGEST_WINDOW
    late = {casting.memory(window, late=True) for window in (1 << 20, LARGEST_WINDOW, 1 << 28)}
    assert len(late) == 1
    assert rooms <= late.pop() < rooms + 1000
    nothing = Casting(["F32"], ({}, {}))
    assert nothing.memory(LARGEST_WINDOW, late=False) == 0
    assert nothing.memory(LARGEST_WINDOW, late=True) == 0


def test_windows_are_widened_before_where_nobody_makes_values(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the library's function is not found."""
    wanted = found(pair, tmp_path / "late")
    init = Kernels.__init__

    def without(self: Kernels, *arguments: Any, **more: Any) -> None:
        init(self, *arguments, **more)
        self._xxh3 = 0

    monkeypatch.setattr(Kernels, "__init__", without)
    assert found(pair, tmp_path / "before") == wanted


@pytest.mark.parametrize("rules", [RULES[:1], RULES], ids=len)
@pytest.mark.parametrize("name", ["128 x 128", "FP4", "MX of 8 bits"])
def test_quantised_values_against_narrow_floats(
    name: str, rules: tuple[str, ...], tmp_path: Path
) -> None:
    """One side is multiplied while it is compared, and the other one widened: either way round."""
    large = {
        "128 x 128": blocks((1100, 700), (128, 128)),
        "FP4": packed((900, 1056), "U8", "U8", ("x.weight", "x.weight_scale", "x.weight")),
    }
    scheme = made(large.get(name) or SCHEMES[name], 3)
    rng = np.random.default_rng(4)
    values: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    narrow: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    with np.errstate(all="ignore"):
        for tensor, x in scheme.values.items():
            values[tensor] = ("F32", x.shape, as_bytes(x))
            moved = np.where(rng.random(x.shape) < 0.1, x * 2, x).astype(LIBRARY["BF16"])
            narrow[tensor] = ("BF16", x.shape, moved.tobytes())
    sides = {"stored": scheme.tensors, "values": values, "narrow": narrow}
    stored, beside, other = (
        write_safetensors(tmp_path / f"{key}.safetensors", tensors)
        for key, tensors in sides.items()
    )
    chosen: dict[str, Any] = {"rules": rules, "include": [*values]}
    wanted = found((beside, other), tmp_path / "wanted", **chosen)
    assert wanted["changed"]["exact"][0] > 100
    chosen["dequantize"] = True
    assert found((stored, other), tmp_path / "base", **chosen) == wanted
    turned = found((other, stored), tmp_path / "tuned", **chosen)
    assert turned["changed"]["exact"] == wanted["changed"]["exact"]
    assert turned["hashes"] == wanted["hashes"][::-1]
