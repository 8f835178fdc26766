"""Directories of torch.distributed.checkpoint: what torch loads of them, bytes for bytes."""

from __future__ import annotations

import pickle
import random
import tracemalloc
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from given_files import all_bytes, contents_of, of_torch, opened, watched
from hypothesis import given
from hypothesis import strategies as st
from sharded_state import Box, rows, saved, write_dcp

import ckdiff
from ckdiff.checkpoints.formats import dcp, picklebytes
from ckdiff.checkpoints.formats.dcpitems import LOOK, quick_look
from ckdiff.checkpoints.formats.dcprows import RowMachine
from ckdiff.checkpoints.formats.pickles import read_pickle
from ckdiff.errors import CheckpointError

torch = pytest.importorskip("torch")


def weights() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "model.embed.weight": torch.randn(11, 6).bfloat16(),
        "model.norm.weight": torch.randn(7),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "long": torch.arange(24).reshape(2, 3, 4),
        "flags": torch.tensor([True, False, True]),
    }


BOXES: dict[str, list[Box]] = {
    "model.embed.weight": rows((11, 6), 4),
    "model.norm.weight": rows((7,), 5),  # the last has no elements
    "long": [
        ((0, 0, 0), (2, 1, 4)), ((0, 1, 0), (1, 2, 2)), ((0, 1, 2), (1, 2, 2)),
        ((1, 1, 0), (1, 2, 4)),
    ],
}  # fmt: skip


def test_pieces_of_any_dimensions(tmp_path: Path) -> None:
    write_dcp(tmp_path, weights(), BOXES)
    with opened(dcp, tmp_path) as checkpoint:
        assert all_bytes(checkpoint) == of_torch(weights())
        pieces = checkpoint.contents.pieces
        assert {checkpoint.table.names[i]: len(p) for i, p in pieces.items()} == {
            "model.embed.weight": 4, "model.norm.weight": 4, "long": 4,
        }  # fmt: skip
        assert checkpoint.contents.notes == []
        assert not checkpoint.in_files


@pytest.mark.filterwarnings("ignore")
def test_what_torch_writes_by_itself_is_read(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as torch_dcp

    state = {"a": weights(), "b": torch.randn(4, 3).t()}
    torch_dcp.save({"model": state["a"], "optimizer": {"state": {"x": state["b"]}}, "epoch": 3},
                   checkpoint_id=tmp_path / "c", no_dist=True)  # fmt: skip
    with opened(dcp, tmp_path / "c") as checkpoint:
        assert all_bytes(checkpoint) == of_torch(weights())
        (note,) = checkpoint.contents.notes
        assert "under model" in note
    torch_dcp.save(state["a"] | {"turned": state["b"]}, checkpoint_id=tmp_path / "d", no_dist=True)
    with opened(dcp, tmp_path / "d") as checkpoint:
        assert all_bytes(checkpoint) == of_torch(weights() | {"turned": state["b"]})


@given(st.data())
def test_any_cuts_of_any_tensors(tmp_path_factory: Any, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("dcp")
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    dim = data.draw(st.integers(0, len(shape) - 1))
    boxes = rows(shape, data.draw(st.integers(1, 6)), dim)
    tensor = torch.arange(int(torch.tensor(shape).prod()), dtype=torch.float16).reshape(shape)
    write_dcp(folder, {"t": tensor}, {"t": boxes}, files=data.draw(st.integers(1, 3)))
    with opened(dcp, folder) as checkpoint:
        assert all_bytes(checkpoint) == of_torch({"t": tensor})


def test_a_diff_counts_what_changed(tmp_path: Path) -> None:
    base, tuned = weights(), weights()
    tuned["model.embed.weight"][5:9, 2] += 1
    tuned["long"][1, 2, 3] = 0
    write_dcp(tmp_path / "a", base, BOXES)
    write_dcp(tmp_path / "b", tuned, {"model.embed.weight": rows((11, 6), 3, 1)}, files=1)
    with opened(dcp, tmp_path / "a") as one, opened(dcp, tmp_path / "b") as other:
        found = ckdiff.diff(one, other)
    assert found.rules["exact"]["changed"] == 5


# which of the tensors are the model


def names_of(
    folder: Path, paths: Mapping[str, tuple[Any, ...]], key: str | None = None
) -> list[str]:
    write_dcp(folder, {name: torch.ones(2) for name in paths}, {}, paths=paths)
    return contents_of(dcp, folder, key).table.names


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        (("model/a.w", "optim/state/a.w/exp_avg"), ["a.w"]),
        (("app/model/w", "app/optim/state/0"), ["w"]),
        (("state_dict/w", "ema/w"), ["w"]),
        # flat names, as of Megatron and of trainers that keep the weights beside the rest
        (("w.a", "optimizer.state.exp_avg.w.a"), ["w.a"]),
        (("decoder.w", "chained_0.optimizer.state.x"), ["decoder.w"]),
        (("layers.0.w", "optimizer/state.layers.0.w.exp_avg"), ["layers.0.w"]),
        (("model.a", "lm_head"), ["model.a", "lm_head"]),
        (("optim_head.w",), ["optim_head.w"]),
        (("x/0/w", "x/1/w"), ["x.0.w", "x.1.w"]),
    ],
)
def test_only_the_weights_count(tmp_path: Path, keys: tuple[str, ...], wanted: list[str]) -> None:
    paths = {key.replace("/", "."): key.split("/") for key in keys}
    numbered = {n: tuple(int(p) if p.isdigit() else p for p in path) for n, path in paths.items()}
    assert names_of(tmp_path, numbered) == wanted


