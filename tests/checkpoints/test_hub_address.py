"""Addresses on the hub: what they say, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import ckdiff
from ckdiff.checkpoints.places.hub.address import HubAddress, is_hub_address
from ckdiff.errors import CheckpointError


@pytest.mark.parametrize(
    ("text", "repo", "revision", "path"),
    [
        ("hf://org/name", "org/name", None, ""),
        ("hf:/org/name", "org/name", None, ""),  # what pathlib makes of it
        ("hf://org/name/", "org/name", None, ""),
        ("hf://org/na.me-7B_x@main", "org/na.me-7B_x", "main", ""),
        ("hf://org/name@v1.0/sub/folder", "org/name", "v1.0", "sub/folder"),
        ("hf://org/name/sub", "org/name", None, "sub"),
        ("hf://org/name@feature%2Fx/sub", "org/name", "feature/x", "sub"),
        ("hf://org/name@feature/x", "org/name", "feature", "x"),
        ("hf://org/name@refs/pr/3/sub", "org/name", "refs/pr/3", "sub"),
        ("hf://org/name@refs%2Fpr%2F3/sub", "org/name", "refs/pr/3", "sub"),
        ("hf://org/name/a@b/model.safetensors", "org/name", None, "a@b/model.safetensors"),
        ("hf://org/name/50%25/x", "org/name", None, "50%25/x"),
    ],
)
def test_what_an_address_says(text: str, repo: str, revision: str | None, path: str) -> None:
    assert is_hub_address(text)
    found = HubAddress.parse(text)
    assert (found.repo, found.revision, found.path) == (repo, revision, path)
    assert HubAddress.parse(str(found)) == found


def test_an_address_survives_pathlib() -> None:
    assert HubAddress.parse(str(Path("hf://org/name@main/sub"))).path == "sub"


@pytest.mark.parametrize(
    "text",
    [
        "hf://", "hf://org", "hf://org/", "hf:///org/name", "hf://org//name", "hf://org/name@",
        "hf://org/name@/sub", "hf://org/..", "hf://../name", "hf://org/a..b", "hf://org/a--b",
        "hf://org/-name", "hf://org/name.", "hf://org/na me", "hf://org/näme", "hf://org/name?x=1",
        "hf://org/name/../other", "hf://org/name/./x", "hf://org/name/a//b",
        "hf://org/name@%2E%2E", "hf://org/name@..%2F..%2Fetc", "hf://org/name@%2Fetc%2Fpasswd",
        "hf://org/name@a%0Ab", "hf://org/name@%00", "hf://org/name/a\0b",
        "hf://datasets/org/name", "hf://spaces/org/name",
    ],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    assert is_hub_address(text)
    with pytest.raises(CheckpointError) as caught:
        ckdiff.open_checkpoint(text)
    assert caught.value.hint is not None
    assert "hf://org/name" in caught.value.hint
    assert caught.value.one_line().isprintable()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("hf://gpt2", "hf://openai-community/gpt2:"),
        ("hf://gpt2-medium@main/", "hf://openai-community/gpt2-medium@main:"),
        ("hf://bert-base-uncased", "hf://google-bert/bert-base-uncased:"),
        ("hf:/t5-small", "hf://google-t5/t5-small:"),
    ],
)
def test_models_that_had_no_organisation(text: str, wanted: str) -> None:
    with pytest.raises(CheckpointError, match="must be an organisation and a name") as caught:
        HubAddress.parse(text)
    assert f"under an organisation now, such as {wanted}" in caught.value.one_line()


def test_other_paths_are_local() -> None:
    for path in ("hf", "hf:", "./hf://org/name", "/hf:/x", "org/name"):
        assert not is_hub_address(path)
    with pytest.raises(CheckpointError, match="is not hf://"):
        HubAddress.parse("HF://org/name")
    with pytest.raises(CheckpointError, match=r"does not exist") as caught:
        ckdiff.open_checkpoint("org/name")
    assert "write hf://org/name" in caught.value.one_line()


def test_a_token_in_an_address_is_not_repeated() -> None:
    with pytest.raises(CheckpointError) as caught:
        HubAddress.parse("hf://me:hf_abcdefghijklmnopqrstuv@org/name")
    assert "abcdef" not in caught.value.one_line()
    with pytest.raises(CheckpointError) as caught:
        HubAddress.parse("hf://gpt2@hf_abcdefghijklmnopqrstuv\n")
    assert "abcdef" not in str(caught.value)
    assert caught.value.one_line().isprintable()
