"""Damaged training state, configs of quantised weights and of adapters: an error, or a diff.

What was damaged is read as commands read it, to the end of its bytes. ``CKDIFF_FUZZ=20000`` runs
the whole campaign.
"""

from __future__ import annotations

import io
import json
import os
import pickletools
import random
import tracemalloc
import zipfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sharded_models import ELEMENTS, STATE, dcp, pieces, ranks
from support import write_safetensors

import ckdiff
from ckdiff.checkpoints.contents import SHARDING
from ckdiff.errors import CkdiffError

torch = pytest.importorskip("torch")

COUNT = int(os.environ.get("CKDIFF_FUZZ", "150")) // 5  # of each kind
MOST = 64 << 20  # bytes that a damaged file may make us allocate
NOISE = np.random.default_rng(11)
#: what takes the place of a value in JSON
HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 3, 7, 1 << 31, 1 << 63, 1 << 70, -(1 << 63), 0.5, -0.0, 1e308, [], {},
    "", "x", "\0", "*", "(((((", "(a+)+$", "a" * 70_000, "model.layers.0", [[]], [0], [1 << 40],
    [-1, -1], [128, 0], {"x": {}}, ["q", 3], "bfloat16", "float8_e4m3fn",
]  # fmt: skip


def quantised(folder: Path) -> str:
    """Weights in blocks of 8-bit floats, of which the config is damaged."""
    codes = NOISE.integers(0, 0x7E, (16, 8), np.uint8).tobytes()
    scales = np.linspace(0.5, 1, 4, dtype=np.float32).tobytes()
    held = {
        "model.layers.0.q.weight": ("F8_E4M3", (16, 8), codes),
        "model.layers.0.q.weight_scale_inv": ("F32", (4, 1), scales),
        "model.norm.weight": ("F32", (2,), bytes(8)),
    }
    write_safetensors(folder / "model.safetensors", held)
    said = {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [4, 8],
        "modules_to_not_convert": ["model.norm"], "activation_scheme": "dynamic",
        "config_groups": {"g": {"weights": {"num_bits": 8, "strategy": "block",
                                            "block_structure": [4, 8]}, "targets": ["Linear"]}},
    }  # fmt: skip
    config = {"model_type": "x", "quantization_config": said}
    (folder / "config.json").write_text(json.dumps(config))
    return "config.json"


def adapter(folder: Path) -> str:
    """An adapter of two modules, of which the config is damaged."""
    held: dict[str, Any] = {}
    for module, (out, into) in {"q": (8, 8), "up": (16, 8)}.items():
        name = f"base_model.model.model.layers.0.{module}"
        held[f"{name}.lora_A.weight"] = ("F32", (2, into), np.ones((2, into), "<f4").tobytes())
        held[f"{name}.lora_B.weight"] = ("F32", (out, 2), np.ones((out, 2), "<f4").tobytes())
    write_safetensors(folder / "adapter_model.safetensors", held)
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "up"], "bias": "none",
        "rank_pattern": {"q": 2}, "alpha_pattern": {"^up$": 8}, "use_rslora": False,
        "fan_in_fan_out": False, "modules_to_save": None, "use_dora": False, "lora_bias": False,
        "layers_pattern": None, "layers_to_transform": None, "base_model_name_or_path": "x",
        "target_parameters": None, "megatron_config": None, "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return "adapter_config.json"


def damaged_json(raw: bytes, noise: random.Random) -> bytes:
    """Some value of an object, at any depth, is another, gone, or there under another name."""
    said = json.loads(raw)
    for _ in range(noise.choice([1, 1, 2, 4])):
        at = said
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = noise.choice(keys)
            if isinstance(at[key], (dict, list)) and at[key] and noise.random() < 0.7:
                at = at[key]
                continue
            match noise.randrange(5):
                case 0:
                    del at[key]
                case 1 if isinstance(at, dict):
                    at[noise.choice(["r", "quant_method", "x", *keys])] = deepcopy(at[key])
                case _:
                    at[key] = deepcopy(noise.choice(HOSTILE))
            break
    return json.dumps(said).encode()


