"""Values that are made while they are compared: all is as if they had been there as floats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantised_schemes import (
    BESIDE,
    SCHEMES,
    Scheme,
    as_bytes,
    blocks,
    grouped,
    made,
    packed,
    spreading,
)
from support import write_safetensors

import ckdiff
from ckdiff.checkpoints.views.blockscalereader import ScaledReader
from ckdiff.diffs import task
from ckdiff.diffs.plan import plan
from ckdiff.diffs.task import LARGEST_WINDOW, SMALLEST_WINDOW
from ckdiff.options import Options

#: more than a window each, which ends anywhere in a row
LARGE: dict[str, Callable[[Scheme], None]] = {
    "128 x 128": blocks((1100, 700), (128, 128)),
    "a column": spreading((800, 900), (1, 900), (1, 900), dtype="I8"),
    "a column of long rows": spreading((3, 300_100), (1, 300_100), (1, 300_100), scale="BF16"),
    "FP4": packed((900, 1056), "U8", "U8", ("x.weight", "x.weight_scale", "x.weight")),
    "turned": grouped((2, 700, 960), "U8", turned=True),
    "turned, narrow": grouped((700, 3, 320), "U8", turned=True),
}
SMALL = ("a tensor of one dimension", "MX of 8 bits", "groups, turned", "a row, integers")


def sides(make: Callable[[Scheme], None], folder: Path, seed: int) -> tuple[Path, Path]:
    """A file as it is quantised, and one with the values."""
    scheme = made(make, seed)
    values = {name: ("F32", x.shape, as_bytes(x)) for name, x in scheme.values.items()}
    paths = folder / f"{seed}-stored.safetensors", folder / f"{seed}-values.safetensors"
    write_safetensors(paths[0], scheme.tensors)
    write_safetensors(paths[1], BESIDE | values)
    return paths


def said(a: Path, b: Path, out: Path, **more: Any) -> tuple[Any, ...]:
    found = ckdiff.diff(a, b, out, rules=["exact", "atol=0.01"], workers=1, verify=True, **more)
    table, store = found.table, found.store
    assert store is not None
    changed = {
        rule: dict(zip(table.names, table.changed[rule], strict=True)) for rule in found.rules
    }
    hashes = {
        name: (table.base_hashes[i], table.tuned_hashes[i]) for i, name in enumerate(table.names)
    }
    masks = {name: np.asarray(store.mask(name)).tobytes() for name in sorted(table.names)}
    return changed, hashes, masks


@pytest.mark.parametrize("name", [*LARGE, *SMALL])
def test_what_comes_of_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "largest_window", lambda sides: SMALLEST_WINDOW)
    late: list[ScaledReader] = []
    give = ScaledReader.give_recipes

    def noted(reader: ScaledReader) -> None:
        late.append(reader)
        give(reader)

    monkeypatch.setattr(ScaledReader, "give_recipes", noted)
    make = LARGE.get(name) or SCHEMES[name]
    (base, base_values), (tuned, tuned_values) = (sides(make, tmp_path, seed) for seed in (0, 1))
    wanted = said(base_values, tuned_values, tmp_path / "wanted")
    assert not late
    assert wanted[0]["exact"][next(n for n in wanted[0]["exact"] if n[0] in "xm")]
    pairs = {"both": (base, tuned), "base": (base, tuned_values), "tuned": (base_values, tuned)}
    for way, pair in pairs.items():
        assert said(*pair, tmp_path / way, dequantize=True) == wanted, way
    assert len(late) == 4
    same = said(base, base, tmp_path / "same", dequantize=True)
    assert {x: one for x, (one, _) in same[1].items()} == {x: a for x, (a, _) in wanted[1].items()}
    assert not any(any(counts.values()) for counts in same[0].values())


def test_statistics_are_the_same(tmp_path: Path) -> None:
    make = LARGE["128 x 128"]
    (base, base_values), (tuned, tuned_values) = (sides(make, tmp_path, seed) for seed in (0, 1))
    wanted = ckdiff.diff(base_values, tuned_values, stats=True).table
    found = ckdiff.diff(base, tuned, stats=True, dequantize=True).table
    assert found.statistics is not None
    assert wanted.statistics is not None
    for column in fields(wanted.statistics):
        mine, theirs = (getattr(side.statistics, column.name) for side in (found, wanted))
        assert [*map(str, mine)] == [*map(str, theirs)], column.name


def test_windows_are_longer_where_values_come_from_few_bytes(tmp_path: Path) -> None:
    """And no buffer for values is counted: windows of which one is made take the memory of it."""

    def planned(base: Path, tuned: Path) -> tuple[int, int]:
        options = Options(memory=8 << 30, workers=1, dequantize=True, device="cpu")
        with plan(base, tuned, None, options) as found:
            return found.allotment.window // LARGEST_WINDOW, found.allotment.needed

    windows, needed = {}, {}
    for name in ("FP4", "128 x 128", "turned"):
        (a, values), (b, _) = (sides(LARGE[name], tmp_path, seed) for seed in (0, 1))
        windows[name], needed[name] = planned(a, b)
        windows["made"], needed["made"] = planned(a, values)
        assert windows["made"] == 1
    assert windows == {"FP4": 4, "128 x 128": 2, "turned": 4, "made": 1}
    assert needed["FP4"] < needed["made"]
