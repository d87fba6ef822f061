"""Which engine a model can have: whether its answer follows from embeddings, positions and a cache alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from mmtool.engine.features import TOWERS
from mmtool.engine.positions import Positions, check_attention, rope_index
from mmtool.errors import MMToolError
from mmtool.models.common.release import ReleaseModel

# What the decoder of a model for ``PtEngine`` may take; anything more is something that the engine would not give it.
_DECODER_INPUTS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache"}
_DECODER_INPUTS |= {"cache_position", "output_attentions", "output_hidden_states", "return_dict", "kwargs"}
_DECODER_INPUTS |= {"flash_attn_kwargs"}
_TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids")
_PROBE_IDS = (1, 2, 3, 5, 8)


def fits_pt(model: Any) -> bool:
    """Return whether ``PtEngine`` gives the answers that the model's own ``forward`` would give.

    Native models are written for it. Of the others, the signatures must show nothing that the engine does not pass, and
    a short text must give the same logits both ways.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # inside an adapter
    if isinstance(base, ReleaseModel):
        return True
    return _is_plain(base) and _same_logits(base)


def _is_plain(model: Any) -> bool:
    config = model.config.get_text_config(decoder=True)
    if not hasattr(model, "lm_head") or model.config.is_encoder_decoder:
        return False
    decoder = model.get_decoder()
    if decoder is None or decoder is model:
        return False
    try:
        positions = Positions(model, decoder)
        check_attention(config, positions.limit, positions.axes)
    except MMToolError:
        return False
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers):
        return False
    if not set(inspect.signature(decoder.forward).parameters) <= _DECODER_INPUTS:
        return False
    takes = inspect.signature(model.forward).parameters
    if any(name in takes for name in _TOKEN_INPUTS) and rope_index(model) is None:
        return False
    kinds = [kind for kind in TOWERS if kind in model.input_modalities and takes.keys() & _media_names(kind)]
    return all(hasattr(model, TOWERS[kind]) for kind in kinds)


def _media_names(kind: str) -> set[str]:
    return {"image": {"pixel_values"}, "audio": {"input_features", "input_values"}}[kind]


@torch.inference_mode()
def _same_logits(model: Any) -> bool:
    embed, decoder = model.get_input_embeddings(), model.get_decoder()
    ids = torch.tensor([_PROBE_IDS], device=embed.weight.device).clamp(max=len(embed.weight) - 1)
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    own = model(input_ids=ids, use_cache=False).logits
    hidden = decoder(inputs_embeds=embed(ids), position_ids=positions, use_cache=False).last_hidden_state
    ours = model.lm_head(hidden)
    tolerance = 1e-5 if own.dtype == torch.float32 else 1e-3
    return bool((own - ours.to(own.device)).abs().max() <= tolerance * own.abs().max())
