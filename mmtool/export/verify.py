"""Load what was written and compare its logits with those of the source, on prompts as the model gets them."""

from __future__ import annotations

import gc
import inspect
import io
import math
import os
import wave
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import torch
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from mmtool.errors import CheckpointError, MMToolError
from mmtool.export.merge_lora import Adapter
from mmtool.export.progress import Progress
from mmtool.export.source import Source
from mmtool.finetuned import attach_adapter
from mmtool.loader import get_template, load_model, load_processor
from mmtool.log import get_logger
from mmtool.messages import Audio, Image, Message, Text
from mmtool.spec import ModelSpec

logger = get_logger(__name__)

# Largest difference of two logits that passes, in standard deviations of the logits; by how the weights are stored.
# Sums in another order give about 1e-5; a weight rounded to 16 bits is off by up to 2**-11 (fp16) or 2**-8 (bf16) of
# itself, which adds up over layers.
BOUNDS = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
# The same where the source was merged and rounded in memory, too: then only a weight that lies between two numbers of
# the format, and falls to the other side, makes a difference.
ROUNDED_BOUNDS = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 5e-3, torch.bfloat16: 0.03}
# What was written must be nearer to the source than this share of what the adapters do to it.
EFFECT_SHARE = 0.5
KEPT = 128  # positions from the end whose logits are compared
_QUESTIONS = (
    ("What is the capital of France, and how far is it from the sea?", "It is Paris, some 180 kilometres away."),
    ("请用一句话介绍你自己。", "我是一个乐于助人的助手。"),
)
_WITH_MEDIA = ("What is this? Tell me what you notice.", "It shows something red beside something blue.")
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Comparison:
    """How far two models are apart on the same prompts.

    Attributes:
        difference: largest difference of two logits.
        spread: standard deviation of the first one's logits.
        bound: largest difference that passes, in ``spread``.
        agreement: share of positions with the same likeliest token.
        positions: how many positions were compared.
        effect: largest difference that the adapters make at all; None without adapters.
        dtype: what was computed in.
        merged: largest difference to the source as peft merges it, rounded as it is stored; None where not compared.
    """

    difference: float
    spread: float
    bound: float
    agreement: float
    positions: int
    effect: float | None
    dtype: torch.dtype
    merged: float | None = None
    merged_bound: float = math.inf

    @property
    def passes(self) -> bool:
        """Whether the differences stay within their bounds."""
        apart = self.merged is not None and not self.merged <= self.merged_bound
        return not apart and math.isfinite(self.difference) and self.difference <= self.bound * self.spread

    def __str__(self) -> str:
        text = (
            f"largest logit difference {self.difference:.3g} (bound {self.bound * self.spread:.3g}), "
            f"top-1 agreement {100 * self.agreement:.2f} % of {self.positions} positions"
        )
        if self.merged is not None:
            text += f"; against peft's own merge {self.merged:.3g} (bound {self.merged_bound:.3g})"
        return text


def verify(
    source: Source, written: Path, stored: torch.dtype, device_map: Any = None, *, one_format: bool = False
) -> Comparison:
    """Compare a written folder with its source.

    Args:
        source: the base with its adapters, not merged.
        written: the folder.
        stored: how its weights are stored.
        device_map: where to compute.
        one_format: all of them are; then a merge in memory can be rounded in the same way, and compared closely.

    Raises:
        MMToolError: where the difference is beyond the bound, or the prompts are tokenised in another way.
    """
    dtype = compute_dtype(source.folder, stored, device_map)
    exact = one_format and dtype == torch.float32 and is_merged_by_peft(source.adapters)
    prompts = len(conversations(source.spec, source.system))
    passes = 2 + (1 + exact if source.adapters else 0)
    with Progress("verifying", prompts * (2 + passes)) as progress:  # to load a model counts as a pass
        expected, without, rounded, ids = reference(source, dtype, device_map, stored if exact else None, progress)
        found = logits_of_folder(source, written, dtype, device_map, ids, progress)
    comparison = compare(expected, found, without, BOUNDS[stored if dtype == torch.float32 else dtype], dtype)
    if rounded is not None and without is not None:
        merged, effect = _largest(rounded, found), _largest(rounded, without)
        bound = min(ROUNDED_BOUNDS[stored] * comparison.spread, EFFECT_SHARE * effect)
        # An adapter that does nothing leaves only what float32 sums differ by.
        least = ROUNDED_BOUNDS[torch.float32] * comparison.spread
        comparison = replace(comparison, merged=merged, merged_bound=max(bound, least))
    if not comparison.passes:
        reason = (
            "The adapter may not belong to this model" if source.adapters else "Give a wider number format (--dtype)"
        )
        raise MMToolError(
            f"what was written does not answer as its source does: {comparison}; nothing was kept",
            f"{reason}; --verify false writes it all the same.",
        )
    if comparison.effect is not None and comparison.difference > comparison.effect / 2 and stored != torch.float32:
        logger.warning(
            "rounding to %s moves the logits by %.2g, the adapter by %.2g: --dtype fp32 keeps what was learned",
            _NAMES[stored],
            comparison.difference,
            comparison.effect,
        )
    return comparison


