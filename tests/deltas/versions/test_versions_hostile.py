"""Streams that are damaged, or were never right: one line, and nothing is written."""

from __future__ import annotations

import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import weight_streams
import zstandard
from support import Tensor, write_raw
from weight_models import save, stepped
from weight_streams import DIGESTS, read_model, write_shard, write_stream_index

from ckdiff.deltas.apply import apply
from ckdiff.deltas.versions.applying import apply_anew
from ckdiff.deltas.versions.checking import check_stream
from ckdiff.deltas.versions.form import parse_index, shard_numbers, version_number
from ckdiff.deltas.versions.given import STREAM, kind_of
from ckdiff.deltas.versions.writing import write_version
from ckdiff.errors import BudgetError, CkdiffError, DeltaError, UsageError
from ckdiff.sync import follow

NAMES = ("w", "v", "s")
MODEL: dict[str, Tensor] = {
    "w": ("U8", (5000,), np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()),
    "v": ("BF16", (40, 2), bytes(range(160))),
    "s": ("F32", (), b"abcd"),
}
STEPS = [MODEL, stepped(MODEL, 1), stepped(stepped(MODEL, 1), 2), stepped(MODEL, 3)]
INDEX = "model.safetensors.index.json"
SHARD = "model-00000-of-00001.safetensors"


def compressed(payload: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(level=1, **options).compress(payload)


def exclusive(name: str = "w") -> bytes:
    one, other = (np.frombuffer(STEPS[i][name][2], np.uint8) for i in (0, 1))
    return (one ^ other).tobytes()


def digest(name: str = "w", step: int = 1) -> str:
    return DIGESTS["xxh3-128"](STEPS[step][name][2])


def overwriting(places: list[int], values: bytes, count: int | None = None) -> bytes:
    head = np.array([len(places) if count is None else count], "<u4").tobytes()
    return head + np.array(places, "<u4").tobytes() + values


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("base") / "base", MODEL)


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    """Three versions."""
    for i in range(1, 4):
        weight_streams.write_version(tmp_path / "s", i, STEPS[i - 1], STEPS[i])
    return tmp_path / "s"


def change_index(folder: Path, **metadata: Any) -> None:
    """Put values into the metadata of an index; None takes a key out."""
    path = folder / INDEX
    found = json.loads(path.read_text())
    found["metadata"] |= metadata
    found["metadata"] = {
        key: value for key, value in found["metadata"].items() if value is not None
    }
    path.write_text(json.dumps(found))


def only(
    frame: bytes, *, encoding: str = "xor", said: str | None = None, name: str = "w"
) -> Callable[[Path], None]:
    """The second version holds this frame and no other."""

    def change(stream: Path) -> None:
        folder = stream / "weight_v000001"
        write_shard(folder / SHARD, [(name, frame, digest() if said is None else said)])
        metadata = json.loads((folder / INDEX).read_text())["metadata"]
        write_stream_index(folder, metadata | {"delta_encoding": encoding}, {name: SHARD})

    return change


def indexed(**metadata: Any) -> Callable[[Path], None]:
    return lambda stream: change_index(stream / "weight_v000002", **metadata)


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return lambda stream: (stream / "weight_v000002" / old).rename(stream / "weight_v000002" / new)


def replaced(old: bytes, new: bytes, file: str = SHARD) -> Callable[[Path], None]:
    def change(stream: Path) -> None:
        path = stream / "weight_v000002" / file
        raw = path.read_bytes()
        assert old in raw
        path.write_bytes(raw.replace(old, new, 1))

    return change


def reheaded(old: bytes, new: bytes) -> Callable[[Path], None]:
    """The same in a shard's header, which gets another length."""

    def change(stream: Path) -> None:
        path = stream / "weight_v000002" / SHARD
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        write_raw(path, raw[8:end].replace(old, new), raw[end:])

    return change


def added(name: str) -> Callable[[Path], None]:
    return lambda stream: write_raw(stream / "weight_v000002" / name, {})  # type: ignore[func-returns-value]


XOR = exclusive()
ALL = list(range(5000))
NEW = STEPS[1]["w"][2]
GIANT, HEAD = b"\x28\xb5\x2f\xfd\x80\xff", b"\x28\xb5\x2f\xfd\x60"  # how frames begin

