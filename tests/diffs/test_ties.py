"""Tensors that are another of their side once more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import write_safetensors

import ckdiff
from ckdiff.options import Observer

NOISE = np.random.default_rng(5)
E = NOISE.integers(0, 1 << 16, (300, 257), np.uint16)


def put(path: Path, tensors: dict[str, Any]) -> Path:
    kinds = {"uint16": "BF16", "uint8": "U8", "uint32": "F32"}
    raw = {n: (kinds[str(a.dtype)], a.shape, a.tobytes()) for n, a in tensors.items()}
    write_safetensors(path, raw)
    return path


def diff(tmp_path: Path, base: dict[str, Any], tuned: dict[str, Any], **more: Any) -> Any:
    notes: list[str] = []
    paths = put(tmp_path / "a.safetensors", base), put(tmp_path / "b.safetensors", tuned)
    found = ckdiff.diff(*paths, observer=Observer(note=notes.append), **more)
    return found, [note for note in notes if "tied" in note]


def test_a_head_that_one_side_has_saved_twice(tmp_path: Path) -> None:
    other = E.copy()
    other[3, 3] ^= 1
    found, notes = diff(tmp_path, {"embed": E}, {"embed": other, "head": other})
    assert found.tied == [{"name": "head", "same_as": "embed", "side": "tuned"}]
    assert found.unpaired["added"] == ["head"]
    assert found.rules["exact"]["changed"] == 1
    assert len(notes) == 1
    (tmp_path / "x").mkdir()
    found, _ = diff(tmp_path / "x", {"embed": E, "head": E}, {"embed": E}, out=tmp_path / "s.zarr")
    assert found.tied == [{"name": "head", "same_as": "embed", "side": "base"}]
    assert found.store.manifest["tied"] == found.tied
    found.store.check()


@pytest.mark.parametrize("where", [0, 5, 2048 * 2 + 1, E.size - 1])
def test_one_other_bit_is_no_tie(tmp_path: Path, where: int) -> None:
    head = E.copy()
    head.reshape(-1)[where] ^= 1
    found, notes = diff(tmp_path, {"embed": E}, {"embed": E, "head": head})
    assert (found.tied, notes) == ([], [])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.zeros((8, 8), np.uint16), np.zeros((8, 8), np.uint16)),  # nothing but zeros
        (np.full((8, 8), 0x3F80, np.uint16), np.full((8, 8), 0x3F80, np.uint16)),
        (E[0], E[0]),  # one dimension
        (E, E.reshape(257, 300)),  # another shape
        (E.view(np.uint8), E.view(np.uint8).reshape(-1)),
    ],
)
def test_what_is_no_tie(tmp_path: Path, one: Any, other: Any) -> None:
    found, notes = diff(tmp_path, {"embed": one}, {"embed": one, "head": other})
    assert (found.tied, notes) == ([], [])
    found, notes = diff(tmp_path, {"a": one, "b": other}, {"a": one, "b": other}, verify=True)
    assert notes == []


def test_tied_on_both_sides(tmp_path: Path) -> None:
    tuned = E.copy()
    tuned[0, :9] ^= 1
    found, notes = diff(tmp_path, {"a": E, "b": E}, {"a": tuned, "b": tuned})
    assert found.tied == []
    assert len(notes) == 1
    assert "counted twice" in notes[0]
    assert found.rules["exact"]["changed"] == 18
    # no more on one side
    found, notes = diff(tmp_path, {"a": E, "b": E}, {"a": tuned, "b": E})
    assert notes == []


def test_ties_fail_no_gate(tmp_path: Path) -> None:
    from ckdiff.diffs.gates import Gates, judge

    found, _ = diff(tmp_path, {"embed": E}, {"embed": E, "head": E})
    assert all(v.ok for v in judge(found, Gates(fail_above=0.1, exit_code=True)))


def test_many_ties_are_one_note_and_cost_one_read(tmp_path: Path) -> None:
    """Experts that were copied, and others that only begin alike."""
    odd = E.copy()
    odd[-1, -1] ^= 1
    copies = {f"experts.{i}": odd if i % 10 == 3 else E for i in range(40)}
    found, notes = diff(tmp_path, {"embed": E}, {"embed": E, **copies})
    wanted = [n for n in copies if copies[n] is E]
    assert [t["name"] for t in found.tied if t["same_as"] == "embed"] == wanted
    others = [(t["name"], t["same_as"]) for t in found.tied if t["same_as"] != "embed"]
    assert others == [(f"experts.{i}", f"experts.{i + 10}") for i in (3, 13, 23)]
    assert len(notes) == 1
    assert notes[0].startswith("note: 39 tensors have the same bits as another: they are tied")
    found, notes = diff(tmp_path, {"embed": E, **copies}, {"embed": E, **copies}, verify=True)
    assert len(notes) == 1
    assert "on both sides: they are tied, and counted twice" in notes[0]
