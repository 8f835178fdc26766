"""Names of language models, as published and as held: rules of ``spellings``."""

RULES: dict[str, str] = {
    "mixtral": r"\.block_sparse_moe\.>.mlp.",
    "phimoe": r"\.block_sparse_moe\.>.mlp. \.gate\.weight>.router.weight",
    "granitemoe": r"""
        block_sparse_moe\.input_linear\.weight>block_sparse_moe.experts.gate_up_proj
        block_sparse_moe\.output_linear\.weight>block_sparse_moe.experts.down_proj
        block_sparse_moe\.router\.layer\.weight>block_sparse_moe.router.weight""",
    "kimi_linear": r"""
        \.block_sparse_moe\.>.mlp.
        self_attn\.(f_a_proj|f_b_proj|f_proj|dt_bias|A_log)>self_attn.forget_gate.\1""",
    "ernie4_5_moe": r"mlp\.moe_statics\.>mlp.gate.moe_statics.",
    "exaone_moe": r"mlp\.e_score_correction_bias>mlp.gate.e_score_correction_bias",
    "nemotron_h": r"^backbone\.>model.",
    "nemotron_h_omni": r"""
        \.backbone\.>.model. ^mlp1\.0\.>multi_modal_projector.layer_norm.
        ^mlp1\.1\.>multi_modal_projector.linear_1. ^mlp1\.3\.>multi_modal_projector.linear_2.
        ^sound_encoder\.encoder\.>audio_tower. ^sound_projection\.norm\.>embed_audio.layer_norm.
        ^sound_projection\.linear(\d)\.>embed_audio.linear_\1.""",
    "gpt_neox": r"^embed_out\.>lm_head.",
    "lfm3_vl": r"patchifier>patch_embed ([qk])_layernorm>\1_norm",
    "aria_text": r"""
        experts\.fc1\.weight>experts.gate_up_proj experts\.fc2\.weight>experts.down_proj""",
    "axk1": r"\.post_mlp_layernorm>.mlp.post_mlp_layernorm",
    "axk2": r"W_down>mlp.fc1 W_up>mlp.fc2 self_attn\.q_b_proj\.>self_attn.q_gate_proj.",
    "bailing_hybrid": r"""
        ^model\.word_embeddings\.>model.embed_tokens. \.attention\.>.self_attn.
        self_attn\.(f_a_proj|f_b_proj|f_proj|dt_bias|A_log)>self_attn.forget_gate.\1
        \.self_attn\.dense\.>.self_attn.o_proj.
        \.mlp\.gate\.expert_bias>.mlp.gate.e_score_correction_bias""",
    "flint": r"self_attn\.softmax_offset>self_attn.sinks",
    "mimo_v2": r"self_attn\.attention_sink_bias>self_attn.sinks",
    "kolibri1": r"""
        moe\.router\.expert_bias>mlp.gate.e_score_correction_bias
        post_attn_norm>post_self_attn_layernorm post_ffn_norm>post_mlp_layernorm""",
    "hy_v3": r"""
        mlp\.router\.gate\.weight>mlp.gate.weight mlp\.expert_bias>mlp.e_score_correction_bias
        mlp\.shared_mlp\.>mlp.shared_experts.""",
    "hy_v4": r"""
        \.hc_pre\.hc_>.hc_ \.learnable_sink_param>.sinks \.linear_gate>.gate_proj
        \.hc_attn_layer\.hc_>.attn_hc. \.hc_mlp_layer\.hc_>.ffn_hc. \.hc_head_>.hc_""",
    "laguna": r"""
        mlp\.experts\.e_score_correction_bias>mlp.gate.e_score_correction_bias
        mlp\.shared_expert\.>mlp.shared_experts.""",
    "lfm3": r"\.self_attn\.gate_proj\.>.self_attn.g_proj.",
    "olmo_hybrid": r"""
        attention_layer_norm>input_layernorm feedforward_layer_norm>post_attention_layernorm""",
    "glm5_next": r"""
        self_attn\.(f_a_proj|f_b_proj|f_proj|dt_bias|A_log)>self_attn.forget_gate.\1
        hc_(attn|ffn)_(fn|base|scale)>\1_hc.\2""",
    "hrm_text": r"\.attn\.(o_proj|gqkv_proj)>.self_attn.\1",
    "deepseek_v4": r"""
        \.attn\.>.self_attn. \.ffn\.>.mlp. \.indexer\.compressor\.>.compressor.indexer.
        ^embed\.weight>model.embed_tokens.weight ^head\.weight>lm_head.weight
        ^(hc_head)_>model.\1.hc_ !^(layers|norm)\.>model.\1. \.attn_norm\.>.input_layernorm.
        \.ffn_norm\.>.post_attention_layernorm. hc_(attn|ffn)_(fn|base|scale)>\1_hc.\2
        \.attn_sink>.sinks \.indexer\.weights_proj\.>.compressor.indexer.scorer.weights_proj.
        \.indexer\.wq_b\.>.compressor.indexer.q_b_proj.
        (self_attn|compressor.*)\.norm\.>\1.kv_norm. \.ape>.position_bias \.wq_a\.>.q_a_proj.
        \.self_attn\.wq_b\.>.self_attn.q_b_proj. \.wkv\.>.kv_proj. \.wgate\.>.gate_proj.
        \.wo_a\.>.o_a_proj. \.wo_b\.>.o_b_proj. \.q_norm\.>.q_a_norm.
        \.gate\.bias>.gate.e_score_correction_bias
        \.shared_experts\.w1\.>.shared_experts.gate_proj.
        \.shared_experts\.w2\.>.shared_experts.down_proj.
        \.shared_experts\.w3\.>.shared_experts.up_proj.""",
    "mistral_large4_text": r"""
        !\.attention\.>.self_attn. !\.wq\.>.q_proj. !\.wo\.>.o_proj.
        \.wkv_a_with_mqa\.>.kv_a_proj_with_mqa. \.wkv_b\.>.kv_b_proj.
        !\.attention_norm\.>.input_layernorm. !\.ffn_norm\.>.post_attention_layernorm.
        \.kv_a_norm\.>.kv_a_layernorm. !\.feed_forward\.>.mlp. !\.gate\.>.mlp.gate.
        !\.experts\.>.mlp.experts. !\.shared_experts\.>.mlp.shared_experts.
        \.ssmax_scaling\.s>.softmax_scaling.scale \.ssmax_scaling\.b>.softmax_scaling.bias""",
    "nomic_bert": r"""
        encoder\.layers>layers emb_ln>embeddings.LayerNorm attn\.out_proj>self_attn.o_proj
        fc11>up_proj fc12>gate_proj !fc2>down_proj !norm1>post_attention_layernorm
        !norm2>post_mlp_layernorm attn\.Wqkv>self_attn.Wqkv""",
    "jina_embeddings_v3": r"""
        emb_ln>embeddings.LayerNorm encoder\.layers>layers mixer\.out_proj>self_attn.o_proj
        !norm1>post_attention_layernorm !norm2>post_mlp_layernorm mixer\.Wqkv>self_attn.Wqkv""",
    "gte": r"""
        ^new\.> encoder\.layer>layers attention\.o_proj>self_attn.o_proj
        attn_ln>post_attention_layernorm mlp_ln>post_mlp_layernorm
        lm_head\.norm>lm_head.layer_norm attention\.qkv_proj>self_attn.qkv_proj""",
    "ultrabert": r"^ultrabert\.>model. ^cls\.>head.decoder.",
    "ultravbert": r"^head\.decoder\.>lm_head. ^head\.>projection_head.",
    "esm": r"LayerNorm\.gamma>LayerNorm.weight LayerNorm\.beta>LayerNorm.bias",
    "weight_norm": r"""
        \.weight_g>.parametrizations.weight.original0
        \.weight_v>.parametrizations.weight.original1""",
    "timesfm": r"ff0>fc1 ff1>fc2",
}
