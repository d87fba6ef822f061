"""Language models of transformers that llama.cpp knows with the same maths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmtool.models.common.gguf import (
    GGUFLayout,
    decoder_numbers,
    head_dim_numbers,
    llama,
    not_representable,
    rope_numbers,
)


def layout(config: Any) -> GGUFLayout:
    """Return how the model is written.

    Raises:
        MMToolError: for all but a few.
    """
    if config.model_type not in _KNOWN:
        raise not_representable(
            f"models of type {config.model_type!r} are not written; of transformers' own: {', '.join(_KNOWN)}"
        )
    return _KNOWN[config.model_type](config)


def _qwen(architecture: str) -> Callable[[Any], GGUFLayout]:
    def made(config: Any) -> GGUFLayout:
        if getattr(config, "use_sliding_window", False):
            raise not_representable("it attends to a sliding window")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return GGUFLayout(architecture, decoder_numbers(config) | head_dim_numbers(head_dim) | rope_numbers(config))

    return made


_KNOWN: Mapping[str, Callable[[Any], GGUFLayout]] = {"llama": llama, "qwen2": _qwen("QWEN2"), "qwen3": _qwen("QWEN3")}
