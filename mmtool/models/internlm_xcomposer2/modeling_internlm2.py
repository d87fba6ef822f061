"""The language model of InternLM-XComposer2: InternLM2 with paths for image positions.

In every decoder layer five matrices (wqkv, wo, w1, w2, w3) have a low-rank path beside them, PLoRA, that is added at
image positions alone. So the decoder is told where those are: ``im_mask``, ``(batch, seq)`` bool, None for nowhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, eager_attention_forward
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from mmtool.models.internlm_xcomposer2.configuration_internlm_xcomposer2 import TASK_MODES, XComposer2TextConfig


class LowRankBranch(nn.Module):
    """What is added to the output of one matrix of the decoder: at image positions, and in a task mode of 2.5.

    The matrix itself is a plain ``nn.Linear`` next to this module: a user's adapter or a quantised matrix takes its
    place and this branch stays untouched. So adapters merge exactly.
    """

    def __init__(self, config: XComposer2TextConfig, matrix: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.config = config
        self.scale = config.plora_scales[matrix]
        rank = config.plora_ranks[matrix]
        self.dropout = nn.Dropout(config.plora_dropout)
        self.Plora_A = nn.Linear(in_features, rank, bias=False)
        self.Plora_B = nn.Linear(rank, out_features, bias=False)
        for task, task_rank in config.task_lora_ranks.items():
            self.add_module(f"lora_{task}_A", nn.Linear(in_features, task_rank, bias=False))
            self.add_module(f"lora_{task}_B", nn.Linear(task_rank, out_features, bias=False))
        self.freeze_idle_tasks()

    def freeze_idle_tasks(self) -> None:
        """Keep the weights of tasks that are not added from being trained: they would only decay."""
        for task in self.config.task_lora_ranks:
            for part in "AB":
                self.get_submodule(f"lora_{task}_{part}").requires_grad_(task in TASK_MODES[self.config.task_mode])

    def forward(self, x: Tensor, y: Tensor, im_mask: Tensor | None) -> Tensor:
        """Return ``y``, the ``(batch, seq, out)`` product of the matrix with ``x`` ``(batch, seq, in)``, completed."""
        for task in TASK_MODES[self.config.task_mode]:
            y = y + self.get_submodule(f"lora_{task}_B")(self.get_submodule(f"lora_{task}_A")(x))
        if im_mask is not None:
            # Everything here is linear, so masking the narrow middle masks the output.
            narrow = self.Plora_A(self.dropout(x)) * im_mask.unsqueeze(-1)
            y = y + self.Plora_B(narrow) * self.scale
        return y


class RotaryAngles(nn.Module):
    """Cosines and sines of positions; beyond ``max_position_embeddings`` the base grows with the length (dynamic NTK).

    The length is that of each row of the batch, and nothing is remembered: a long prompt changes neither its neighbours
    nor those that follow. While a row grows, the keys in its cache stay as they were rotated, as in the release.
    """

    def __init__(self, config: XComposer2TextConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.base = config.rope_parameters["rope_theta"]
        self.limit = config.max_position_embeddings
        self.dynamic = config.rope_parameters["rope_type"] == "dynamic"
        self.factor = config.rope_parameters.get("factor", 1.0)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines ``(rows, seq, head_dim)`` in the dtype of ``x`` for positions ``(rows, seq)``."""
        base = torch.full((len(position_ids), 1), self.base, dtype=torch.float32, device=x.device)
        if self.dynamic:
            length = position_ids.amax(dim=1, keepdim=True).to(x.device, torch.float32) + 1
            stretch = self.factor * length / self.limit - (self.factor - 1)
            base = base * stretch.clamp(min=1.0) ** (self.head_dim / (self.head_dim - 2))
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=x.device) / self.head_dim
        frequencies = 1.0 / base**steps  # (rows, head_dim / 2)
        angles = position_ids.to(x.device, torch.float32).unsqueeze(-1) * frequencies.unsqueeze(1)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class XComposer2Attention(nn.Module):
    """Attention with queries, keys and values from one matrix whose rows are grouped by key/value head.

    For each of them: its query heads, then the key, then the value. The release's order is kept in memory, because the
    low-rank paths, adapters and saved checkpoints all have it.
    """

    def __init__(self, config: XComposer2TextConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        hidden, inner = config.hidden_size, config.num_attention_heads * self.head_dim
        fused = inner + 2 * config.num_key_value_heads * self.head_dim
        self.wqkv = nn.Linear(hidden, fused, bias=config.attention_bias)
        self.wqkv_branch = LowRankBranch(config, "wqkv", hidden, fused)
        self.wo = nn.Linear(inner, hidden, bias=config.attention_bias)
        self.wo_branch = LowRankBranch(config, "wo", inner, hidden)

    def forward(
        self,
        hidden_states: Tensor,
        im_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``(batch, seq, hidden)`` for states of that shape, and the weights where the kernel has them."""
        batch, seq, _ = hidden_states.shape
        fused = self.wqkv_branch(hidden_states, self.wqkv(hidden_states), im_mask)
        fused = fused.view(batch, seq, -1, self.num_key_value_groups + 2, self.head_dim)  # (B, S, kv heads, g + 2, d)
        query = fused[..., :-2, :].reshape(batch, seq, -1, self.head_dim).transpose(1, 2)
        key, value = fused[..., -2, :].transpose(1, 2), fused[..., -1, :].transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        output = output.reshape(batch, seq, -1).contiguous()
        return self.wo_branch(output, self.wo(output), im_mask), weights


class XComposer2FeedForward(nn.Module):
    """The gated MLP: w1 is the gate, w3 goes up, w2 down."""

    def __init__(self, config: XComposer2TextConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.w1, self.w1_branch = nn.Linear(hidden, inner, bias=False), LowRankBranch(config, "w1", hidden, inner)
        self.w3, self.w3_branch = nn.Linear(hidden, inner, bias=False), LowRankBranch(config, "w3", hidden, inner)
        self.w2, self.w2_branch = nn.Linear(inner, hidden, bias=False), LowRankBranch(config, "w2", inner, hidden)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, im_mask: Tensor | None) -> Tensor:
        """Return ``(batch, seq, hidden)`` for states of that shape."""
        gate = self.w1_branch(x, self.w1(x), im_mask)
        inner = self.act(gate) * self.w3_branch(x, self.w3(x), im_mask)
        return self.w2_branch(inner, self.w2(inner), im_mask)


class XComposer2DecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and added to its input."""

    def __init__(self, config: XComposer2TextConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = XComposer2Attention(config, layer_idx)
        self.feed_forward = XComposer2FeedForward(config)
        self.attention_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, im_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return ``(batch, seq, hidden)`` for hidden states of that shape; ``kwargs`` are the attention's."""
        attended, _ = self.attention(self.attention_norm(hidden_states), im_mask, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.feed_forward(self.ffn_norm(hidden_states), im_mask)


class XComposer2TextModel(PreTrainedModel):
    """InternLM2 without its head."""

    config: XComposer2TextConfig
    config_class = XComposer2TextConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "tok_embeddings"
    _no_split_modules = ("XComposer2DecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": XComposer2DecoderLayer,
        "attentions": XComposer2Attention,
    }

    def __init__(self, config: XComposer2TextConfig) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(XComposer2DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = RotaryAngles(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        im_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return hidden states ``(batch, seq, hidden)`` after the last norm.

        Args:
            input_ids: ``(batch, seq)``, or else ``inputs_embeds``.
            attention_mask: ``(batch, past + seq)``, 0 at padding.
            position_ids: ``(batch, seq)``; if None, counted from the first position that is no padding.
            past_key_values: the cache of earlier positions.
            inputs_embeds: ``(batch, seq, hidden)``.
            im_mask: ``(batch, seq)`` bool, True where an image feature stands; None if there is none.
            use_cache: whether to return a cache.
            kwargs: for the attention.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        if inputs_embeds is None:
            inputs_embeds = self.tok_embeddings(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = _positions(inputs_embeds, attention_mask, past_key_values)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = inputs_embeds
        position_embeddings = self.rotary(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                im_mask=im_mask,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


def _positions(embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None) -> Tensor:
    seq = embeds.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -seq:].to(embeds.device)
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    return torch.arange(past, past + seq, device=embeds.device).unsqueeze(0)
