"""How ``format-2`` was made, once, by 0.2.0: ``python tests/data/make_format_2.py EMPTY_FOLDER``.

It needs ``tests/helpers`` beside it. The checkpoints come from numpy; all else is what ckdiff made.
"""

from __future__ import annotations

import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from support import Tensor, write_safetensors
from timelines import some_run, write_run

import ckdiff

ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def bf16(*shape: int, seed: int) -> Tensor:
    values = np.random.default_rng(seed).standard_normal(shape) * 0.02
    return "BF16", shape, values.astype(ml_dtypes.bfloat16).tobytes()


def floats(dtype: str, tensor: Tensor) -> Tensor:
    """The same numbers, wider."""
    values = np.frombuffer(tensor[2], ml_dtypes.bfloat16)
    return dtype, tensor[1], values.astype({"F32": np.float32}[dtype]).tobytes()


def moved(tensor: Tensor, every: int) -> Tensor:
    """Some elements of a tensor, a bit further, and some of these much."""
    bits = np.frombuffer(tensor[2], np.uint16).copy()
    bits[::every] ^= 1
    bits[:: 4 * every] ^= 0x40
    return tensor[0], tensor[1], bits.tobytes()


def grown(root: Path) -> None:
    """Sides of two dtypes and numbers of rows, with a tied head and a tensor that is missing."""
    embed, norm = bf16(20, 16, seed=1), bf16(48, seed=2)
    query, gone = bf16(16, 16, seed=3), bf16(4, seed=4)
    base = {"model.embed.weight": embed, "model.layers.0.q_proj.weight": query}
    base |= {"model.layers.0.norm.weight": norm, "model.gone": gone}
    more = bf16(3, 16, seed=5)
    wide = "BF16", (23, 16), moved(embed, 7)[2] + more[2]
    tuned = {"model.embed.weight": wide, "lm_head.weight": wide}
    tuned["model.layers.0.q_proj.weight"] = moved(query, 5)
    tuned["model.layers.0.norm.weight"] = floats("F32", moved(norm, 3))
    write_safetensors(root / "old/model.safetensors", base)
    write_safetensors(root / "grown/model.safetensors", tuned)
    (root / "grown/config.json").write_text('{"model_type": "tiny", "tie_word_embeddings": true}')


def quantised(root: Path) -> None:
    """The query in 8-bit floats with a scale for each 8 x 8 of them."""
    codes = np.random.default_rng(6).integers(0, 0x78, (16, 16), np.uint8)
    scales = np.array([[0.25, 1], [2, 0.125]], np.float32)
    for name, changed in (("fp8", 0), ("fp8-tuned", 9)):
        codes.reshape(-1)[:changed] ^= 1
        tensors: dict[str, Tensor] = {
            "model.layers.0.q_proj.weight": ("F8_E4M3", (16, 16), codes.tobytes()),
            "model.layers.0.q_proj.weight_scale_inv": ("F32", (2, 2), scales.tobytes()),
        }
        write_safetensors(root / name / "model.safetensors", tensors)
        config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
        (root / name / "config.json").write_text(json.dumps(config))


def adapter(root: Path) -> None:
    low, high = bf16(2, 16, seed=7), bf16(16, 2, seed=8)
    name = "base_model.model.model.layers.0.q_proj.lora_"
    tensors = {f"{name}A.weight": floats("F32", low), f"{name}B.weight": floats("F32", high)}
    write_safetensors(root / "adapter/adapter_model.safetensors", tensors)
    (root / "adapter/adapter_config.json").write_text(json.dumps(ADAPTER))


def stream(root: Path, run: list[Path]) -> None:
    """A version of each kind; a run goes through the steps, and back by a full one."""
    out = root / "stream"
    steps = [*run, run[1], run[2]]
    for (base, tuned), how in zip(pairwise(steps), ("xor", "overwrite", "packed", "full", "xor"),
                                  strict=True):  # fmt: skip
        if how == "full":
            ckdiff.delta(base, tuned, out, encoding="xor", full=True)
        else:
            ckdiff.delta(base, tuned, out, encoding=how, as_version=how == "packed")


def stores(root: Path) -> None:
    old, new = root / "old", root / "grown"
    for rows in (False, True):
        name = "common" if rows else "retyped"
        ckdiff.diff(old, new, root / f"{name}.zarr", rules=["exact", "atol=1e-3"], stats=True,
                    common_rows=rows)  # fmt: skip
    ckdiff.diff(root / "fp8", root / "fp8-tuned", root / "dequantized.zarr", dequantize=True)
    ckdiff.diff(old, old, root / "adapter.zarr", tuned_adapter=root / "adapter")
    store = root / "common.zarr"
    ckdiff.combine("union", [store, store], root / "union.zarr", rule="exact")
    ckdiff.random_mask(store, root / "random.zarr", seed=7, rule="exact")
    ckdiff.principal(old, root / "low.zarr", like=store, kind="low", alpha=0.25, rule="exact")
    shape = root / "profiles.safetensors"
    ckdiff.structure([store], rule="exact", profiles=shape)
    for encoding in ("packed", "indices"):
        ckdiff.delta(old, new, root / f"{encoding}.ckdelta", encoding=encoding)
    ckdiff.delta(old, new, root / "masked.ckdelta", mask=store, rule="atol=1e-3")


def main(root: Path) -> None:
    run = write_run(root, some_run(11, 4))
    ckdiff.timeline(run, root / "run.timeline", stats=True)
    ckdiff.timeline(run[:3], root / "no-moves.timeline", first_moves=False)
    stream(root, run)
    grown(root)
    quantised(root)
    adapter(root)
    stores(root)
    for path in root.rglob(".weight_sync"):
        shutil.rmtree(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
