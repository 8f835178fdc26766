"""The base of a version that comes after a full one is held against what that one holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import write_safetensors
from version_models import write_steps
from weight_streams import read_model, read_stream

import ckdiff
from ckdiff.deltas.versions import holding
from ckdiff.errors import DeltaError


@pytest.fixture
def steps(tmp_path: Path) -> list[Path]:
    return write_steps(tmp_path, 3)


def with_another_bit(checkpoint: Path, name: str, out: Path) -> Path:
    """A checkpoint of which one bit of one tensor differs."""
    model = read_model(checkpoint)
    dtype, shape, data = model[name]
    model[name] = dtype, shape, data[:-1] + bytes([data[-1] ^ 0x40])
    out.mkdir()
    write_safetensors(out / "model.safetensors", model)
    return out


@pytest.mark.parametrize("checksum", ["xxh3-128", "adler32"])
@pytest.mark.parametrize("name", ["embed.weight", "layers.0.scale", "norm"])
def test_another_base_than_a_full_version(
    tmp_path: Path, steps: list[Path], checksum: str, name: str
) -> None:
    stream = tmp_path / "s"
    ckdiff.delta(steps[0], steps[1], stream, encoding="xor", full=True)
    other = with_another_bit(steps[1], name, tmp_path / "other")
    for tuned in (other, steps[2]):
        with pytest.raises(DeltaError, match=rf"{name} is not what weight_v000001 says"):
            ckdiff.delta(other, tuned, stream, encoding="xor", checksum=checksum)
    assert [path.name for path in stream.iterdir()] == ["weight_v000001"]
    ckdiff.delta(steps[1], steps[2], stream, encoding="overwrite", checksum=checksum)
    # what a delta has changed since is held against that, and the rest against the full version
    other = with_another_bit(steps[2], name, tmp_path / "later")
    with pytest.raises(DeltaError, match=rf"{name} is not what weight_v00000[12] says"):
        ckdiff.delta(other, steps[3], stream, encoding="xor", checksum=checksum)
    ckdiff.delta(steps[2], steps[3], stream, encoding="xor", checksum=checksum)
    assert read_stream({}, stream, 3) == read_model(steps[3])


def test_the_full_version_itself_as_the_base(
    tmp_path: Path, steps: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = tmp_path / "s"
    ckdiff.delta(steps[0], steps[1], stream, encoding="xor", full=True)

    def never(*given: object) -> dict[int, str]:
        raise AssertionError("it is not read to be compared with itself")

    monkeypatch.setattr(holding, "digests", never)
    ckdiff.delta(stream / "weight_v000001", steps[2], stream, encoding="xor")
    assert read_stream({}, stream, 2) == read_model(steps[2])
