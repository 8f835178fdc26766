"""Models of any family that transformers knows, so small that they cost nothing."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy.typing as npt

Tensors = dict[str, npt.NDArray[Any]]

#: what is small in a tiny model, in the words of one family or another
_SMALL: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "hidden_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "expert_dim"), 24),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "depth", "num_blocks"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "linear_num_value_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_layer_start_index", "n_group", "topk_group", "n_groups"), 1),
    **dict.fromkeys(("decoder_sparse_step", "mamba_n_groups", "num_dense_layers"), 1),
    **dict.fromkeys(("first_k_dense", "zero_expert_num"), 1),
    **dict.fromkeys(("q_lora_rank", "shared_intermediate_size", "mamba_d_head"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "sliding_window"), 16),
    **dict.fromkeys(("head_dim", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "mamba_d_state", "mamba_dt_rank", "ssm_state_size"), 4),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), 64),
    "linear_num_key_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type")
_CLASSES = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "PRETRAINING", "MASKED_LM")


def _shrink(config: Any, depth: int = 0) -> None:
    for key, value in _SMALL.items():
        old = getattr(config, key, None)
        if (isinstance(old, int | float) and not isinstance(old, bool)) or (
            key == "pad_token_id" and hasattr(config, key)
        ):
            with contextlib.suppress(AttributeError):  # what follows from another
                setattr(config, key, value)
    for key in _LISTS:
        kinds = list(dict.fromkeys(getattr(config, key, None) or ()))
        if kinds:
            with contextlib.suppress(AttributeError):
                setattr(config, key, (kinds * 2)[:2])
    if depth < 3:
        for inner in list(vars(config).values()):
            if hasattr(inner, "model_type") and hasattr(inner, "to_dict"):
                _shrink(inner, depth + 1)


def tiny_model(family: str) -> Any:
    """A model of a family of transformers, with random weights."""
    import torch
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[family]()
    _shrink(config)
    tables = [f"MODEL_FOR_{kind}_MAPPING_NAMES" for kind in _CLASSES] + ["MODEL_MAPPING_NAMES"]
    known = next(
        names[family]
        for names in (getattr(modeling_auto, each, {}) for each in tables)
        if family in names
    )
    with torch.device("meta"):
        model = getattr(transformers, known if isinstance(known, str) else known[0])(config)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=generator))
    return model


def state_of(model: Any) -> Tensors:
    """What a model holds, under the names that it has there."""
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


def published(model: Any, state: Tensors) -> Tensors:
    """What ``save_pretrained`` would write of it, without writing."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    saved = revert_weight_conversion(model, tensors)
    return {name: value.contiguous().numpy() for name, value in saved.items()}
