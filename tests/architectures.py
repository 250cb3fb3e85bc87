"""Tiny random models of every causal-LM architecture that transformers knows, from their config classes alone.

A field's name says what it is (hidden sizes, layers, heads, experts, windows ...), so one table shrinks nearly all of
them; what an architecture needs beyond that stands in CORRECTIONS. Windows and chunks are made shorter than the
examples, so that a lost window is a wrong number.
"""

import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ARCHITECTURES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY, WINDOW, CHUNK = 97, 7, 8

ROPE = {"rope_type": "default", "rope_theta": 1e4}
LAYERS = r"num_(hidden_|decoder_|encoder_)?layers|n_layers?|(de|en)coder_layers|num_blocks|num_(de|en)coder_layers"
SIZES: tuple[tuple[str, Any], ...] = (
    # name of a config's field -> its value in a tiny model; of several that match a whole name the last one wins
    (r"(text_|decoder_)?vocab_size(_per_layer_input)?|padded_vocab_size|src_vocab_size|tgt_vocab_size", VOCABULARY),
    (r"pad_token_id|padding_idx", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id|sep_token_id|cls_token_id", 2),
    (r".*(dropout|drop|pdrop|layerdrop)(_rate|_prob|_p)?|.*_dropout_.*|.*jitter_noise|jitter_eps", 0.0),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|context_length|seq_length", 256),
    (r"sliding_window|attention_window_size|window_size", WINDOW),
    (r"attention_chunk_size", CHUNK),
    (r"(chunk|mamba_chunk|block)_size", 8),
    (r"hidden_size|d_model|n_embd|emb_dim|lru_width|embedding_size|word_embed_proj_dim|hidden_dim|dim_model", 32),
    (r"attention_hidden_size|dim|text_hidden_size|out_hidden_size|hidden_size_global", 32),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|ffn_size)|n_inner|dff|dim_ff|mlp_hidden_size|d_ff", 48),
    (r"intermediate_size_mlp", 48),
    (LAYERS, 2),
    (r"num_key_value_heads|num_kv_heads|multi_query_group_num|n_kv_heads|swa_num_key_value_heads", 2),
    (r".*num_attention_heads|n_heads?|num_heads|(de|en)coder_attention_heads|num_(de|en)coder_attention_heads", 4),
    (r"mamba_n_heads|linear_num_heads", 8),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|num_local_experts", 4),
    (r"(num_)?experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|num_selected_experts|top_k_experts", 2),
    (r"n_group|topk_group|num_shared_experts|n_shared_experts|first_k_dense_replace|num_expert_group", 1),
    (r"index_topk|keep_window_size", 6),
    (r"(q|kv|o)_lora_rank|rotary_dim", 8),
    (r"head_dim|(v|qk_nope|qk_rope|global|swa|mamba|linear(_key|_value)?|index)_head_dim|mamba_d_head", 8),
    (r"mamba_d_state|ssm_state_size|state_size", 8),
    (r"mamba_d_ssm", 64),
)
SWITCHES: dict[str, dict[str, Any]] = {
    "is_decoder": {"is_decoder": True},  # models that began as encoders look ahead without it
}

QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 97,
    "split_ngram_parts": 1,
    "make_ngram_vocab_size_divisible_by": 1,
}
DOTS3 = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 8,
    "swa_kv_lora_rank": 8,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
DOTS3_AUDIO = {"adapter_input_size": 32, "adapter_out_dim": 32}
NOT_MADE: dict[str, str] = {
    # what cannot be made here, or at all, from a config alone: no row of the table is measured for these
    "gemma3n": "its vision part needs the library timm; its text part is `gemma3n_text`",
    "gemma4_assistant": "drafts for another model, from whose hidden states it computes",
    "gemma4_unified_assistant": "drafts for another model, from whose hidden states it computes",
    "reformer": "its reversible layers' backward pass fails in transformers itself",
    "musicgen": "predicts audio codes, four at a time; transformers does not load it as a language model",
    "musicgen_melody": "predicts audio codes, four at a time; transformers does not load it as a language model",
}
CORRECTIONS: dict[str, dict[str, Any]] = {
    # what a config's class cannot tell by the names of its fields
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "cpmant": {"prompt_types": 4, "prompt_length": 4, "segment_types": 4},
    "blt": {"encoder_hash_byte_group_vocab": 97},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}, "rope_parameters": ROPE},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": DOTS3_AUDIO,
    },
    "dots3_note_text": DOTS3,
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 4}},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "got_ocr2": {"vision_config": {"image_size": 32, "output_channels": 8, "mlp_dim": 48}},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling2_text": {"sliding_window_size": WINDOW, "unpadded_vocab_size": 97},
    "inkling_text": {"sliding_window_size": WINDOW},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "num_layers": 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "moshi": {"audio_vocab_size": VOCABULARY},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "feed_forward_size": 48,
        "attention_head_size": 8,
    },
    "roc_bert": {"pronunciation_vocab_size": 97, "shape_vocab_size": 97},
    "xmod": {"default_language": "en_XX"},
    "qwen2_moe": {"num_experts": 4},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 2},
    "zamba": {
        "attention_hidden_size": 64,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 64,
        "num_key_value_heads": 4,
        "n_mamba_heads": 8,
        "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(architecture: str) -> Any:
    """The architecture's own config class, shrunk; its text and other parts too."""
    default = AutoConfig.for_model(architecture)
    return type(default)(**_shrunk(default, CORRECTIONS.get(architecture, {})))


def tiny_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """Seeded random weights, twice as wide as usual, so that attention and logits matter; in fp32."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return model


def _shrunk(default: PreTrainedConfig, corrections: dict[str, Any]) -> dict[str, Any]:
    """Arguments for a config class: its fields by SIZES, its parts by the same rule, corrections over them."""
    values: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        part = vars(default).get(name)
        if isinstance(part, PreTrainedConfig):
            own = corrections.get(name, {})
            values[name] = _shrunk(part, own) | {"model_type": part.model_type}
        elif isinstance(value, (bool, list, dict)) or value is None:
            values |= SWITCHES.get(name, {})
        else:
            sizes = [size for pattern, size in SIZES if re.fullmatch(pattern, name)]
            if sizes:
                values[name] = sizes[-1]
    layers = next((name for name in values if re.fullmatch(LAYERS, name)), None)
    kinds = list(dict.fromkeys(vars(default).get("layer_types") or ()))
    if (
        layers and len(kinds) > 1 and "layer_types" in default.to_dict()
    ):  # one layer of each kind; several models want full attention last
        values["layer_types"] = sorted(kinds, key=lambda kind: kind == "full_attention")
        values[layers] = len(kinds)
    blocks = list(dict.fromkeys(vars(default).get("mlp_layer_types") or ()))
    if layers and len(blocks) > 1:
        values["mlp_layer_types"] = [blocks[0], *[blocks[-1]] * (values[layers] - 1)]
    if "kv_lora_rank" in values:  # latent attention has as many key heads as query heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    return values | {
        name: value for name, value in corrections.items() if not isinstance(value, dict) or name not in values
    }
