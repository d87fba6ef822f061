"""The Python API: the swift 2.x calls by their old names, and ``chat``/``stream_chat`` for messages.

Thin on purpose: the registry, the loader, the templates and the engine do the work.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmtool.engine.base import Answer, Delta, Engine, Request, Sampling, request_from
from mmtool.engine.create import create_engine
from mmtool.errors import MMToolError
from mmtool.loader import get_template as make_template
from mmtool.loader import load_model as load_weights
from mmtool.loader import load_processor, open_folder
from mmtool.log import get_logger
from mmtool.messages import Message, conversation
from mmtool.registry import ModelType, get_default_template_type, get_template_class
from mmtool.spec import ModelSpec
from mmtool.template.base import Template

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Answer",
    "Delta",
    "ModelType",
    "chat",
    "get_default_template_type",
    "get_model_tokenizer",
    "get_template",
    "inference",
    "inference_stream",
    "stream_chat",
]

History = list[list[str]]

# Keywords of the swift 2.x calls that have no work to do here.
_UNNEEDED = {
    "trust_remote_code": "the models are part of mmtool",
    "revision": "give the folder of the revision as model_id_or_path",
    "use_hf": "give the folder or the hub id as model_id_or_path",
    "ignore_file_pattern": "only what is needed is read",
    "automodel_class": "the registry names the class",
    "is_training": "call model.train()",
    "verbose": "print the answer yourself",
    "stream": "inference_stream streams",
    "prompt_prefix": "print the prompt with template.show(messages)",
    "output_prefix": "print the answer yourself",
    "generation_info": "chat() returns the figures in Answer.usage",
}
_UNSUPPORTED = ("tools", "objects", "videos", "adapter_names", "quant_method")
_HARMLESS = (None, False, "", (), [])
_noted: set[str] = set()

# What belongs to a tokenizer or a model, without keeping it alive or writing into it.
_origins: weakref.WeakKeyDictionary[Any, tuple[ModelSpec, Path]] = weakref.WeakKeyDictionary()
_engines: weakref.WeakKeyDictionary[Any, tuple[object, Engine]] = weakref.WeakKeyDictionary()


def get_model_tokenizer(
    model_type: str | None,
    torch_dtype: torch.dtype | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    load_model: bool = True,
    *,
    model_id_or_path: str | Path | None = None,
    attn_impl: str | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel | None, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        model_type: such as ``ModelType.yi_vl_6b_chat``; None takes what the folder holds.
        torch_dtype: None is the checkpoint's own (float32 where the CPU is slow in that).
        model_kwargs: keywords of ``from_pretrained``, ``device_map`` among them.
        load_model: False gives None for the model.
        model_id_or_path: a folder or hub id; None takes the type's own.
        attn_impl: ``eager``, ``sdpa`` or ``flash_attention_2``.
        kwargs: further keywords of swift 2.x, of which none is needed.
    """
    attn_impl = attn_impl or ("flash_attention_2" if kwargs.pop("use_flash_attn", None) else None)
    _note_unneeded("get_model_tokenizer", kwargs)
    spec, folder = open_folder(model_type, model_id_or_path)
    processor = load_processor(spec, folder)
    _origins[processor.tokenizer] = spec, folder
    if not load_model:
        return None, processor.tokenizer
    rest = dict(model_kwargs or {})
    model, _ = load_weights(
        spec,
        folder,
        dtype="AUTO" if torch_dtype is None else str(torch_dtype).removeprefix("torch."),
        device_map=rest.pop("device_map", None),
        attn_impl=attn_impl,
        model_kwargs=rest,
        processor=processor,
    )
    return model, processor.tokenizer