def test_a_key_chooses(tmp_path: Path) -> None:
    paths: dict[str, tuple[Any, ...]] = {
        "student.w": ("student", "w"),
        "teacher.v": ("teacher", "v"),
    }
    assert names_of(tmp_path, paths, "teacher") == ["v"]
    with pytest.raises(CheckpointError, match="--key"):
        contents_of(dcp, tmp_path, "nobody")


def test_a_checkpoint_of_nothing_but_an_optimizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="optimizer"):
        names_of(tmp_path, {"optim.state.w.exp_avg": ("optim", "state", "w", "exp_avg")})


# how items are written


def test_items_are_read_in_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp.ItemReader, "_opened", None)
    write_dcp(tmp_path, {"w": torch.randn(50, 40)}, {"w": rows((50, 40), 7)})
    with watched(tmp_path) as given:
        dcp.read_contents(given.files)
    assert given.longest <= LOOK


@pytest.mark.parametrize("size", [0, 1, 100, 250, 300, 500, 100_000])
@pytest.mark.parametrize("checksums", [True, False])
def test_a_look_finds_what_opening_finds(size: int, checksums: bool) -> None:
    from ckdiff.checkpoints.formats.torcharchive import open_torch_zip

    torch.serialization.set_crc32_options(checksums)
    try:
        raw = saved(torch.arange(size, dtype=torch.uint8))
    finally:
        torch.serialization.set_crc32_options(True)
    found = quick_look(raw[:LOOK], raw[-LOOK:], len(raw))
    whole = open_torch_zip(lambda offset, n: raw[offset : offset + n], len(raw), "f")
    assert found is not None
    member = whole.archive.members[f"{whole.prefix}/data/0"]
    assert (found[1].begin, found[1].size) == (member.begin, member.size)


@given(st.data())
def test_a_damaged_item_is_never_looked_at_as_another(data: st.DataObject) -> None:
    """Whatever a look accepts, opening accepts as well, and finds the same."""
    from ckdiff.checkpoints.formats.torcharchive import open_torch_zip, place

    raw = bytearray(saved(torch.arange(20, dtype=torch.int16)))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(raw[: len(raw) - data.draw(st.sampled_from([0, 0, 1, 30]))])
    found = quick_look(cut[:LOOK], cut[-LOOK:], len(cut))
    if found is None:
        return
    try:
        whole = open_torch_zip(lambda offset, n: cut[offset : offset + n], len(cut), "f")
    except CheckpointError:
        return  # checksums and such of what a look does not use
    assert found[1].begin == place(whole, whole.content, "t").begin


