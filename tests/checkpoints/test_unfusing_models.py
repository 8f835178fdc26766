"""Fused against per-part names, by transformers itself: what a model holds and what it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckdiff.checkpoints.views.unfusing import unfuse
from tests.helpers.naive_pieces import Tensors, table_of, viewed
from tests.helpers.tiny_models import published, state_of, tiny_model

#: families whose saved names are others than those in memory, and that pair whole
WHOLE = """
    afmoe altclip aria aria_text audioflamingo3 axk1 axk2 aya_vision bailing_hybrid beam
    beit cohere2_moe colpali cosmos3_edge cosmos3_omni deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v4 deit dinov2 dinov2_with_registers dinov3_convnext dinov3_vit ernie4_5_moe
    exaone_moe flex_olmo flint fuyu gemma3 glm4_moe glm4_moe_lite glm4v_moe glm5_next
    glm_moe_dsa glmasr gpt_neox granite_speech granitemoe granitemoehybrid granitemoeshared
    gte hrm_text hy_v3 hy_v4 hyperclovax_vision_v2 ijepa internvl jamba jina_embeddings_v3
    kimi_linear kolibri1 laguna lfm3 lfm3_vl llava llava_next llava_next_video
    llava_onevision longcat_flash mellum mimi_encoder mimo_v2_flash minimax minimax_m2
    mistral3 mistral_large4_text mixtral molmo2 molmo2_text musicflamingo nemo_speechlm
    nemotron_h nemotron_h_omni nomic_bert olmo_hybrid olmoe paddleocr_vl paligemma phimoe
    pixio qianfan_ocr qwen2_5_omni_thinker qwen2_5_vl qwen2_audio qwen2_moe qwen2_vl
    qwen3_5_moe_text qwen3_moe qwen3_next qwen3_omni_moe_thinker radio sapiens2 segformer
    solar_open swin t5gemma2 timesfm2_5 tipsv2_text_model tipsv2_vision_model ultrabert
    ultravbert unlimited_ocr video_llava videomae vipllava vit vit_msn vivit voxtral
    voxtral_realtime yolos
"""
#: families of which a part is rotated, in a way that only the configuration tells
IN_PART = {
    "kimi_k25": "qkv",
    "gradium_phonon_tts": "in_proj",
    "mistral_large4": "attention.wq",
    "step3p7": "in_proj",
}


def uncompared(base: Tensors, tuned: Tensors) -> tuple[set[str], list[str], tuple[str, ...]]:
    """Unpaired names, changed tensors, and notes."""
    result = unfuse(table_of(base), table_of(tuned))
    left = viewed(base, result.base, slow=False)
    right = viewed(tuned, result.tuned, slow=False)
    both = left.keys() & right.keys()
    odd = {name for name in both if left[name].shape != right[name].shape}
    changed = [name for name in both - odd if not np.array_equal(left[name], right[name])]
    return (left.keys() ^ right.keys()) | odd, changed, result.notes


def checked_both_ways(held: Tensors, saved: Tensors) -> None:
    assert held.keys() != saved.keys()
    for base, tuned in ((held, saved), (saved, held)):
        unpaired, changed, notes = uncompared(base, tuned)
        assert unpaired == set()
        assert changed == []
        assert len(notes) == 1


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "phimoe", "radio"])
def test_what_is_held_against_what_is_saved(family: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    saved: dict[str, Any] = load_file(tmp_path / "model.safetensors")
    held = {name: a for name, a in state_of(model).items() if not _tied(model, name)}
    checked_both_ways(held, saved)


def _tied(model: Any, name: str) -> bool:
    return name in set(getattr(model, "all_tied_weights_keys", None) or ())


@pytest.mark.parametrize("family", ["phi3", "gpt_oss", "llama"])
def test_families_that_are_saved_as_they_are_held(family: str) -> None:
    model = tiny_model(family)
    held = state_of(model)
    result = unfuse(table_of(held), table_of(published(model, held)))
    assert (result.base, result.tuned, result.notes) == (None, None, ())


def test_phi3_against_its_parts() -> None:
    held = state_of(tiny_model("phi3"))
    parts: Tensors = {}
    for name, array in held.items():
        if name.endswith("qkv_proj.weight"):
            for leaf, rows in (("q", slice(0, 32)), ("k", slice(32, 48)), ("v", slice(48, 64))):
                parts[name.replace("qkv_proj", f"{leaf}_proj")] = array[rows]
        elif name.endswith("gate_up_proj.weight"):
            for i, leaf in enumerate(("gate_proj", "up_proj")):
                parts[name.replace("gate_up_proj", leaf)] = array[i * 48 : (i + 1) * 48]
        else:
            parts[name] = array
    checked_both_ways(held, parts)


def test_gpt_oss_against_its_parts() -> None:
    held = state_of(tiny_model("gpt_oss"))
    parts: Tensors = {}
    for name, array in held.items():
        home, there, leaf = name.partition(".experts.")
        if not there:
            parts[name] = array
            continue
        tail = "bias" if leaf.endswith("_bias") else "weight"
        for n, each in enumerate(array):
            front = f"{home}.experts.{n}"
            if leaf.startswith("down"):
                parts[f"{front}.down_proj.{tail}"] = each.T
            else:
                parts[f"{front}.gate_proj.{tail}"] = each[..., ::2].T
                parts[f"{front}.up_proj.{tail}"] = each[..., 1::2].T
    checked_both_ways(held, {name: np.ascontiguousarray(a) for name, a in parts.items()})


@pytest.mark.parametrize("family", WHOLE.split())
def test_every_family_pairs_whole(family: str) -> None:
    model = tiny_model(family)
    held = state_of(model)
    checked_both_ways(held, published(model, held))


@pytest.mark.parametrize("family", IN_PART)
def test_what_is_rotated_is_left(family: str) -> None:
    model = tiny_model(family)
    held = state_of(model)
    saved = published(model, held)
    for base, tuned in ((held, saved), (saved, held)):
        unpaired, changed, _ = uncompared(base, tuned)
        assert any(IN_PART[family] in name for name in unpaired)
        assert all("att" in name or "wqkv" in name for name in unpaired)
        assert changed == []


def test_one_element_of_a_saved_model() -> None:
    model = tiny_model("mixtral")
    held = state_of(model)
    saved = published(model, held)
    held["model.layers.1.mlp.experts.gate_up_proj"][2, 48 + 5, 7] += 1
    result = unfuse(table_of(saved), table_of(held))
    seen = viewed(held, result.tuned, slow=False)
    changed = {name for name, array in saved.items() if (seen[name] != array).any()}
    assert changed == {"model.layers.1.block_sparse_moe.experts.2.w3.weight"}
    (name,) = changed
    assert np.argwhere(seen[name] != saved[name]).tolist() == [[5, 7]]
