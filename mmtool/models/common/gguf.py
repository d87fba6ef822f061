"""How a language model is told to llama.cpp: its architecture there, its numbers, and what is done to its matrices.

Data only; ``mmtool/export/gguf.py`` writes the file. A family that llama.cpp can run names a function ``config ->
GGUFLayout`` in its spec.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mmtool.errors import MMToolError


@dataclass(frozen=True)
class Change:
    """What is done to a matrix before it is written.

    Attributes:
        kind: ``scale`` multiplies the first ``rows`` rows (0: all) by ``factor``; ``turn`` puts the rows of each of
            ``heads`` heads into the order of rotary angles that neighbours share.
        factor, rows, heads: see there.
    """

    kind: Literal["scale", "turn"]
    factor: float = 1.0
    rows: int = 0
    heads: int = 0

    def apply(self, weight: Tensor) -> Tensor:
        """Return the changed weight, ``(rows, ...)`` in float32."""
        if self.kind == "scale":
            weight = weight.clone()
            weight[: self.rows or None] *= self.factor
            return weight
        half = weight.shape[0] // self.heads // 2
        return weight.reshape(self.heads, 2, half, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


@dataclass(frozen=True)
class GGUFLayout:
    """A model as llama.cpp takes it.

    Attributes:
        architecture: name in ``gguf.MODEL_ARCH``.
        numbers: settings by the name of ``GGUFWriter``'s method without ``add_``.
        changes: what is done to matrices, by a regular expression on the released parameter name.
        own_head: whether the head is stored on its own though it is the embedding.
        rope_factors: what rotary frequencies are divided by; None for nothing.
        head_factor: what logits are multiplied by through the head's matrix.
    """

    architecture: str
    numbers: Mapping[str, Any]
    changes: Mapping[str, Change] = field(default_factory=dict)
    own_head: bool = False
    rope_factors: tuple[float, ...] | None = None
    head_factor: float = 1.0

    def changed(self, name: str, weight: Tensor) -> Tensor:
        """Return what is written for a weight."""
        for pattern, change in self.changes.items():
            if re.fullmatch(pattern, name):
                weight = change.apply(weight)
        return weight


def decoder_numbers(config: Any) -> dict[str, Any]:
    """Return what llama.cpp wants to know of every decoder."""
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": config.rope_parameters["rope_theta"],
        "vocab_size": config.vocab_size,
    }


def head_dim_numbers(head_dim: int) -> dict[str, Any]:
    """Return what llama.cpp wants to know of heads."""
    return {"key_length": head_dim, "value_length": head_dim, "rope_dimension_count": head_dim}


def turned_queries(config: Any) -> dict[str, Change]:
    """Return the changes for architectures whose rotary angles neighbours share, not halves of a head."""
    return {
        r".*\.q_proj\.(weight|bias)": Change("turn", heads=config.num_attention_heads),
        r".*\.k_proj\.(weight|bias)": Change("turn", heads=config.num_key_value_heads),
    }


def llama(config: Any) -> GGUFLayout:
    """Return the layout of a Llama.

    Raises:
        MMToolError: for rotary scaling that is not written here.
    """
    if config.hidden_act != "silu":
        raise not_representable(f"its activation is {config.hidden_act}, and llama.cpp's Llama has silu")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = decoder_numbers(config) | head_dim_numbers(head_dim)
    return GGUFLayout("LLAMA", numbers | rope_numbers(config), turned_queries(config))


def rope_numbers(config: Any) -> dict[str, Any]:
    """Return the settings of rotary scaling: none, or linear.

    Raises:
        MMToolError: for other kinds.
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}
    if kind == "linear":
        return {"rope_scaling_type": "linear", "rope_scaling_factor": float(rope["factor"])}
    raise not_representable(f"its rotary scaling {kind!r} is not written here")


def not_representable(reason: str) -> MMToolError:
    """Return the error of a model that a .gguf file cannot hold."""
    return MMToolError(f"--to_gguf true: {reason}", "Export it as a folder, or serve it with `mmtool infer`.")


def frequency_factors(plain: Tensor, used: Tensor) -> tuple[float, ...] | None:
    """Return what ``plain`` frequencies are divided by to get those that are used; None where they are equal."""
    if torch.equal(plain, used):
        return None
    return tuple((plain / used).tolist())
