"""``delta`` and ``apply`` with weight versions: the commands and the calls."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_support import run
from version_models import changed_bytes, start, step, write_model, write_steps
from weight_streams import read_model, read_stream

import ckdiff
from ckdiff.errors import DeltaError, UsageError


@pytest.fixture
def steps(tmp_path: Path) -> list[Path]:
    return write_steps(tmp_path, 3)


@pytest.fixture
def stream(tmp_path: Path, steps: list[Path]) -> Path:
    for base, tuned, encoding in zip(steps, steps[1:], ["xor", "overwrite", "xor"], strict=False):
        ckdiff.delta(base, tuned, tmp_path / "s", encoding=encoding)
    return tmp_path / "s"


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
@pytest.mark.parametrize("checksum", ["xxh3-128", "adler32"])
def test_the_command_writes_what_an_independent_reader_reads(
    tmp_path: Path, steps: list[Path], encoding: str, checksum: str
) -> None:
    out = tmp_path / "s"
    for number, (base, tuned) in enumerate(itertools.pairwise(steps), 1):
        done = run("delta", str(base), str(tuned), "--encoding", encoding, "--checksum", checksum,
                   "-o", str(out), "--json")  # fmt: skip
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert (found["version"], found["full"]) == (f"{number:06d}", False)
        assert found["changed_bytes"] == changed_bytes(read_model(base), read_model(tuned))
        assert read_stream(read_model(steps[0]), out, number) == read_model(tuned)


def test_a_number_and_full_versions(tmp_path: Path, steps: list[Path]) -> None:
    out = str(tmp_path / "s")
    one = run("delta", str(steps[0]), str(steps[1]), "--encoding", "xor", "--full", "-o", out)
    assert one.exit_code == 0, one.output
    assert "version 1: 7 tensors, a full version" in one.stdout
    assert (tmp_path / "s" / "weight_v000001" / "config.json").exists()
    two = run("delta", str(steps[1]), str(steps[2]), "--encoding", "xor", "--version", "5", "-o",
              out)  # fmt: skip
    assert two.exit_code == 0, two.output
    assert read_stream({}, tmp_path / "s", 5) == read_model(steps[2])
    grown = write_model(tmp_path / "grown", start() | {"new": ("U8", (3,), b"abc")})
    refused = run("delta", str(steps[2]), str(grown), "--encoding", "xor", "-o", out)
    assert refused.exit_code == 2
    assert "--full-when-needed" in refused.stderr
    made = run("delta", str(steps[2]), str(grown), "--encoding", "xor", "--full-when-needed", "-o",
               out)  # fmt: skip
    assert made.exit_code == 0, made.output
    assert read_stream({}, tmp_path / "s", 6) == read_model(grown)


def test_options_of_the_other_kind_are_refused(tmp_path: Path, steps: list[Path]) -> None:
    given: Any
    for wrong in ("checksum", "version", "full", "full_when_needed"):
        given = {wrong: 1}
        with pytest.raises(UsageError, match="is not for the packed encoding"):
            ckdiff.delta(steps[0], steps[1], tmp_path / "x", **given)
    for wrong in ("mask", "rule", "overwrite"):
        given = {wrong: "1", "encoding": "xor"}
        with pytest.raises(UsageError, match=f"--{wrong} is not for weight versions"):
            ckdiff.delta(steps[0], steps[1], tmp_path / "x", **given)
    with pytest.raises(UsageError, match="there is no encoding 'zip'") as caught:
        ckdiff.delta(steps[0], steps[1], tmp_path / "x", encoding="zip")
    assert caught.value.hint == "one of packed, indices, xor, overwrite"
    assert not (tmp_path / "x").exists()


def test_apply_follows_a_stream(tmp_path: Path, steps: list[Path], stream: Path) -> None:
    newest = ckdiff.apply(steps[0], stream, tmp_path / "o3")
    assert isinstance(newest, ckdiff.AppliedVersions)
    assert (newest.version, newest.seed, newest.versions) == (3, None, [1, 2, 3])
    assert read_model(tmp_path / "o3") == read_model(steps[3])
    done = run("apply", str(steps[0]), str(stream), "--to", "2", "-o", str(tmp_path / "o2"),
               "--json")  # fmt: skip
    found = json.loads(done.stdout)
    assert (found["version"], found["versions"]) == ("000002", ["000001", "000002"])
    assert (found["deltas"], found["lossy"], found["tensors"]) == (2, False, 7)
    assert read_model(tmp_path / "o2") == read_model(steps[2])


def test_apply_takes_versions_by_name(tmp_path: Path, steps: list[Path], stream: Path) -> None:
    named = [stream / f"weight_v{number:06d}" for number in (1, 2, 3)]
    away = shutil.copytree(named[1], tmp_path / "fetched")  # its index says which it is
    ckdiff.apply(steps[0], [named[0], away], tmp_path / "o2")
    assert read_model(tmp_path / "o2") == read_model(steps[2])
    ckdiff.apply(steps[1], [away, named[2]], tmp_path / "o3", base_version=1)
    assert read_model(tmp_path / "o3") == read_model(steps[3])
    marked = shutil.copytree(steps[1], tmp_path / "marked")
    (marked / ".weight_sync").mkdir()
    (marked / ".weight_sync" / "state.json").write_text('{"version": "000001"}')
    ckdiff.apply(marked, named, tmp_path / "again")
    assert read_model(tmp_path / "again") == read_model(steps[3])


def test_apply_refuses_what_does_not_follow(
    tmp_path: Path, steps: list[Path], stream: Path
) -> None:
    named = [stream / f"weight_v{number:06d}" for number in (1, 2, 3)]
    wrong: dict[str, list[Path]] = {
        "is made from version 1, and the checkpoint is at version 0": named[1:],
        "is made from version 2, and version 1 is before it": [named[0], named[2]],
        "version 1 is given twice": [named[0], named[0], named[1]],
    }
    for match, given in wrong.items():
        with pytest.raises(DeltaError, match=match):
            ckdiff.apply(steps[0], given, tmp_path / "o")
    with pytest.raises(DeltaError, match="version 3 is not one of those"):
        ckdiff.apply(steps[0], named[:2], tmp_path / "o", target=3)
    ckdiff.delta(steps[0], steps[1], tmp_path / "p.delta")
    for given in ([tmp_path / "p.delta", named[1]], [stream, tmp_path / "p.delta"]):
        with pytest.raises(UsageError, match=r"p\.delta is not"):
            ckdiff.apply(steps[0], given, tmp_path / "o")
    with pytest.raises(UsageError, match="is not a weight version, but others are"):
        ckdiff.apply(steps[0], [stream, named[1]], tmp_path / "o")
    with pytest.raises(UsageError, match="have no versions"):
        ckdiff.apply(steps[0], tmp_path / "p.delta", tmp_path / "o", target=1)
    assert not (tmp_path / "o").exists()


def test_a_full_version_among_named_ones_is_the_seed(tmp_path: Path, steps: list[Path]) -> None:
    out = tmp_path / "s"
    ckdiff.delta(steps[0], steps[1], out, encoding="xor")
    ckdiff.delta(steps[1], steps[2], out, encoding="xor", full=True)
    ckdiff.delta(steps[2], steps[3], out, encoding="xor")
    other = write_model(tmp_path / "other", step(start(9), 1))  # what a full version replaces
    made = ckdiff.apply(other, [out / "weight_v000002", out / "weight_v000003"], tmp_path / "o")
    assert isinstance(made, ckdiff.AppliedVersions)
    assert (made.seed, made.versions) == (2, [3])
    assert read_model(tmp_path / "o") == read_model(steps[3])
