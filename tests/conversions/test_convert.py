"""``ckdiff convert``: any checkpoint as safetensors, each number where it was or rounded."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import MOST_MEMORY, error, ok, python
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import Tensor, write_index, write_safetensors, write_sparse

import ckdiff
from ckdiff.checkpoints import open_checkpoint
from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.conversions.dtypes import chosen_dtypes
from ckdiff.kernels.casting import narrow

TORCH = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "layers.10.w": ("BF16", (33, 100)),
    "layers.2.w": ("F32", (701,)),
    "layers.2.b": ("F4", (34, 2)),
    "layers.3.b": ("F6_E2M3", (132,)),
    "wide": ("C64", (17, 3)),
    "wider": ("I64", (90_001,)),
    "double": ("F64", (1_000,)),
    "half": ("F16", (3, 5, 7)),
    "scalar": ("BF16", ()),
    "empty": ("BF16", (0, 3)),
    "bytes": ("U8", (5, 3, 1)),
    "flags": ("BOOL", (4,)),
    "large": ("BF16", (1 << 20, 5)),  # more than a window and several buffers
}
BITS = {"F4": 4, "F6_E2M3": 6, "BF16": 16, "F16": 16, "F32": 32, "C64": 64, "I64": 64, "F64": 64}


def model(seed: int) -> dict[str, Tensor]:
    rng, found = np.random.default_rng(seed), dict[str, Tensor]()
    for name, (dtype, shape) in SHAPES.items():
        data = rng.bytes(int(np.prod(shape)) * BITS.get(dtype, 8) // 8)
        if dtype == "BOOL":
            data = bytes(byte & 1 for byte in data)
        found[name] = (dtype, shape, data)
    return found


def held(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, read by offsets of its headers and not by us."""
    found = dict[str, Tensor]()
    for file in sorted(path.glob("*.safetensors")):
        raw = file.read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        assert begin % 8 == 0, "the library aligns data"
        header: dict[str, Any] = json.loads(raw[8:begin])
        assert header.pop("__metadata__") == {"format": "pt"}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            data = raw[begin + first : begin + last]
            found[name] = (entry["dtype"], tuple(entry["shape"]), data)
    return found


@pytest.mark.parametrize("workers", [1, 3])
def test_every_bit_in_other_shards(tmp_path: Path, workers: int) -> None:
    tensors = model(1)
    source = write_safetensors(tmp_path / "x.safetensors", tensors, pad=3)
    out = tmp_path / "out"
    made = ckdiff.convert(source, out, shard_size=300_000, workers=workers)
    assert held(out) == tensors
    assert (made.tensors, made.rounded, made.converted) == (len(tensors), 0, 0)
    assert made.size == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for name in tensors:
        with safe_open(out / index["weight_map"][name], "np") as file:
            assert name in file.keys()  # noqa: SIM118
    assert sorted(made.files) == sorted(os.listdir(out))
    whole = ckdiff.convert(source, tmp_path / "one")
    assert whole.files == ["model.safetensors"]
    assert held(tmp_path / "one") == tensors


