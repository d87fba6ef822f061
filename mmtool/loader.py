"""Open a model: which type a folder holds, its processor, its weights on a device, its template."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from mmtool.errors import CheckpointError, MMToolError
from mmtool.hub import resolve_folder
from mmtool.models.common.bnb import METHOD, finish_bnb, is_bnb
from mmtool.models.common.folders import read_json
from mmtool.models.common.quantised import CONFIG_KEY, INSTALL, finish_quantised
from mmtool.registry import MODELS, detect_model_type, get_model_spec
from mmtool.spec import ModelSpec
from mmtool.utils import collection_paused, did_you_mean, import_object, resolve_dtype

if TYPE_CHECKING:
    from mmtool.template.base import Template

DEFAULT_MODEL_TYPE = "tiny"
_PROCESSOR_PARTS = ("image_processor", "feature_extractor")


def open_folder(
    model_type: str | None = None, model_id_or_path: str | Path | None = None, *, hub: str = "hf"
) -> tuple[ModelSpec, Path]:
    """Return the type and the local folder of a model.

    Args:
        model_type: None takes what the folder holds; without a folder, the embedded model.
        model_id_or_path: a folder or hub id; None takes the type's own.
        hub: ``hf`` or ``ms``, where ids are looked up.

    Raises:
        CheckpointError: when the folder holds another family than ``model_type``, or one that is not known.
    """
    if model_id_or_path is None:
        spec = get_model_spec(model_type or DEFAULT_MODEL_TYPE)
        return spec, resolve_folder(spec, hub=hub)
    wanted = get_model_spec(model_type) if model_type is not None else None
    folder = resolve_folder(wanted, model_id_or_path, hub=hub)
    config = read_json(folder / "config.json")
    if wanted is None:
        wanted = MODELS[detect_model_type(config, folder)]
    else:
        _check_family(wanted, config, folder)
    if wanted.refine is not None:
        wanted = import_object(wanted.refine)(wanted, folder)
    return wanted, folder


def fit_layout(spec: ModelSpec, model: Any) -> ModelSpec:
    """Return ``spec`` with the parts and LoRA targets of ``model``, where they are not the same for all of its type."""
    if spec.layout is None:
        return spec
    parts, lora_target_modules = import_object(spec.layout)(model)
    return dataclasses.replace(spec, parts=parts, lora_target_modules=lora_target_modules)


def _check_family(wanted: ModelSpec, config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a folder of another network; a size of the same network may be called by another's name."""
    try:
        found = detect_model_type(config, folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"--model_type {wanted.model_type} does not fit: {error}",
            f"Give the folder of a {wanted.model_type} model.",
        ) from error
    holds = MODELS[found]
    if (holds.family, holds.model_class) != (wanted.family, wanted.model_class):
        named = f"a {found} model"
        if holds.layout is not None:  # a type for all that no family claims
            named = f"a {config['model_type']!r} model of transformers (model type {found})"
        raise CheckpointError(
            f"--model_type {wanted.model_type}, but {folder} holds {named}",
            f"Pass --model_type {found}, or leave it out.",
        )


def load_processor(
    spec: ModelSpec, folder: Path, *, tokenizer: Any = None, processor_kwargs: Mapping[str, Any] | None = None
) -> Any:
    """Return the processor of a folder: ``tokenizer`` (read if None) and what prepares media.

    ``processor_kwargs`` are settings of its parts that win over the folder's, such as ``{"max_slice_nums": 4}``.
    """
    settings = dict(processor_kwargs or {})
    with collection_paused():
        processor_class = import_object(spec.processor_class)
        if settings:
            processor = processor_class.from_pretrained(folder, tokenizer=tokenizer)
            parts = [getattr(processor, name) for name in _PROCESSOR_PARTS if hasattr(processor, name)]
            for name in settings:
                if not any(hasattr(part, name) for part in parts):
                    raise MMToolError(f"--processor_kwargs: {spec.model_type} has no setting {name!r}")
        return processor_class.from_pretrained(folder, tokenizer=tokenizer, **settings)


def get_template(
    spec: ModelSpec, processor: Any, template_kwargs: Mapping[str, Any] | None = None, **settings: Any
) -> Template:
    """Return the chat format of ``spec`` for ``processor``; ``settings`` as in ``Template``.

    ``template_kwargs`` are settings that only this template has, such as ``{"image_position": "auto"}``.
    """
    template_class = import_object(spec.template_class)
    for name in template_kwargs or {}:
        known = {key for each in template_class.__mro__ for key in _keywords(each)}
        if name not in known:
            raise MMToolError(
                f"--template_kwargs: the template {spec.template_type} has no setting {name!r}",
                did_you_mean(name, known),
            )
    return template_class(processor, **settings, **(template_kwargs or {}))


