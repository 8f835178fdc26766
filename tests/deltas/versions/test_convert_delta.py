"""Deltas from one encoding to another: what they rebuild stays the same."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from cli_support import run
from version_models import start, write_model, write_steps
from weight_streams import read_model, read_stream

import ckdiff
from ckdiff.errors import CkdiffError, DeltaError, UsageError

FILES, VERSIONS = ["packed", "indices"], ["xor", "overwrite"]


@pytest.mark.parametrize(("one", "other"), [*itertools.product(FILES + VERSIONS, repeat=2)])
def test_any_encoding_becomes_any_other(tmp_path: Path, one: str, other: str) -> None:
    base, tuned = write_steps(tmp_path, 1)
    made = ckdiff.delta(base, tuned, tmp_path / "from", encoding=one)
    source = made.out if isinstance(made, ckdiff.DeltaResult) else made.path
    done = run("convert-delta", str(source), "--base", str(base), "--encoding", other, "-o",
               str(tmp_path / "to"), "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    direct = ckdiff.delta(base, tuned, tmp_path / "direct", encoding=other)
    found = json.loads(done.stdout)
    if other in FILES:
        assert found["encoding"] == other
        assert (tmp_path / "to").read_bytes() == (tmp_path / "direct").read_bytes()
    else:
        assert isinstance(direct, ckdiff.VersionReport)
        for path in direct.path.iterdir():
            assert (
                path.read_bytes() == (tmp_path / "to" / direct.path.name / path.name).read_bytes()
            )
    ckdiff.apply(base, tmp_path / "to", tmp_path / "o")
    assert read_model(tmp_path / "o") == read_model(tuned)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"m0", "m1", "from", "to", "direct", "o"}


def test_a_version_keeps_its_number_and_its_base(tmp_path: Path) -> None:
    steps = write_steps(tmp_path, 3)
    for base, tuned in itertools.pairwise(steps):
        ckdiff.delta(base, tuned, tmp_path / "s", encoding="xor")
    for number in (2, 3):
        ckdiff.convert_delta(
            tmp_path / "s" / f"weight_v{number:06d}",
            tmp_path / "t",
            base=steps[number - 1],
            encoding="overwrite",
            checksum="adler32",
        )
    rows = ckdiff.info(tmp_path / "t")["versions"]
    assert [(row["version"], row["base_version"]) for row in rows] == [
        ("000002", "000001"), ("000003", "000002"),
    ]  # fmt: skip
    ckdiff.convert_delta(tmp_path / "s" / "weight_v000001", tmp_path / "u", base=steps[0],
                         encoding="overwrite", checksum="adler32")  # fmt: skip
    for number in (2, 3):
        (tmp_path / "t" / f"weight_v{number:06d}").rename(tmp_path / "u" / f"weight_v{number:06d}")
    assert read_stream(read_model(steps[0]), tmp_path / "u", 3) == read_model(steps[3])


def test_single_files_stay_single(tmp_path: Path) -> None:
    base, tuned = (path / "model.safetensors" for path in write_steps(tmp_path, 1))
    ckdiff.delta(base, tuned, tmp_path / "p")
    ckdiff.convert_delta(tmp_path / "p", tmp_path / "i", base=base, encoding="indices")
    ckdiff.apply(base, tmp_path / "i", tmp_path / "o.safetensors")
    assert (tmp_path / "o.safetensors").read_bytes() == tuned.read_bytes()


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    base, tuned = write_steps(tmp_path, 1)
    other = write_model(tmp_path / "other", start(5))
    ckdiff.delta(base, tuned, tmp_path / "p")
    ckdiff.delta(base, tuned, tmp_path / "s", encoding="xor")
    ckdiff.delta(base, tuned, tmp_path / "f", encoding="xor", full=True)
    ckdiff.diff(base, tuned, tmp_path / "m.zarr")
    ckdiff.delta(base, tuned, tmp_path / "lossy", mask=tmp_path / "m.zarr")
    out = tmp_path / "to"
    wrong: dict[str, tuple[str, Path]] = {
        "is a stream": ("s", base),
        "is a full version": ("f/weight_v000001", base),
        "is lossy": ("lossy", base),
        "was not made for": ("p", other),
        "has another digest": ("s/weight_v000001", other),
    }
    for match, (source, given) in wrong.items():
        with pytest.raises(CkdiffError, match=match):
            ckdiff.convert_delta(tmp_path / source, out, base=given, encoding="indices")
    grown = write_model(tmp_path / "grown", start() | {"new": ("U8", (3,), b"abc")})
    ckdiff.delta(base, grown, tmp_path / "g")
    with pytest.raises(DeltaError, match="cannot say this: new is added"):
        ckdiff.convert_delta(tmp_path / "g", out, base=base, encoding="xor")
    with pytest.raises(UsageError, match="there is no encoding"):
        ckdiff.convert_delta(tmp_path / "p", out, base=base, encoding="zip")
    with pytest.raises(UsageError, match="are not for the packed encoding"):
        ckdiff.convert_delta(tmp_path / "p", out, base=base, encoding="packed", version=3)
    assert not out.exists()
    assert not list(tmp_path.glob("*.ckdiff-partial"))
