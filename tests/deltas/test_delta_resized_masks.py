"""Deltas along masks of other rows than the checkpoints have."""

from __future__ import annotations

from pathlib import Path

import pytest
from two_sides import Pair, some_pairs, two_sided

import ckdiff
from ckdiff.errors import PairingError


def longer(pair: Pair) -> Pair:
    """The base's tensor on both sides, of which no element is the same."""
    dtype, shape, data = pair.base
    return Pair(pair.base, (dtype, shape, bytes(len(data))))


def test_a_mask_of_other_rows_without_ones_marks_nothing(tmp_path: Path) -> None:
    pairs = {name: some_pairs(3)[name] for name in ("alike", "padded")}
    assert not pairs["padded"].changed().any()
    store = two_sided(tmp_path / "mask.zarr", pairs)
    both = two_sided(tmp_path / "both.zarr", pairs | {"padded": longer(pairs["padded"])})
    sides = both.path.with_suffix(".checkpoints")
    found = ckdiff.delta(sides / "base", sides / "tuned", tmp_path / "d", mask=store)
    assert found.changed == store.manifest["changed"]["exact"]
    ckdiff.apply(sides / "base", tmp_path / "d", tmp_path / "out")
    ckdiff.diff(sides / "base", tmp_path / "out", tmp_path / "again.zarr")
    again = ckdiff.open_store(tmp_path / "again.zarr")
    assert not again.mask("padded").any()
    assert (again.mask("alike") == store.mask("alike")).all()


def test_a_mask_of_other_rows_with_ones_is_refused(tmp_path: Path) -> None:
    embed = some_pairs(3)["embed"]
    shrunk = Pair(embed.tuned, embed.base)
    store = two_sided(tmp_path / "mask.zarr", {"a": shrunk})
    both = two_sided(tmp_path / "both.zarr", {"a": longer(shrunk)})
    sides = both.path.with_suffix(".checkpoints")
    with pytest.raises(PairingError, match=r"a is \[24, 30\] in base and \[20, 30\] in the"):
        ckdiff.delta(sides / "base", sides / "tuned", tmp_path / "d", mask=store)