def _keywords(template_class: type) -> list[str]:
    """Return the names of the keyword-only arguments that a class itself declares."""
    if "__init__" not in vars(template_class) or template_class is object:
        return []
    parameters = inspect.signature(template_class).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def load_model(
    spec: ModelSpec,
    folder: Path,
    *,
    dtype: str = "AUTO",
    device_map: str | Mapping[str, Any] | None = None,
    attn_impl: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    processor: Any = None,
) -> tuple[Any, Any]:
    """Return the model of a folder, in evaluation mode, and its processor.

    Args:
        spec: entry of the registry.
        folder: the model's folder.
        dtype: ``AUTO|fp32|bf16|fp16``. AUTO is what the folder says; on a CPU, float32 for the embedded model, for
            float16, and for bfloat16 where the CPU has no instructions for it.
        device_map: ``cpu``, ``cuda:0``, ``auto`` or a map by module; None is the first GPU, or else the CPU.
        attn_impl: ``eager``, ``sdpa`` or ``flash_attention_2``; None lets transformers choose.
        model_kwargs: more keywords of ``from_pretrained``; they win over the arguments here.
        processor: the processor if it is read already.
    """
    with collection_paused():
        model_class = import_object(spec.model_class)
        device_map = _device_map(device_map)
        keywords: dict[str, Any] = {"dtype": _dtype(dtype, spec, folder, device_map), "device_map": device_map}
        if attn_impl is not None:
            keywords["attn_implementation"] = attn_impl
        keywords |= model_kwargs or {}
        stored = read_json(folder / "config.json")
        if is_bnb(stored) and importlib.util.find_spec(METHOD) is None:
            raise MMToolError(f"the weights in {folder} need the package {METHOD}", INSTALL)
        with _progress_bar(spec.embedded is None and sys.stderr.isatty()):
            try:
                model = model_class.from_pretrained(folder, **keywords)
            except ImportError as error:  # flash attention, a quantisation library
                raise MMToolError(
                    f"{spec.model_type} cannot be loaded like this: {error}",
                    "Install the package, or leave out the option that asks for it, such as --attn_impl.",
                ) from error
        if CONFIG_KEY in stored:
            finish_quantised(model)
        elif is_bnb(stored):
            finish_bnb(model)
        processor = processor or load_processor(spec, folder)
    _check_vocabulary(model, processor, folder)
    return model, processor


def _device_map(device_map: str | Mapping[str, Any] | None) -> str | dict[str, Any] | None:
    """Return what transformers should be told: None for the CPU, which then needs no accelerate."""
    has_gpu = torch.cuda.is_available()
    if isinstance(device_map, Mapping):
        return dict(device_map)
    if device_map in (None, "auto") and has_gpu:
        return device_map or "cuda:0"
    if device_map in (None, "auto", "cpu"):
        return None
    if device_map.startswith("cuda") and not has_gpu:
        raise MMToolError(f"--device_map {device_map}, but torch sees no GPU", "Leave it out to run on the CPU.")
    return device_map


def _dtype(dtype: str, spec: ModelSpec, folder: Path, device_map: str | dict[str, Any] | None) -> torch.dtype | str:
    chosen = resolve_dtype(dtype)
    if chosen != "auto" or device_map is not None:
        return chosen
    config = read_json(folder / "config.json")
    stored = config.get("dtype") or config.get("torch_dtype")
    slow = stored == "float16" or (stored == "bfloat16" and not _cpu_has_bf16())
    return "float32" if spec.embedded or slow else "auto"


def number_format(dtype: str, spec: ModelSpec, folder: Path) -> str:
    """Return the number format that ``load_model`` would take, by its name in torch; ``auto`` where only files tell."""
    chosen = _dtype(dtype, spec, folder, _device_map(None))
    if chosen == "auto":
        config = read_json(folder / "config.json")
        text = config.get("text_config") or {}
        stored = [part.get(key) for part in (config, text) for key in ("dtype", "torch_dtype")]
        chosen = next(filter(None, stored), chosen)
    return str(chosen).removeprefix("torch.")


def _cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # newer torch only
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _check_vocabulary(model: Any, processor: Any, folder: Path) -> None:
    num_tokens, num_rows = len(processor.tokenizer), model.get_input_embeddings().weight.shape[0]
    if num_tokens > num_rows:
        raise CheckpointError(
            f"the tokenizer in {folder} has {num_tokens} tokens, but the model knows {num_rows}",
            "Take tokenizer.model, tokenizer_config.json and special_tokens_map.json from the release.",
        )


@contextmanager
def _progress_bar(shown: bool) -> Iterator[None]:
    enabled = logging.is_progress_bar_enabled()
    if not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
