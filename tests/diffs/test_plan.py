"""The plan of a diff: it says what was asked, and a run does not change it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support import write_safetensors

from ckdiff.diffs.plan import DiffPlan, plan
from ckdiff.diffs.run import run
from ckdiff.options import Observer, Options


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    base = write_safetensors(tmp_path / "base.safetensors", {"a": ("U8", (3,), b"abc")})
    tuned = write_safetensors(tmp_path / "tuned.safetensors", {"a": ("U8", (3,), b"abd")})
    return base, tuned


@pytest.mark.parametrize("asked", ["cpu", "auto"])
def test_a_run_does_not_change_its_plan(
    sides: tuple[Path, Path], tmp_path: Path, asked: str
) -> None:
    with plan(*sides, tmp_path / "out.zarr", Options(workers=1, device=asked)) as planned:
        shown, devices = repr(planned), planned.devices
        assert run(planned).rules["exact"]["changed"] == 1
        assert repr(planned) == shown
        assert planned.devices == devices
        frozen = planned, planned.devices, planned.allotment, planned.rules
        for thing in frozen:
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(thing, dataclasses.fields(thing)[0].name, None)


def test_a_plan_can_be_printed(sides: tuple[Path, Path]) -> None:
    with plan(*sides, None, Options(workers=3, rules=["atol=1"]), Observer()) as planned:
        text = repr(planned)
    assert sides[0].name in text
    assert sides[1].name in text
    for said in ("atol=1", "workers=3", "window=", "1 tensors", "device='cpu'"):
        assert said in text
    for hidden in ("ExitStack", "Observer", "opened="):
        assert hidden not in text


def test_what_was_asked_for_is_kept(sides: tuple[Path, Path]) -> None:
    options = Options(workers=1)
    with plan(*sides, None, options) as planned:
        options.workers = 7
        assert isinstance(planned, DiffPlan)
        assert planned.options.workers == 1