def compare(
    expected: Sequence[Tensor], found: Sequence[Tensor], without: Sequence[Tensor] | None, bound: float, dtype: Any
) -> Comparison:
    """Return how far two lists of logits ``(positions, vocabulary)`` are apart; ``without``: those without adapters."""
    joined = torch.cat(list(expected))
    difference = _largest(expected, found)
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(expected, found, strict=True))
    effect = None if without is None else _largest(expected, without)
    return Comparison(difference, float(joined.std()), bound, same / len(joined), len(joined), effect, dtype)


def _largest(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def is_merged_by_peft(adapters: Sequence[Adapter]) -> bool:
    """Tell whether peft can merge what is merged: one adapter, at its full weight."""
    return len(adapters) == 1 and adapters[0].weight == 1


def reference(
    source: Source, dtype: torch.dtype, device_map: Any, stored: torch.dtype | None, progress: Progress
) -> tuple[list[Tensor], list[Tensor] | None, list[Tensor] | None, list[list[int]]]:
    """Return the logits of the source, and the ids of the prompts.

    The logits are those with its adapters; those without, if it has any; and, with ``stored``, those after peft has
    merged the adapter and every weight was rounded to that format.
    """
    model, processor = load_model(
        source.spec,
        source.folder,
        dtype=_NAMES[dtype],
        device_map=device_map,
        model_kwargs=source.model_kwargs,
        processor=load_processor(source.spec, source.folder, processor_kwargs=source.processor_kwargs),
    )
    template = get_template(source.spec, processor)
    rows = [template.encode(messages, train=True) for messages in conversations(source.spec, source.system)]
    progress.advance(len(rows))
    without = None
    if source.adapters:
        without = all_logits(model, template, rows, progress)
        model = attach_adapters(model, source.adapters)
    found = all_logits(model, template, rows, progress)
    rounded = None
    if stored is not None and not changes_tied_weights(model):
        merge_and_round(model, stored)
        rounded = all_logits(model, template, rows, progress)
    return found, without, rounded, [row["input_ids"] for row in rows]


def changes_tied_weights(model: nn.Module) -> bool:
    """Tell whether an adapter changes one of two layers that share a weight: peft's merge would change both."""
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    layers = [module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return any(uses[id(weight)] > 1 for layer in layers for weight in layer.parameters(recurse=False))


@torch.no_grad()
def merge_and_round(model: nn.Module, stored: torch.dtype) -> None:
    """Let peft fold the adapter in ``model`` into its weights, and round all of them to ``stored``, in place."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    for parameter in model.parameters():
        parameter.copy_(parameter.to(stored))


def logits_of_folder(
    source: Source, folder: Path, dtype: torch.dtype, device_map: Any, ids: Sequence[list[int]], progress: Progress
) -> list[Tensor]:
    """Return the logits of a written folder, whose own processor prepares the same prompts.

    Raises:
        CheckpointError: where it prepares them in another way.
    """
    gc.collect()
    model, processor = load_model(
        source.spec,
        folder,
        dtype=_NAMES[dtype],
        device_map=device_map,
        model_kwargs=source.model_kwargs,
        processor=load_processor(source.spec, folder, processor_kwargs=source.processor_kwargs),
    )
    template = get_template(source.spec, processor)
    rows = [template.encode(messages, train=True) for messages in conversations(source.spec, source.system)]
    if [row["input_ids"] for row in rows] != list(ids):
        raise CheckpointError("the tokenizer that was written gives other ids than that of the source")
    progress.advance(len(rows))
    return all_logits(model, template, rows, progress)


def all_logits(model: Any, template: Any, rows: Sequence[dict[str, Any]], progress: Progress) -> list[Tensor]:
    """Return the logits of encoded rows, see ``logits``."""
    found = []
    for row in rows:
        found.append(logits(model, template, row))
        progress.advance()
    return found


@torch.no_grad()
def logits(model: Any, template: Any, row: dict[str, Any]) -> Tensor:
    """Return the logits of the last positions of an encoded row, ``(positions, vocabulary)`` in float32 on the CPU."""
    device = model.get_input_embeddings().weight.device
    batch = {name: value.to(device) for name, value in template.collate([row]).items() if name != "labels"}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        batch["logits_to_keep"] = KEPT
    output = model(**batch, use_cache=False).logits
    return output[0, -KEPT:].float().cpu()


def conversations(spec: ModelSpec, system: str | None) -> list[list[Message]]:
    """Return sample conversations: in two languages, with a picture and with a sound where the model takes them."""
    start = [] if system is None else [Message("system", (Text(system),))]
    found = [_turn(Text(question), answer=answer) for question, answer in _QUESTIONS]
    question, answer = _WITH_MEDIA
    if "image" in spec.modalities:
        found.append(_turn(Image(_picture()), Text(question), answer=answer))
    if "audio" in spec.modalities:
        found.append(_turn(Audio(_sound()), Text(question), answer=answer))
    return [[*start, *turns] for turns in found]


def _turn(*parts: Any, answer: str) -> list[Message]:
    return [Message("user", tuple(parts)), Message("assistant", (Text(answer),))]


def _picture() -> PIL.Image.Image:
    picture = PIL.Image.linear_gradient("L").resize((256, 192)).convert("RGB")
    draw = PIL.ImageDraw.Draw(picture)
    draw.ellipse((20, 30, 110, 120), fill="red")
    draw.rectangle((140, 60, 230, 170), fill="blue")
    return picture


def _sound(seconds: float = 1.0, rate: int = 16000) -> bytes:
    samples = [
        int(8000 * math.sin(2 * math.pi * (300 + 200 * n / rate) * n / rate)) for n in range(int(seconds * rate))
    ]
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(b"".join(sample.to_bytes(2, "little", signed=True) for sample in samples))
    return buffer.getvalue()


def compute_dtype(folder: Path, stored: torch.dtype, device_map: Any) -> torch.dtype:
    """Return float32 where a model fits into memory in it, else what it is stored in.

    Raises:
        MMToolError: where it fits in neither.
    """
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin"))
    free = _free_memory(device_map)
    if size / stored.itemsize * 4 < 0.8 * free or stored.itemsize >= 4:
        return torch.float32
    if size > 0.9 * free:
        raise MMToolError(
            f"--verify true needs {size / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free",
            "Give --device_map auto for several GPUs, or write without it: --verify false.",
        )
    logger.info("verifying in %s: in float32 the model would not fit into memory", _NAMES[stored])
    return stored


def _free_memory(device_map: Any) -> float:
    if torch.cuda.is_available() and device_map != "cpu":
        devices = range(torch.cuda.device_count()) if device_map == "auto" else [0]
        return float(sum(torch.cuda.mem_get_info(device)[0] for device in devices))
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) + _page_cache()


def _page_cache() -> float:
    """Return the bytes that the system would free for a process that asks."""
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="ascii").splitlines() if path.is_file() else []
    amounts = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return float(max(0, amounts.get("MemAvailable", 0) - amounts.get("MemFree", 0)))


# Adapters that are not merged -----------------------------------------------------------------------------------------


def attach_adapters(model: Any, adapters: Sequence[Adapter]) -> Any:
    """Return ``model`` with adapters in its layers; several add their shares, as merging does with weights."""
    if len(adapters) == 1 and adapters[0].weight == 1:
        return attach_adapter(model, adapters[0].folder)
    weights = {f"adapter{index}": adapter.weight for index, adapter in enumerate(adapters)}
    adapted: PeftModel | None = None
    for name, adapter in zip(weights, adapters, strict=True):
        config = PeftConfig.from_pretrained(str(adapter.folder))
        config.inference_mode = True
        if adapted is None:
            adapted = PeftModel(model, config, adapter_name=name, autocast_adapter_dtype=False)
        else:
            adapted.add_adapter(name, config)
        state = load_peft_weights(str(adapter.folder), device="cpu")
        set_peft_model_state_dict(adapted, state, adapter_name=name)
    assert adapted is not None
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.forward = _weighted(module, weights)  # type: ignore[attr-defined]
        elif isinstance(module, ModulesToSaveWrapper):
            _mix_modules(module, weights)
    adapted.to(next(model.parameters()).device)
    return adapted.eval().get_base_model()


def _weighted(layer: Any, weights: dict[str, float]) -> Callable[..., Tensor]:
    plain = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = layer.get_base_layer()(x, *args, **kwargs)
        total = base.clone()
        for name, weight in weights.items():
            if name in layer.scaling:
                layer._active_adapter = [name]
                total += weight * (plain(x, *args, **kwargs) - base)
        return total

    return forward


@torch.no_grad()
def _mix_modules(wrapper: ModulesToSaveWrapper, weights: dict[str, float]) -> None:
    names = [name for name in weights if name in wrapper.modules_to_save]
    original: nn.Module = wrapper.original_module
    target = wrapper.modules_to_save[names[0]]
    base = dict(original.named_parameters())
    trained = {name: dict(wrapper.modules_to_save[name].named_parameters()) for name in names}
    mixed = {
        key: value + sum(weights[name] * (trained[name][key] - value) for name in names) for key, value in base.items()
    }
    for key, parameter in target.named_parameters():
        parameter.copy_(mixed[key])
    wrapper._active_adapter = [names[0]]
