"""A base with a LoRA adapter merged into it, against PEFT's own ``merge_and_unload``."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ckdiff.checkpoints.opening import open_checkpoint
from ckdiff.checkpoints.views.adapter import AdapterView, adapt
from ckdiff.checkpoints.views.adaptersurvival import survival
from ckdiff.errors import CheckpointError
from ckdiff.kernels.memory import bytes_at

pytestmark = pytest.mark.filterwarnings("ignore")  # of what PEFT and transformers ask each other

#: one model for each kind; wide enough for torch to use its matrix product
LLAMA = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
    attention_bias=True,
)
GPT2 = GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32)

Tensors = Mapping[str, torch.Tensor]


def noise(model: nn.Module, seed: int = 1) -> None:
    """Weights unlike zero everywhere: also those that begin as zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def train(base: nn.Module, config: LoraConfig, folder: Path) -> None:
    """A base and an adapter as people have them on disks."""
    noise(base)
    base.save_pretrained(folder / "base")
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                seed = torch.Generator().manual_seed(len(name))
                parameter += 0.05 * torch.randn(parameter.shape, generator=seed)
    model.save_pretrained(folder / "adapter")


def merged_by_peft(kind: Any, folder: Path) -> dict[str, torch.Tensor]:
    base = kind.from_pretrained(folder / "base", dtype="auto")
    model = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    model.save_pretrained(folder / "merged")
    return load_file(folder / "merged" / "model.safetensors")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def read(view: AdapterView, window: int = 1 << 12) -> dict[str, bytes]:
    """All tensors of a view, some bytes at a time."""
    found = {}
    with closing(view.reader()) as reader:
        for i, (name, size) in enumerate(
            zip(view.table.names, view.table.nbytes.tolist(), strict=True)
        ):
            data = b""
            for at in range(0, size, window):
                some = min(window, size - at)
                (address,) = reader.acquire(*(np.array([n]) for n in (i, at, some))).tolist()
                data += bytes_at(address, some).tobytes()
                reader.release()
            found[name] = data
    return found


def same(folder: Path, kind: Any, **options: int) -> AdapterView:
    """Fails unless the view is what PEFT makes, bit for bit; gives the view, closed."""
    expected = merged_by_peft(kind, folder)
    with opened(folder) as view:
        found = read(view, **options)
        assert sorted(found) == sorted(expected)
        for name, tensor in expected.items():
            assert view.table.shapes[view.table.names.index(name)] == tuple(tensor.shape)
            assert found[name] == bits(tensor), name
    return view


LINEAR = ["q_proj", "k_proj", "o_proj", "down_proj", "up_proj"]


