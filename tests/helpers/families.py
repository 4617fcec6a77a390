"""Tiny models of every family that the installed transformers can build from a configuration of a few numbers.

The sizes below are set where a family's configuration has a field of the name; EXTRAS has what a family needs besides.
"""

from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from fedray.types import Task

WIDTH, LAYERS, HEADS, INNER, POSITIONS, VOCABULARY, EXPERTS = 32, 2, 4, 48, 512, 300, 4

SIZES: dict[str, int] = {
    "vocab_size": VOCABULARY,  # the byte tokenizer has 259 tokens
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "cls_token_id": 257,
    "sep_token_id": 258,
    "decoder_start_token_id": 256,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_inner", "d_ff", "dff", "hidden_dim"), INNER),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), INNER),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), POSITIONS),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), EXPERTS),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "input_embedding_size": WIDTH,
    "output_embedding_size": WIDTH,
    "zero_expert_num": 2,
}

ATTENTION_LAST: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}

EXTRAS: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": ["sliding_attention", "full_attention"]},
    "axk1": {"num_key_value_heads": 4},
    "axk2": {"num_key_value_heads": 4},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1], "mamba_d_state": 8},
    "cohere_compass_text": {"layer_types": ["full_attention", "full_attention"]},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "esm": {"mask_token_id": 259, "token_dropout": False},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2},
    "funnel": {"block_sizes": [1, 1]},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_period": 2, "mamba_d_state": 8},
    "longcat_flash": {"num_key_value_heads": 4},
    "longformer": {"attention_window": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "minicpm3": {"num_key_value_heads": 4},
    "mistral4": {"num_key_value_heads": 4, "head_dim": 16},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2},
    "qwen3_5_moe_text": ATTENTION_LAST,
    "qwen3_5_text": ATTENTION_LAST,
    "qwen3_next": ATTENTION_LAST,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 32], "attn_layers": ["local", "lsh"]},
    "roc_bert": {
        "pronunciation_vocab_size": VOCABULARY,
        "shape_vocab_size": VOCABULARY,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "t5": {"decoder_start_token_id": 256},
    "bailing_hybrid": {**ATTENTION_LAST, "num_key_value_heads": 4},
    "deepseek_v32": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "kimi_linear": {**ATTENTION_LAST, "linear_num_heads": 4, "num_key_value_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "luke": {"entity_vocab_size": 10},
    "markuplm": {
        "max_xpath_tag_unit_embeddings": 20,
        "max_xpath_subs_unit_embeddings": 20,
        "tag_pad_id": 16,
        "subs_pad_id": 17,
        "xpath_unit_hidden_size": 8,
        "max_depth": 4,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "youtu": {"num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}

MULTIMODAL = (
    *("dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git", "got_ocr2"),
    *("layoutlmv2", "layoutlmv3", "llama4", "mllama", "modernvbert", "moss_transcribe_diarize"),
    *("musicgen", "musicgen_melody", "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp"),
    *("trocr", "ultravbert", "whisper"),
)
LARGE = (
    *("blt", "cohere_compass_text", "cpmant", "dbrx", "perceiver", "qwen4_exp_text", "t5gemma"),
    *("t5gemma2", "xlstm", "zamba", "zamba2"),
)
NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(MULTIMODAL, "also reads images or sound; where its language part has a line above, that is used"),
    **dict.fromkeys(LARGE, "cannot be built small from a configuration of a few numbers"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "drafts tokens for another model"),
    "mra": "its attention is nothing without a CUDA kernel of its own",
    "reformer": "its language model is built only with `is_decoder` in its configuration",
}
"""Families that the sweep leaves out, and why."""

TASKS: dict[Task, Any] = {"causal_lm": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification}
NAMES: dict[Task, Any] = {
    "causal_lm": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


def tiny_config(family: str, **fields: Any) -> Any:
    """Return a configuration of the family with small sizes."""
    kind = CONFIG_MAPPING[family]
    default = kind()
    known = {*default.to_dict(), *default.attribute_map}
    small = {name: size for name, size in SIZES.items() if name in known}
    return kind(**{**small, **EXTRAS.get(family, {}), **fields})


def tiny_base(family: str, seed: int = 0, spread: float | None = None) -> PreTrainedModel:
    """Return a base model of the family, without a task head."""
    config = tiny_config(family)
    if spread is not None:
        config.initializer_range = spread
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModel.from_config(config)
    return model.eval()


def tiny_family(family: str, task: Task, seed: int = 0, spread: float | None = None, **fields: Any) -> PreTrainedModel:
    """Return a model of the family with seeded random weights, evaluating.

    Args:
        spread: standard deviation of the weights; default: the family's own.
        fields: of its configuration.
    """
    config = tiny_config(family, **fields)
    if spread is not None:
        config.initializer_range = spread
    if task != "causal_lm":
        config.num_labels = 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = TASKS[task].from_config(config)
    return model.eval()