#: what is done to a stream, and a word that the message has
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link is missing": (lambda s: shutil.rmtree(s / "weight_v000002"), "weight_v000002"),
    "the first is missing": (lambda s: shutil.rmtree(s / "weight_v000001"), "weight_v000001"),
    "a cycle": (indexed(base_version="000003"), "not before"),
    "its own base": (indexed(base_version="000002"), "not before"),
    "a base that is not there": (
        lambda s: change_index(s / "weight_v000003", base_version="000000"), "digest"
    ),
    "another number than its directory": (indexed(version="000009"), "version 9"),
    "a number that is none": (indexed(version="7a"), "not a number"),
    "a number of words": (indexed(version=2), "version"),
    "no checksum": (indexed(checksum_format=None), "checksum_format"),
    "an unknown checksum": (indexed(checksum_format="md5"), "md5"),
    "another checksum": (indexed(checksum_format="adler32"), "adler32 digest"),
    "an unknown encoding": (indexed(delta_encoding="swap"), "swap"),
    "another encoding": (indexed(delta_encoding="overwrite"), "positions and values"),
    "an unknown compression": (indexed(compression_format="lz4"), "lz4"),
    "no index": (lambda s: (s / "weight_v000002" / INDEX).unlink(), "incomplete"),
    "an index that is no JSON": (
        lambda s: (s / "weight_v000002" / INDEX).write_text("{"), "byte"
    ),
    "an index with a key twice": (
        replaced(b'"metadata"', b'"metadata": {}, "metadata"', INDEX), "duplicate"
    ),
    "no shard": (lambda s: (s / "weight_v000002" / SHARD).unlink(), SHARD),
    "a shard of another number": (renamed(SHARD, "model-00001-of-00001.safetensors"), "gaps"),
    "a shard of another name": (renamed(SHARD, "model.safetensors"), "model.safetensors"),
    "a shard too many": (added("model-00001-of-00002.safetensors"), "gaps"),
    "another safetensors file": (added("extra.safetensors"), "extra.safetensors"),
    "a tensor that the index lacks": (replaced(b'"v": "model', b'"x": "model', INDEX), "v"),
    "a tensor that the shard lacks": (
        replaced(b'"weight_map": {', b'"weight_map": {"x": "' + SHARD.encode() + b'", ', INDEX), "x"
    ),
    "a shard that is cut": (
        lambda s: (s / "weight_v000002" / SHARD).write_bytes(b"\x02\0\0\0\0\0\0\0{"), "header"
    ),
    "no digests": (replaced(b'"__metadata__"', b'"__metadat___"'), "__metadat___"),
    "a digest that is none": (replaced(digest("w", 2).encode(), b"x" * 32), "digest"),
    "a digest of something else": (replaced(digest("w", 2).encode(), b"0" * 32), "another digest"),
    "frames that are no bytes": (replaced(b'"U8"', b'"I8"'), "vector"),
    "frames of two dimensions": (reheaded(b'"shape": [', b'"shape": [1, '), "vector"),
    "a tensor that the base lacks": (only(compressed(XOR), name="new"), "does not have"),
    "a frame that is none": (only(b"nothing of the kind"), "zstd"),
    "a frame that is empty": (only(b""), "zstd"),
    "two frames": (only(compressed(XOR) + compressed(b"")), "after its zstd frame"),
    "a frame and a byte": (only(compressed(XOR) + b"\0"), "after its zstd frame"),
    "half a frame": (only(compressed(XOR)[:-9]), "zstd frame"),
    "a frame without its size": (only(compressed(XOR, write_content_size=False)), "how much"),
    "a frame of another size": (only(compressed(XOR[:-1])), "holds 4,999"),
    "a frame of a larger size": (only(compressed(XOR + b"\0")), "holds 5,001"),
    "a frame of a giant size": (
        only(b"\x28\xb5\x2f\xfd\xe0" + (1 << 60).to_bytes(8, "little")), "to be decoded"
    ),
    "a frame of a giant window": (
        only(GIANT + (5000).to_bytes(4, "little") + b"\x01\0\0"), "to be decoded"
    ),
    "a frame that says too much": (
        only(HEAD + (5000 - 256).to_bytes(2, "little") + b"\x01\0\0"), "zstd frame"
    ),
    "a frame of another tensor": (only(compressed(bytes(5000))), "another digest"),
    "positions past the end": (
        only(compressed(overwriting([5000], b"x")), encoding="overwrite"), "beyond"
    ),
    "positions twice": (
        only(compressed(overwriting([7, 7], b"xx")), encoding="overwrite"), "twice"
    ),
    "positions twice, apart": (
        only(compressed(overwriting([7, 3, 7], b"xxx")), encoding="overwrite"), "twice"
    ),
    "more positions than bytes": (
        only(compressed(overwriting([*ALL, 5000], NEW + b"x")), encoding="overwrite"), "5,001"
    ),
    "a count that is too small": (
        only(compressed(overwriting([1, 2], b"xx", 1)), encoding="overwrite"), "not hold as many"
    ),
    "a count that is too large": (
        only(compressed(overwriting([1, 2], b"xx", 1 << 31)), encoding="overwrite"),
        "not hold as many",
    ),
    "half a value": (
        only(compressed(overwriting([1, 2], b"x")), encoding="overwrite"), "positions and values"
    ),
    "no count": (only(compressed(b"\0\0"), encoding="overwrite"), "positions and values"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str, stream: Path, base: Path, tmp_path: Path) -> None:
    change, word = WRONG[name]
    change(stream)
    with pytest.raises(DeltaError, match=word) as error:
        apply_anew(base, stream, tmp_path / "out")
    assert "\n" not in error.value.one_line()
    assert "weight_v0" in error.value.message or "stream" in error.value.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_positions_in_any_order_are_read(stream: Path, base: Path, tmp_path: Path) -> None:
    order = random.Random(1).sample(ALL, len(ALL))
    payload = overwriting(order, bytes(NEW[i] for i in order))
    only(compressed(payload), encoding="overwrite")(stream)
    apply_anew(base, stream, tmp_path / "out", target=1)
    assert read_model(tmp_path / "out")["w"] == STEPS[1]["w"]


