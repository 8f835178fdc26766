"""Which files are the model: each rule, for a directory and for a listing alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import ANY, PLACES, Files, S, T, index, some_files, tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckdiff.checkpoints.choosing import choice_of
from ckdiff.checkpoints.folders import Choice, Folder
from ckdiff.checkpoints.weightnames import is_training_state
from ckdiff.errors import CheckpointError

INDEX = "model.safetensors.index.json"
Place = Callable[[Path, Files], Folder]


@pytest.fixture(params=PLACES, ids=lambda place: place.__name__)
def place(request: pytest.FixtureRequest) -> Place:
    made: Place = request.param
    return made


def numbered(stem: str, count: int, suffix: str = ".safetensors") -> list[str]:
    return [f"{stem}-{i:05d}-of-{count:05d}{suffix}" for i in range(1, count + 1)]


def chosen(place: Place, root: Path, files: Files, path: str = "") -> Choice:
    return choice_of(place(root, files), path)


def refused(place: Place, root: Path, files: Files, *words: str, path: str = "") -> str:
    with pytest.raises(CheckpointError) as raised:
        chosen(place, root, files, path)
    line = raised.value.one_line()
    assert "\n" not in line
    assert len(line) < 1000
    for word in words:
        assert word in line
    return line


# -- rules 1, 2 and 3: paths and indexes -----------------------------------------------------------

TWO_MODELS: Files = {
    "model.safetensors": S,
    "other.safetensors": T,
    "a.safetensors": S,
    INDEX: index({"w": "a.safetensors"}),
    "x.fp16.safetensors.index.json": index({"v": "./other.safetensors"}),
    "x.safetensors.index.fp16.json": index({"v": "other.safetensors"}),
    "sub/b.safetensors": S,
    f"sub/{INDEX}": index({"w": "deep/c.safetensors", "v": "b.safetensors"}),
    "sub/deep/c.safetensors": S,
}


@pytest.mark.parametrize(
    ("path", "form", "folder", "names"),
    [
        ("model.safetensors", "safetensors", "", ["model.safetensors"]),
        ("other.safetensors", "torch", "", ["other.safetensors"]),
        (INDEX, "safetensors", "", ["a.safetensors"]),
        ("x.fp16.safetensors.index.json", "safetensors", "", ["other.safetensors"]),
        ("x.safetensors.index.fp16.json", "safetensors", "", ["other.safetensors"]),
        ("sub/b.safetensors", "safetensors", "sub", ["b.safetensors"]),
        ("sub", "safetensors", "sub", ["b.safetensors", "deep/c.safetensors"]),
        (f"sub/{INDEX}", "safetensors", "sub", ["b.safetensors", "deep/c.safetensors"]),
        ("sub/deep/", "safetensors", "sub/deep", ["c.safetensors"]),
    ],
)
def test_a_path_means_exactly_that(
    tmp_path: Path, place: Place, path: str, form: str, folder: str, names: list[str]
) -> None:
    choice = chosen(place, tmp_path / "f", TWO_MODELS, path)
    assert (choice.format, choice.folder, list(choice.names)) == (form, folder, names)
    assert choice.notes == ()


def test_an_index_in_a_directory(tmp_path: Path, place: Place) -> None:
    names = numbered("model", 2)
    weight_map = {"a": f"./{names[0]}", "b": names[1], "c": f"././{names[1]}"}
    files = some_files(*names, "extra.safetensors", "config.json", "pytorch_model.bin")
    choice = chosen(place, tmp_path / "f", {**files, INDEX: index(weight_map)})
    assert choice.format == "safetensors"
    assert list(choice.names) == names
    assert choice.index == INDEX
    assert choice.weight_map == {"a": names[0], "b": names[1], "c": names[1]}
    assert len(choice.index_digest) == 16
    (note,) = choice.notes
    assert "extra.safetensors" in note
    assert "pytorch_model" not in note


VARIANTS = {
    "model.safetensors.index.fp16.json": "model.fp16-00001-of-00001.safetensors",
    "model.fp16.safetensors.index.json": "model.fp16-00001-of-00001.safetensors",
    "model.safetensors.index.non_ema.json": "model.non_ema.safetensors",
    "consolidated.safetensors.index.json": "consolidated-00001-of-00001.safetensors",
    "adapter_model.safetensors.index.json": "adapter_model-00001-of-00001.safetensors",
}


@pytest.mark.parametrize("other", VARIANTS)
@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "weights"])
@pytest.mark.parametrize("how", ["index", "files", "no files of it"])
def test_an_index_beside_the_model(
    tmp_path: Path, place: Place, other: str, stem: str, how: str
) -> None:
    """A model counts before what lies beside it, whether it has an index or not."""
    other = other.replace("model.", f"{stem}.") if other.startswith("model") else other
    listed = VARIANTS.get(other, VARIANTS[other.replace(f"{stem}.", "model.")])
    listed = listed.replace("model.", f"{stem}.") if listed.startswith("model") else listed
    names = numbered(stem, 2)
    files = {**some_files(*names), other: index({"w": listed})}
    if how != "no files of it":
        files[listed] = S
    if how == "index":
        files[f"{stem}.safetensors.index.json"] = index({"w": names[0], "v": names[1]})
    choice = chosen(place, tmp_path / "f", files)
    assert list(choice.names) == names
    assert [listed in note for note in choice.notes] == [True] * (how != "no files of it")


@pytest.mark.parametrize("other", VARIANTS)
def test_an_index_that_is_alone_counts(tmp_path: Path, place: Place, other: str) -> None:
    choice = chosen(
        place, tmp_path / "f", {VARIANTS[other]: S, other: index({"w": VARIANTS[other]})}
    )
    assert (choice.index, choice.names) == (other, (VARIANTS[other],))


@pytest.mark.parametrize(
    "indexes",
    [
        ["a.safetensors.index.json", "b.safetensors.index.json"],
        ["a.safetensors.index.fp16.json", "a.safetensors.index.bf16.json"],
        ["a.fp16.safetensors.index.json", "consolidated.safetensors.index.json"],
        ["llama-3.1.safetensors.index.json", "llama-3.safetensors.index.json"],
    ],
)
def test_several_indexes(tmp_path: Path, place: Place, indexes: list[str]) -> None:
    files = {**some_files("x.safetensors"), **dict.fromkeys(indexes, index({"w": "x.safetensors"}))}
    refused(place, tmp_path / "f", files, "2 indexes", *indexes)


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        (INDEX, "model.safetensors"),
        ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"),
        ("model.safetensors.index.fp16.json", "model.fp16.safetensors"),
        ("model.fp16.safetensors.index.json", "model.fp16.safetensors"),
    ],
)
def test_a_twin_of_the_index(tmp_path: Path, place: Place, name: str, twin: str) -> None:
    files: Files = {"x-00001-of-00001.safetensors": S, twin: S}
    unlisted = {**files, name: index({"w": "x-00001-of-00001.safetensors"})}
    refused(place, tmp_path / "f", unlisted, f" {twin} ", f" {name},", "which does not list it")
    assert chosen(place, tmp_path / "f", unlisted, twin).names == (twin,)
    assert chosen(place, tmp_path / "f", unlisted, name).index == name
    choice = chosen(place, tmp_path / "g", {**files, name: index({"w": f"./{twin}"})})
    assert choice.names == (twin,)
    assert len(choice.notes) == 1


def test_listed_files_that_are_not_there(tmp_path: Path, place: Place) -> None:
    names = numbered("model", 3)
    files = {**some_files(names[1]), INDEX: index(dict(zip("abc", names, strict=True)))}
    refused(
        place,
        tmp_path / "f",
        files,
        INDEX,
        "3 files, and 2 of them are not there",
        names[0],
        f"1 is: {names[1]}",
    )
    files = {**some_files("model.safetensors"), INDEX: index({"w": names[0]})}
    refused(place, tmp_path / "g", files, INDEX, "one file", names[0], "lie model.safetensors")
    files = {INDEX: index({"w": "a/b/c.safetensors"})}
    refused(place, tmp_path / "h", files, "a/b/c.safetensors", "no others")
    refused(place, tmp_path / "h", files, "a/b/c.safetensors", path=INDEX)


@pytest.mark.parametrize(
    "name", ["../a", "/a", "a/../../b", "", "a//b", "x/", "..", ".", "./", "a\0b"]
)
def test_listed_files_outside(tmp_path: Path, place: Place, name: str) -> None:
    refused(place, tmp_path / "f", {INDEX: index({"w": name})}, "outside its directory")


@pytest.mark.parametrize(
    "raw",
    [b"", b"{}", b"[]", b"{", b'{"weight_map":{}}', b'{"weight_map":{"w":1}}', b"\xff",
     b'{"weight_map":{"w":"a","w":"b"}}', b'{"weight_map":{"w":"a"}}x', b"[" * 100_000],
)  # fmt: skip
def test_an_index_that_is_none(tmp_path: Path, place: Place, raw: bytes) -> None:
    refused(place, tmp_path / "f", {INDEX: raw, "model.safetensors": S}, INDEX)


def test_a_version_of_a_stream_is_no_checkpoint(tmp_path: Path, place: Place) -> None:
    files = {"model-00000-of-00001.safetensors": S}
    files[INDEX] = index({"w": "model-00000-of-00001.safetensors"}, delta_encoding="xor")
    refused(place, tmp_path / "weight_v000002", files, "only what changed", "ckdiff apply")
    full = {**files, INDEX: index({"w": "model-00000-of-00001.safetensors"}, version="000001")}
    assert chosen(place, tmp_path / "weight_v000001", full).index == INDEX
    stream = {f"weight_v000001/{name}": data for name, data in full.items()}
    refused(place, tmp_path / "s", stream, "stream", "ckdiff apply")


# -- rule 4: without an index ----------------------------------------------------------------------

ONE = "model.safetensors"


@pytest.mark.parametrize(
    ("counts", "passed"),
    [
        ([ONE], ["consolidated.safetensors"]),
        ([ONE], ["consolidated-00001-of-00002.safetensors"]),
        ([ONE], ["model.fp16.safetensors", "model.bf16.safetensors"]),
        ([ONE], numbered("model.fp16", 2)),
        ([ONE], ["model-00001-of-00002.fp16.safetensors"]),
        ([ONE], ["adapter_model.safetensors", "adapter_model.fp16.safetensors"]),
        ([ONE], ["pytorch_lora_weights.safetensors", "adapters.safetensors"]),
        ([ONE], ["weights.safetensors", *numbered("model", 2)]),
        (numbered("model", 3), ["consolidated.safetensors"]),
        (numbered("model", 3), numbered("model.fp16", 2)),
        (numbered("model", 3), ["model-00001-of-00003.non_ema.safetensors"]),
        (numbered("model", 3), ["model-00001-of-00002.safetensors", "head.safetensors"]),
        (numbered("shard-00001-model", 1), ["adapter_model.safetensors"]),
        (["x-0-of-2.safetensors", "x-1-of-2.safetensors"], ["x.8bit-0-of-9.safetensors"]),
        (["diffusion_pytorch_model.safetensors"], ["diffusion_pytorch_model.fp16.safetensors"]),
        (["model.fp16.safetensors"], []),
        (["model.fp16.safetensors"], ["adapter_model.safetensors"]),
        (["consolidated.safetensors"], []),
        (numbered("consolidated", 2), ["adapter_model.safetensors"]),
        (["a.safetensors", "b.safetensors"], ["a.ema.safetensors"]),
        (["language.safetensors", "vision.safetensors"], []),
        ([*numbered("language", 2), *numbered("vision", 2)], []),
        (["llama-3.1.safetensors", "llama-3.safetensors"], []),
        ([f"w.{i}-of-12.safetensors" for i in range(1, 13)], ["v.safetensors"]),
        ([f"w_{i:02d}-of-02.safetensors" for i in range(2)], ["consolidated.safetensors"]),
        (["adapter_model.safetensors"], []),
        (["adapter_model.safetensors"], ["adapter_model.fp16.safetensors"]),
        (numbered("adapter_model", 2), []),
    ],
)
def test_safetensors_without_an_index(
    tmp_path: Path, place: Place, counts: list[str], passed: list[str]
) -> None:
    others = ["config.json", "optimizer.pt", "training_args.bin", ".hidden.safetensors"]
    choice = chosen(place, tmp_path / "f", some_files(*passed, *reversed(counts), *others))
    assert (choice.format, choice.folder) == ("safetensors", "")
    assert sorted(choice.names) == sorted(counts)
    assert len(choice.notes) == bool(passed)
    for note in choice.notes:
        assert passed[0] in note


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (numbered("model", 4)[:2], ["2 of 4", "model-00003-of-00004.safetensors"]),
        (numbered("m", 9)[1:2], ["1 of 9", "m-00001-of-00009", "and 5 more"]),
        (["x.07-of-08.safetensors"], ["1 of 8", "x.01-of-08", "and 4 more"]),
        (["x-1-of-999999999.safetensors"], ["1 of 999,999,999", "x-2-of-999999999"]),
        (["x-5-of-2.safetensors", "x-1-of-2.safetensors"], ["x-2-of-2"]),
        (["x-0001-of-0000.safetensors"], ["of a numbered set"]),
        (["x-1-of-2.safetensors", "x-01-of-2.safetensors", "x-2-of-2.safetensors"], ["3 of 2"]),
        (numbered("adapter_model", 2)[:1], ["adapter_model-00002-of-00002"]),
        (numbered("pytorch_model", 3, ".bin")[1:], ["pytorch_model-00001-of-00003.bin"]),
    ],
)
def test_incomplete_sets(tmp_path: Path, place: Place, names: list[str], words: list[str]) -> None:
    refused(place, tmp_path / "f", some_files(*names), *words)


def piece(*names: str, **metadata: str) -> bytes:
    info = {name: {"saved_offsets": [0]} for name in names}
    return tensors(*names, metadata={**metadata, "DCP_SHARDING_INFO": json.dumps(info)})


@pytest.mark.parametrize("many", [1, 3000])
@pytest.mark.parametrize("before", [{}, {"a": "}" * 70_000}, {"a": '"' * 50_000}])
def test_pieces(tmp_path: Path, place: Place, many: int, before: dict[str, str]) -> None:
    tensor_names = [f"layers.{i}.weight" for i in range(many)]
    names = [f"shard-{i:05d}-model-00001-of-00001.safetensors" for i in (1, 2)]
    files = dict.fromkeys(names, piece(*tensor_names, **before))
    choice = chosen(place, tmp_path / "f", files)
    assert (choice.format, list(choice.names), choice.notes) == ("pieces", names, ())
    choice = chosen(place, tmp_path / "g", {**files, "adapter_model.safetensors": S})
    assert (choice.format, list(choice.names), len(choice.notes)) == ("pieces", names, 1)


def test_what_only_speaks_of_pieces(tmp_path: Path, place: Place) -> None:
    said = tensors("DCP_SHARDING_INFO", metadata={"a": "DCP_SHARDING_INFO"})
    broken = b"\xff" * 8 + b'{"__metadata__":{"DCP_SHARDING_INFO":"'
    for other in (said, broken, b"", b"\x40" + bytes(7) + b"DCP_SHARDING_INFO"):
        choice = chosen(place, tmp_path / "f", {"a.safetensors": said, "b.safetensors": other})
        assert choice.format == "safetensors"


TB = "pytorch_model.bin"


@pytest.mark.parametrize(
    ("form", "counts", "passed"),
    [
        ("torch", [TB], []),
        ("torch", [TB], ["pytorch_model.fp16.bin", *numbered("pytorch_model", 2, ".bin")]),
        ("torch", [TB], ["consolidated.00.pth"]),
        ("torch", numbered("pytorch_model", 2, ".bin"), ["x.pt"]),
        ("torch", ["a.pth.tar"], []),
        ("torch", ["last.ckpt"], []),
        ("torch", ["model.pt"], ["model.ema.pt"]),
        ("torch", ["model.pt"], ["consolidated.pt"]),
        ("torch", ["consolidated.00.pth"], []),
        ("torch", ["adapter_model.bin"], []),
        ("torch", ["pytorch_model_fsdp.bin"], []),
        ("torch", ["weights"], []),
        ("ranks", [f"model_world_size_11_rank_{i}.pt" for i in range(11)], []),
        ("ranks", ["model_world_size_1_rank_0.pt"], []),
        ("dcp", ["__0_0.distcp", "__1_0.distcp"], []),
    ],
)
def test_torch_files(
    tmp_path: Path, place: Place, form: str, counts: list[str], passed: list[str]
) -> None:
    state = [
        "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "rng_state_0.pth",
        "training_args.bin", "scaler.pt", "random_states_0.pkl", "sampler.bin", "config.json",
        "extra_state_world_size_11_rank_0.pt", "optim_world_size_11_rank_0.pt", "README.md",
        "vocab.txt", "custom_checkpoint_0.pkl", "lr_scheduler.pt", "dl_state_dict.bin",
    ]  # fmt: skip
    files = some_files(*passed, *reversed(counts), *state)
    files["tokenizer.model"] = b"\x0a\x0e"
    if form == "dcp":
        files[".metadata"] = b"\x80\x02"
    if "weights" in files:
        files["weights"] = T
    choice = chosen(place, tmp_path / "f", files)
    assert (choice.format, choice.folder, list(choice.names)) == (form, "", counts)
    assert choice.index == (".metadata" if form == "dcp" else None)
    assert len(choice.notes) == bool(passed)


def test_a_torch_index(tmp_path: Path, place: Place) -> None:
    names = numbered("pytorch_model", 2, ".bin")
    files = some_files(*names, "optimizer.bin", TB)
    files["pytorch_model.bin.index.json"] = index({"a": names[0], "b": names[1]})
    files["pytorch_model.bin.index.fp16.json"] = index({"a": "nothing.bin"})
    choice = chosen(place, tmp_path / "f", files)
    assert (choice.format, list(choice.names)) == ("torch", names)
    assert choice.index == "pytorch_model.bin.index.json"
    (note,) = choice.notes
    assert TB in note
    assert "optimizer" not in note
    assert chosen(place, tmp_path / "f", files, TB).names == (TB,)


@pytest.mark.parametrize("torch", [TB, "x.pt", "model_world_size_1_rank_0.pt"])
def test_safetensors_win_over_torch_files(tmp_path: Path, place: Place, torch: str) -> None:
    for name in ("model.safetensors", "x.safetensors", "consolidated.safetensors"):
        choice = chosen(place, tmp_path / name, some_files(torch, name))
        assert (choice.format, choice.names, choice.notes) == ("safetensors", (name,), ())
    choice = chosen(place, tmp_path / "a", some_files(torch, "adapter_model.safetensors"))
    assert choice.format in ("torch", "ranks")
    assert "adapter_model.safetensors" in choice.notes[0]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.pt", "b.pt"], ["2 torch files", "a.pt", "b.pt"]),
        (["consolidated.00.pth", "consolidated.01.pth"], ["2 torch files"]),
        ([f"model_world_size_4_rank_{r}.pt" for r in (0, 2)], ["2 ranks of 4", "rank_1.pt"]),
        ([f"model_world_size_{n}_rank_0.pt" for n in (1, 2)], ["several sharded runs"]),
        ([f"model_world_size_1_rank_{r}.pt" for r in (0, 3)], ["2 ranks of 1"]),
        (["model_world_size_999999999_rank_0.pt"], ["1 ranks of 999,999,999"]),
        (["optimizer.pt", "scheduler.pt"], ["training state"]),
        (["__0_0.distcp"], [".metadata"]),
        (["zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"], ["to_fp32"]),
        (["bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"], ["zero_to_fp32"]),
        (["latest", "zero_to_fp32.py", "global_step5/mp_rank_00_model_states.pt"], ["to_fp32"]),
        (["global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt"], ["DeepSpeed"]),
        (["model-Q4.gguf"], ["GGUF"]),
        (["tf_model.h5", "flax_model.msgpack", "config.json"], ["1 HDF5", "1 Flax"]),
        (["model.onnx"], ["ONNX"]),
        (["config.json"], ["no weights", "config.json"]),
        (["config.json", "model.safetensors.incomplete"], ["not finished", "download it again"]),
        (["zarr.json", "manifest.json", "masks/zarr.json"], ["mask store"]),
        ([".hidden.safetensors"], ["no weights"]),
    ],
)  # fmt: skip
def test_what_is_no_checkpoint(
    tmp_path: Path, place: Place, names: list[str], words: list[str]
) -> None:
    refused(place, tmp_path / "f", some_files(*names), *words)


def test_the_order_of_a_listing_means_nothing(tmp_path: Path) -> None:
    for names in (
        ["optimizer.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"],
        ["b.txt", "a.txt", "c.txt"],
        ["b.pt", "a.pt"],
        ["c-2/model.safetensors", "c-10/model.safetensors", "c-1/x.bin"],
        ["b.gguf", "a.onnx"],
        ["b.safetensors.index.json", "a.safetensors.index.json"],
        ["model_world_size_2_rank_0.pt", "model_world_size_1_rank_0.pt"],
    ):
        lines = {
            refused(PLACES[1], tmp_path, some_files(*order), "f")
            for order in (names, sorted(names), sorted(names, reverse=True))
        }
        assert len(lines) == 1, lines


def test_an_empty_directory(tmp_path: Path, place: Place) -> None:
    refused(place, tmp_path / "f", {}, "is an empty directory")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("optimizer.pt", T, ["training state"]),
        ("__0_0.distcp", T, ["give its directory"]),
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", T, ["is a part of a DeepSpeed", "to_fp32"]),
        ("model_world_size_2_rank_1.pt", T, ["one of 2 ranks", "all ranks"]),
        ("config.json", ANY, ["JSON"]),
        ("x.gguf", b"GGUF", ["GGUF"]),
        ("x.npz", b"PK\x03\x04" + bytes(22) + b"\x05\0\0\0a.npy", ["numpy"]),
        ("x.tar", bytes(257) + b"ustar", ["tar archive"]),
        ("x.msgpack", b"\x80", ["msgpack"]),
    ],
)
def test_files_that_are_no_checkpoint(
    tmp_path: Path, place: Place, name: str, data: bytes, words: list[str]
) -> None:
    refused(place, tmp_path / "f", {f"d/{name}": data}, *words, path=f"d/{name}")
    refused(place, tmp_path / "f", {f"d/{name}": data}, "does not exist", path="d/x")


@pytest.mark.parametrize("name", ["x.tar", "x.npz", "x", "x.h5", "x.safetensors", "x.bin"])
def test_a_file_is_what_is_in_it(tmp_path: Path, place: Place, name: str) -> None:
    assert chosen(place, tmp_path / "s", {name: S}, name).format == "safetensors"
    assert chosen(place, tmp_path / "t", {name: T}, name).format == "torch"


def test_words_of_training_state() -> None:
    for name in ("optimizer.pt", "optim.bin", "scheduler_1.bin", "random_states_7.pkl", "rng.pt"):
        assert is_training_state(name), name
    for name in ("model.pt", "optimus.pt", "schedule_free_model.pt", "scaled.bin", "last.ckpt"):
        assert not is_training_state(name), name


# -- rule 5: caches, pipelines, folders of checkpoints ---------------------------------------------


def cached(**snapshots: Files) -> dict[str, bytes]:
    files: dict[str, bytes] = {"blobs/abc": S}
    for commit, inside in snapshots.items():
        files |= {f"snapshots/{commit}/{name}": data for name, data in inside.items()}
    return files


def test_a_folder_of_the_hub_s_cache(tmp_path: Path, place: Place) -> None:
    root = tmp_path / "models--o--n"
    files = cached(c1={ONE: S}, c2={"x.safetensors": S})
    for main, folder in ((b"c1", "snapshots/c1"), (b"c2\n", "snapshots/c2")):
        choice = chosen(place, root, {**files, "refs/main": main})
        assert choice.folder == folder
    for i, main in enumerate([b"c3", b"../..", b"", b"\xff", b"x" * 5000]):
        refused(place, tmp_path / str(i), {**files, "refs/main": main}, "2 snapshots", "c1", "c2")
    refused(place, tmp_path / "none", files, "2 snapshots")
    for extra in ({}, {"refs/main": b"gone"}, {"refs/v1": b"c1"}):
        choice = chosen(place, tmp_path / f"{extra}"[:9], {**cached(c1={ONE: S}), **extra})
        assert (choice.folder, choice.names) == ("snapshots/c1", (ONE,))
    refused(place, tmp_path / "empty", {"blobs/a": S, "snapshots/x": b""}, "without any snapshot")
    whole = {f"models--o--n/{name}": data for name, data in cached(c1={ONE: S}).items()}
    refused(place, tmp_path / "hub", whole, "did you mean", "models--o--n")


COMPONENTS: dict[str, Any] = {
    "_class_name": "X", "unet": ["diffusers", "U"], "vae": ["diffusers", "V"],
    "scheduler": ["diffusers", "S"], "safety_checker": [None, None], "text_encoder_2": None,
    "force_zeros": True, "tokenizer": ["transformers", "T"],
}  # fmt: skip
PIPELINE: dict[str, bytes] = {
    "model_index.json": json.dumps(COMPONENTS).encode(),
    "unet/diffusion_pytorch_model.safetensors": S,
    "vae/diffusion_pytorch_model.safetensors": S,
    "scheduler/scheduler_config.json": ANY,
    "tokenizer/vocab.json": ANY,
}


def test_a_pipeline(tmp_path: Path, place: Place) -> None:
    choice = chosen(place, tmp_path / "f", PIPELINE)
    assert (choice.names, choice.notes) == ((), ())
    name = "diffusion_pytorch_model.safetensors"
    found = [(prefix, part.format, part.folder, part.names) for prefix, part in choice.parts]
    assert found == [(f"{n}/", "safetensors", n, (name,)) for n in ("unet", "vae")]
    assert chosen(place, tmp_path / "f", PIPELINE, "model_index.json") == choice
    assert chosen(place, tmp_path / "f", PIPELINE, "unet") == choice.parts[0][1]
    files = {f"snapshots/c1/{name}": data for name, data in PIPELINE.items()} | {"refs/main": b"c1"}
    parts = chosen(place, tmp_path / "g", files).parts
    assert [(prefix, part.folder) for prefix, part in parts] == [
        ("unet/", "snapshots/c1/unet"), ("vae/", "snapshots/c1/vae"),
    ]  # fmt: skip


def test_what_lies_in_and_beside_a_pipeline(tmp_path: Path, place: Place) -> None:
    files = PIPELINE | some_files(
        "v1-5-pruned.safetensors", "lora/x.safetensors", "safety_checker/model.safetensors",
        "vae/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors",
    )  # fmt: skip
    choice = chosen(place, tmp_path / "f", files)
    assert [prefix for prefix, _ in choice.parts] == ["unet/", "vae/"]
    assert len(choice.notes) == 2
    assert "fp16" in choice.notes[0]
    for name in ("v1-5-pruned.safetensors", "lora/", "safety_checker/"):
        assert name in choice.notes[1]
    files = {name: data for name, data in PIPELINE.items() if not name.startswith("vae")}
    (note,) = chosen(place, tmp_path / "g", files).notes
    assert "vae, which is not there" in note
    files = {**PIPELINE, "unet/model.safetensors.index.json": index({"w": "gone.safetensors"})}
    refused(place, tmp_path / "h", files, "gone.safetensors")


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"1", b'{"a":1}' + b" " * (1 << 20)],
)
def test_a_pipeline_that_is_none(tmp_path: Path, place: Place, raw: bytes) -> None:
    refused(place, tmp_path / "f", {**PIPELINE, "model_index.json": raw}, "model_index.json")


@pytest.mark.parametrize("key", ["..", "a/b", "", ".", "/", "unet/../.."])
def test_components_are_folders_right_here(tmp_path: Path, place: Place, key: str) -> None:
    said = {**COMPONENTS, key: ["a", "b"]}
    files = {**PIPELINE, "model_index.json": json.dumps(said).encode(), "a/b/x.safetensors": S}
    choice = chosen(place, tmp_path / "f", files)
    assert [prefix for prefix, _ in choice.parts] == ["unet/", "vae/"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([f"checkpoint-{n}/{ONE}" for n in (500, 1000)], ["-500, checkpoint-1000", "-1000?"]),
        ([f"checkpoint-500/{ONE}", "trainer_state.json"], ["did you mean", "f/checkpoint-500?"]),
        (["a/b/c/x.safetensors"], ["a/b/c?"]),
        (["global_step_5/actor/model_world_size_1_rank_0.pt"], ["global_step_5/actor?"]),
        (["pytorch_model_fsdp_0/.metadata", "optimizer.bin"], ["pytorch_model_fsdp_0?"]),
        (
            ["c-5/pytorch_model_fsdp_0/.metadata", "c-5/optimizer_0/.metadata", "c-5/state.json"],
            ["its folder does: c-5/pytorch_model_fsdp_0 (did"],
        ),
        (["optimizer_0/.metadata"], ["optimizer_0?"]),
        (["unet/x.safetensors", "vae/x.bin", ".git/x.safetensors"], ["unet, vae"]),
    ],
)  # fmt: skip
def test_folders_of_checkpoints(
    tmp_path: Path, place: Place, names: list[str], words: list[str]
) -> None:
    refused(place, tmp_path / "f", some_files(*names), *words)


def test_very_many_folders(tmp_path: Path) -> None:
    names = [f"{i}/{j}/x.json" for i in range(300) for j in range(2)]
    refused(PLACES[1], tmp_path, some_files(*names), "no weights")


# -- all of it at once -----------------------------------------------------------------------------

STEMS = ["model", "consolidated", "adapter_model", "model.fp16", "x", "x.ema", "pytorch_model"]
NAMES = [
    *(f"{stem}{suffix}" for stem in STEMS for suffix in (".safetensors", ".bin", ".pt")),
    *(name for stem in ("model", "model.fp16", "consolidated") for name in numbered(stem, 2)),
    *numbered("pytorch_model", 2, ".bin"),
    "optimizer.pt", "training_args.bin", ".metadata", "__0_0.distcp", "config.json",
    "model_world_size_1_rank_0.pt", "mp_rank_00_model_states.pt", "checkpoint-1/model.safetensors",
    "model_index.json", "unet/model.safetensors", "weight_v000001/model.safetensors",
]  # fmt: skip
INDEXES = [
    *(f"{stem}.safetensors.index.json" for stem in STEMS),
    "model.safetensors.index.fp16.json", "pytorch_model.bin.index.json",
]  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    names=st.lists(st.sampled_from(NAMES), unique=True, max_size=8),
    indexes=st.dictionaries(
        st.sampled_from(INDEXES),
        st.lists(st.sampled_from(NAMES), min_size=1, max_size=3),
        max_size=2,
    ),
    data=st.data(),
)
def test_never_two_models_and_the_same_in_any_order(
    tmp_path: Path, names: list[str], indexes: dict[str, list[str]], data: st.DataObject
) -> None:
    files = some_files(*names)
    for name, listed in indexes.items():
        files[name] = index({str(i): one for i, one in enumerate(listed)})
    if "model_index.json" in files:
        files["model_index.json"] = json.dumps(COMPONENTS).encode()

    def outcome(order: list[str]) -> Choice | str:
        try:
            return chosen(PLACES[1], tmp_path, {name: files[name] for name in order})
        except CheckpointError as error:
            return error.one_line()

    first = outcome(sorted(files))
    assert outcome(data.draw(st.permutations(sorted(files)))) == first
    if isinstance(first, str):
        return
    for choice in [first, *(part for _, part in first.parts)]:
        paths = [f"{choice.folder}/{name}".lstrip("/") for name in choice.names]
        assert set(paths) <= set(files)
        assert not any(is_training_state(name) for name in choice.names if not choice.index)
        if choice.weight_map is None:
            never_two(choice.names)
    if not first.parts and first.index is None and first.format == "safetensors":
        passed = {n for n in files if n.endswith(".safetensors") and "/" not in n} - {*first.names}
        assert bool(first.notes) == bool(passed)


def never_two(names: tuple[str, ...]) -> None:
    """A model's twin, its variant and its adapter are not part of it."""
    stems = {name.partition("-0000")[0].removesuffix(".safetensors") for name in names}
    for one in stems:
        assert not any(other.startswith(f"{one}.") for other in stems)
    for alone in ("consolidated", "adapter_model", "model"):
        assert alone not in stems or len(stems) == 1
