"""``model.chat(...)`` of the release, on the template and the engine that everything else uses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image

from mmtool.errors import MMToolError
from mmtool.log import get_logger
from mmtool.messages import Image, Message, Part, Text
from mmtool.models.common.chat import answer_of, deltas, processor_of
from mmtool.models.fm9g4b_v.processing_fm9g4b_v import FM9GVProcessor
from mmtool.models.fm9g4b_v.template import FM9GVTemplate
from mmtool.models.fm9g4b_v.tokenization_fm9g4b_v import FM9GVTokenizer

logger = get_logger(__name__)

# What the release generates with. Where it does not sample it searches with 3 beams; the engine takes the likeliest.
_SAMPLED = {"do_sample": True, "top_p": 0.8, "top_k": 100, "temperature": 0.7, "repetition_penalty": 1.05}
_NOT_SAMPLED = {"do_sample": False, "repetition_penalty": 1.2}


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The arguments of ``chat`` beside the conversation, with the release's names and defaults."""

    max_new_tokens: int = 2048
    min_new_tokens: int = 0
    sampling: bool = True
    max_inp_length: int = 8192
    system_prompt: str = ""
    stream: bool = False
    max_slice_nums: int | None = None
    use_image_id: bool | None = None


def answer(
    model: Any, image: Any, msgs: Any, tokenizer: Any, processor: Any, options: ChatOptions, settings: Mapping[str, Any]
) -> Any:
    """Return the answer: a string, a list of strings for a batch, or an iterator of pieces with ``stream``.

    Args:
        model: the model.
        image: a picture in front of the first question, if that is a string.
        msgs: ``[{"role": "user", "content": str | [picture or str, ...]}]``, JSON, or a list of such conversations.
        tokenizer: of the model.
        processor: of the model; read from its folder if None.
        options: the other arguments.
        settings: ``top_p``, ``temperature``, ...: as in the release, only those of the chosen way to generate count.
    """
    msgs = json.loads(msgs) if isinstance(msgs, str) else msgs
    if not msgs:
        raise MMToolError("msgs is empty", "Write [{'role': 'user', 'content': [image, 'What is this?']}].")
    if options.stream and not options.sampling:
        raise MMToolError("stream=True needs sampling=True")
    is_batch = not isinstance(msgs[0], Mapping)
    if is_batch and image is not None:
        raise MMToolError("image is for one conversation; msgs holds several", "Put pictures into the contents.")
    template = _template(model, tokenizer, processor, options)
    known = _SAMPLED if options.sampling else _NOT_SAMPLED
    unknown = settings.keys() - known
    if unknown:
        logger.info("chat goes without %s", ", ".join(sorted(unknown)))
    sampling = known | {name: value for name, value in settings.items() if name in known}
    sampling |= {"max_new_tokens": options.max_new_tokens, "min_new_tokens": options.min_new_tokens}
    conversations = [_messages(turns, image) for turns in (msgs if is_batch else [msgs])]
    if options.stream and not is_batch:
        return (delta.text for delta in deltas(model, template, conversations[0], sampling) if delta.text)
    answers = [answer_of(model, template, turns, sampling) for turns in conversations]
    return answers if is_batch else answers[0]


def _template(model: Any, tokenizer: Any, processor: Any, options: ChatOptions) -> FM9GVTemplate:
    if not isinstance(processor, FM9GVProcessor):
        processor = processor_of(model, FM9GVProcessor)
        if isinstance(tokenizer, FM9GVTokenizer):
            processor = FM9GVProcessor(processor.image_processor, tokenizer)
    changes = {"max_slice_nums": options.max_slice_nums, "use_image_id": options.use_image_id}
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes:
        image_processor = type(processor.image_processor)(**{**processor.image_processor.to_dict(), **changes})
        processor = FM9GVProcessor(image_processor, processor.tokenizer)
    return FM9GVTemplate(processor, system=options.system_prompt, max_length=options.max_inp_length)


def _messages(turns: Sequence[Mapping[str, Any]], image: Any) -> list[Message]:
    """Read a conversation; roles and contents as in the release."""
    messages = []
    for index, turn in enumerate(turns):
        role, content = turn["role"], turn["content"]
        if role not in ("user", "assistant"):
            raise MMToolError(
                f"msgs[{index}]: the role is {role!r}, not user or assistant", "A system text is system_prompt."
            )
        contents = [content] if isinstance(content, str) else list(content)
        if index == 0 and image is not None and isinstance(content, str):
            contents.insert(0, image)
        messages.append(Message(role, tuple(map(_part, contents))))
    return messages


def _part(content: Any) -> Part:
    return Image(content) if isinstance(content, PIL.Image.Image) else Text(content)