def test_digests_as_others_write_them(base: Path, tmp_path: Path) -> None:
    """Upper case, and without leading zeros."""
    folder = weight_streams.write_version(tmp_path / "s", 1, MODEL, STEPS[1], checksum="adler32")
    path = folder / SHARD
    raw = path.read_bytes()
    short = DIGESTS["adler32"](STEPS[1]["s"][2])
    assert short.startswith("0")
    raw = raw.replace(f'"{short}"'.encode(), f'"{short.lstrip("0").upper()}"'.encode().ljust(10))
    path.write_bytes(raw)
    apply_anew(base, tmp_path / "s", tmp_path / "out")
    assert read_model(tmp_path / "out") == STEPS[1]


@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_random_damage_is_an_error_or_does_no_harm(
    encoding: str, base: Path, tmp_path: Path
) -> None:
    for i in (1, 2):
        weight_streams.write_version(
            tmp_path / "s", i, STEPS[i - 1], STEPS[i], encoding=encoding, shards=2
        )
    files = sorted((tmp_path / "s").rglob("*.*"))
    dice, refused = random.Random(7), 0
    for _ in range(150):
        path = dice.choice([file for file in files if file.is_file()])
        raw = path.read_bytes()
        damaged = bytearray(raw)
        for _ in range(dice.randint(1, 3)):
            damaged[dice.randrange(len(raw))] = dice.randrange(256)
        if dice.random() < 0.1:
            damaged = damaged[: dice.randrange(len(raw))]
        path.write_bytes(damaged)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        said = _refused(base, tmp_path)
        refused += said is not None
        assert said is None or "\n" not in said
        path.write_bytes(raw)
    assert refused > 75


def _refused(base: Path, folder: Path) -> str | None:
    """What is said of a stream; None where its newest version is what it was."""
    try:
        apply_anew(base, folder / "s", folder / "out")
    except CkdiffError as error:
        return "an\noutput" if (folder / "out").exists() else error.one_line()
    assert read_model(folder / "out") == STEPS[2]
    return None