OPTIONS: list[dict[str, Any]] = [
    {"r": 8, "lora_alpha": 16, "target_modules": LINEAR},
    {"r": 1, "lora_alpha": 3, "target_modules": LINEAR},
    {"r": 5, "lora_alpha": 7, "use_rslora": True, "target_modules": "all-linear"},
    {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": LINEAR,
        "rank_pattern": {r"^model\.layers\.0\.self_attn\..*": 6, "down_proj": 3},
        "alpha_pattern": {r"layers\.\d+\.mlp\.(up|down)_proj": 5, "q_proj": 0.3},
    },
    {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    {"r": 4, "target_modules": ["q_proj", "v_proj"], "bias": "all"},
    {"r": 4, "target_modules": ["q_proj", "k_proj"], "bias": "lora_only"},
    {"r": 4, "target_modules": ["q_proj", "k_proj"], "lora_bias": True},
    {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.bfloat16, options) for options in OPTIONS]
    + [(dtype, options) for dtype in (torch.float16, torch.float32) for options in OPTIONS[:3]]
    + [(torch.float32, options) for options in OPTIONS[-2:]],
)
def test_llama(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    train(LlamaForCausalLM(LLAMA).to(dtype), LoraConfig(**options), tmp_path)
    view = same(tmp_path, LlamaForCausalLM)
    assert view.merged
    assert not view.in_files
    assert bool(view.replaced) == (
        "modules_to_save" in options
        or "bias" in options
        or ("embed_tokens" in options["target_modules"])
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "targets", [["c_attn", "c_proj", "c_fc"], ["c_attn"], ["wte", "c_proj"], ["c_proj"]]
)
def test_gpt2_whose_weights_are_transposed(
    tmp_path: Path, dtype: torch.dtype, targets: list[str]
) -> None:
    config = LoraConfig(r=4, target_modules=targets, fan_in_fan_out=True)
    train(GPT2LMHeadModel(GPT2).to(dtype), config, tmp_path)
    same(tmp_path, GPT2LMHeadModel)


@pytest.mark.parametrize("rank", [64, 192, 200, 256, 400])
def test_ranks_for_which_torch_sums_in_runs(tmp_path: Path, rank: int) -> None:
    config = LoraConfig(r=rank, target_modules=["q_proj", "down_proj"])
    train(LlamaForCausalLM(LLAMA), config, tmp_path)
    same(tmp_path, LlamaForCausalLM, window=1 << 20)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(16, 32, 1)
        self.three = nn.Conv2d(32, 16, 3)
        self.flat = nn.Conv1d(16, 24, 3)
        self.solid = nn.Conv3d(16, 16, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_convolutions(tmp_path: Path, dtype: torch.dtype) -> None:
    base = Convolutions().to(dtype)
    noise(base)
    for folder in ("base", "merged"):
        (tmp_path / folder).mkdir()
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["one", "three", "flat", "solid"]))
    noise(model.base_model, 2)
    model.save_pretrained(tmp_path / "adapter")
    again = Convolutions().to(dtype)
    again.load_state_dict(load_file(tmp_path / "base" / "model.safetensors"))
    expected = PeftModel.from_pretrained(again, tmp_path / "adapter").merge_and_unload()
    with opened(tmp_path) as view:
        assert len(view.merged) == 4
        found = read(view)
    for name, tensor in expected.state_dict().items():
        assert found[name] == bits(tensor), name


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 model with matrices for an embedding, attention and a head that is replaced."""
    folder = tmp_path_factory.mktemp("small")
    options = {"target_modules": ["embed_tokens", "q_proj", "down_proj"], "lora_bias": False}
    config = LoraConfig(r=6, modules_to_save=["lm_head"], **options)
    train(LlamaForCausalLM(LLAMA).to(torch.bfloat16), config, folder)
    # a head in float32, as trainers that keep one save it
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    head = "base_model.model.lm_head.weight"
    tensors[head] = tensors[head].float() * 1.001
    save_file(tensors, path)
    merged_by_peft(LlamaForCausalLM, folder)
    return folder


def test_any_spans_give_the_same_bits(small: Path) -> None:
    whole = load_file(small / "merged" / "model.safetensors")
    noise = random.Random(3)
    with opened(small) as view, closing(view.reader()) as one, closing(view.reader()) as two:
        names, sizes = view.table.names, view.table.nbytes.tolist()
        assert not [name for name, held in view._plan.cast.items() if held != "F32"]
        for turn in range(200):
            reader = one if turn % 2 else two
            chosen = [noise.randrange(len(names)) for _ in range(noise.randint(0, 5))]
            starts = [noise.randint(0, sizes[i]) for i in chosen]
            counts = [
                min(noise.choice([0, 1, 3, 130, sizes[i]]), sizes[i] - at)
                for i, at in zip(chosen, starts, strict=True)
            ]
            columns = [np.array(numbers, np.int64) for numbers in (chosen, starts, counts)]
            reader.prefetch(*columns)
            addresses = reader.acquire(*columns).tolist()
            for i, at, size, address in zip(chosen, starts, counts, addresses, strict=True):
                expected = bits(whole[names[i]])[at : at + size]
                assert bytes_at(address, size).tobytes() == expected
            reader.release()


def test_who_it_is(small: Path) -> None:
    with opened(small) as view, opened(small) as again, open_checkpoint(small / "base") as base:
        assert view.fingerprint() == again.fingerprint() != base.fingerprint()
        assert view.seen() == again.seen() != base.seen()
        assert view.recipe() == again.recipe()
        recipe = json.loads(view.recipe())["adapter"]
        assert set(recipe) == {"base", "adapter", "config", "safe"}
        assert json.loads(recipe["config"])["peft_type"] == "LORA"
        assert {"adapter", "adapter_config"} <= set(view.origin)
        assert [file.name for file in view.files] == [
            "model.safetensors",
            "adapter/adapter_model.safetensors",
        ]
        assert len(view.open_files) == 2
        # what the adapter leaves alone lies where it lay: a diff need not read it
        at = {name: i for i, name in enumerate(base.table.names)}
        for i, name in enumerate(view.table.names):
            computed = name in view.merged or name in view.replaced
            place = (int(view.file_index[i]), int(view.offset[i]))
            assert place == ((-1, -1) if computed else (0, int(base.offset[at[name]])))
        view.verify()
        with pytest.raises(CheckpointError, match="what its files are"):
            view.head(0)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-2], OPTIONS[-1]])
def test_a_safe_merge(tmp_path: Path, options: dict[str, Any]) -> None:
    """It rounds twice: some elements are others than in a merge that is not."""
    train(LlamaForCausalLM(LLAMA).to(torch.bfloat16), LoraConfig(**options), tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    model = PeftModel.from_pretrained(model, tmp_path / "adapter")
    expected = model.merge_and_unload(safe_merge=True).state_dict()
    with opened(tmp_path) as view:
        found = read(AdapterView(view.base, view.adapter, view.config, safe=True))
        assert found != read(view)
    for name, tensor in expected.items():
        assert found[name] == bits(tensor), name


def test_another_configuration_is_another_checkpoint(small: Path) -> None:
    raw = (small / "adapter" / "adapter_config.json").read_bytes()
    louder = raw.replace(b'"lora_alpha": 8', b'"lora_alpha": 9')
    assert louder != raw
    with opened(small) as view:
        other = AdapterView(view.base, view.adapter, louder)
        assert other.seen() != view.seen()
        assert other.fingerprint() != view.fingerprint()
        assert read(other) != read(view)


def test_memory_is_that_of_a_window(tmp_path: Path) -> None:
    """A matrix of 4 MiB and rank 16, by windows of 64 KiB."""
    a, b = torch.randn(16, 4096), torch.randn(256, 16)
    put(
        tmp_path, {"w.weight": torch.randn(256, 4096)}, {"w.lora_A.weight": a, "w.lora_B.weight": b}
    )
    window = 1 << 16
    with opened(tmp_path) as view, closing(view.reader()) as reader:
        reader.acquire(*(np.array([n]) for n in (0, 0, window)))
        tracemalloc.start()
        for at in range(0, 1 << 20, window):
            reader.release()
            reader.acquire(*(np.array([n]) for n in (0, at + 4, window)))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak + window <= view.reader_memory(window)
        assert view.reader_memory(window) < 8 << 20


def test_what_is_asked_and_what_was_there(small: Path) -> None:
    base = load_file(small / "base" / "model.safetensors")
    with opened(small) as view, closing(view.reader()) as reader:
        for i, name in enumerate(view.table.names):
            size = int(view.table.nbytes[i])
            columns = [np.array([n], np.int64) for n in (i, 0, size)]
            (address,) = reader.acquire(*columns).tolist()
            (before,) = reader.unmerged.tolist()
            if name in view.replaced:
                assert before or not size  # what the adapter brings is what it is added to
            else:
                held, now = (bytes_at(at, size) for at in (before, address))
                assert held.tobytes() == bits(base[name])
                changed = survival(held, now, now, 2, int(reader.asked[0]))
                assert changed.arrived == changed.visible <= changed.asked
                assert bool(changed.asked) == bool(changed.visible) == (name in view.merged)
            reader.release()


def put(folder: Path, base: Tensors, adapter: Tensors, **config: Any) -> None:
    """A base and an adapter, of whatever tensors."""
    for name, tensors in (("base", base), ("adapter", adapter)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        file = "model" if name == "base" else "adapter_model"
        save_file(dict(tensors), folder / name / f"{file}.safetensors")
    rank = next((t.shape[0] for name, t in adapter.items() if "_A" in name), 8)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, **config}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


@contextmanager
def opened(folder: Path) -> Iterator[AdapterView]:
    with open_checkpoint(folder / "base") as base, open_checkpoint(folder / "adapter") as adapter:
        yield adapt(base, adapter)