def unusual(folder: Path, raw: bytes) -> None:
    """Put other bytes at the place of the only item."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    def change(metadata: Any) -> None:
        (index,) = metadata.storage_data
        metadata.storage_data[index] = _StorageInfo("__0_0.distcp", 3, len(raw))

    write_dcp(folder, {"w": torch.arange(12.0).reshape(3, 4)}, {}, files=1, change=change)
    (folder / "__0_0.distcp").write_bytes(b"abc" + raw)


def test_items_that_are_written_otherwise_are_opened(tmp_path: Path) -> None:
    wanted = torch.arange(12.0).reshape(3, 4)
    import io
    import zipfile

    raw = saved(torch.nn.Parameter(wanted))
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(packed, "w") as new:
        for name in reversed(old.namelist()):
            new.writestr(name, old.read(name))
    for i, other in enumerate((raw, packed.getvalue(), saved(torch.arange(24.0)[12:] - 12))):
        if i == 2:
            other = saved(torch.arange(-12.0, 12.0)[12:].reshape(3, 4))
        unusual(tmp_path / str(i), other)
        with opened(dcp, tmp_path / str(i)) as checkpoint:
            assert all_bytes(checkpoint) == of_torch({"w": wanted})


@pytest.mark.parametrize(
    "content",
    [
        torch.arange(12.0),  # another shape
        torch.arange(12).reshape(3, 4),  # another dtype
        {"w": torch.arange(12.0).reshape(3, 4)},
        [1, 2],
        torch.arange(12.0).reshape(3, 4).to_sparse(),
    ],
)
def test_items_that_are_something_else(tmp_path: Path, content: Any) -> None:
    unusual(tmp_path, saved(content))
    with pytest.raises(CheckpointError, match="__0_0") as caught:
        contents_of(dcp, tmp_path)
    assert "\n" not in str(caught.value)


# hostile


def _shift(metadata: Any, **numbers: Any) -> None:
    import dataclasses

    index = next(iter(metadata.storage_data))
    info = metadata.storage_data[index]
    metadata.storage_data[index] = dataclasses.replace(info, **numbers)


def _chunk(metadata: Any, place: int, at: tuple[int, ...], extent: tuple[int, ...]) -> None:
    chunk = metadata.state_dict_metadata["w"].chunks[place]
    chunk.offsets, chunk.sizes = torch.Size(at), torch.Size(extent)


def _size(metadata: Any, *size: int) -> None:
    metadata.state_dict_metadata["w"].size = torch.Size(size)


def _same_bytes(metadata: Any) -> None:
    infos = list(metadata.storage_data.values())
    for index in metadata.storage_data:
        metadata.storage_data[index] = infos[0]


HOSTILE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "offset": (lambda m: _shift(m, offset=1 << 40), "bytes"),
    "negative": (lambda m: _shift(m, offset=-1), "bytes"),
    "length": (lambda m: _shift(m, length=1 << 62), "bytes"),
    "cut": (lambda m: _shift(m, length=700), "distcp"),
    "nothing": (lambda m: _shift(m, length=0), "bytes"),
    "text": (lambda m: _shift(m, length="9"), "stored"),
    "far": (lambda m: _shift(m, relative_path="../../etc/passwd"), "not there"),
    "absolute": (lambda m: _shift(m, relative_path="/etc/passwd"), "not there"),
    "other": (lambda m: _shift(m, relative_path="__9_0.distcp"), "not there"),
    "packed": (lambda m: _shift(m, transform_descriptors=["stream.zstd/1"]), "compressed"),
    "hole": (lambda m: m.state_dict_metadata["w"].chunks.pop(), "missing"),
    "overlap": (lambda m: _size(m, 3, 4) or _chunk(m, 1, (2, 0), (1, 4)), "beyond|where"),
    "same bytes": (_same_bytes, "same bytes"),
    "beyond": (lambda m: _size(m, 5, 4), "missing|beyond|goes on"),
    "huge": (lambda m: _size(m, 1 << 62, 4), "possible shape"),
    "overflow": (lambda m: _size(m, 1 << 33, 1 << 33), "possible shape"),
    "many": (lambda m: _size(m, 1 << 40, 4), "missing"),
    "sizes": (lambda m: _chunk(m, 0, (0, 0), (3, 4)), "distcp"),
    "dimensions": (lambda m: _chunk(m, 0, (0,), (2,)), "where|dimensions"),
    "unsaid": (lambda m: m.storage_data.clear(), "where"),
    "no pieces": (lambda m: setattr(m.state_dict_metadata["w"], "chunks", []), "missing"),
    "dtype": (lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", torch.int8), "I8"),
    "no dtype": (
        lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", 3),
        "possible shape",
    ),
    "a list": (lambda m: setattr(m, "state_dict_metadata", [1]), "state_dict_metadata"),
    "no storage": (lambda m: setattr(m, "storage_data", None), "storage_data"),
    "strange": (lambda m: m.state_dict_metadata.update({7: 7}), "not a tensor"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_metadata(tmp_path: Path, kind: str) -> None:
    change, match = HOSTILE[kind]
    tensors = {"w": torch.arange(16.0).reshape(4, 4)}
    write_dcp(tmp_path, tensors, {"w": rows((4, 4), 2)}, change=change)
    with pytest.raises(CheckpointError, match=match) as caught:
        contents_of(dcp, tmp_path)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x80\x04N.",
        b"PK",
        pickle.dumps({"a": 1}),
        b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00lstR.",
    ],
)
def test_what_is_no_metadata(tmp_path: Path, raw: bytes) -> None:  # fmt: skip
    write_dcp(tmp_path, {"w": torch.ones(3)}, {})
    (tmp_path / ".metadata").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        contents_of(dcp, tmp_path)


def many_pieces(count: int) -> bytes:
    """The metadata of ``count`` tensors of eight pieces each."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    listed, stored = dict[str, Any](), dict[Any, Any]()
    for t in range(count):
        name, chunks = f"model.layers.{t // 1000}.mlp.experts.{t % 1000}.down_proj.weight", []
        for r in range(8):
            chunks.append(ChunkStorageMetadata(torch.Size([16 * r, 32]), torch.Size([16, 32])))
            where = _StorageInfo(f"__{r}_0.distcp", t * 3000, 2000 + r)
            stored[MetadataIndex(name, torch.Size([16 * r, 32]), r)] = where
        whole, kind = torch.Size([128, 32]), TensorProperties(torch.bfloat16)
        listed[name] = TensorStorageMetadata(kind, whole, chunks)
    return pickle.dumps(Metadata(listed, None, stored))


