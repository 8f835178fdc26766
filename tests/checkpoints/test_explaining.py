"""What is said of a path that is no checkpoint: what it is, and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckdiff.checkpoints.explaining import no_such_path, refused_metadata


def line(path: str) -> str:
    error = no_such_path(path)
    text = error.one_line()
    assert "\n" not in text
    assert error.hint
    return text


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("s3://bucket/model", ["object storage", "aws s3"]),
        ("S3://bucket/model", ["aws s3"]),
        ("gs://bucket/model", ["object storage", "gcloud"]),
        ("az://container/model", ["object storage", "azcopy"]),
        ("https://example.org/m.safetensors", ["web address", "download it"]),
        ("https://hub.example/org/name", ["write hf://org/name)"]),
        ("https://example.org/files/m.safetensors", ["download it"]),
        ("https://hub.example/org/name/", ["write hf://org/name)"]),
        ("https://hub.example/org/name/tree/main", ["write hf://org/name@main)"]),
        (
            "https://hub.example/org/n/resolve/v1/a/b.safetensors?download=true",
            ["write hf://org/n@v1/a/b.safetensors)"],
        ),
        ("ftp://x/y", ["web address"]),
        ("rsync://x/y", ["rsync", "copy it here"]),
        ("s3:/bucket/model", ["aws s3"]),
    ],
)
def test_addresses(path: str, words: list[str]) -> None:
    text = line(path)
    for word in words:
        assert word in text


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("runs/qwen-base", "runs/checkpoint-500", "Models/m", "org"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs/model.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("runs/qwen-bse", "runs/qwen-base"),
        ("runs/qwen-base2/", "runs/qwen-base"),
        ("run/qwen-base", "runs/qwen-base"),
        ("runs/checkpoint-50", "runs/checkpoint-500"),
        ("runs/model.safetensor", "runs/model.safetensors"),
        ("models/m", "Models/m"),
        ("./rusn/checkpoint-500", "./runs/checkpoint-500"),
    ],
)
def test_typos(here: Path, path: str, meant: str) -> None:
    text = line(path)
    assert f"did you mean {meant}?" in text
    assert "hf://" not in text
    text = line(f"{here}/{path}")
    assert f"did you mean {here}/{meant.removeprefix('./')}?".replace("//", "/") in text.replace(
        "/./", "/"
    )


@pytest.mark.parametrize("path", ["Qwen/Qwen3-0.6B", "meta-llama/Llama-3.1-8B", "a/b"])
def test_names_of_the_hub(here: Path, path: str) -> None:
    assert f"hf://{path}" in line(path)
    assert "did you mean" not in line(path)


@pytest.mark.parametrize(
    "path", ["", "/", "nothing", "/nothing/at/all", "a/b/c", "\n", "x" * 10_000]
)
def test_nothing_is_like_it(here: Path, path: str) -> None:
    text = line(path)
    assert "hf://" not in text
    assert "did you mean" not in text
    assert len(text) < 1000


def test_our_own_files() -> None:
    for said, word in (("ckdiff-delta", "ckdiff apply"), ("ckdiff-masks", "ckdiff import")):
        error = refused_metadata("x", {"format": said})
        assert error is not None
        assert word in error.one_line()
    assert refused_metadata("x", {"format": "pt"}) is None
    assert refused_metadata("x", {"said": json.dumps("ckdiff-delta")}) is None
