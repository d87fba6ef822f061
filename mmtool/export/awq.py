"""Which factors AWQ may move in a language model: from the output of a layer into all that reads it.

llm-compressor finds them by patterns on names, which also fit the towers of a model that sees or hears; here they are
anchored to the decoder. It knows the families of transformers by their classes; native ones are told by their modules.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

# Inside a decoder layer: what gives, and all that takes; layers take a chain where they have its first reader.
_CHAINS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("input_layernorm", ("self_attn.kv_a_proj_with_mqa", "self_attn.q_a_proj", "self_attn.q_proj")),  # latent attention
    ("self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
    ("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
    # InternLM2, whose low-rank paths read what their matrices read
    ("attention_norm", ("attention.wqkv", "attention.wqkv_branch.Plora_A")),
    (
        "ffn_norm",
        ("feed_forward.w1", "feed_forward.w3", "feed_forward.w1_branch.Plora_A", "feed_forward.w3_branch.Plora_A"),
    ),
)


def chains(model: Any) -> list[tuple[str, list[str]]]:
    """Return names of layers whose output can be divided by factors, each with those of all that read it."""
    decoder = model.get_decoder()
    (prefix,) = (name for name, module in model.named_modules() if module is decoder)
    found: list[tuple[str, list[str]]] = []
    for number, layer in enumerate(decoder.layers):
        inside = dict(layer.named_modules())
        place = f"{prefix}.layers.{number}."
        for giver, readers in _chains_of(inside):
            found.append((f"{place}{giver}", [f"{place}{reader}" for reader in readers]))
    return found


def _chains_of(inside: dict[str, nn.Module]) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    latent = "self_attn.kv_a_proj_with_mqa" in inside
    for giver, names in _CHAINS:
        readers = [name for name in names if name in inside]
        if giver not in inside or not readers or readers[0] != names[0]:
            continue
        if latent and giver == "input_layernorm" and readers[0] == "self_attn.q_proj":
            continue
        source, reader = inside[giver], inside[readers[0]]
        grouped = isinstance(source, nn.Linear) and source.out_features != reader.in_features
        if not grouped:
            found.append((giver, readers))
    return found


def mappings(model: Any) -> list[Any]:
    """Return what llm-compressor's AWQ takes."""
    from llmcompressor.modifiers.transform.awq import AWQ_MAPPING_REGISTRY, AWQMapping

    known = AWQ_MAPPING_REGISTRY.get(type(model).__name__)
    if known is None:
        return [
            AWQMapping(_exactly(giver), [_exactly(reader) for reader in readers]) for giver, readers in chains(model)
        ]
    decoder = model.get_decoder()
    (prefix,) = (name for name, module in model.named_modules() if module is decoder)

    def anchored(pattern: str) -> str:
        return pattern.replace("re:.*", f"re:{re.escape(prefix)}\\..*", 1)

    return [
        AWQMapping(anchored(each.smooth_layer), list(map(anchored, each.balance_layers)), each.activation_hook_target)
        for each in known
    ]


def _exactly(name: str) -> str:
    return f"re:{re.escape(name)}$"


def modifiers(model: Any, groups: dict[str, Any]) -> list[Any]:
    """Return the steps that find the factors, and then round by ``groups``."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    class Unpinned(IntermediatesCache):
        """Inputs that stay where they are: memory is pinned for the way to an accelerator."""

        def pin_memory(self, *args: Any, **kwargs: Any) -> None:
            """Do nothing."""

    class OnCPU(AWQModifier):
        """AWQ where there is no accelerator."""

        def _setup_activation_cache_hooks(self) -> None:
            super()._setup_activation_cache_hooks()
            for parent in self._parent_args_cache:
                self._parent_args_cache[parent] = Unpinned(None, self.offload_device)

    kind = AWQModifier if torch.accelerator.is_available() else OnCPU
    return [kind(mappings=mappings(model)), QuantizationModifier(config_groups=groups, ignore=[])]
