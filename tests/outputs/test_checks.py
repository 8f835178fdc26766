"""Whether one path lies in another, by whatever names: against a twin that asks of each pair."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckdiff.outputs import checks

PARTS = st.lists(st.sampled_from(["a", "b", "link", ".."]), max_size=4)


def holds(place: str, path: str) -> bool:
    """The twin."""
    if os.path.abspath(path) == os.path.abspath(place):
        return True
    top, name = os.path.realpath(place), os.path.realpath(path)
    if name == top or name.startswith(top.rstrip("/") + "/"):
        return True
    above = [name, *map(str, Path(name).parents)]
    return os.path.exists(top) and any(
        os.path.samefile(folder, top) for folder in above if os.path.exists(folder)
    )


@settings(max_examples=60, deadline=None)
@given(
    made=st.lists(PARTS, max_size=3),
    links=st.lists(st.tuples(PARTS, PARTS), max_size=3),
    places=st.lists(PARTS, min_size=1, max_size=2),
    paths=st.lists(PARTS, max_size=3),
)
def test_against_the_twin(
    made: list[list[str]],
    links: list[tuple[list[str], list[str]]],
    places: list[list[str]],
    paths: list[list[str]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        top = os.path.join(folder, "x", "y", "z", "w")  # ".." stays inside
        os.makedirs(top)
        for parts in made:
            Path(top, *(part for part in parts if part != "..")).mkdir(parents=True, exist_ok=True)
        for at, to in links:
            place = Path(top, *at, "link")
            if place.parent.is_dir() and not os.path.lexists(place):
                place.symlink_to(os.path.join(top, *to))
        wholes = [os.path.join(top, *parts) for parts in places]
        names = [os.path.join(top, *parts) for parts in paths]
        wanted = any(holds(place, name) for place in wholes for name in names)
        assert checks._held(wholes, names) == wanted
        assert checks._held(["/"], names) == bool(names)


def test_each_directory_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "out").mkdir()
    shards = [folder / f"{i}.safetensors" for i in range(50)]
    asked: list[str] = []
    identity = checks._identity

    def counted(path: str) -> tuple[int, int] | None:
        asked.append(path)
        return identity(path)

    monkeypatch.setattr(checks, "_identity", counted)
    assert not checks._held([tmp_path / "out"], [*shards, *shards])
    assert len(asked) == len(set(asked)) == 1 + len(shards) + len(folder.resolve().parts)
