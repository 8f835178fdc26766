"""``info`` and ``check`` of streams and deltas."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zstandard
from cli_support import run
from version_models import changed_bytes, start, step, write_model, write_steps
from weight_streams import DIGESTS, read_model, write_shard, write_stream_index, write_version

import ckdiff
from ckdiff.errors import CkdiffError, DeltaError, UsageError


@pytest.fixture
def steps(tmp_path: Path) -> list[Path]:
    return write_steps(tmp_path, 4)


@pytest.fixture
def stream(tmp_path: Path, steps: list[Path]) -> Path:
    """xor, overwrite, full, xor."""
    kinds = [("xor", False), ("overwrite", False), ("xor", True), ("xor", False)]
    for (base, tuned), (encoding, full) in zip(itertools.pairwise(steps), kinds, strict=True):
        ckdiff.delta(base, tuned, tmp_path / "s", encoding=encoding, full=full)
    return tmp_path / "s"


def test_info_says_what_each_version_changes(steps: list[Path], stream: Path) -> None:
    done = run("info", str(stream), "--json")
    rows = json.loads(done.stdout)["versions"]
    models = list(map(read_model, steps))
    whole = sum(len(data) for _, _, data in models[0].values())
    for i, row in enumerate(rows):
        assert row["version"] == f"{i + 1:06d}"
        assert row["full"] == (i == 2)
        assert row["base_version"] == (None if i == 2 else f"{i:06d}")
        assert row["encoding"] == ["xor", "overwrite", None, "xor"][i]
        one, other = models[i], models[i + 1]
        assert row["changed_bytes"] == (whole if i == 2 else changed_bytes(one, other))
        assert row["tensors"] == (7 if i == 2 else sum(one[n] != other[n] for n in one))
        folder = stream / f"weight_v{i + 1:06d}"
        assert row["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert rows[0]["share"] is None
    assert rows[3]["share"] == rows[3]["bytes"] / whole
    text = run("info", str(stream))
    assert text.exit_code == 0, text.output
    assert "4 weight versions" in text.stdout
    assert "000002  000001  delta  overwrite" in text.stdout.replace("   ", "  ")


def test_info_of_one_version(stream: Path) -> None:
    found = ckdiff.info(stream / "weight_v000002")
    assert found["kind"] == "stream"
    assert [row["version"] for row in found["versions"]] == ["000002"]
    assert ckdiff.info(stream / "weight_v000003")["kind"] == "checkpoint"


def test_info_passes_over_a_version_that_is_being_written(stream: Path) -> None:
    (stream / "weight_v000004" / "model.safetensors.index.json").unlink()
    found = ckdiff.info(stream)
    assert [row["version"] for row in found["versions"]] == ["000001", "000002", "000003"]
    assert "weight_v000004 is ignored" in found["notes"][0]


def test_check_of_sound_streams(steps: list[Path], stream: Path) -> None:
    plain = json.loads(run("check", str(stream), "--json").stdout)
    frames = [row["tensors"] for row in ckdiff.info(stream)["versions"] if not row["full"]]
    assert (plain["ok"], plain["versions"], plain["frames"]) == (True, 4, sum(frames))
    assert plain["digests"] == frames[-1]  # of what follows the full version
    dry = json.loads(run("check", str(stream), "--base", str(steps[0]), "--json").stdout)
    assert dry["digests"] == dry["frames"] == sum(frames)
    some = ckdiff.check(stream, base=steps[0], target=1)
    assert (some["versions"], some["digests"]) == (1, frames[0])
    late = ckdiff.check(stream, base=steps[1], base_version=1, target=2)
    assert (late["frames"], late["digests"]) == (frames[0] + frames[1], frames[1])
    one = ckdiff.check(stream / "weight_v000002")
    assert (one["versions"], one["frames"], one["digests"]) == (1, frames[1], 0)
    done = run("check", str(stream))
    assert done.exit_code == 0, done.output
    assert "ok, 4 weight versions" in done.stdout


def test_check_finds_another_base(steps: list[Path], stream: Path) -> None:
    with pytest.raises(DeltaError, match="has another digest"):
        ckdiff.check(stream, base=steps[1])
    done = run("check", str(stream), "--base", str(steps[1]))
    assert done.exit_code == 2
    assert done.stdout == ""


def test_check_finds_missing_links(stream: Path) -> None:
    shutil.rmtree(stream / "weight_v000001")
    with pytest.raises(DeltaError, match=r"weight_v000002: is made from weight_v000001, which is"):
        ckdiff.check(stream)
    with pytest.raises(DeltaError, match="has no weight_v000009"):
        ckdiff.check(stream, target=9)


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_check_finds_every_damaged_byte_of_frames(tmp_path: Path, encoding: str) -> None:
    """With the base; without it what contradicts a frame."""
    base = start()
    tuned = step(base, 1)
    folder = write_version(tmp_path / "s", 1, base, tuned, encoding=encoding)
    model = write_model(tmp_path / "base", base)
    ckdiff.check(tmp_path / "s", base=model)
    shard = folder / "model-00000-of-00001.safetensors"
    raw = shard.read_bytes()
    data = 8 + int.from_bytes(raw[:8], "little")
    seen = 0
    for at in np.random.default_rng(0).integers(data, len(raw), 30).tolist():
        shard.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
        try:
            ckdiff.check(tmp_path / "s", base=model)
        except CkdiffError as error:
            assert "weight_v000001" in str(error)  # noqa: PT017
            seen += 1
    assert seen >= 29  # a bit of a frame's descriptor means nothing


def test_check_finds_frames_that_contradict_each_other(tmp_path: Path) -> None:
    """A tensor of two sizes, positions behind its end or twice, and values that are missing."""
    base = start()
    tuned = step(base, 1)
    write_version(tmp_path / "s", 1, base, tuned)
    longer = {"layers.0.w": ("BF16", (1,), base["layers.0.w"][2] + b"ab")}
    write_version(tmp_path / "s", 2, longer, {"layers.0.w": ("BF16", (1,), bytes(16386))})
    with pytest.raises(DeltaError, match=r"weight_v000002: layers.0.w holds 16,386 bytes, and"):
        ckdiff.check(tmp_path / "s")
    places = {"twice": [5, 5], "behind": [16384], "fine": [3, 1, 16383]}
    for what, listed in places.items():
        stream = tmp_path / what
        write_version(stream, 1, base, tuned)
        payload = np.uint32(len(listed)).tobytes() + np.array(listed, "<u4").tobytes()
        frame = zstandard.ZstdCompressor().compress(payload + bytes(len(listed)))
        (stream / "weight_v000002").mkdir()
        name = "model-00000-of-00001.safetensors"
        digest = DIGESTS["adler32"](b"")
        write_shard(stream / "weight_v000002" / name, [("layers.0.w", frame, digest)])
        metadata = {"version": "000002", "base_version": "000001", "delta_encoding": "overwrite",
                    "compression_format": "zstd", "checksum_format": "adler32"}  # fmt: skip
        write_stream_index(stream / "weight_v000002", metadata, {"layers.0.w": name})
        if what == "fine":
            assert ckdiff.check(stream)["ok"]
            continue
        with pytest.raises(DeltaError, match=r"weight_v000002: layers\.0\.w"):
            ckdiff.check(stream)


@pytest.mark.parametrize("encoding", ["packed", "indices"])
def test_check_of_deltas_in_files(tmp_path: Path, steps: list[Path], encoding: str) -> None:
    path = tmp_path / "x.delta"
    ckdiff.delta(steps[0], steps[1], path, encoding=encoding)
    plain = json.loads(run("check", str(path), "--json").stdout)
    assert (plain["ok"], plain["encoding"], plain["applied"]) == (True, encoding, False)
    assert ckdiff.check(path, base=steps[0])["applied"]
    with pytest.raises(DeltaError, match="was not made for"):
        ckdiff.check(path, base=steps[2])
    with pytest.raises(UsageError, match="only streams"):
        ckdiff.check(path, target=1)
    raw = bytearray(path.read_bytes())
    at = 8 + int.from_bytes(raw[:8], "little") + 20
    raw[at] ^= 1
    path.write_bytes(raw)
    done = run("check", str(path))
    assert done.exit_code == 2
    assert "damaged" in done.stderr
