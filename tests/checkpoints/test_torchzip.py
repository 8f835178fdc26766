"""Torch files against torch itself: names, dtypes, shapes, bytes; and which tensors are taken."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_files
from mask_files import Entry, mapping, pickled, tensor, torch_bytes, zip_bytes
from safetensors.torch import save_file
from torch_files import assert_same, read, saved

import ckdiff
from ckdiff.checkpoints.formats.torchzip import is_torch_zip
from ckdiff.errors import CheckpointError

W = torch.arange(6, dtype=torch.float32)
ROOT = Path(__file__).parents[2]


def refused(raw: bytes, key: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(raw, key)
    return caught.value.one_line()


# -- what is read is what torch reads --------------------------------------------------------------


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_dtype_and_view(protocol: int) -> None:
    raw = saved(torch_files.state_dict(), pickle_protocol=protocol)
    loaded = torch.load(io.BytesIO(raw), weights_only=protocol == 2)
    table = assert_same(raw, loaded)
    assert table.notes == []
    assert table.strides[table.names.index("matrix")] is None
    assert table.strides[table.names.index("transposed")] == (1, 6)
    places = dict(zip(table.names, table.begins.tolist(), strict=True))
    assert places["matrix"] == places["same"] == places["part"] - 20


@pytest.mark.parametrize("protocol", [1, 2, 4, 5])
def test_a_module_pickled_whole(protocol: int) -> None:
    model = torch_files.module()
    wanted = model.state_dict()
    assert "passing" not in wanted
    assert "2.0.weight" in wanted  # of a module that is there twice
    assert_same(saved(model, pickle_protocol=protocol), wanted)
    wrapped = torch.nn.DataParallel(model)
    assert_same(saved({"epoch": 1, "net": wrapped}), wrapped.state_dict())


@pytest.mark.parametrize("protocol", [1, 2, 4, 5])
def test_weights_beside_the_rest_of_a_training(protocol: int) -> None:
    state = torch_files.training_state()
    table = assert_same(saved(state, pickle_protocol=protocol), state["state_dict"])
    assert table.key == "state_dict"
    assert table.notes == ["f.pt: the weights under state_dict are compared"]


class Attributes(torch.nn.Module):
    """A module with a tensor that is no part of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 3)
        self.loose = torch.ones(4)
        self.own = torch.nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.loose.sum() + self.own.sum()


