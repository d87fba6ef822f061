"""The decoder that the FM9G models share: Llama's layout, three constant factors (MuP), latent attention (MLA).

For a model that contains it (FM9G4B-V):

    class TextConfig(MLAConfig): model_type = "fm9gv_text"       the fields are the keys of a released config.json
    decoder = MLADecoder(config.text_config)                     embed_tokens, layers, norm: the released weight names
    decoder.get_input_embeddings()(ids)                          already times ``scale_emb``
    decoder(inputs_embeds=..., attention_mask=..., position_ids=..., past_key_values=..., use_cache=True)
    lm_head(output.last_hidden_state)                            final logits: the state is divided already
    tie: config.tie_word_embeddings is True unless config.json says otherwise

``inputs_embeds`` are taken as they are, so media features are put between scaled text embeddings without a factor.
``mmtool/models/fm9g`` subclasses both for grouped attention with or without bias. What is cached of a position is its
latent (``kv_lora_rank`` + ``qk_rope_head_dim`` numbers per layer), not its keys and values.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, eager_attention_forward, rotate_half
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from mmtool.errors import CheckpointError
from mmtool.models.common.release import ReleaseModel

LATENT_NORM_EPS = 1e-6  # the release's own, whatever rms_norm_eps says
ROPE_TYPES = ("default", "linear", "dynamic", "longrope")


class MLAConfig(PreTrainedConfig):
    """Configuration of the decoder; names and defaults are those of the released configuration class.

    Args:
        kv_lora_rank: width of the latent that keys and values come from; None is attention without one.
        q_lora_rank: the same for queries; None is one plain projection.
        qk_nope_head_dim: part of a query or key head without positions; ``qk_rope_head_dim`` the part with them.
        v_head_dim: kept, but not used: a value head has ``hidden_size / num_attention_heads`` numbers.
        head_dim: set by the other fields, whatever is given: the width of a query or key head.
        attention_bias: biases in the first projections of the attention.
        output_bias: a bias in ``o_proj``; as ``attention_bias`` if None.
        scale_emb: factor of text embeddings.
        scale_depth: divided by the square root of the number of layers, factor of what a layer adds.
        dim_model_base: the last state is divided by ``hidden_size / dim_model_base``.
    """

    model_type = "mla_decoder"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    base_model_tp_plan: ClassVar = {
        "layers.*.self_attn.q_b_proj": "colwise",
        "layers.*.self_attn.kv_b_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan: ClassVar = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    default_theta = 10000.0

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = True
    rope_parameters: dict | None = None
    attention_bias: bool | None = None
    output_bias: bool | None = None
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    q_lora_rank: int | None = 768
    kv_lora_rank: int | None = 256
    qk_nope_head_dim: int | None = 64
    qk_rope_head_dim: int | None = 32
    v_head_dim: int | None = None
    head_dim: int | None = None
    scale_emb: float = 1.0
    scale_depth: float = 1.0
    dim_model_base: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        """Complete what a release may leave out, and refuse what this network is not."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        self.attention_bias = bool(self.attention_bias)
        if self.output_bias is None:
            self.output_bias = self.attention_bias
        self.head_dim = self.hidden_size // self.num_attention_heads
        if self.kv_lora_rank is not None:
            self.head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        if kwargs.get("rope_theta", self.default_theta) is None:
            del kwargs["rope_theta"]
        # transformers completes the settings of the rotation in place: not in the caller's dictionary
        if kwargs.get("rope_scaling") is not None:
            kwargs["rope_scaling"] = dict(kwargs["rope_scaling"])
        if self.rope_parameters is not None:
            self.rope_parameters = dict(self.rope_parameters)
        super().__post_init__(**kwargs)
        if self.rope_parameters["rope_type"] not in ROPE_TYPES:
            raise CheckpointError(
                f"rope_scaling has the type {self.rope_parameters['rope_type']!r}, not one of {', '.join(ROPE_TYPES)}"
            )

    @property
    def rotary_dim(self) -> int:
        """How many numbers of a head are turned by their position."""
        return self.head_dim if self.kv_lora_rank is None else self.qk_rope_head_dim

    @property
    def embedding_factor(self) -> float:
        """Factor of text embeddings."""
        return float(self.scale_emb)

    @property
    def residual_factor(self) -> float:
        """Factor of what attention and MLP add to the state."""
        return self.scale_depth / math.sqrt(self.num_hidden_layers)

    @property
    def logits_divisor(self) -> float:
        """What the last state is divided by; not rounded to an integer."""
        return self.hidden_size / self.dim_model_base


