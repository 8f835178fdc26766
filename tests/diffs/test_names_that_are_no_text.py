"""Names that are no UTF-8 cannot be recorded: that is said before the work, and not at its end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import run

import ckdiff
from ckdiff.errors import CkdiffError, StoreError

DATA = Path(__file__).parents[1] / "data" / "format-1"
BAD = os.fsdecode(b"b\xff")


def base_called(tmp: Path) -> None:
    base = shutil.copytree(DATA / "base", tmp / BAD)
    ckdiff.diff(base, DATA / "tuned", tmp / "out")


def tuned_called(tmp: Path) -> None:
    tuned = shutil.copytree(DATA / "tuned", tmp / BAD)
    ckdiff.diff(DATA / "base", tuned, tmp / "out")


def shard_called(tmp: Path) -> None:
    base = shutil.copytree(DATA / "base", tmp / "base")
    (base / "model.safetensors").rename(base / f"{BAD}.safetensors")
    ckdiff.diff(base, DATA / "tuned", tmp / "out")


def renamed_to(tmp: Path) -> None:
    ckdiff.diff(DATA / "base", DATA / "tuned", tmp / "out", rename=["norm=\udcff"])


def renamed_to_one(tmp: Path) -> None:
    """Nothing of that name is paired: it is only listed."""
    ckdiff.diff(DATA / "base", DATA / "tuned", tmp / "out", rename=["extra=\ud800"])


def excluded(tmp: Path) -> None:
    ckdiff.diff(DATA / "base", DATA / "tuned", tmp / "out", exclude=["\udcff*"])


def combined(tmp: Path) -> None:
    store = shutil.copytree(DATA / "run.zarr", tmp / BAD)
    ckdiff.combine("union", [store, DATA / "random.zarr"], tmp / "out", rule="exact")


FORMS: list[Callable[[Path], None]] = [
    base_called, tuned_called, shard_called, renamed_to, renamed_to_one, excluded, combined,
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_store_that_could_not_say_it_is_not_begun(
    tmp_path: Path, form: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckdiff.stores import workdir

    def begun(path: Path, *, create: bool = True) -> None:
        pytest.fail("the work was begun")

    monkeypatch.setattr(workdir, "acquire", begun)
    with pytest.raises(StoreError, match="not valid text") as caught:
        form(tmp_path)
    assert caught.value.one_line().isprintable()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_nothing_recorded_nothing_refused(tmp_path: Path) -> None:
    base = shutil.copytree(DATA / "base", tmp_path / BAD)
    assert ckdiff.diff(base, DATA / "tuned").differs
    assert run("diff", str(base), str(DATA / "tuned"), "--json").exit_code == 0


def test_an_output_may_be_called_anything_that_the_system_takes(tmp_path: Path) -> None:
    out = tmp_path / BAD
    ckdiff.diff(DATA / "base", DATA / "tuned", out)
    assert ckdiff.check_store(out)["ok"]
    assert run("show", str(out), "--json").exit_code == 0
    assert os.listdir(tmp_path) == [BAD]


def test_a_delta_of_such_files_can_be_applied_or_is_not_made(tmp_path: Path) -> None:
    tuned = shutil.copytree(DATA / "base", tmp_path / "tuned")
    (tuned / "model.safetensors").rename(tuned / f"{BAD}.safetensors")
    try:
        ckdiff.delta(DATA / "base", tuned, tmp_path / "delta")
    except CkdiffError:
        assert not (tmp_path / "delta").exists()
        return
    ckdiff.apply(DATA / "base", tmp_path / "delta", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == os.listdir(tuned)