@pytest.mark.parametrize("model", [torch_files.module(), Attributes()])
def test_torchscript(model: Any) -> None:
    raw = torch_files.scripted(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loaded = torch.jit.load(io.BytesIO(raw)).state_dict()
    table = read(raw)
    assert sorted(table.names) == sorted(loaded)
    for place, name in enumerate(table.names):
        data = torch_files.packed_bytes(raw, table, place)
        assert data == loaded[name].contiguous().numpy().tobytes()


def test_other_ways_of_saving() -> None:
    raw = saved({"w": W})
    assert_same(raw, {"w": W})
    torch.serialization.set_crc32_options(False)
    try:
        assert_same(saved({"w": W}), {"w": W})
    finally:
        torch.serialization.set_crc32_options(True)
    tagged = W.clone()
    tagged.note = "mine"  # type: ignore[attr-defined]
    assert_same(saved({"w": tagged}), {"w": W})
    unordered = OrderedDict(w=W)
    unordered._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    assert_same(saved(unordered), {"w": W})


def test_tensors_without_names() -> None:
    assert_same(saved(W), {"0": W})
    assert_same(saved([W, W[1:]]), {"0": W, "1": W[1:]})
    assert_same(saved((7, {"w": W})), {"w": W})


def test_a_dtensor_that_is_whole() -> None:
    """Written by hand, as a process group is not needed for it."""
    local = tensor("0", 4, [2, 2], storage="FloatStorage")

    def made(rows: int, kind: bytes) -> bytes:
        spec = (
            b"ctorch.distributed.tensor._dtensor_spec\nDTensorSpec\n)\x81"
            + mapping({"placements": b"ctorch.distributed.tensor.placement_types\n" + kind
                       + b"\n)\x81\x85"}) + b"b"
        )  # fmt: skip
        size = b"K" + bytes([rows]) + b"K\2\x86"
        args = b"(ctorch.distributed.tensor\nDTensor\nctorch\nfloat32\n" + size + size + b"K\0t"
        state = mapping({"_local_tensor": local, "_spec": spec})
        word = b"ctorch._utils\n_rebuild_wrapper_subclass\n"
        of_type = b"ctorch._tensor\n_rebuild_from_type_v2\n("
        return of_type + word + b"ctorch.distributed.tensor\nDTensor\n" + args + state + b"tR"

    def file(rows: int, kind: bytes) -> bytes:
        return torch_bytes(pickled(mapping({"w": made(rows, kind)})), {"0": bytes(range(16))})

    assert read(file(2, b"Replicate")).shapes == [(2, 2)]
    assert read(file(2, b"Shard")).names == ["w"]
    assert "a shard of a DTensor" in refused(file(4, b"Shard"))
    assert "files of all ranks" in refused(file(4, b"Shard"))
    assert "a shard of a DTensor" in refused(file(2, b"Partial"))


# -- which tensors are taken -----------------------------------------------------------------------

OPTIMIZER = {"state": {0: {"exp_avg": W, "step": W[0]}}, "param_groups": [{"lr": 1}]}
SD = {"l.0.weight": W, "l.0.bias": W[:2], "head": W}
NAMES = list(SD)
TAKEN: dict[str, tuple[Any, str, list[str]]] = {
    "flat": ({"a.w": W, "b": W}, "", ["a.w", "b"]),
    "beside plain values": ({"w": W, "epoch": 3, "_metadata": {"v": W}}, "", ["w"]),
    "extra state": ({"w": W, "l._extra_state": {"scale": W}}, "", ["w"]),
    "extra state in tensors": ({"w": W, "l._extra_state": W}, "", ["w", "l._extra_state"]),
    "by a known name": ({"loss": W, "state_dict": {"w": W}}, "state_dict", ["w"]),
    "two known names": ({"model": {"state_dict": {"w": W}, "args": {"x": W}}},
                        "model.state_dict", ["w"]),
    "a chain": ({"model": {"state_dict": {"w": W}}}, "model.state_dict", ["w"]),
    "before averages": ({"ema": {"w": W}, "model_ema": {"w": W}, "net": {"v": W}}, "net", ["v"]),
    "only averages": ({"ema": {"w": W}, "epoch": 1}, "ema", ["w"]),
    "averages beside": ({"w": W, "ema": {"w": W}}, "", ["w"]),
    "any name": ({"generator": {"w": W}, "epoch": 1}, "generator", ["w"]),
    "nested modules": ({"encoder": {"w": W}, "decoder": {"l": {"w": W}}}, "",
                       ["encoder.w", "decoder.l.w"]),
    "nested under a name": ({"model": {"net": {"w": W}, "head": {"w": W}}, "epoch": 1}, "model",
                            ["net.w", "head.w"]),
    "layers": ({"layers": {"0": {"w": W}, "1": {"w": W}}, "epoch": 1}, "layers", ["0.w", "1.w"]),
    "a tree": ({"layers": {"0": {"w": W}}, "head": {"w": W}}, "", ["layers.0.w", "head.w"]),
    "a tree under a name": ({"model": {"layers": {"0": {"w": W}, "1": {"w": W}}}}, "model",
                            ["layers.0.w", "layers.1.w"]),
    "models under a name": ({"model": {"a": SD, "b": {"w": W}}, "c": {"w": W}}, "model",
                            [*(f"a.{name}" for name in NAMES), "b.w"]),
    "beside an optimizer": ({"optimizer": OPTIMIZER, "weights": {"w": W}}, "weights", ["w"]),
    "beside an unnamed optimizer": ({"thing": OPTIMIZER, "x": {"w": W}}, "x", ["w"]),
    "beside settings": ({"hyper_parameters": {"w": W}, "lr_schedulers": [{"w": W}],
                         "callbacks": {"ema": {"w": W}}, "x": {"w": W}}, "x", ["w"]),
    "in a list": ([{"epoch": 1}, {"w": W}], "1", ["w"]),
    "in a trainer": ({"trainer": {"model": SD}, "epoch": 3}, "trainer.model", NAMES),
    "in a trainer alone": ({"trainer": {"model": SD}}, "trainer.model", NAMES),
    "in a trainer by any name": ({"trainer": {"best": SD, "step": 3}}, "trainer.best", NAMES),
    "in a trainer beside an optimizer": ({"trainer": {"model": SD, "optimizer": OPTIMIZER},
                                          "optimizer": OPTIMIZER}, "trainer.model", NAMES),
    "a trainer goes last": ({"trainer": {"state_dict": {"w": W}}, "netG": SD}, "netG", NAMES),
    "before averages of a trainer": ({"trainer": {"ema": {"w": W}, "state_dict": SD}, "e": 1},
                                     "trainer.state_dict", NAMES),
    "a chain that leads to weights": ({"run": {"agent": {"model": SD}}}, "run.agent.model", NAMES),
    "the only weights, aside": ({"callbacks": {"Saver": {"state_dict": SD}},
                                 "optimizer": OPTIMIZER},
                                "callbacks.Saver.state_dict", NAMES),
    "averages aside": ({"callbacks": [{"ema": SD}], "epoch": 1}, "callbacks.0.ema", NAMES),
    "the first of the known": ({"module": {"m": W}, "state_dict": {"w": W}}, "state_dict", ["w"]),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_which_tensors_are_taken(case: str) -> None:
    content, key, names = TAKEN[case]
    table = read(saved(content))
    assert (table.key, table.names) == (key, names)
    assert bool(key) == any(f"the weights under {key} are" in note for note in table.notes)
    if key:
        assert read(saved(content), key).names == names


def test_others_are_named() -> None:
    table = read(saved({"model": {"w": W}, "ema": {"w": W}, "e": 1}))
    assert "left out: --key ema" in table.notes[1]


def test_several_that_nothing_tells_apart() -> None:
    content = {"netG": {"w": W}, "netD": {"v": W}, "epoch": 1, "optimizer": OPTIMIZER}
    assert "choose with --key netG or --key netD" in refused(saved(content))
    assert read(saved(content), "netD").names == ["v"]
    assert "try --key netG or --key netD" in refused(saved(content), "netX")
    assert "is not a mapping" in refused(saved(content), "epoch")
    assert read(saved(content), "optimizer.state.0").names == ["exp_avg", "step"]


@pytest.mark.parametrize("parts", [SD, {"w": W}, {"block": {"l.w": W}, "l.w": W}])
@pytest.mark.parametrize("wrapped", [False, True])
def test_several_models_are_not_one(parts: dict[str, Any], wrapped: bool) -> None:
    models = {"generator": parts, "discriminator": {"w": W}}
    under = "nets." if wrapped else ""
    content = {"nets": models} if wrapped else models
    said = refused(saved(content))
    assert "holds 2 groups of tensors, and nothing says which is the model" in said
    assert f"choose with --key {under}generator or --key {under}discriminator" in said
    assert read(saved(content), f"{under}discriminator").names == ["w"]
    assert f"{under}discriminator.w" in read(saved(content), ".").names


SETTINGS = ["args", "config", "hparams", "hyper_parameters", "Options"]


@pytest.mark.parametrize("key", [*SETTINGS, "optimized_model", "scheduled"])
def test_weights_among_settings_are_suggested(key: str) -> None:
    content = {key: {"model": SD}, "epoch": 1, "optimizer": OPTIMIZER}
    said = refused(saved(content))
    assert (
        f"has tensors only under {key}.model, and ckdiff compares that only if you name it" in said
    )
    assert f"(choose with --key {key}.model)" in said
    assert read(saved(content), f"{key}.model").names == NAMES
    assert f"(try --key {key}.model)" in refused(saved(content), f"{key}.modl")


def test_all_weights_among_settings_are_suggested() -> None:
    content = {"callbacks": {"a": {"model": SD}, "b": {"model": SD}, "n": 2}, "metrics": [SD]}
    said = refused(saved(content))
    for key in ("callbacks.a.model", "callbacks.b.model", "metrics.0"):
        assert f"--key {key}" in said
    # one tensor that is somewhere else is no reason to be silent about them
    table = read(saved({"args": {"model": SD}, "loss": W}))
    assert table.names == ["loss"]
    assert "left out: --key args.model" in " ".join(table.notes)


@pytest.mark.parametrize(
    "content",
    [
        {"optimizer": OPTIMIZER, "optim": {"m": {"l.0.w": W, "l.1.w": W}}},
        {"optimizer_states": [{"l.0.exp_avg": W, "l.1.exp_avg": W}]},
        {"optimizer": {"model": {"l.0.exp_avg_sq": W, "l.1.exp_avg_sq": W}}},
        {"lr_scheduler": {"a.b": W, "c.d": W}},
        {"args": {"mean": W, "std": W}, "optimizer": OPTIMIZER},
    ],
)
def test_the_state_of_an_optimizer_is_not_suggested(content: Any) -> None:
    said = refused(saved(content))
    assert "no weights" in said
    assert "(give the file that has the weights)" in said


def test_a_wrong_key_where_there_are_no_others() -> None:
    assert "are under no key: leave out --key" in refused(saved(SD), "model")
    assert "are under no key: leave out --key" in refused(saved([W, W]), "model")
    assert "no tensors by name under any key" in refused(saved({"epoch": 1}), "model")
    assert "no tensors by name under any key" in refused(saved({"optimizer": OPTIMIZER}), "model")


def test_keys_with_dots() -> None:
    content = {"a.b": {"c": {"w": W}}, "x": 1}
    assert read(saved(content), "a.b.c").names == ["w"]
    both = {"a.b": {"w": W}, "a": {"b": {"v": W}}, "x": 1}
    assert "more than one thing" in refused(saved(both), "a.b")
    assert read(saved({"w": W, "model": {"v": W}}), ".").names == ["w", "model.v"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (OPTIMIZER, "the state of an optimizer"),
        ({"optimizer": OPTIMIZER, "epoch": 1}, "the state of an optimizer"),
        ({"python": 1, "numpy": 2, "cpu": W}, "no weights"),
        ({"epoch": 1}, "holds no tensors by name"),
        ({}, "holds no tensors by name"),
        (7, "holds no tensors by name"),
        ({(0, 1): W}, "holds no tensors by name"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, "of dtype complex128"),
        ({"a": {"b": W}, "a.b": W}, "two tensors have the name"),
    ],
)
def test_no_weights(content: Any, words: str) -> None:
    assert words in refused(saved(content))


def test_what_cannot_be_compared_is_named() -> None:
    content = {
        "w": W,
        "sparse": torch.zeros(2, 2).to_sparse(),
        "conj": torch.ones(2, dtype=torch.complex64).conj(),
        "wide": torch.ones(2, dtype=torch.complex128),
        "meta": torch.empty(2, device="meta"),
    }
    table = read(saved(content))
    assert table.names == ["w"]
    assert "4 tensors cannot be compared and are left out, such as sparse" in table.notes[0]
    assert table.absent == ["sparse", "conj", "wide", "meta"]


@pytest.mark.parametrize("kind", ["sparse", "dtype"])
def test_no_gate_passes_what_cannot_be_compared(kind: str, tmp_path: Path) -> None:
    other = torch.ones(2, 2, dtype=torch.complex128 if kind == "dtype" else torch.float32)
    other = other.to_sparse() if kind == "sparse" else other
    torch.save({"w": W, "other": other}, tmp_path / "a.pt")
    torch.save({"w": W, "other": 2 * other}, tmp_path / "b.pt")
    held = {"w": W, "other": other}
    for base in [tmp_path / "a.pt", held][: 2 if kind == "dtype" else 1]:
        result = ckdiff.diff(base, tmp_path / "b.pt")
        assert result.unpaired["missing"] == ["other"]
        assert result.uncompared["tensors"] == 1
    with pytest.raises(CheckpointError, match="other is missing, or of a kind"):
        ckdiff.delta(
            tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "s", encoding="xor", full=True
        )


def test_arrays_of_numpy_are_named() -> None:
    table = read(saved({"state_dict": {"w": W, "a": np.ones(2), "n": np.float32(1)}}))
    assert table.names == ["w"]
    assert table.absent == []
    assert table.notes[-1].endswith("1 numpy array in it is not compared: a")
    table = read(saved({"w": W, "a": np.ones(2), "b": np.ones(2)}))
    assert table.notes[-1].endswith("2 numpy arrays in it are not compared, such as a")


# -- files that are not what they should be --------------------------------------------------------

Q = {"0": bytes(range(24))}


def hand_made(view: bytes, storages: dict[str, bytes] = Q, **options: Any) -> bytes:
    return torch_bytes(pickled(mapping({"w": view})), storages, **options)


def floats(*arguments: Any, **options: Any) -> bytes:
    return tensor(*arguments, storage="FloatStorage", **options)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (hand_made(floats("0", 7, [7])), "not the declared size"),
        (hand_made(floats("0", 5, [5])), "not the declared size"),
        (hand_made(floats("0", -6, [5])), "not the declared size"),
        (hand_made(floats("1", 6, [6])), "are not in the file"),
        (hand_made(floats("../version", 6, [6])), "are not in the file"),
        (hand_made(floats("0", 6, [7])), "beyond the end of its storage"),
        (hand_made(floats("0", 6, [6], offset=1)), "beyond the end of its storage"),
        (hand_made(floats("0", 6, [2, 3], [4, 1])), "beyond the end of its storage"),
        (hand_made(floats("0", 6, [2], [-1], offset=3)), "impossible shape"),
        (hand_made(floats("0", 6, [-1], [1])), "impossible shape"),
        (hand_made(floats("0", 6, [1 << 40, 1 << 40, 0], [0, 0, 0])), "impossible shape"),
        (hand_made(floats("0", 6, [1 << 40], [0])), "repeat"),
        (hand_made(floats("0", 6, [6]), order=b"big"), "big-endian"),
        (hand_made(floats("0", 6, [6]), order=b"?"), "not an order of bytes"),
        (hand_made(floats("0", 6, [6]), method=8), "compressed"),
        (zip_bytes([Entry(b"a/data.pkl", pickled(b"}"), 8)]), "compressed"),
        (zip_bytes([Entry(b"a/x", b"")]), "torch did not write it"),
        (zip_bytes([Entry(b"a/data.pkl", b"."), Entry(b"b/data.pkl", b".")]), "two pickles"),
        (zip_bytes([Entry(b"a/data.pkl", b".", flags=1)]), "is encrypted"),
        (zip_bytes([Entry(b"a/data.pkl", b"."), Entry(b"a/data.pkl", b".")]), "there twice"),
    ],
)
def test_files_that_contradict_themselves(raw: bytes, words: str) -> None:
    assert words in refused(raw)


