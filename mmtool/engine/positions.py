"""Where tokens stand: position numbers along one axis or several, and how far a model's rotary angles reach."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmtool.errors import MMToolError
from mmtool.models.common.merge import same_shape

if TYPE_CHECKING:
    from mmtool.engine.base import Request
    from mmtool.template.base import MediaInput

UNLIMITED = 1 << 20  # positions; for models whose configuration names no limit


class Positions:
    """What an engine must know of a model's position numbers.

    Attributes:
        limit: most positions of prompt and answer.
        stretched: length beyond which the rotary angles of all positions depend on the length (dynamic NTK, longrope);
            None where they never do. A longer prompt is then computed at once, by itself, and its keys fit no other.
        axes: whether a position is several numbers: Qwen-VL counts time, rows and columns of a picture apart.
    """

    def __init__(self, model: Any, decoder: Any) -> None:
        config = model.config.get_text_config()
        rope = rope_settings(config)
        # Few decoders have one of these: no rotary embedding at all, or one of their own that remembers nothing.
        self._rotary = getattr(decoder, "rotary_emb", None)
        remembers = hasattr(self._rotary, "original_inv_freq")
        self.stretched = None
        if rope.get("rope_type") == "dynamic":
            self.stretched = config.max_position_embeddings
        elif rope.get("rope_type") == "longrope" and remembers:
            self.stretched = rope["original_max_position_embeddings"]
        self.limit = position_limit(config)
        self._model = model  # may be a weak proxy, so its method is looked up when it is needed
        self.axes = rope_index(model) is not None
        self._remembers = remembers and self.stretched is not None

    def of_prompt(self, request: Request, device: torch.device) -> Tensor | None:
        """Return the positions of a prompt, ``(axes, length)``; None if they are 0, 1, 2, ..."""
        if not self.axes:
            return None
        length = len(request.input_ids)
        if not request.media:
            return torch.arange(length, device=device).expand(3, -1)
        fields = token_tensors(request.media, length, device)
        inputs = fields | joined_inputs(request.media, device, dtype=None)
        index = rope_index(self._model)
        wanted = inspect.signature(index).parameters
        ids = torch.tensor([request.input_ids], device=device)
        found = index(input_ids=ids, **{name: value for name, value in inputs.items() if name in wanted})
        return found[0][-3:, 0]

    def is_stretched(self, length: int) -> bool:
        """Whether the angles of a sequence of ``length`` depend on its length."""
        return self.stretched is not None and length > self.stretched

    def forget_length(self) -> None:
        """Make the model's rotary embedding forget the longest sequence it has seen; it would turn shorter ones."""
        rotary = self._rotary
        if self._remembers and getattr(rotary, "max_seq_len_cached", 0) > rotary.original_max_seq_len:
            rotary.register_buffer("inv_freq", rotary.original_inv_freq.to(rotary.inv_freq.device), persistent=False)
            rotary.max_seq_len_cached = rotary.original_max_seq_len


def check_attention(config: Any, max_model_len: int, axes: bool = False) -> None:
    """Raise MMToolError for a model whose state is not keys and values of all positions.

    ``axes`` says that the model numbers positions along several axes itself. Few
    configurations have these fields, so a missing one is the normal case.
    """
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if (getattr(config, "sliding_window", None) or max_model_len) < max_model_len and uses_window(config):
        kinds.add("sliding_attention")
    if not axes and "mrope_section" in rope_settings(config):
        kinds.add("several position numbers per token")
    if kinds:
        raise MMToolError(f"the pt engine runs models with full attention; this one has {', '.join(sorted(kinds))}")


def uses_window(config: Any) -> bool:
    """Whether a configuration with a sliding window lets a layer use it; without a list of layers, all do."""
    layers = getattr(config, "layer_types", None)
    return layers is None or "sliding_attention" in layers


def rope_settings(config: Any) -> Mapping[str, Any]:
    """Return the settings of a text configuration's rotary embedding, those of full attention if there are several."""
    rope = getattr(config, "rope_parameters", None) or {}  # models without rotary positions lack the field
    nested = rope.get("full_attention")
    return nested if isinstance(nested, Mapping) else rope


def position_limit(config: Any) -> int:
    """Return the most positions that a model with this text configuration takes."""
    declared = getattr(config, "max_sequence_length", None)  # InternLM-XComposer2 has a limit beside its angles'
    if declared is not None:
        return declared
    limit = getattr(config, "max_position_embeddings", None)  # state space models have none
    if limit is None or rope_settings(config).get("rope_type") == "dynamic":
        return UNLIMITED
    return limit


def rope_index(model: Any) -> Any | None:
    """Return the method of a model that numbers positions along several axes, if it does so."""
    inner = getattr(model, "model", None)
    return next((owner.get_rope_index for owner in (model, inner) if hasattr(owner, "get_rope_index")), None)


def token_tensors(media: Sequence[MediaInput], length: int, device: torch.device) -> dict[str, Tensor]:
    """Return what the model wants to know of each position beside the id, ``(1, length)`` by name."""
    fields: dict[str, Tensor] = {}
    for item in media:
        for name, values in item.token_fields.items():
            row = fields.setdefault(name, torch.zeros(1, length, dtype=torch.long, device=device))
            row[0, item.start : item.start + item.length] = torch.tensor(values, device=device)
    return fields


def joined_inputs(media: Sequence[MediaInput], device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the tensors of media by name, one after the other, padded with zeros where shapes differ.

    What describes the whole conversation is there once. Numbers with a fraction get ``dtype``, unless it is None.
    """
    gathered: dict[str, list[Tensor]] = {}
    for item in media:
        for name, tensor in item.inputs.items():
            if name not in item.shared or name not in gathered:
                gathered.setdefault(name, []).append(tensor)
    joined = {name: torch.cat(same_shape(tensors)).to(device) for name, tensors in gathered.items()}
    if dtype is None:
        return joined
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in joined.items()}
