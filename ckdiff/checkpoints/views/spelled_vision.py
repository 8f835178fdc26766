"""Names of models with vision or audio, as published and as held: rules of ``spellings``."""

RULES: dict[str, str] = {
    "llava": r"""
        ^language_model\.lm_head>lm_head ^language_model\.model>language_model
        ^(vision_embed_tokens|vision_model|vision_tower|image_tower|video_tower|image_newline)>model.\1
        ^(multi_modal_projector|audio_tower|acoustic_tokenizer_encoder)>model.\1
        ^(semantic_tokenizer_encoder|language_model)>model.\1 !^(encoder|projector)>model.\1""",
    "qwen2_vl": r"!^model(?!\.(language_model|visual))>model.language_model ^visual>model.visual",
    "qwen2_5_omni": r"""
        ^thinker\.> ^(audio_tower|visual)>model.\1
        !^model(?!\.(language_model|visual|audio_tower))>model.language_model""",
    "emu3": r"""
        ^text_model\.lm_head>lm_head ^text_model\.model>text_model
        ^(text_model|vqmodel)>model.\1""",
    "paddleocr_vl": r"""
        ^mlp_AR>model.projector ^visual>model.visual
        !^model(?!\.(visual|projector|language_model))>model.language_model""",
    "kimi_k25": r"""
        ^language_model\.model>model.language_model ^language_model\.lm_head>lm_head
        encoder\.blocks\.(\d+)\.norm1>encoder.blocks.\1.norm2
        encoder\.blocks\.(\d+)\.norm0>encoder.blocks.\1.norm1
        encoder\.blocks\.(\d+)\.mlp\.fc1>encoder.blocks.\1.mlp.fc2
        encoder\.blocks\.(\d+)\.mlp\.fc0>encoder.blocks.\1.mlp.fc1
        encoder\.blocks\.(\d+)\.wo>encoder.blocks.\1.attn.proj
        encoder\.blocks\.(\d+)\.wqkv>encoder.blocks.\1.attn.rotated_qkv
        ^mm_projector\.proj\.0>model.mm_projector.in_proj
        ^mm_projector\.proj\.2>model.mm_projector.out_proj
        patch_embed\.pos_emb\.weight>patch_embed.pos_emb.position_embeddings
        ^vision_tower(\.encoder)?>model.vision_tower \.blocks\.>.layers.""",
    "step3p7": r"""
        ^vit_large_projector\.>model.multi_modal_projector.
        !^model\.(embed_tokens|layers|norm)\.>model.language_model.\1.
        \.moe\.gate\.weight>.mlp.gate.weight \.moe\.router_bias>.mlp.gate.e_score_correction_bias
        \.moe\.(down_proj|gate_proj|up_proj)\.weight>.mlp.experts.\1
        \.share_expert\.>.mlp.shared_experts.
        ^vision_model\.conv1\.weight>vision_model.embeddings.patch_embedding.weight
        ^vision_model\.positional_embedding>vision_model.embeddings.position_embedding.weight
        ^vision_model\.transformer\.resblocks\.>vision_model.layers.
        ^vision_model\.ln_pre\.>vision_model.pre_layernorm.
        ^vision_model\.vit_downsampler>vision_model.downsampler \.ls_1\.gamma>.lambda_1
        \.ls_2\.gamma>.lambda_2 \.mlp\.c_fc\.>.mlp.fc1. \.mlp\.c_proj\.>.mlp.fc2.
        \.attn\.in_proj_>.self_attn.rotated_qkv. \.attn\.>.self_attn. \.ln_1\.>.layernorm_before.
        \.ln_2\.>.layernorm_after. ^vision_model\.>model.vision_model.""",
    "minimax_m3_vl": r"""
        ^language_model\.lm_head>lm_head ^language_model\.model\.>model.language_model.
        vision_model\.embeddings\.patch_embedding\.>embeddings.proj.
        vision_model\.encoder\.layers\.>layers. vision_model\.pre_layrnorm\.>pre_layrnorm.
        ^vision_tower\.>model.vision_tower. ^multi_modal_projector\.>model.multi_modal_projector.
        ^patch_merge_mlp\.linear_>model.multi_modal_projector.merge_linear_
        \.block_sparse_moe\.(experts|gate|shared_experts)\.>.mlp.\1.
        \.block_sparse_moe\.e_score>.mlp.gate.e_score
        \.self_attn\.index_(q_proj|k_proj|q_norm|k_norm)\.>.self_attn.indexer.\1.""",
    "cosmos3": r"""
        !^(layers|embed_tokens|norm)\.>model.language_model.\1.
        ^(blocks|merger|patch_embed|pos_embed|deepstack_merger_list)\.>model.visual.\1.
        \.self_attn\.to_(q|k|v)\.>.self_attn.\1_proj. \.self_attn\.to_out\.>.self_attn.o_proj.
        \.self_attn\.norm_(q|k)\.>.self_attn.\1_norm.""",
    "cosmos3_edge": r"""
        !^(layers|embed_tokens|norm)\.>model.language_model.\1.
        \.self_attn\.to_(q|k|v)\.>.self_attn.\1_proj. \.self_attn\.to_out\.>.self_attn.o_proj.
        \.mlp\.up_proj\.>.mlp.fc1. \.mlp\.down_proj\.>.mlp.fc2.""",
    "gemma4_unified": r"""
        embed_vision\.embedding_projection>embed_vision.multimodal_embedder.embedding_projection
        vision_embedder\.(patch_ln1|patch_dense|patch_ln2|pos_embedding|pos_norm)>embed_vision.\1""",
    "hyperclovax": r"""
        ^model\.language_model\.lm_head>lm_head ^model\.vision_projector>model.projector
        ^model\.language_model\.model\.>model.language_model.""",
    "colpali": r"^vlm\.language_model\.model\.>vlm.language_model. ^vlm\.model\.>vlm.",
    "t5gemma2": r"(^|^model\.)encoder\.(embed_tokens|layers|norm)\.>\1encoder.text_model.\2.",
    "mimi_encoder": r"^encoder\.layers>encoder_seanet.layers",
    "deepseek_ocr2": r"""
        sam_model\.blocks\.(\d+)\.norm>vision_tower.sam_encoder.layers.\1.layer_norm
        sam_model\.blocks\.>vision_tower.sam_encoder.layers.
        sam_model\.patch_embed\.proj\.>vision_tower.sam_encoder.patch_embed.projection.
        sam_model\.neck\.0\.>vision_tower.sam_encoder.neck.conv1.
        sam_model\.neck\.1\.>vision_tower.sam_encoder.neck.layer_norm1.
        sam_model\.neck\.2\.>vision_tower.sam_encoder.neck.conv2.
        sam_model\.neck\.3\.>vision_tower.sam_encoder.neck.layer_norm2.
        sam_model\.net_2\.>vision_tower.sam_encoder.proj.conv1.
        sam_model\.net_3\.>vision_tower.sam_encoder.proj.conv2.
        sam_model\.>vision_tower.sam_encoder.
        qwen2_model\.model\.model\.>vision_tower.vision_encoder.
        qwen2_model\.query_(\d+)>vision_tower.query_\1_resolution
        vision_model\.transformer\.>vision_tower.vision_encoder.encoder.
        vision_model\.>vision_tower.vision_encoder. projector\.layers\.>multi_modal_projector.
        view_seperator>view_separator
        !^(model\.)?(embed_tokens|layers|norm)\.>\1language_model.\2.""",
    "mistral_large4": r"""
        ^vision_encoder\.>model.vision_tower. ^tok_embeddings\.>model.language_model.embed_tokens.
        ^lerope\.alpha>model.language_model.rotary_emb.alpha ^output\.>lm_head.
        ^pre_mm_projector_norm\.>model.multi_modal_projector.norm.
        ^patch_merger\.>model.multi_modal_projector.patch_merger.
        ^vision_language_adapter\.w_in\.>model.multi_modal_projector.linear_1.
        ^vision_language_adapter\.w_out\.>model.multi_modal_projector.linear_2.
        (feed_forward|shared_experts)\.w1\.>\1.gate_proj.
        (feed_forward|shared_experts)\.w2\.>\1.down_proj.
        (feed_forward|shared_experts)\.w3\.>\1.up_proj. (vision_tower.*)\.wv\.>\1.v_proj.
        (vision_tower.*)\.wo\.>\1.o_proj. !^norm\.>model.language_model.norm.
        ^layers\.(\d+)\.attention\.>model.language_model.layers.\1.self_attn.
        ^layers\.(\d+)\.attention_norm\.>model.language_model.layers.\1.input_layernorm.
        ^(layers\.\d+)\.ffn_norm\.>model.language_model.\1.post_attention_layernorm.
        ^layers\.(\d+)\.(gate|experts|shared_experts)\.>model.language_model.layers.\1.mlp.\2.
        ^layers\.(\d+)\.feed_forward\.>model.language_model.layers.\1.mlp.
        (language_model.*)\.wq\.>\1.q_proj. (language_model.*)\.wo\.>\1.o_proj.
        \.wkv_a_with_mqa\.>.kv_a_proj_with_mqa. \.wkv_b\.>.kv_b_proj.
        \.kv_a_norm\.>.kv_a_layernorm. \.ssmax_scaling\.s>.softmax_scaling.scale
        \.ssmax_scaling\.b>.softmax_scaling.bias""",
    "nemo_speechlm": r"""
        ^perception\.encoder\.asr_encoder\.>model.audio_tower.asr_encoder.
        diarization_model\.encoder\.>diarization_model.model.audio_tower.
        ^ctc_timestamp\.decoder\.transformer\.>model.word_timestamp_encoder.
        ^ctc_timestamp\.decoder\.upsample\.>model.word_timestamp_encoder.upsampler.
        ^ctc_timestamp\.decoder\.decoder_layers\.0\.>word_timestamp_head.
        diarization_model\.sortformer_modules\.>diarization_model.
        ^perception\.encoder\.(diarization_model)>model.audio_tower.\1
        diarization_model\.encoder_proj\.>diarization_model.model.proj.
        diarization_model\.subpixel_upsample\.>diarization_model.model.upsampler.conv.
        diarization_model\.first_hidden_to_hidden\.>diarization_model.classifier.dense.
        diarization_model\.single_hidden_to_spks\.>diarization_model.classifier.out_proj.
        diarization_model\.learnable_sil_emb>diarization_model.silence_embeds
        ^perception\.encoder\.asr_norm\.>model.audio_tower.asr_norm.
        ^perception\.encoder\.diar_norm\.>model.audio_tower.speaker_norm.
        ^perception\.proj\.>model.multi_modal_projector. ^llm\.lm_head\.>lm_head.
        ^llm\.model\.embed_tokens\.>model.language_model.embeddings.
        ^llm\.model\.norm\.>model.language_model.norm_f. ^llm\.model\.>model.language_model.
        \.pre_encode\.proj\.>.embedder.projection. \.embed_norm\.>.input_layer_norm.
        \.final_norm\.>.layer_norm. \.norm(1|2)\.>.layer_norm\1.
        \.attn\.out_proj\.>.self_attn.o_proj. \.attn\.(q_norm|k_norm|w_qkv)\.>.self_attn.\1.
        \.ffn\.net\.0\.>.mlp.fc1. \.ffn\.net\.3\.>.mlp.fc2. \.mixer\._fp32_params\.>.mixer.
        \.experts\.gate_and_up_projs>.experts.turned_up_proj
        \.experts\.down_projs>.experts.turned_down_proj""",
    "molmo2_text": r"""
        \.attn_norm\.>.input_layernorm. \.ff_norm\.>.post_attention_layernorm.
        self_attn\.attn_out>self_attn.o_proj mlp\.ff_out>mlp.down_proj
        wte\.embedding>embed_tokens.shard_0.weight
        wte\.new_embedding>embed_tokens.shard_1.weight""",
    "molmo2": r"""
        (?<!image_vit\.)transformer\.ln_f\.>language_model.norm.
        (?<!image_vit\.)transformer\.blocks\.>language_model.layers.
        (?<!image_vit\.)transformer\.>language_model.
        vision_backbone\.image_vit\.transformer\.resblocks\.>vision_tower.layers.
        vision_backbone\.image_vit\.>vision_tower.
        vision_backbone\.(image_pooling_2d|image_projector)\.>multi_modal_projector.\1.
        (vision_tower.*)\.attention\.w(q|k|v|o)>\1.self_attn.\2_proj \.feed_forward\.w1>.mlp.fc1
        \.feed_forward\.w2>.mlp.fc2 \.attention_norm>.layer_norm1 \.ffn_norm>.layer_norm2
        image_pooling_2d\.w(q|k|v|o)>image_pooling_2d.\1_proj
        image_projector\.w1>image_projector.gate_proj
        image_projector\.w2>image_projector.down_proj image_projector\.w3>image_projector.up_proj
        \.attn_norm\.>.input_layernorm. \.ff_norm\.>.post_attention_layernorm.
        self_attn\.attn_out>self_attn.o_proj mlp\.ff_out>mlp.down_proj
        wte\.embedding>embed_tokens.shard_0.weight
        wte\.new_embedding>embed_tokens.shard_1.weight""",
    "inkling": r"""
        model\.llm\.layers>model.language_model.layers
        model\.llm\.embed_norm\.>model.language_model.embed_tokens.embed_norm.
        model\.llm\.embed\.>model.language_model.embed_tokens.
        model\.llm\.norm\.>model.language_model.norm. model\.llm\.unembed\.>lm_head.
        model\.visual\.layers\.linear_(\d+)>model.vision_tower.encoder_layers.\1.projection
        model\.visual\.layers\.norm_(\d+)>model.vision_tower.encoder_layers.\1.layer_norm
        model\.visual>model.vision_tower model\.audio\.final_norm>model.audio_tower.norm
        model\.audio\.encoder\.>model.audio_tower.embed_audio_tokens.embed_audio_tokens.
        mlp\.gate\.bias>mlp.gate.e_score_correction_bias
        experts\.shared_w13_weight>experts.gate_up_interleaved
        experts\.shared_w2_weight>experts.down_proj
        mlp\.experts\.w13_weight>mlp.experts.gate_up_interleaved
        mlp\.experts\.w2_weight>mlp.experts.down_proj mlp\.w13_dn\.>mlp.gate_up_interleaved.
        mlp\.w2_md\.>mlp.down_proj. attn\.wq_du>self_attn.q_proj attn\.wk_dv>self_attn.k_proj
        attn\.wv_dv>self_attn.v_proj attn\.wr_du>self_attn.r_proj attn\.wo_ud>self_attn.o_proj
        attn\.gate_attn>self_attn.gate_proj attn\.attn_sink_proj>self_attn.sink_proj
        \.attn\.(q_norm|k_norm|k_sconv|v_sconv|rel_logits_proj|q_l2_clip|k_l2_clip|rel_l2_clip)>.self_attn.\1
        ([kv]_sconv|attn_sconv|mlp_sconv)\.weight>\1.conv1d.weight
        mlp_norm>post_attention_layernorm \.attn_norm>.input_layernorm""",
    "qianfan_ocr": r"""
        ^vision_model\.>model.vision_tower. encoder\.layers\.>layers. \.ls(1|2)>.lambda_\1
        \.attn\.proj\.>.attention.projection_layer. \.attn\.qkv\.>.attention.qkv.
        \.norm1\.>.layernorm_before. \.norm2\.>.layernorm_after.
        \.embeddings\.class_embedding>.embeddings.cls_token
        \.embeddings\.position_embedding>.embeddings.position_embeddings
        \.embeddings\.patch_embedding\.>.embeddings.patch_embeddings.projection.
        ^language_model\.model\.>model.language_model. ^language_model\.lm_head\.>lm_head.
        ^mlp1\.0\.>model.multi_modal_projector.layer_norm.
        ^mlp1\.1\.>model.multi_modal_projector.linear_1.
        ^mlp1\.3\.>model.multi_modal_projector.linear_2.""",
    "vit": r"""
        encoder\.layer\.>layers. attention\.query>q_proj attention\.key>k_proj
        attention\.value>v_proj attention\.output\.dense>attention.o_proj
        intermediate\.dense>mlp.fc1 output\.dense>mlp.fc2""",
    "vit_mae": r"""
        attention\.query>q_proj attention\.key>k_proj attention\.value>v_proj
        attention\.output\.dense>attention.o_proj intermediate\.dense>mlp.fc1
        output\.dense>mlp.fc2""",
    "pixio": r"""
        encoder\.layer\.>layers. attention\.query>q_proj attention\.key>k_proj
        attention\.value>v_proj attention\.output\.dense>attention.o_proj
        intermediate\.dense>mlp.fc1 output\.dense>mlp.fc2 norm1>layernorm_before
        norm2>layernorm_after""",
    "dinov2": r"""
        attention\.attention\.query>attention.q_proj attention\.attention\.key>attention.k_proj
        attention\.attention\.value>attention.v_proj attention\.output\.dense>attention.o_proj
        mlp\.weights_out>mlp.down_proj""",
    "lw_detr": r"""
        attention\.attention\.query>attention.q_proj attention\.attention\.key>attention.k_proj
        attention\.attention\.value>attention.v_proj attention\.output>attention.o_proj""",
    "swin": r"""
        attention\.self\.query>attention.q_proj attention\.self\.key>attention.k_proj
        attention\.self\.value>attention.v_proj attention\.output\.dense>attention.o_proj
        attention\.self\.(relative_position_bias)_table>attention.\1.\1_table
        intermediate\.dense>mlp.fc1 output\.dense>mlp.fc2""",
    "segformer": r"""
        attention\.self\.query>attention.q_proj attention\.self\.key>attention.k_proj
        attention\.self\.value>attention.v_proj attention\.output\.dense>attention.o_proj
        encoder\.patch_embeddings\.(\d+)\.>stages.\1.patch_embeddings.
        encoder\.block\.(\d+)\.>stages.\1.blocks. encoder\.layer_norm\.(\d+)>stages.\1.layer_norm
        attention\.self\.sr>attention.sequence_reduction.sequence_reduction
        attention\.self\.layer_norm>attention.sequence_reduction.layer_norm mlp\.dense1>mlp.fc1
        mlp\.dense2>mlp.fc2 layer_norm_1>layernorm_before layer_norm_2>layernorm_after""",
    "detr": r"""
        backbone\.conv_encoder>backbone out_proj>o_proj layers\.(\d+)\.fc1>layers.\1.mlp.fc1
        layers\.(\d+)\.fc2>layers.\1.mlp.fc2
        encoder\.encoder\.(\d+)\.layers>encoder.aifi.\1.layers""",
    "maskformer": r"""
        (?<!stages\.\d\.)(?<!model\.)layers\.(\d+)\.fc1>layers.\1.mlp.fc1
        layers\.(\d+)\.fc2>layers.\1.mlp.fc2 backbone\.conv_encoder>backbone""",
    "d_fine": r"""
        out_proj>o_proj layers\.(\d+)\.fc1>layers.\1.mlp.layers.0
        layers\.(\d+)\.fc2>layers.\1.mlp.layers.1
        encoder\.encoder\.(\d+)\.layers>encoder.aifi.\1.layers""",
    "radio": r"""
        radio_model\.model\.patch_generator\.video_embedder>embeddings.video_patch_projection
        radio_model\.model\.patch_generator\.embedder>embeddings.patch_projection
        radio_model\.model\.patch_generator\.pos_embed>embeddings.position_embedding
        radio_model\.model\.patch_generator\.cls_token\.token>embeddings.cls_register_token
        radio_model\.model\.blocks>encoder.layer attn\.proj>attention.o_proj
        radio_model\.(input_conditioner|summary_idxs)>\1 attn\.qkv>attention.qkv""",
    "sapiens2": r"""
        ^cls_token>embeddings.cls_token ^storage_tokens>embeddings.register_tokens
        ^patch_embed\.projection\.>embeddings.patch_embeddings. ^blocks\.(\d+)\.>model.layer.\1.
        attn\.proj\.>attention.o_proj. \.attn\.w(q|k|v)\.>.attention.\1_proj.
        \.attn\.(q_norm|k_norm)\.>.attention.\1. attn\.gamma\.weight>layer_scale1.lambda1
        \.ffn\.w3\.>.mlp.down_proj. \.ln1\.>.norm1. \.ln2\.>.norm2. ^ln1\.>norm.
        \.ffn\.w12\.>.mlp.w12.""",
    "tipsv2_text": r"""
        ^text_encoder\.>text_model. ln_final\.>final_layer_norm.
        (?<!embeddings\.)token_embedding\.>embeddings.token_embedding.
        transformer\.resblocks\.>encoder.layers. \.ln_(1|2)\.>.layer_norm\1. \.attn\.>.self_attn.
        \.mlp\.c_fc\.>.mlp.fc1. \.mlp\.c_proj\.>.mlp.fc2.""",
    "tipsv2_vision": r"""
        ^vision_encoder\.>vision_model.
        patch_embed\.proj\.>embeddings.patch_embeddings.projection.
        (^|\.)(cls_token|mask_token|register_tokens)>\1embeddings.\2
        (^|\.)pos_embed>\1embeddings.position_embeddings (^|\.)norm\.>\1layernorm.
        blocks\.>encoder.layer. \.attn\.proj\.>.attention.o_proj. \.attn\.qkv\.>.attention.qkv.
        \.ls(1|2)\.gamma>.layer_scale\1.lambda1 \.mlp\.c_fc\.>.mlp.fc1. \.mlp\.c_proj\.>.mlp.fc2.
        \.mlp\.w3\.>.mlp.down_proj.""",
    "sam3_tracker": r"""
        ^detector_model\.vision_encoder\.backbone\.>vision_encoder.backbone.
        ^tracker_neck\.>vision_encoder.neck. ^tracker_model\.>""",
    "pp_doclayout_v4": r"""
        decoder_roor_order_head\.>decoder.successor_order_head.proj.
        decoder_roor_global_pointer\.>decoder.successor_order_head.global_pointer.
        decoder_order_head\.>decoder.relative_order_head.proj.
        decoder_global_pointer\.>decoder.relative_order_head.global_pointer.
        s2r_fusion\.a>decoder.relative_order_head.s2r_fusion.closure_weight out_proj>o_proj
        layers\.(\d+)\.fc1>layers.\1.mlp.fc1 layers\.(\d+)\.fc2>layers.\1.mlp.fc2
        encoder\.encoder\.(\d+)\.layers>encoder.aifi.\1.layers""",
    "dinov3": r"(?<!model\.)stages>model.stages (?<!model\.)layer\.>model.layer.",
    "yolos": r"encoder\.mid_position_embeddings>encoder.interpolation.mid_position_embeddings",
    "videomae": r"""
        attention\.attention\.q_bias>attention.attention.query.bias
        attention\.attention\.v_bias>attention.attention.value.bias""",
    "altclip": r"\.layer\.>.layers.",
}
