"""What checkpoints are called: enough of their paths, and no more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import write_safetensors

import ckdiff
from ckdiff.checkpoints.labels import labels, labels_of

TENSORS = {"x": ("U8", (1,), b"1")}


def called(root: Path, base: str, tuned: str) -> tuple[str, str]:
    for path in (base, tuned):
        file = root / path
        file = file if path.endswith(".safetensors") else file / "model.safetensors"
        if not file.exists():
            write_safetensors(file, TENSORS)
    with ckdiff.open_checkpoint(root / base) as one, ckdiff.open_checkpoint(root / tuned) as other:
        return labels(one, other)


@pytest.mark.parametrize(
    ("base", "tuned", "names"),
    [
        ("base", "tuned", ("base", "tuned")),
        ("Llama-3.1-8B", "my-tune", ("Llama-3.1-8B", "my-tune")),
        ("base", "run1/checkpoint-500", ("base", "run1/checkpoint-500")),
        (*2 * ("run1/checkpoint-500",), 2 * ("run1/checkpoint-500",)),
        ("run1/checkpoint-5", "run2/checkpoint-5", ("run1/checkpoint-5", "run2/checkpoint-5")),
        ("a/run/tuned", "b/run/tuned", ("a/run/tuned", "b/run/tuned")),
        ("base", "grpo/global_step_10/actor/huggingface",
         ("base", "grpo/global_step_10/actor/huggingface")),
        ("base.safetensors", "x/model.safetensors", ("base.safetensors", "x/model.safetensors")),
        ("base", "x/model-01-of-02.safetensors", ("base", "x/model-01-of-02.safetensors")),
        ("base", "x/epoch=3-step=100", ("base", "x/epoch=3-step=100")),
    ],
)  # fmt: skip
def test_enough_of_the_paths(tmp_path: Path, base: str, tuned: str, names: tuple[str, str]) -> None:
    assert called(tmp_path / "home", base, tuned) == names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["base", "tuned"], ["base", "tuned"]),
        (["base", "run1/tuned", "run2/tuned", "other"],
         ["base", "run1/tuned", "run2/tuned", "other"]),
        (["base", "run/checkpoint-1", "run/checkpoint-2"],
         ["base", "run/checkpoint-1", "run/checkpoint-2"]),
        (["a/x/tuned", "b/x/tuned", "x/tuned", "y/tuned"],
         ["a/x/tuned", "b/x/tuned", "home/x/tuned", "y/tuned"]),
        (["base", "tuned", "tuned", "base"], ["base", "tuned", "tuned", "base"]),
        (["a/1/2/3/4/5/6/7", "b/1/2/3/4/5/6/7"], 2 * ["2/3/4/5/6/7"]),
    ],
)  # fmt: skip
def test_those_of_a_run_are_told_apart(tmp_path: Path, paths: list[str], names: list[str]) -> None:
    opened = []
    for path in paths:
        file = tmp_path / "home" / path / "model.safetensors"
        if not file.exists():
            write_safetensors(file, TENSORS)
        opened.append(ckdiff.open_checkpoint(file.parent))
    assert labels_of(opened) == names
    for side in opened:
        side.close()


def test_how_a_path_is_spelled_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = called(tmp_path, "base", "run1/checkpoint-500")
    monkeypatch.chdir(tmp_path / "run1")
    with ckdiff.open_checkpoint("../base/") as one, ckdiff.open_checkpoint("checkpoint-500") as two:
        assert labels(one, two) == wanted


def test_a_directory_whose_name_is_no_text(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/\xff"))
    assert called(odd, "base", "checkpoint-1") == ("base", "checkpoint-1")
    out = tmp_path / "s.zarr"
    ckdiff.diff(odd / "base", odd / "checkpoint-1", out)
    assert ckdiff.open_store(out).manifest["tuned"]["label"] == "checkpoint-1"
