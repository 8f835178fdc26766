"""What stores are called side by side."""

from __future__ import annotations

import pytest

from ckdiff.stores.shortnames import short_names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a.zarr", "x/b.zarr"], ["a", "b"]),
        (["x/masks.zarr", "y/masks.zarr"], ["x/masks", "y/masks"]),
        (["x/a.zarr", "x/a.zarr"], ["a", "a"]),
        (["x/a.zarr", "x/a"], ["a.zarr", "a"]),
        (["/"], ["/"]),
    ],
)
def test_short_names(paths: list[str], names: list[str]) -> None:
    assert short_names(paths) == names
