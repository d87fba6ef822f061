"""FM9G text models for llama.cpp: as MiniCPM, MiniCPM3 or Qwen2, which have the same maths."""

from __future__ import annotations

import torch

from mmtool.models.common.gguf import (
    Change,
    GGUFLayout,
    decoder_numbers,
    frequency_factors,
    head_dim_numbers,
    not_representable,
    rope_numbers,
    turned_queries,
)
from mmtool.models.common.mla import LATENT_NORM_EPS, MLARotaryEmbedding
from mmtool.models.fm9g.configuration_fm9g import FM9GConfig

# What llama.cpp's MiniCPM3 computes with, whatever a file says.
_EMBEDDING, _DEPTH, _HEAD_BASE = 12.0, 1.4, 256.0


def layout(config: FM9GConfig) -> GGUFLayout:
    """Return how the model is written.

    Raises:
        MMToolError: where llama.cpp has no such model.
    """
    if config.kv_lora_rank is not None:
        return _latent(config)
    numbers = decoder_numbers(config) | head_dim_numbers(config.head_dim) | rope_numbers(config)
    if config.attention_bias:
        if config.is_scaled or config.output_bias:
            raise not_representable("it has both scaled states and biases in its attention, or a bias behind it")
        return GGUFLayout("QWEN2", numbers)
    scales = {
        "embedding_scale": config.embedding_factor,
        "residual_scale": config.residual_factor,
        "logit_scale": config.logits_divisor,
    }
    return GGUFLayout("MINICPM", numbers | scales, turned_queries(config))


def _latent(config: FM9GConfig) -> GGUFLayout:
    if config.attention_bias or config.output_bias:
        raise not_representable("its latent attention has biases")
    if config.q_lora_rank is None:
        raise not_representable("its queries are not latent, and llama.cpp's MiniCPM3 has latent ones only")
    if config.rope_parameters["rope_type"] == "dynamic":
        raise not_representable("its rotary frequencies change with the length of the text")
    rotary = MLARotaryEmbedding(config)
    used, attention_scaling = rotary.frequencies("cpu")
    steps = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    plain = 1.0 / config.rope_parameters["rope_theta"] ** steps
    # The latent norms have an eps of their own, llama.cpp one for all: with larger numbers a larger eps means the same.
    latent = (config.rms_norm_eps / LATENT_NORM_EPS) ** 0.5
    residual = Change("scale", config.residual_factor * config.num_hidden_layers**0.5 / _DEPTH)
    numbers = decoder_numbers(config) | {
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "key_length": config.head_dim,
        "value_length": config.v_head_dim,
        "rope_dimension_count": config.qk_rope_head_dim,
    }
    if attention_scaling != 1.0:
        numbers["rope_scaling_attn_factors"] = attention_scaling
    changes = {
        r"model\.embed_tokens\.weight": Change("scale", config.embedding_factor / _EMBEDDING),
        r".*\.(o_proj|down_proj)\.weight": residual,
        r".*\.q_a_proj\.weight": Change("scale", latent),
        r".*\.kv_a_proj_with_mqa\.weight": Change("scale", latent, rows=config.kv_lora_rank),
    }
    head = config.hidden_size / config.logits_divisor / _HEAD_BASE
    alike = head == 1.0 and config.embedding_factor == _EMBEDDING
    factors = frequency_factors(plain, used)
    return GGUFLayout("MINICPM3", numbers, changes, not alike, factors, head)
