"""Whatever bytes a stream has: a result or one of our errors, from every command that reads it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from version_models import start, step, write_model
from weight_streams import write_version

import ckdiff
from ckdiff.errors import CkdiffError


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_damage_is_an_error_or_nothing(tmp_path: Path, encoding: str) -> None:
    models = [start()]
    stream = tmp_path / "s"
    for number in (1, 2):
        models.append(step(models[-1], number, 0.1))
        write_version(stream, number, models[-2], models[-1], encoding=encoding)
    base = write_model(tmp_path / "base", models[0])
    packed = tmp_path / "packed"
    reading: dict[str, Callable[[], object]] = {
        "info": lambda: ckdiff.info(stream),
        "check": lambda: ckdiff.check(stream),
        "dry": lambda: ckdiff.check(stream, base=base),
        "squash": lambda: ckdiff.squash(stream, 1, 2, tmp_path / "o"),
        "import": lambda: ckdiff.import_masks(
            stream / "weight_v000002", tmp_path / "m.zarr", base=base, overwrite=True
        ),
        "convert": lambda: ckdiff.convert_delta(
            stream / "weight_v000001", packed, base=base, encoding="packed", overwrite=True
        ),
        "tensor": lambda: ckdiff.Delta(stream / "weight_v000001").tensor("layers.0.w", base),
    }
    files = sorted(path for path in stream.rglob("*") if path.is_file())
    rng = np.random.default_rng(1)
    said: list[str] = []
    for turn in range(16):
        path = files[turn % len(files)]
        raw = path.read_bytes()
        at = int(rng.integers(len(raw)))
        kinds = [raw[:at], raw[:at] + bytes([raw[at] ^ (1 << turn % 8)]) + raw[at + 1 :],
                 raw + b"\0", raw[:at] + raw[at + 1 :]]  # fmt: skip
        path.write_bytes(kinds[int(rng.integers(len(kinds)))])
        for name, read in reading.items():
            try:
                read()
            except CkdiffError as error:
                said.append(f"{name}: {error}")
            shutil.rmtree(tmp_path / "o", ignore_errors=True)
        path.write_bytes(raw)
    assert len(said) > 16
    assert [one for one in said if "\n" in one] == []
    assert {path.name for path in tmp_path.iterdir()} <= {"s", "base", "packed", "m.zarr"}


def test_what_a_frame_declares_is_not_allocated(tmp_path: Path) -> None:
    """A frame that says 2**50 bytes, in a tensor that is small."""
    from weight_streams import write_shard, write_stream_index

    base = write_model(tmp_path / "base", start())
    folder = tmp_path / "s" / "weight_v000001"
    folder.mkdir(parents=True)
    head = b"\x28\xb5\x2f\xfd" + b"\xc0" + b"\x00" + (1 << 50).to_bytes(8, "little")
    name = "model-00000-of-00001.safetensors"
    write_shard(folder / name, [("embed.weight", head + b"\x03\x00\x00\x00", "0" * 32)])
    metadata = {"version": "000001", "base_version": "000000", "delta_encoding": "xor",
                "compression_format": "zstd", "checksum_format": "xxh3-128"}  # fmt: skip
    write_stream_index(folder, metadata, {"embed.weight": name})
    for read in (
        lambda: ckdiff.info(tmp_path / "s"),
        lambda: ckdiff.check(tmp_path / "s"),
        lambda: ckdiff.check(tmp_path / "s", base=base),
        lambda: ckdiff.squash(tmp_path / "s", 1, 1, tmp_path / "o"),
        lambda: ckdiff.import_masks(folder, tmp_path / "m.zarr", base=base),
    ):
        with pytest.raises(CkdiffError, match=r"weight_v000001: embed\.weight"):
            read()
