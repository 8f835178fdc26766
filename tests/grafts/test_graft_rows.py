"""Grafts along masks of the rows that two checkpoints have in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
from support import write_safetensors
from two_sides import Pair, some_pairs, two_sided

import ckdiff
from ckdiff.errors import PairingError
from ckdiff.options import Observer


def pairs() -> dict[str, Pair]:
    """Tensors of one dtype: alike, longer in tuned, longer in base with and without changes."""
    found = some_pairs(3)
    chosen = {name: found[name] for name in ("alike", "embed", "padded")}
    return chosen | {"shrunk": Pair(found["embed"].tuned, found["embed"].base)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    two_sided(folder / "run.zarr", pairs())
    return folder


def content(path: Path) -> dict[str, bytes]:
    raw = path.read_bytes()
    return {
        name: bytes(tensor["data"])
        for name, tensor in safetensors_numpy.deserialize(raw)  # type: ignore[attr-defined]
    }


def grafted(pair: Pair, mask: np.ndarray) -> bytes:
    """The base's elements, and tuned ones of the compared rows where the mask has ones."""
    dtype = "<u2"
    base, tuned = (np.frombuffer(data, dtype).copy() for _, _, data in pair.sides)
    flags = mask.reshape(-1)
    base[: len(flags)][flags] = tuned[: len(flags)][flags]
    return base.tobytes()


@pytest.mark.parametrize("kind", ["run", "random", "union"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_rows_are_grafted(made: Path, tmp_path: Path, kind: str, workers: int) -> None:
    store = ckdiff.open_store(made / "run.zarr")
    if kind == "random":
        store = ckdiff.random_mask(store, tmp_path / "r.zarr", seed=1)
    elif kind == "union":
        store = ckdiff.combine("union", [store, store], tmp_path / "u.zarr")
    sides = made / "run.checkpoints" / "base", made / "run.checkpoints" / "tuned"
    notes: list[str] = []
    told = Observer(note=notes.append)
    found = ckdiff.graft(*sides, store, tmp_path / "out", workers=workers, observer=told)
    out = content(tmp_path / "out" / "model.safetensors")
    assert out == {name: grafted(pair, store.mask(name)) for name, pair in pairs().items()}
    assert found["grafted"] == store.manifest["changed"]["exact"]
    assert found["unmasked"] == found["left_out"] == []
    (note,) = notes
    assert note.startswith("the mask has only the first rows of 2 tensors")
    assert note.endswith("embed, shrunk")
    if kind != "random":
        assert out["alike"] == pairs()["alike"].tuned[2]
        assert out["embed"] == pairs()["embed"].tuned[2][: 20 * 30 * 2]


def test_a_mask_of_whole_tensors_is_of_no_larger_ones(made: Path, tmp_path: Path) -> None:
    """Only a mask that says that it is of the first rows is taken for one."""
    found = pairs()["embed"]
    whole = Pair(found.base, (found.tuned[0], (20, 30), found.tuned[2][: 20 * 30 * 2]))
    store = two_sided(tmp_path / "whole.zarr", {"embed": whole})
    sides = made / "run.checkpoints" / "base", made / "run.checkpoints" / "tuned"
    with pytest.raises(PairingError, match=r"embed is \[24, 30\] in tuned and \[20, 30\]"):
        ckdiff.graft(*sides, store, tmp_path / "out")


def test_rows_that_are_not_there(made: Path, tmp_path: Path) -> None:
    """A checkpoint of fewer rows than the mask, or of longer ones, is another model."""
    base = made / "run.checkpoints" / "base"
    for shape in ((19, 30), (20, 31), (24,)):
        model = {
            name: (
                pair.tuned if name != "embed" else ("BF16", shape, bytes(2 * int(np.prod(shape))))
            )
            for name, pair in pairs().items()
        }
        tuned = write_safetensors(tmp_path / str(len(shape)) / "model.safetensors", model)
        with pytest.raises(PairingError, match=r"embed is .* in tuned and"):
            ckdiff.graft(base, tuned, made / "run.zarr", tmp_path / "out")


def test_rows_of_less_than_whole_bytes(tmp_path: Path) -> None:
    base, tuned = ("F4", (4, 3), bytes(6)), ("F4", (2, 3), bytes([1, 0, 0]))
    good = two_sided(tmp_path / "good.zarr", {"a": Pair(base, tuned)})
    folder = good.path.with_suffix(".checkpoints")
    ckdiff.graft(folder / "base", folder / "tuned", good, tmp_path / "out")
    assert content(tmp_path / "out" / "model.safetensors")["a"] == bytes([1, 0, 0, 0, 0, 0])
    # a mask of another dtype's tensor, whose rows end inside a byte of these
    longer, shorter = ("BF16", (4, 3), bytes(24)), ("BF16", (1, 3), bytes([1, 0, 0, 0, 0, 0]))
    odd = two_sided(tmp_path / "odd.zarr", {"a": Pair(longer, shorter)})
    with pytest.raises(PairingError, match="rows of a do not end where bytes do"):
        ckdiff.graft(folder / "base", folder / "tuned", odd, tmp_path / "no")