def test_metadata_of_many_pieces() -> None:
    """Each piece has three records: they take less than six times what the file has."""
    raw = many_pieces(250)
    tracemalloc.start()
    found = read_pickle([raw], len(raw), "x", machine=RowMachine)
    took, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took < 6 * len(raw)
    chunk = found.field("state_dict_metadata").popitem()[1].field("chunks")[3]
    assert (chunk.field("offsets"), chunk.field("sizes")) == ((48, 32), (16, 32))
    index, info = found.field("storage_data").popitem()
    assert (index.field("fqn")[-11:], index.field("offset")) == ("proj.weight", (112, 32))
    assert (info.field("offset"), info.field("length")) == (249 * 3000, 2007)
    assert not info.field("transform_descriptors")


def test_hostile_metadata_take_no_more_than_their_length_explains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With an eighth of what any pickle may make, an eighth of the records comes as far."""
    monkeypatch.setattr(picklebytes, "_LEAST_MEMORY", 2 << 20)
    for begin, again in ((b"", b"}"), (b"}\x94", b"h\0"), (b"", b"K\x05\x85\x94"), (b"", b"]\x94")):
        raw = b"\x80\x04(" + begin + again * (1 << 16) + b"t."
        tracemalloc.start()
        with suppress(CheckpointError):
            read_pickle([raw], len(raw), "x", machine=RowMachine)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < (20 << 17) + 9 * len(raw)


def test_metadata_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp, "_LONGEST", 100)
    write_dcp(tmp_path, weights(), BOXES)
    with pytest.raises(CheckpointError, match="more than the 100"):
        contents_of(dcp, tmp_path)


def test_metadata_are_read_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dcp(tmp_path, weights(), BOXES)
    whole = contents_of(dcp, tmp_path)
    for size in (1, 7, 64, 1 << 12):
        monkeypatch.setattr(dcp, "_PART", size)
        assert contents_of(dcp, tmp_path).is_same(whole)


def test_mutations_are_refused_or_read(tmp_path: Path) -> None:
    """Nothing but CheckpointError ever leaves, and nothing large is read."""
    write_dcp(tmp_path, weights(), BOXES, paths={n: tuple(n.split(".", 1)) for n in weights()})
    noise = random.Random(3)
    for name in (".metadata", "__0_0.distcp"):
        raw = (tmp_path / name).read_bytes()
        for _ in range(150):
            bad = bytearray(raw)
            for _ in range(noise.randint(1, 4)):
                bad[noise.randrange(len(bad))] = noise.randrange(256)
            (tmp_path / name).write_bytes(
                bad[: noise.choice([len(bad), noise.randrange(len(bad))])]
            )
            try:
                with watched(tmp_path) as given:
                    found = dcp.read_contents(given.files)
            except CheckpointError:
                continue
            assert given.longest <= 1 << 20
            assert len(found.table) <= 6
        (tmp_path / name).write_bytes(raw)
