"""Which module of a loaded model is what: language model, towers, projectors; found from its attributes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

# Words in the names that transformers gives to the parts beside the language model.
_ENCODERS = re.compile(r"vision|visual|image|audio|speech|sound|tower|encoder")
_PROJECTORS = re.compile(r"project|connector|merger|adapter|resampler|align|proj\b|mlp|newline")
_VISION = re.compile(r"vision|visual|image")
_AUDIO = re.compile(r"audio|speech|sound")


def find_layout(model: Any) -> tuple[Mapping[str, tuple[str, ...]], str]:
    """Return module name prefixes by part, and a regular expression for LoRA: every linear layer of the decoder.

    The language model is what ``get_decoder`` returns, with its head; everything beside it on the way down is a tower
    or a projector.
    """
    decoder = model.get_decoder()
    names = {id(module): name for name, module in model.named_modules()}
    path = names[id(decoder)]
    head = names.get(id(model.get_output_embeddings()))
    parts: dict[str, list[str]] = {"llm": [path]}
    if head is not None and not head.startswith(f"{path}."):
        parts["llm"].append(head)
    beside = [name for name in _beside(model, path) if name != head]
    only_hears = any(map(_AUDIO.search, beside)) and not any(map(_VISION.search, beside))
    for name in beside:
        parts.setdefault(_part_of(name, only_hears), []).append(name)
    return {part: tuple(prefixes) for part, prefixes in parts.items()}, _lora_targets(decoder, path)


def _beside(model: Any, path: str) -> list[str]:
    """Return the names of the modules and single weights beside the way down to ``path``."""
    found, prefix, module = [], "", model
    for step in path.split("."):
        children = [(name, any(True for _ in child.parameters())) for name, child in module.named_children()]
        for name, has_weights in children:
            if has_weights and name != step:
                found += _with_merger_apart(f"{prefix}{name}", getattr(module, name))
        found += [f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False)]
        prefix, module = f"{prefix}{step}.", getattr(module, step)
    return found


def _with_merger_apart(name: str, module: nn.Module) -> list[str]:
    """Return ``name``, or the names below it where a tower has its projector inside, as those of Qwen-VL."""
    below = [child for child, _ in module.named_children()]
    if not any("merger" in child for child in below):
        return [name]
    return [f"{name}.{child}" for child in (*below, *(own for own, _ in module.named_parameters(recurse=False)))]


def _part_of(name: str, only_hears: bool) -> str:
    kind = "audio" if only_hears or _AUDIO.search(name) else "vision"
    if _PROJECTORS.search(name.rpartition(".")[2]):
        return f"{kind}_proj"
    return f"{kind}_encoder" if _ENCODERS.search(name) else "llm"


def _lora_targets(decoder: nn.Module, path: str) -> str:
    linears = {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    ends = "|".join(sorted(map(re.escape, linears)))
    return rf"{re.escape(path)}\..*\.({ends})"
