"""``model.chat(messages)`` as the release offers it, with the prompts and the engine of everything else here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mmtool.errors import MMToolError
from mmtool.messages import Audio, Image, Message, Part, Text, to_messages
from mmtool.models.common.chat import deltas, processor_of
from mmtool.models.megrez.processing_megrez import MegrezOProcessor
from mmtool.models.megrez.template import MegrezOmniTemplate

# What the release's web page samples with; its examples ask for the likeliest tokens instead.
_SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 100, "repetition_penalty": 1.2}
_KINDS: tuple[tuple[str, type[Image] | type[Audio]], ...] = (("image", Image), ("audio", Audio))


def answer(
    model: Any, messages: Sequence[Mapping[str, Any] | Message], sampling: bool, streamer: Any, settings: dict[str, Any]
) -> str:
    """Return the answer to a conversation.

    Args:
        model: a ``MegrezOmniForConditionalGeneration`` that was loaded from a folder.
        messages: ``{"role", "content"}``; the content is a string, a list of parts, or an object with ``text``,
            ``image`` and ``audio``, each of the last two one medium or a list.
        sampling: draw tokens at random.
        streamer: gets the tokens as they come: ``put(ids)`` and ``end()``, as those of transformers.
        settings: fields of ``Sampling``; ``num_beams=1`` is taken and changes nothing.
    """
    if settings.pop("num_beams", 1) != 1:
        raise MMToolError("chat(num_beams=...) is not supported", "Leave it out: one beam is all there is.")
    settings = (_SAMPLING if sampling else {"do_sample": False}) | settings
    template = MegrezOmniTemplate(processor_of(model, MegrezOProcessor))
    text = ""
    for delta in deltas(model, template, conversation(messages), settings):
        text += delta.text
        if streamer is not None:
            streamer.put(torch.tensor(delta.token_ids))
    if streamer is not None:
        streamer.end()
    return text


def conversation(messages: Sequence[Mapping[str, Any] | Message]) -> list[Message]:
    """Return messages whose content may be an object with ``text``, ``image`` and ``audio``, whatever their order."""
    return to_messages([_with_parts(message) for message in messages])


def _with_parts(message: Mapping[str, Any] | Message) -> Mapping[str, Any] | Message:
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, Mapping):
        return message
    unknown = [key for key in content if key not in ("text", "image", "audio")]
    if unknown:
        raise MMToolError(f"content.{unknown[0]}: unknown key", "A message has text, image and audio.")
    parts: list[Part] = []
    for key, kind in _KINDS:
        found = content.get(key)
        sources = found if isinstance(found, list | tuple) else [found]
        parts += [kind(source) for source in sources if source is not None]
    parts.append(Text(content.get("text") or ""))
    return {**message, "content": parts}