def get_template(
    template_type: str | None,
    tokenizer: PreTrainedTokenizerBase,
    default_system: str | None = None,
    max_length: int | None = None,
    truncation_strategy: str = "delete",
    *,
    processor_kwargs: Mapping[str, Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Template:
    """Return the chat format for a tokenizer of ``get_model_tokenizer``.

    Args:
        template_type: None takes the model's own.
        tokenizer: as ``get_model_tokenizer`` returned it.
        default_system: replaces the default system text; ``""`` is none.
        max_length: most positions, media at their real length.
        truncation_strategy: ``delete``, ``truncation_left`` or ``raise``.
        processor_kwargs: settings of the image or audio processor, such as ``{"max_slice_nums": 4}``.
        template_kwargs: settings that only this template has.
        kwargs: further keywords of swift 2.x, of which none is needed.
    """
    _note_unneeded("get_template", kwargs)
    spec, folder = _origin(tokenizer)
    if template_type is not None:
        spec = replace(spec, template_type=template_type, template_class=get_template_class(template_type))
    return make_template(
        spec,
        load_processor(spec, folder, tokenizer=tokenizer, processor_kwargs=processor_kwargs),
        template_kwargs,
        system=default_system,
        max_length=max_length,
        truncation_strategy=truncation_strategy,
    )


def inference(
    model: PreTrainedModel,
    template: Template,
    query: str,
    history: Sequence[Sequence[str]] | None = None,
    system: str | None = None,
    images: Sequence[Any] | None = None,
    audios: Sequence[Any] | None = None,
    *,
    generation_config: GenerationConfig | None = None,
    stop_words: Sequence[str] | None = None,
    **kwargs: Any,
) -> tuple[str, History]:
    """Answer ``query`` and return (answer, history with it).

    Args:
        model: what answers; its ``generation_config`` says how, as it is now.
        template: its chat format.
        query: the question; for models with inline media it may hold ``<img>path or URL</img>``.
        history: the rounds before, ``[[question, answer], ...]``.
        system: the system text; None for the template's own, ``""`` for none.
        images: one entry per round, oldest first, None for a round without.
        audios: the same for sounds.
        generation_config: used instead of the model's.
        stop_words: texts that end the answer, beside the template's.
        kwargs: fields of ``Sampling`` that win over the generation config.
    """
    *_, last = inference_stream(
        model,
        template,
        query,
        history,
        system,
        images,
        audios,
        generation_config=generation_config,
        stop_words=stop_words,
        **kwargs,
    )
    return last


def inference_stream(
    model: PreTrainedModel,
    template: Template,
    query: str,
    history: Sequence[Sequence[str]] | None = None,
    system: str | None = None,
    images: Sequence[Any] | None = None,
    audios: Sequence[Any] | None = None,
    *,
    generation_config: GenerationConfig | None = None,
    stop_words: Sequence[str] | None = None,
    **kwargs: Any,
) -> Iterator[tuple[str, History]]:
    """Answer ``query`` and yield (answer so far, history with it); arguments as for ``inference``.

    Every answer extends the one before; there is at least one, and the last is the whole.
    """
    media_style = _origin(template.tokenizer)[0].media_style
    messages = conversation(query, history, system, images, audios, media_style)
    if stop_words is not None:
        kwargs["stop"] = (*kwargs.get("stop", ()), *stop_words)
    past = [list(pair) for pair in history or ()]
    response, shown = "", False
    deltas = stream_chat(model, template, messages, generation_config=generation_config, **kwargs)
    with contextlib.closing(deltas):
        for delta in deltas:
            response += delta.text
            if delta.text or (delta.finish_reason and not shown):
                shown = True
                yield response, [*map(list, past), [query, response]]


def chat(
    model: PreTrainedModel,
    template: Template,
    messages: Sequence[Message | Mapping[str, Any]],
    *,
    generation_config: GenerationConfig | None = None,
    **sampling: Any,
) -> Answer:
    """Answer a conversation.

    Args:
        model: what answers; its ``generation_config`` says how, as it is now.
        template: its chat format.
        messages: ``[{"role": "user", "content": "..."}]``; content may be a list of parts such as
            ``{"type": "image", "image": path, URL, bytes or PIL image}``. The last message is the user's.
        generation_config: used instead of the model's.
        sampling: fields of ``Sampling`` (``max_new_tokens=64, temperature=0.2, ...``) that win over it.
    """
    engine, request = _prepare(model, template, messages, generation_config, sampling)
    return engine.answer(request)


def stream_chat(
    model: PreTrainedModel,
    template: Template,
    messages: Sequence[Message | Mapping[str, Any]],
    *,
    generation_config: GenerationConfig | None = None,
    **sampling: Any,
) -> Iterator[Delta]:
    """Answer a conversation piece by piece; arguments as for ``chat``.

    Joined, the ``text`` of all deltas is the answer; the last one has ``finish_reason`` and ``usage``.
    """
    engine, request = _prepare(model, template, messages, generation_config, sampling)
    yield from engine.generate([request])


def _prepare(
    model: PreTrainedModel,
    template: Template,
    messages: Sequence[Message | Mapping[str, Any]],
    generation_config: GenerationConfig | None,
    overrides: dict[str, Any],
) -> tuple[Engine, Request]:
    known = {field.name for field in fields(Sampling)}
    _note_unneeded("inference", {name: value for name, value in overrides.items() if name not in known})
    overrides = {name: value for name, value in overrides.items() if name in known}
    if isinstance(overrides.get("stop"), str):
        overrides["stop"] = (overrides["stop"],)
    sampling = Sampling.from_generation_config(generation_config or model.generation_config, **overrides)
    return _engine(model, template), request_from(template, messages, sampling)


def _engine(model: PreTrainedModel, template: Template) -> Engine:
    """Return the model's engine, whose KV and feature caches live from call to call.

    A new one is made when the weights are other ones: moved, cast, or trained since.
    """
    state = _weights_state(model)
    model.eval()
    known, engine = _engines.get(model, (None, None))
    if engine is None or known != state:
        # A proxy: the table must not keep the model alive through its own value.
        engine = create_engine(weakref.proxy(model), template.tokenizer)
        _engines[model] = state, engine
    return engine


def _weights_state(model: PreTrainedModel) -> object:
    # Every change in place counts up a tensor's version; tensors made under inference_mode have none and cannot change.
    return tuple(
        (weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version)
        for weight in model.parameters()
    )


def _origin(tokenizer: PreTrainedTokenizerBase) -> tuple[ModelSpec, Path]:
    found = _origins.get(tokenizer)
    if found is None:
        raise MMToolError(
            "this tokenizer does not come from get_model_tokenizer", "Pass on the tokenizer that it returned."
        )
    return found


def _note_unneeded(call: str, keywords: Mapping[str, Any]) -> None:
    """Say once for every keyword of swift 2.x that it does nothing; others are mistakes."""
    for name, value in keywords.items():
        if name not in _UNNEEDED and name not in _UNSUPPORTED:
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")
        if value in _HARMLESS or name in _noted:
            continue
        if name in _UNSUPPORTED:
            raise MMToolError(f"{call}({name}=...) is not supported", "Leave it out.")
        _noted.add(name)
        get_logger(__name__).warning("%s(%s=...) is not needed: %s", call, name, _UNNEEDED[name])