def numbers(dtype: torch.dtype, seed: int, count: int) -> torch.Tensor:
    """Random bits as floats: infinities, NaNs and subnormals among them."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(words)
    bits = torch.randint(info.min, info.max, (count,), generator=generator, dtype=words)
    wide = torch.randn(count, generator=generator, dtype=torch.float64) * 10.0 ** (seed % 9)
    return torch.where(bits % 3 == 0, bits.view(dtype), wide.to(dtype))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    wanted=st.sampled_from(sorted(TORCH)),
    count=st.integers(0, 300) | st.sampled_from([65_537]),
)
def test_rounding_is_that_of_torch(
    seed: int, wanted: str, count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("round")
    floats = [torch.float32, torch.float16, torch.bfloat16]
    if wanted == "f32":  # to shorter ones torch rounds it twice, and we once
        floats.append(torch.float64)
    tensors = {str(dtype): numbers(dtype, seed, count) for dtype in floats}
    tensors["ints"] = torch.arange(7)
    save_file(tensors, folder / "x.safetensors")
    made = ckdiff.convert(folder / "x.safetensors", folder / "out", dtype=wanted)
    rounded = overflowed = 0
    for name, found in load_file(folder / "out" / "model.safetensors").items():
        before = tensors[name]
        after = before.to(TORCH[wanted]) if before.is_floating_point() else before
        assert found.dtype == after.dtype
        nan = torch.isnan(before) if before.is_floating_point() else torch.zeros(7) > 0
        assert torch.equal(found[~nan], after[~nan])
        assert torch.isnan(found[nan]).all()
        back = found.to(before.dtype)
        rounded += int((back != before)[~nan].sum())
        overflowed += int((torch.isinf(found) & ~torch.isinf(before)).sum())
    assert made.rounded >= rounded  # payloads of NaNs count as well
    assert made.overflowed == overflowed
    assert made.converted == len(floats) - 1


def test_what_belongs_to_quantised_weights_stays() -> None:
    columns = {
        "a.weight": "F8_E4M3", "a.weight_scale_inv": "F32", "a.bias": "F32",
        "b.qweight": "I32", "b.scales": "F16", "b.qzeros": "I32", "b.bias": "F16",
        "c.weight": "U8", "c.weight.absmax": "F32", "c.weight.quant_map": "F32",
        "d.experts.up_blocks": "U8", "d.experts.up_scales": "U8", "d.experts.up_bias": "BF16",
        "e.weight": "F8_E5M2", "e.bias": "F32", "logit_scale": "F32", "f.position_ids": "I64",
        "f.scale": "F32", "g.weight": "I8", "g.bias": "F32",
    }  # fmt: skip
    names, stored = list(columns), list(columns.values())
    shapes: list[tuple[int, ...]] = [(2,)] * len(names)
    table = TensorTable(names, stored, shapes, np.zeros(len(names), np.int64))
    found, untouched = chosen_dtypes(table, "BF16")
    assert untouched == [
        "a.weight", "a.weight_scale_inv", "b.scales", "c.weight.absmax", "c.weight.quant_map",
        "e.weight", "logit_scale", "f.scale",
    ]  # fmt: skip
    changed = {name for name, a, b in zip(names, stored, found, strict=True) if a != b}
    assert changed == {"a.bias", "b.bias", "e.bias", "g.bias"}
    assert chosen_dtypes(table, None) == (stored, [])


@pytest.mark.parametrize(
    ("columns", "quantised"),
    [
        ({"a.weight": "F8_E4M3", "a.weight_scale": "F32"}, True),
        ({"a.weight": "F8_E4M3", "a.scale_weight": "F32"}, True),
        ({"a.weight": "F8_E4M3", "a.weight_quantizer._scale": "F32"}, True),
        ({"a.weight_packed": "I32", "a.weight_scale": "BF16"}, True),
        ({"weight": "F8_E4M3", "scale": "F32"}, True),
        ({"a.weight": "F8_E4M3", "a.bias": "F32"}, False),
        ({"a.weight": "F32", "a.scale": "F32", "b.ids": "I32"}, False),
        ({"a.weight": "F32", "logit_scale": "F32", "a.flags": "U8"}, False),
    ],
)
def test_quantised_checkpoints_are_known(columns: dict[str, str], quantised: bool) -> None:
    count = np.zeros(len(columns), np.int64)
    shapes: list[tuple[int, ...]] = [(2,)] * len(columns)
    table = TensorTable(list(columns), list(columns.values()), shapes, count)
    assert bool(chosen_dtypes(table, "F16")[1]) is quantised


def test_eight_bit_floats_without_scales_are_widened(tmp_path: Path) -> None:
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    save_file({"w": every}, tmp_path / "x.safetensors")
    made = ckdiff.convert(tmp_path / "x.safetensors", tmp_path / "out", dtype="bf16")
    found = load_file(tmp_path / "out" / "model.safetensors")["w"]
    wanted = every.to(torch.bfloat16)
    assert torch.equal(found[~wanted.isnan()], wanted[~wanted.isnan()])
    assert (made.rounded, made.converted, made.untouched) == (0, 1, [])


def test_numbers_that_become_infinite_are_counted(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 1e6, -1e6, float("inf"), float("nan"), 65_504.0])
    save_file({"fine": torch.ones(4), "w": values}, tmp_path / "x.safetensors")
    lines = ok(
        "convert", str(tmp_path / "x.safetensors"), "--dtype", "f16", "-o", str(tmp_path / "out")
    )
    assert "warning: 2 finite numbers are too large for F16" in lines.stderr
    assert "in w" in lines.stderr
    assert lines.stdout.splitlines()[1].startswith("2 tensors converted to f16: 2 elements rounded")


def test_torch_files_and_their_shared_storages(tmp_path: Path) -> None:
    weight = torch.randn(40, 30)
    state = {"embed": weight, "head": weight, "turned": weight.t(), "some": weight[3:7, ::2]}
    torch.save({"model": state, "step": 7}, tmp_path / "x.pt")
    notes: list[str] = []
    observer = ckdiff.Observer(note=notes.append)
    made = ckdiff.convert(tmp_path / "x.pt", tmp_path / "out", key="model", observer=observer)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in state.items()
    }
    assert any("a storage are written once for each name: head" in note for note in notes)
    assert made.files == ["model.safetensors"]
    assert (
        "no such"
        in error("convert", str(tmp_path / "x.pt"), "--key", "nonsense", "-o", str(tmp_path / "no"))
        or not (tmp_path / "no").exists()
    )


def test_a_state_dict(tmp_path: Path) -> None:
    state = {"w": torch.randn(100, 10), "b": torch.randn(10).bfloat16()}
    made = ckdiff.convert(state, tmp_path / "out", dtype="f32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in state.items())
    assert (made.converted, made.rounded, made.copied) == (1, 0, [])


def test_adapters_and_pipelines_keep_their_names(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    torch.save(
        {"base_model.model.x.lora_A.weight": torch.ones(2, 3)}, adapter / "adapter_model.bin"
    )
    (adapter / "adapter_config.json").write_text("{}")
    made = ckdiff.convert(adapter, tmp_path / "lora")
    assert (made.files, made.copied) == (["adapter_model.safetensors"], ["adapter_config.json"])
    pipe = tmp_path / "pipe"
    parts = {"unet": "diffusion_pytorch_model", "text_encoder": "model", "scheduler": ""}
    said = {name: ["diffusers", "X"] for name in parts}
    for name, stem in parts.items():
        (pipe / name).mkdir(parents=True)
        (pipe / name / ("config.json" if stem else "scheduler_config.json")).write_text("{}")
        if stem:
            tensors = {"a.w": torch.ones(30), "b.w": torch.zeros(30)}
            save_file(tensors, pipe / name / f"{stem}.safetensors")
    (pipe / "model_index.json").write_text(json.dumps(said))
    out = tmp_path / "out"
    made = ckdiff.convert(pipe, out, shard_size=130)
    for name, stem in parts.items():
        if stem:
            assert f"{name}/{stem}-00001-of-00002.safetensors" in made.files
            assert f"{name}/{stem}.safetensors.index.json" in made.files
    assert "scheduler/scheduler_config.json" in made.copied
    assert "model_index.json" in made.copied
    result = ckdiff.diff(pipe, out).to_dict()
    assert (result["tensors"], result["rules"]["exact"]["changed"]) == (4, 0)
    assert not any(result["unpaired"].values())
    ckdiff.convert(pipe, out, overwrite=True)


def test_metadata_comes_along(tmp_path: Path) -> None:
    folder, one = tmp_path / "m", ("F32", (1,), b"1234")
    said = {"format": "mlx", "licence": "é", "part": "1"}
    write_safetensors(folder / "model-00001-of-00002.safetensors", {"a": one}, said)
    said = {"part": "2", "long": "x" * (1 << 20), "also": "y"}
    write_safetensors(folder / "model-00002-of-00002.safetensors", {"b": one}, said)
    notes: list[str] = []
    ckdiff.convert(folder, tmp_path / "out", observer=ckdiff.Observer(note=notes.append))
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt", "licence": "é"}
    assert any("is not kept: part, long, also" in note for note in notes)


def test_wrong_arguments(tmp_path: Path) -> None:
    source = write_safetensors(tmp_path / "m" / "x.safetensors", {"w": ("F32", (1,), b"1234")})
    out = tmp_path / "out"
    wrong: dict[str, Any]
    for wrong in ({"dtype": "BF16"}, {"shard_size": 0}, {"workers": 0}, {"config": "no"}):
        with pytest.raises(ckdiff.UsageError):
            ckdiff.convert(source, out, **wrong)
    line = error("convert", str(source), "-o", str(out), "--no-config", "--config-from", "x")
    assert "leave out one" in line
    assert "replace a source" in error("convert", str(source), "-o", str(tmp_path / "m"))
    inside = str(tmp_path / "m" / "out")
    assert "inside the source" in error("convert", str(tmp_path / "m"), "-o", inside)
    assert "of memory is too little" in error(
        "convert", str(source), "-o", str(out), "--memory", "64MiB"
    )
    assert not out.exists()


def test_an_index_with_names_that_no_file_has_is_said(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m" / "a.safetensors", {"w": ("F32", (1,), b"1234")})
    write_index(tmp_path / "m", {"w": "a.safetensors", "gone": "a.safetensors"})
    done = ok("convert", str(tmp_path / "m"), "-o", str(tmp_path / "out"), "--json")
    assert "warning" in done.stderr
    assert "gone" in done.stderr
    assert json.loads(done.stdout)["tensors"] == 1


# what goes wrong


def sparse(path: Path, mebibytes: int) -> Path:
    """A model of holes: F32, in tensors of 64 MiB."""
    tensors = {f"{i}.w": ("F32", (1 << 24,), 1 << 26) for i in range(mebibytes // 64)}
    return write_sparse(path, tensors)


def test_memory_is_bounded(tmp_path: Path) -> None:
    source = sparse(tmp_path / "x.safetensors", 640)
    code = (
        "import sys, ckdiff\n"
        "ckdiff.convert(sys.argv[1], sys.argv[2], dtype='bf16', shard_size='100MB', workers=2)\n"
        "print(most())\n"
    )
    done = python(MOST_MEMORY + code, str(source), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 256 << 20
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 5


def test_killed_and_run_again(tmp_path: Path) -> None:
    source, out = sparse(tmp_path / "x.safetensors", 256), tmp_path / "out"
    work = tmp_path / "out.ckdiff-partial"
    code = (
        "import os, sys, threading, time, ckdiff\n"
        "def kill():\n"
        "    while not os.path.exists(sys.argv[3]): time.sleep(0.001)\n"
        "    os.kill(os.getpid(), 9)\n"
        "threading.Thread(target=kill, daemon=True).start()\n"
        "ckdiff.convert(*sys.argv[1:3], dtype='bf16', workers=1)\n"
    )
    killed = python(code, str(source), str(out), str(work / "new"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    assert work.exists()
    made = ckdiff.convert(source, out, dtype="bf16")
    assert made.tensors == 4
    assert not work.exists()


def test_a_source_that_is_cut_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_safetensors(
        tmp_path / "x.safetensors", {"w": ("F32", (1 << 20,), bytes(1 << 22))}
    )

    def cut(*arguments: Any) -> int:
        os.truncate(source, 5000)
        return narrow(*arguments)

    monkeypatch.setattr("ckdiff.conversions.run.narrow", cut)
    with pytest.raises(ckdiff.SourceChanged):
        ckdiff.convert(source, tmp_path / "out", dtype="bf16")
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_the_result_is_read_by_everybody(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config)
    llama.save_pretrained(tmp_path / "base")
    (tmp_path / "bin").mkdir()
    torch.save(llama.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.view(-1)[:5] += 1
    llama.save_pretrained(tmp_path / "tuned")
    ckdiff.convert(tmp_path / "bin", tmp_path / "converted", dtype="bf16", shard_size=20_000)
    ckdiff.delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta")
    ckdiff.apply(tmp_path / "base", tmp_path / "delta", tmp_path / "applied")
    ckdiff.diff(tmp_path / "base", tmp_path / "tuned", tmp_path / "s.zarr")
    mask = tmp_path / "s.zarr"
    ckdiff.graft(tmp_path / "base", tmp_path / "tuned", mask, tmp_path / "grafted")
    load = transformers.AutoModelForCausalLM.from_pretrained
    for name in ("applied", "grafted"):
        found = load(tmp_path / name).state_dict()
        assert all(torch.equal(found[k], tensor) for k, tensor in llama.state_dict().items())
    found = load(tmp_path / "converted").state_dict()
    before = torch.load(tmp_path / "bin" / "pytorch_model.bin")
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in before.items())


def test_what_was_written_is_a_checkpoint_of_the_same_tensors(tmp_path: Path) -> None:
    source = write_safetensors(tmp_path / "x.safetensors", model(2))
    ckdiff.convert(source, tmp_path / "out", shard_size=100_000)
    with open_checkpoint(source) as one, open_checkpoint(tmp_path / "out") as other:
        assert sorted(one.table.names) == sorted(other.table.names)
    result = ckdiff.diff(source, tmp_path / "out").to_dict()
    assert result["rules"]["exact"]["changed"] == 0