def old(content: Any) -> bytes:
    return saved(content, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (old({"w": W}), "format of torch before 1.6"),
        (b"\x1f\x8b\x08" + bytes(40), "gunzip"),
        (b"a" * 257 + b"ustar\x0000" + bytes(300), "tar archive"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
        ((40).to_bytes(8, "little") + b'{"a":' + b" " * 40, "safetensors"),
        (b"\x80\4K\1.", "a pickle by itself"),
        (b"", "is empty"),
        (b"GGUF" + bytes(30), "GGUF"),
        (b"PK\3\4", "not a whole zip"),
    ],
)
def test_other_files_have_a_remedy(raw: bytes, words: str) -> None:
    line = refused(raw)
    assert words in line
    assert "(" in line  # the remedy


def test_known_by_content() -> None:
    assert is_torch_zip(saved({"w": W})[:128])
    assert is_torch_zip(torch_files.scripted(torch.nn.Linear(1, 1))[:128])
    buffer = io.BytesIO()
    np.savez(buffer, w=np.ones(3))
    assert not is_torch_zip(buffer.getvalue()[:128])
    assert not is_torch_zip(old({"w": W})[:128])


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    raw = saved({"w": torch.ones(1000)})
    for size in range(0, len(raw), 97):
        refused(raw[:size])