class ScaledEmbedding(nn.Embedding):
    """Text embeddings times a constant; an attribute ``embed_scale``, because vLLM puts its own table here."""

    def __init__(self, num_embeddings: int, embedding_dim: int, embed_scale: float) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.embed_scale = embed_scale

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return ``(..., embedding_dim)`` for ids of any shape."""
        return super().forward(input_ids) * self.embed_scale


class MLARotaryEmbedding(nn.Module):
    """Cosines and sines of positions in float32: plain, linear, dynamic, or longrope as the release does it.

    Longrope: the release makes its table for all positions at once, so one list of factors serves all of them: the long
    one where ``max_position_embeddings`` is more than the original length, or else the short one.
    """

    def __init__(self, config: MLAConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        inv_freq, self.attention_scaling = self.frequencies("cpu")
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def frequencies(self, device: torch.device | str, num_positions: int = 0) -> tuple[Tensor, float]:
        """Return ``(rotary_dim / 2,)`` turns per position, and the factor of cosines and sines.

        ``num_positions`` counts only for dynamic scaling, which changes beyond ``max_position_embeddings``.
        """
        rope, dim, most = self.config.rope_parameters, self.config.rotary_dim, self.config.max_position_embeddings
        base = rope["rope_theta"]
        if self.rope_type == "dynamic" and num_positions > most:
            factor = rope["factor"]
            base *= (factor * num_positions / most - (factor - 1)) ** (dim / (dim - 2))
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))
        if self.rope_type == "linear":
            return inv_freq / rope["factor"], 1.0
        if self.rope_type != "longrope":
            return inv_freq, 1.0
        original = rope["original_max_position_embeddings"]
        factors = rope["long_factor"] if most > original else rope["short_factor"]
        if len(factors) != dim // 2:
            raise CheckpointError(f"rope_scaling has {len(factors)} factors, but {dim // 2} are needed")
        factors = torch.tensor(factors, dtype=torch.float32, device=device)
        return inv_freq * (1.0 / factors), math.sqrt(1 + math.log(most / original) / math.log(original))

    @torch.no_grad()
    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines ``(batch, seq, rotary_dim)`` of ``(batch, seq)`` positions, both in float32."""
        inv_freq = self.inv_freq.to(positions.device)
        if self.rope_type == "dynamic" and (num_positions := int(positions.max()) + 1) > (
            self.config.max_position_embeddings
        ):
            inv_freq, _ = self.frequencies(positions.device, num_positions)
        angles = positions.unsqueeze(-1).float() * inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``(batch, heads, seq, dim)`` by their positions, in float32; the result has the format of ``x``."""
    wide = x.float()
    return (wide * cos.unsqueeze(1) + rotate_half(wide) * sin.unsqueeze(1)).to(x.dtype)


class MLAAttention(nn.Module):
    """Attention whose keys and values are made from one small latent per position.

    Many positions at once make keys and values from the latents. One new position works on the latents themselves: the
    matrix that would make the keys is applied to its query, and the one for the values to the result. That is the same
    sum in another order, and saves making the keys and values of all earlier positions again.
    """

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: MLAConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.rank = config.kv_lora_rank
        self.value_dim = config.hidden_size // config.num_attention_heads
        self.head_dim = self.nope_dim + self.rope_dim
        self.scaling = self.head_dim**-0.5
        hidden_size, query_size, bias = config.hidden_size, self.num_heads * self.head_dim, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, query_size, bias=bias)
        else:
            self.q_a_proj = nn.Linear(hidden_size, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = LlamaRMSNorm(config.q_lora_rank, eps=LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, self.rank + self.rope_dim, bias=bias)
        self.kv_a_layernorm = LlamaRMSNorm(self.rank, eps=LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.rank, self.num_heads * (self.nope_dim + self.value_dim), bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.value_dim, hidden_size, bias=config.output_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``(batch, seq, hidden)`` and the attention weights, if the implementation has them."""
        batch, length = hidden_states.shape[:2]
        query = self._queries(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        query_nope, query_rope = query.split((self.nope_dim, self.rope_dim), dim=-1)
        latent, key_rope = self.kv_a_proj_with_mqa(hidden_states).split((self.rank, self.rope_dim), dim=-1)
        # One head, so that a cache can hold both: (batch, 1, seq, rank) and (batch, 1, seq, rope_dim).
        latent, key_rope = self.kv_a_layernorm(latent.contiguous()).unsqueeze(1), key_rope.unsqueeze(1)
        query_rope, key_rope = rotate(query_rope, *position_embeddings), rotate(key_rope, *position_embeddings)
        if past_key_values is not None:
            latent, key_rope = past_key_values.update(latent, key_rope, self.layer_idx)
        on_latents = past_key_values is not None and length == 1 and self._can_use_latents()
        if on_latents:
            to_keys, to_values = self._halves_of_kv_b()
            query_latent = torch.matmul(query_nope.squeeze(2).transpose(0, 1), to_keys).transpose(0, 1)
            # The heads share their keys, so they stand where several query positions would: (batch, 1, heads, ...).
            query = torch.cat((query_latent, query_rope.squeeze(2)), dim=-1).unsqueeze(1)
            key, value = torch.cat((latent, key_rope), dim=-1), latent
            kwargs["is_causal"] = False
        else:
            key_nope, value = self._keys_and_values(latent)
            query = torch.cat((query_nope, query_rope), dim=-1)
            key = torch.cat((key_nope, key_rope.expand(-1, key_nope.shape[1], -1, -1)), dim=-1)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        if on_latents:  # (batch, heads, 1, rank)
            output = torch.matmul(output.squeeze(2).transpose(0, 1), to_values.mT).transpose(0, 1)
        return self.o_proj(output.reshape(batch, length, -1).contiguous()), weights

    def _queries(self, hidden_states: Tensor) -> Tensor:
        if self.config.q_lora_rank is None:
            return self.q_proj(hidden_states)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))

    def _keys_and_values(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        batch, _, length, _ = latent.shape
        both = self.kv_b_proj(latent.squeeze(1)).view(batch, length, -1, self.nope_dim + self.value_dim)
        return both.transpose(1, 2).split((self.nope_dim, self.value_dim), dim=-1)

    def _halves_of_kv_b(self) -> tuple[Tensor, Tensor]:
        """Return what makes keys, ``(heads, nope_dim, rank)``, and what makes values, ``(heads, value_dim, rank)``."""
        weight = self.kv_b_proj.weight.view(-1, self.nope_dim + self.value_dim, self.rank)
        return weight.split((self.nope_dim, self.value_dim), dim=1)

    def _can_use_latents(self) -> bool:
        """Whether ``kv_b_proj`` is its weight and nothing else: no adapter, quantisation, or weights brought by hooks.

        The heads as query positions are not for every attention implementation.
        """
        linear = self.kv_b_proj
        plain = type(linear) is nn.Linear and "forward" not in vars(linear) and not linear._forward_pre_hooks
        return plain and not linear._forward_hooks and self.config._attn_implementation in ("eager", "sdpa")


class MuPDecoderLayer(GradientCheckpointingLayer):
    """Llama's layer, with a factor on what attention and MLP add."""

    def __init__(self, config: MLAConfig, attention: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.residual_factor = config.residual_factor

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Return the next ``(batch, seq, hidden)``; ``kwargs`` are for the attention."""
        added, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = torch.add(hidden_states, added, alpha=self.residual_factor)
        added = self.mlp(self.post_attention_layernorm(hidden_states))
        return torch.add(hidden_states, added, alpha=self.residual_factor)


class MLADecoder(ReleaseModel):
    """The decoder without a head; its output is what a plain linear head takes."""

    config: MLAConfig
    config_class = MLAConfig
    base_model_prefix = "model"
    _has_head = False
    _no_split_modules = ("MuPDecoderLayer",)
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MuPDecoderLayer, "attentions": MLAAttention}  # noqa: RUF012

    def __init__(self, config: MLAConfig) -> None:
        super().__init__(config)
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size, config.embedding_factor)
        self.layers = nn.ModuleList(
            MuPDecoderLayer(config, self.new_attention(index)) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MLARotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def new_attention(self, layer_idx: int) -> nn.Module:
        """Return the attention of a layer."""
        return MLAAttention(self.config, layer_idx)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        refill_rotary(module)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return states ``(batch, seq, hidden)`` that a linear head turns into logits.

        Args:
            input_ids: ``(batch, seq)``.
            attention_mask: ``(batch, seq)``, 0 at padding.
            position_ids: ``(batch, seq)``; those after the cached ones if None.
            past_key_values: the cache of earlier positions.
            inputs_embeds: ``(batch, seq, hidden)`` instead of ``input_ids``, text already scaled.
            use_cache: whether to make a cache where none is given.
            kwargs: for the attention implementation.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("either input_ids or inputs_embeds is needed, not both")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + seen
        attention_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        # Not inside the norm: vLLM replaces norms by its own.
        hidden_states = self.norm(hidden_states) / self.config.logits_divisor
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


def refill_rotary(module: nn.Module) -> None:
    """Fill the table of an ``MLARotaryEmbedding``: transformers builds models without memory, and no file holds it.

    A model that contains the decoder calls this in its ``_init_weights``.
    """
    if isinstance(module, MLARotaryEmbedding):
        with torch.no_grad():
            module.inv_freq.copy_(module.frequencies(module.inv_freq.device)[0])
