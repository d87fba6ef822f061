"""FM9G text models: the shared decoder with grouped attention beside the latent one, and the head."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.generic import can_return_tuple

from mmtool.models.common.mla import MLAAttention, MLADecoder, MuPDecoderLayer, rotate
from mmtool.models.common.release import ReleaseModel
from mmtool.models.common.weights import LazyTensor, read_weights
from mmtool.models.fm9g.configuration_fm9g import FM9GConfig
from mmtool.models.fm9g.tokenization_fm9g import stop_ids

_FIRST_PROJECTIONS = ("q_proj", "q_a_proj", "kv_a_proj_with_mqa")


class FM9GAttention(nn.Module):
    """Attention whose key heads serve several query heads each, or one (the 7B and 70B, with biases on q, k and v)."""

    is_causal = True

    def __init__(self, config: FM9GConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        hidden_size, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden_size, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden_size, bias=config.output_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``(batch, seq, hidden)`` and the attention weights, if the implementation has them."""
        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        query = rotate(self.q_proj(hidden_states).view(heads).transpose(1, 2), *position_embeddings)
        key = rotate(self.k_proj(hidden_states).view(heads).transpose(1, 2), *position_embeddings)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
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
        return self.o_proj(output.reshape(*hidden_states.shape[:2], -1).contiguous()), weights


class FM9GModel(MLADecoder):
    """The decoder without the head; see ``MLADecoder`` for what it takes and returns."""

    config: FM9GConfig
    config_class = FM9GConfig
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": MuPDecoderLayer,
        "attentions": [MLAAttention, FM9GAttention],
    }

    def new_attention(self, layer_idx: int) -> nn.Module:
        """Return the attention of a layer: a latent one where the configuration has ``kv_lora_rank``."""
        kind = FM9GAttention if self.config.kv_lora_rank is None else MLAAttention
        return kind(self.config, layer_idx)

    @classmethod
    def read_release(cls, folder: Path, config: FM9GConfig) -> dict[str, LazyTensor]:
        """Return the weights of a release folder; see ``released_weights``."""
        return released_weights(folder, config)


class FM9GForCausalLM(ReleaseModel, GenerationMixin):
    """The decoder with its head."""

    config: FM9GConfig
    config_class = FM9GConfig
    base_model_prefix = "model"
    _no_split_modules = FM9GModel._no_split_modules
    _can_compile_fullgraph = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: FM9GConfig) -> None:
        super().__init__(config)
        self.model = FM9GModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def read_release(cls, folder: Path, config: FM9GConfig) -> dict[str, LazyTensor]:
        """Return the weights of a release folder; see ``released_weights``."""
        return released_weights(folder, config)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load a release as ``ReleaseModel`` does; ``generate`` stops at ``<|im_end|>`` and ``</s>``.

        A released ``config.json`` may name only one of them.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if kwargs.get("generation_config") is None and model.name_or_path:
            known = model.generation_config.eos_token_id
            known = [] if known is None else [known] if isinstance(known, int) else list(known)
            stops = list(dict.fromkeys([*known, *stop_ids(Path(model.name_or_path))]))
            model.generation_config.eos_token_id = stops or None
        return loaded

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits ``(batch, seq, vocab)``, and the loss where ``labels`` are given.

        Args:
            input_ids: as in ``MLADecoder.forward``, like the other inputs.
            attention_mask: 0 at padding.
            position_ids: positions.
            past_key_values: cache.
            inputs_embeds: embeddings, already scaled.
            labels: ``(batch, seq)`` next to ``input_ids``, -100 where nothing is learned; shifted here. The loss is the
                mean cross entropy.
            logits_to_keep: logits of the last so many positions only (0: all), or of these indices.
            kwargs: for the decoder and the loss.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits, loss = self.logits_and_loss(outputs.last_hidden_state, labels, logits_to_keep, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def released_weights(folder: Path, config: FM9GConfig) -> dict[str, LazyTensor]:
    """Return the weights of a release folder without buffers and copies of tied ones.

    ``config`` learns from them what a release's ``config.json`` may leave out: the biases, and for a model of unknown
    kind whether the head is the embedding.
    """
    stored = read_weights(folder)
    weights = {name: tensor for name, tensor in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    _learn_biases(weights, config)
    if not config.tie_is_known:
        config.tie_word_embeddings = "lm_head.weight" not in weights
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights


def _learn_biases(weights: Mapping[str, Any], config: FM9GConfig) -> None:
    first = "model.layers.0.self_attn."
    if any(name.startswith(first) for name in weights):  # else the folder is not one of ours: an error comes later
        config.attention_bias = any(f"{first}{name}.bias" in weights for name in _FIRST_PROJECTIONS)
        config.output_bias = f"{first}o_proj.bias" in weights