def test_nothing_of_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "f.pt").write_bytes(saved(torch_files.training_state()))
    script = (
        "import sys\n"
        "from ckdiff.checkpoints.formats.torchzip import torch_table\n"
        f"raw = open({str(tmp_path / 'f.pt')!r}, 'rb').read()\n"
        "torch_table(lambda o, n: raw[o:o + n], len(raw), 'f')\n"
        "print(sorted({'torch', 'pickle', 'numba', 'zarr'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert "torch" not in done.stdout
    assert "numba" not in done.stdout


# -- one key for two sides -------------------------------------------------------------------------


def test_a_key_is_for_one_of_two_sides(tmp_path: Path) -> None:
    torch.save({"model": {"w": W}, "ema": {"w": 2 * W}}, tmp_path / "run.ckpt")
    torch.save({"w": W}, tmp_path / "flat.pt")
    holder = torch.nn.Module()
    holder.w = torch.nn.Parameter(W.clone())
    for other in (tmp_path / "flat.pt", {"w": W}, holder):
        for sides in ((other, tmp_path / "run.ckpt"), (tmp_path / "run.ckpt", other)):
            result = ckdiff.diff(*sides, key="ema")
            assert result.rules["exact"]["changed"] == 5
            ckdiff.delta(*sides, tmp_path / "d.delta", key="ema", overwrite=True)


def test_a_key_that_no_side_has_a_use_for(tmp_path: Path) -> None:
    torch.save({"w": W}, tmp_path / "flat.pt")
    save_file({"w": W}, tmp_path / "a.safetensors")
    for base in (tmp_path / "flat.pt", {"w": W}, tmp_path / "a.safetensors"):
        with pytest.raises(CheckpointError, match="--key ema is not in it"):
            ckdiff.diff(base, tmp_path / "flat.pt", key="ema")
    torch.save({"a": {"w": W}, "b": {"v": 3}, "c": {"w": W}}, tmp_path / "two.pt")
    torch.save({"ema": {"w": W}}, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match="--key ema is not in it"):
        ckdiff.diff(tmp_path / "two.pt", tmp_path / "run.pt", key="ema")
