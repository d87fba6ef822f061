"""One conversation in, one answer out; the chat and the single question share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmtool.engine.base import Answer, Engine, Request, Sampling, request_from
from mmtool.messages import Message, Text, split_inline_media
from mmtool.spec import ModelSpec
from mmtool.template.base import Template


@dataclass(frozen=True)
class Model:
    """What answers: a template that writes prompts, an engine that continues them, and how it samples."""

    spec: ModelSpec
    template: Template
    engine: Engine
    sampling: Sampling
    show_prompt: bool = False

    def request(self, messages: Sequence[Message]) -> Request:
        """Return the request for the next answer in ``messages``; with ``show_prompt``, print what it really says."""
        if self.show_prompt:
            from rich.console import Console  # only for those who look

            Console(stderr=True).print(self.template.show(messages), soft_wrap=True)
        return request_from(self.template, messages, self.sampling)


MEDIA_TAGS = ("<img>", "</img>", "<audio>", "</audio>")


def note_on_tags(text: str, spec: ModelSpec) -> str | None:
    """Return what to say about media tags in a question that stay text; None where there are none."""
    parts = split_inline_media(text)
    if spec.media_style != "inline":
        tagged = any(not isinstance(part, Text) for part in parts)
        return f"{spec.model_type} does not look for media in the text: the tags are text to it" if tagged else None
    left = "".join(part.text for part in parts if isinstance(part, Text))
    tag = next((tag for tag in MEDIA_TAGS if tag in left), None)
    return f"{tag} lacks its other half, so it is text to the model" if tag else None


def stream_answer(
    engine: Engine, request: Request, write: Callable[[str], None], stopped: Callable[[], bool] = lambda: False
) -> Answer:
    """Hand every piece of the answer to ``write`` as it comes and return the whole.

    ``stopped`` is asked after every step; once it is true the answer ends there, and its ``finish_reason`` and
    ``usage`` are None.
    """
    text, token_ids = "", []
    finish_reason = usage = None
    deltas = engine.generate([request])
    try:
        for delta in deltas:
            text += delta.text
            token_ids += delta.token_ids
            finish_reason, usage = delta.finish_reason, delta.usage
            if delta.text:
                write(delta.text)
            if stopped():
                break
    finally:
        deltas.close()
    return Answer(text=text, token_ids=tuple(token_ids), finish_reason=finish_reason, usage=usage)
