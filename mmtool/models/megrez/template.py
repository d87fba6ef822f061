"""The chat format of the Megrez models: turns between role tokens, a default system text, numbered sounds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jinja2 import TemplateError

from mmtool.errors import MMToolError
from mmtool.log import get_logger
from mmtool.media import describe_source, load_audio, load_image
from mmtool.messages import Audio, Image, Message
from mmtool.template.base import MediaInput, Template, content_key
from mmtool.template.formats import ChatFormat, Piece, mark

logger = get_logger(__name__)

# Of the text model; Omni's says the same, though it is another model.
DEFAULT_SYSTEM = "你是Megrez-3B-Instruct，将针对用户的问题给出详细的、积极的回答。"
_ROLE_START, _ROLE_END, _TURN_END = "<|role_start|>", "<|role_end|>", "<|turn_end|>"
_SYSTEM_TURN = re.compile(
    f"{re.escape(_ROLE_START)}system{re.escape(_ROLE_END)}(.*?){re.escape(_TURN_END)}(?={re.escape(_ROLE_START)}user)",
    re.DOTALL,
)


def _header(role: str) -> str:
    return f"{_ROLE_START}{role}{_ROLE_END}"


@dataclass(frozen=True, kw_only=True)
class MegrezFormat(ChatFormat):
    """Role headers; a system turn even where its text is empty; in a question pictures, then sounds, then the text."""

    system: tuple[str, str] = (_header("system"), _TURN_END)
    user: tuple[str, str] = (_header("user"), _TURN_END)
    assistant: str = _header("assistant")
    answer: tuple[str, str] = ("", _TURN_END)
    control: tuple[str, ...] = (_ROLE_START, _ROLE_END, _TURN_END)

    def head(self, system: str) -> Iterator[Piece]:
        """Give the system turn."""
        yield from (mark(self.system[0]), Piece(system), mark(self.system[1]))

    def pieces(self, turns: Sequence[Message], system: str) -> Iterator[Piece]:
        """Give the pieces of a conversation; sounds are counted from its beginning."""
        yield from self.head(system)
        num_sounds = 0
        for index, message in enumerate(turns):
            if message.role == "assistant":
                yield from self.answered(message, last=index == len(turns) - 1)
                continue
            yield mark(self.user[0])
            for part in message.media:
                if isinstance(part, Image):
                    yield from (Piece(media=part), mark("\n"))
            for part in message.media:
                if isinstance(part, Audio):
                    num_sounds += 1
                    yield from (mark(f"Audio {num_sounds}: "), Piece(media=part), mark("\n"))
            yield from (Piece(message.text), mark(self.user[1] + self.assistant))


class MegrezTemplate(Template):
    """Prompts of Megrez-3B-Instruct, and what Omni's have in common with them. Nothing is stripped, no BOS is written.

    The default system text is the one in the folder's own chat template. ``system=""`` gives an empty system turn: the
    release has no prompt without one.
    """

    template_type = "megrez"
    default_system = DEFAULT_SYSTEM
    chat_format = MegrezFormat()
    modalities = ()
    strip_answer = False

    def __init__(self, processor: Any, *, system: str | None = None, **settings: Any) -> None:
        super().__init__(processor, system=system, **settings)
        if system is None:
            self.system = _stored_system(self.tokenizer, self.default_system)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the end of a turn, and that of a text."""
        known = self.tokenizer.get_added_vocab()
        return tuple(known[token] for token in (_TURN_END, "<|eos|>") if token in known)


class MegrezOmniTemplate(MegrezTemplate):
    """Prompts of Megrez-3B-Omni.

    The sounds of a conversation are encoded together: the last frames of one see what is behind it, silence, only
    where a longer one stands beside it. ``finish_media`` says so by one more frame in the mask of the shorter ones.
    """

    template_type = "megrez-omni"
    modalities = ("image", "audio")

    def media_input(self, part: Image | Audio) -> MediaInput:
        """Open a picture or a sound and prepare its tensors."""
        return self._picture(part) if isinstance(part, Image) else self._sound(part)

    def finish_media(self, media: list[MediaInput]) -> list[MediaInput]:
        """Let sounds that are shorter than the longest one of the conversation see one frame more."""
        frames = [_num_frames(item) for item in media]
        longest = max(frames, default=0)
        return [
            _seeing(item, count + 1) if item.kind == "audio" and count < longest else item
            for item, count in zip(media, frames, strict=True)
        ]

    def encode(self, messages: Sequence[Message | Mapping[str, Any]], train: bool = False) -> dict[str, Any]:
        """Encode a conversation; a sound too short to give a position is nothing to learn from."""
        encoded = super().encode(messages, train)
        if train and any(item.kind == "audio" and item.num_features <= 2 for item in encoded["media"]):
            raise MMToolError("a sound is shorter than 30 milliseconds, which gives no position", "Leave the row out.")
        return encoded

    def _picture(self, part: Image) -> MediaInput:
        picture = load_image(part.source, self.media_limits)
        made = self.processor.image_processor(images=[picture], return_tensors="pt")
        inputs = {name: made[name] for name in self.processor.image_processor.model_input_names}
        ids, index = self.processor.image_ids(picture.size)
        return MediaInput("image", 0, len(ids), inputs, content_key(inputs), tuple(ids), tuple(index))

    def _sound(self, part: Audio) -> MediaInput:
        extractor = self.processor.feature_extractor
        samples = load_audio(part.source, self.media_limits, extractor.sampling_rate)
        if len(samples) > extractor.n_samples:
            seconds, kept = len(samples) / extractor.sampling_rate, extractor.chunk_length
            logger.warning(
                "%s lasts %.1f seconds; the model hears the first %d", describe_source(part.source), seconds, kept
            )
        inputs = dict(extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt"))
        ids, index = self.processor.audio_ids(extractor.num_positions(len(samples)))
        return MediaInput("audio", 0, len(ids), inputs, content_key(inputs), tuple(ids), tuple(index))


def _num_frames(item: MediaInput) -> int:
    return int(item.inputs["input_features_mask"].sum()) if item.kind == "audio" else 0


def _seeing(item: MediaInput, num_frames: int) -> MediaInput:
    mask = item.inputs["input_features_mask"]
    seen = (torch.arange(mask.shape[1]) < num_frames).to(mask.dtype).unsqueeze(0)
    inputs = {**item.inputs, "input_features_mask": seen}
    return replace(item, inputs=inputs, key=content_key(inputs))


def _stored_system(tokenizer: Any, default: str) -> str:
    """Return the system text that the folder's own chat template puts before a question; ``default`` without one."""
    if not tokenizer.chat_template:
        return default
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    except TemplateError:
        text = ""
    turn = _SYSTEM_TURN.match(text)
    if turn is None:
        logger.warning("the folder's chat template is not that of Megrez; the usual prompts are used")
        return default
    return turn[1]