def damaged_bytes(raw: bytes, noise: random.Random) -> bytes:
    out = bytearray(raw)
    for _ in range(noise.choice([1, 1, 3])):
        at = noise.randrange(len(out) or 1)
        match noise.randrange(4):
            case 0:
                out[at : at + 1] = noise.randbytes(1)
            case 1:
                del out[at : at + noise.choice([1, 4, len(out)])]
            case 2:
                out[at:at] = out[at // 2 : at // 2 + noise.choice([1, 9])]
            case _:
                out[at : at + 4] = noise.choice([b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f"])
    return bytes(out)


def number(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


def damaged_pickle(raw: bytes, noise: random.Random) -> bytes:
    """Some number is another; or an opcode is gone, there twice, in another's place, or damaged."""
    codes = list(pickletools.genops(raw))
    ends = [*(int(at or 0) for _, _, at in codes[1:]), len(raw)]
    parts = [raw[int(at or 0) : end] for (_, _, at), end in zip(codes, ends, strict=True)]
    numbers = [i for i, (code, _, _) in enumerate(codes) if code.name.startswith("BININT")]
    if noise.random() < 0.5:
        at = noise.choice(numbers)
        parts[at] = number(noise.choice([0, 1, 2, 3, 4, 8, 16, 1 << 30, -1]))
        return b"".join(parts)
    for _ in range(noise.choice([1, 1, 2, 5])):
        at, other = noise.randrange(len(parts)), noise.randrange(len(parts))
        match noise.randrange(4):
            case 0:
                parts[at] = b""
            case 1:
                parts[at] = parts[other]
            case 2:
                parts[at], parts[other] = parts[other], parts[at]
            case _:
                parts[at] = damaged_bytes(parts[at] or b"N", noise)
    return b"".join(parts)


def damaged_rank(raw: bytes, noise: random.Random) -> bytes:
    """The pickle in a file of torch, whose checksums fit; or any bytes of it."""
    if noise.random() < 0.25:
        return damaged_bytes(raw, noise)
    into = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(into, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, damaged_pickle(data, noise) if name.endswith("data.pkl") else data)
    return into.getvalue()


def damaged_pieces(raw: bytes, noise: random.Random) -> bytes:
    """What the metadata says of the places of pieces, or the shapes in the header."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    if noise.random() < 0.6:
        inner = header["__metadata__"][SHARDING].encode()
        bad = (damaged_json if noise.random() < 0.7 else damaged_bytes)(inner, noise)
        header["__metadata__"][SHARDING] = bad.decode("utf-8", "replace")
        text = json.dumps(header).encode()
    else:
        text = damaged_json(raw[8 : 8 + length], noise)
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def damaged_config(raw: bytes, noise: random.Random) -> bytes:
    return (damaged_json if noise.random() < 0.85 else damaged_bytes)(raw, noise)


Make = Callable[[Path], str]
KINDS: dict[str, tuple[Make, Callable[[bytes, random.Random], bytes], str | None]] = {
    "dcp": (dcp, damaged_pickle, None),
    "ranks": (ranks, damaged_rank, None),
    "pieces": (pieces, damaged_pieces, None),
    "quantised": (quantised, damaged_config, "dequantize"),
    "adapter": (adapter, damaged_config, "tuned_adapter"),
}


def outcome(base: Path, tuned: Path, options: dict[str, Any], most: int) -> bool:
    """Whether a diff is made; of no more than there is, and none of it with more than a line."""
    try:
        found = ckdiff.diff(base, tuned, workers=1, **options)
    except CkdiffError as error:
        line = error.one_line()
        assert "\n" not in line
        assert len(line) < 4000
        return False
    assert 0 <= found.rules["exact"]["changed"] <= found.elements <= most
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_refused_or_compared(tmp_path: Path, kind: str) -> None:
    make, damage, option = KINDS[kind]
    good = tmp_path / "good"
    (good if kind in ("quantised", "adapter") else tmp_path).mkdir(exist_ok=True)
    name = make(good)
    raw, bad = (good / name).read_bytes(), tmp_path / "bad"
    bad.mkdir()
    for path in good.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    whole, most = good, ELEMENTS
    if kind == "adapter":
        whole = tmp_path / "whole"
        whole.mkdir()
        torch.save(STATE, whole / "pytorch_model.bin")
    elif kind == "quantised":
        most = 16 * 8 + 4 + 2
    noise, read, peak = random.Random(kind), 0, 0

    def options(folder: Path) -> dict[str, Any]:
        return {} if option is None else {option: folder if "adapter" in option else True}

    sides = (whole, whole) if kind == "adapter" else (whole, bad)
    assert outcome(*sides, options(bad), most)
    tracemalloc.start()
    try:
        for _ in range(COUNT):
            (bad / name).write_bytes(damage(raw, noise))
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            read += outcome(*sides, options(bad), most)
            peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    assert read < COUNT or kind == "quantised"  # where a config cannot be, that is noted
    assert peak < MOST