def test_a_frame_that_grows_takes_no_memory(base: Path, tmp_path: Path) -> None:
    """A GiB of zeros in a few bytes, where four are allowed: never decoded at once."""
    bomb = b"\x28\xb5\x2f\xfd\x20\x04" + (b"\x02\0\x10\0") * 8192 + b"\x01\0\0"
    folder = weight_streams.write_version(tmp_path / "s", 1, MODEL, STEPS[1])
    write_shard(folder / SHARD, [("s", bomb, digest("s"))])
    metadata = json.loads((folder / INDEX).read_text())["metadata"]
    write_stream_index(folder, metadata, {"s": SHARD})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DeltaError, match="zstd frame"):
        apply_anew(base, tmp_path / "s", tmp_path / "out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (64 << 10)


def test_tables_that_are_too_large_are_refused(base: Path, tmp_path: Path) -> None:
    folder = weight_streams.write_version(tmp_path / "s", 1, MODEL, STEPS[1])
    many = {f"tensor.{i:07d}": SHARD for i in range(600_000)}
    metadata = json.loads((folder / INDEX).read_text())["metadata"]
    write_stream_index(folder, metadata, many)
    with pytest.raises(BudgetError, match="declares tables"):
        apply_anew(base, tmp_path / "s", tmp_path / "out", memory="160MiB")


def test_a_damaged_newest_version_is_not_followed(stream: Path, base: Path, tmp_path: Path) -> None:
    save(tmp_path / "tuned", STEPS[2])
    save(tmp_path / "last", STEPS[3])
    replaced(b'"U8"', b'"I8"')(stream)
    with pytest.raises(DeltaError, match="vector"):
        write_version(tmp_path / "last", tmp_path / "tuned", stream)
    assert len(list(stream.iterdir())) == 3


def test_targets(stream: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match="has no weight_v000004"):
        apply_anew(base, stream, tmp_path / "out", target=4)
    with pytest.raises(DeltaError, match="newer"):
        apply_anew(base, stream, tmp_path / "out", target=1, base_version=2)
    with pytest.raises(DeltaError, match="another digest"):
        apply_anew(base, stream, tmp_path / "out", base_version=1)
    with pytest.raises(DeltaError, match="look into"):
        apply_anew(base, tmp_path / "nowhere", tmp_path / "out")


def test_names() -> None:
    assert version_number("weight_v000007") == 7
    assert version_number("weight_v1234567") == 1234567
    for name in ("weight_v000000", "weight_v7", "weight_v0000007", "weight_v000007x", "v000007"):
        assert version_number(name) is None
    assert shard_numbers("model-00001-of-00002.safetensors") == (1, 2)
    for name in (
        "model-1-of-2.safetensors",
        "model-000001-of-00002.safetensors",
        "model.safetensors",
    ):
        assert shard_numbers(name) is None
    assert parse_index(b'{"weight_map": {"a": "b"}}', "x").said is None


@pytest.mark.parametrize("name", ["weight_v000004.tmp", "weight_v000003_old", "latest", "log.txt"])
def test_what_lies_beside_versions_is_passed_over(name: str, stream: Path, base: Path) -> None:
    (stream / name).mkdir()
    assert kind_of(str(stream)) == STREAM
    apply_anew(base, stream, stream.parent / "out")
    assert read_model(stream.parent / "out") == STEPS[3]
    with pytest.raises(DeltaError, match=r"is not the name of a version|is not a stream"):
        write_version(stream.parent / "out", stream.parent / "out", stream)


@pytest.mark.parametrize("name", ["weight_v00004", "weight_v0000004", "weight_v00000\u0664"])
def test_a_version_with_other_digits_is_not_passed_over(
    name: str, stream: Path, base: Path
) -> None:
    (stream / name).mkdir()
    with pytest.raises(DeltaError, match="is not the name of a version"):
        apply_anew(base, stream, stream.parent / "out")


def test_versions_beside_weights_are_no_stream(stream: Path, tmp_path: Path) -> None:
    both = save(tmp_path / "both", MODEL)
    for version in stream.iterdir():
        version.rename(both / version.name)
    assert kind_of(str(both)) is None
    with pytest.raises(CkdiffError, match="is a checkpoint, not a delta"):
        apply(both, both, tmp_path / "out")


@pytest.mark.parametrize("target", ["2", "000002", 2.0, -1, 10**9])
def test_a_version_that_is_no_number(target: Any, stream: Path, base: Path, tmp_path: Path) -> None:
    local = shutil.copytree(base, tmp_path / "local")
    words = "target must be a whole number|a version is a number from 0"
    for call in (
        lambda: follow(local, stream, target),
        lambda: apply(base, stream, tmp_path / "out", target=target),
        lambda: apply(base, stream, tmp_path / "out", base_version=target),
        lambda: check_stream(stream, base=base, target=target),
    ):
        with pytest.raises(UsageError, match=words.replace("target", "(target|base_version)")):
            call()
    assert read_model(local) == MODEL
