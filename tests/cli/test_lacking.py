"""What is not here is named: a package of the whole install, or the system that ckdiff runs on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli_support import error, write_pair

import ckdiff
from ckdiff.cli import exits
from ckdiff.errors import UsageError, lacking, of_the_whole


@pytest.fixture
def store(tmp_path: Path) -> str:
    base, tuned = write_pair(tmp_path)
    ckdiff.diff(base, tuned, tmp_path / "run.zarr")
    return str(tmp_path / "run.zarr")


def test_the_command_line_says_it_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # type: ignore[arg-type]
    said = error("info", "hf://org/model")
    assert said.count("\n") <= 1
    assert "models on the hub take the package huggingface_hub, which is not installed" in said
    assert "pip install ckdiff" in said


@pytest.mark.parametrize(("method", "package"), [("array", "zarr"), ("dask", "dask")])
def test_python_gets_an_error_of_ours(
    store: str, method: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = ckdiff.open_store(store)
    for name in (package, f"{package}.array"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"take the package {package}, .*pip install ckdiff"):
        getattr(opened, method)()


def test_a_module_of_ours_is_a_bug() -> None:
    for name in ("ckdiff.nothing", "zarrs", ""):
        assert lacking(ModuleNotFoundError(name=name)) is None
    with pytest.raises(ModuleNotFoundError), of_the_whole():
        import ckdiff.nothing  # type: ignore[import-not-found]  # noqa: F401


def test_another_system_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> int:
        raise AttributeError("module 'os' has no attribute 'O_PATH'")

    monkeypatch.setattr(sys, "platform", "darwin")
    assert exits.run(fails) == 2
    assert "ckdiff runs on Linux, and this is darwin" in capsys.readouterr().err
