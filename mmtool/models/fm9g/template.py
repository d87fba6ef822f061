"""The chat formats of FM9G: ChatML (4B, 7B, 70B), and ``<用户>..<AI>`` of the 2024 models (2B, 8B)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from mmtool.messages import Message, Text, to_messages
from mmtool.template.base import Segment, Template
from mmtool.template.formats import ChatFormat, Piece

BOS, END_OF_TEXT, END_OF_TURN = "<s>", "</s>", "<|im_end|>"


class FM9GTemplate(Template):
    """ChatML without a default system text; BOS comes from the tokenizer, so it is not part of the prompt's text.

    Messages lose the white space around them, except an answer to learn at the end: the release's fine-tuning puts it
    behind the prompt as it is. Of several answers all are learned, with their end tokens.

    The tokenizer puts a ``▁`` in front of every stretch of text between special tokens. An answer to learn is no new
    stretch: it goes on where the role's line ended.
    """

    template_type = "fm9g"
    modalities = ()
    chat_format = ChatFormat(
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant="<|im_start|>assistant\n",
        answer=("", END_OF_TURN),
        between="\n",
        control=(BOS, END_OF_TEXT, "<|im_start|>", END_OF_TURN),
    )

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: of a turn, and of a text."""
        return self._control_ids[END_OF_TURN], self._control_ids[END_OF_TEXT]

    def render(self, messages: Sequence[Message | Mapping[str, Any]], train: bool = False) -> list[Piece]:
        """Return the prompt as pieces; text to go on pre-training with ends with ``</s>``, not with a turn's end."""
        messages = to_messages(messages)
        if train and [message.role for message in messages] == ["assistant"]:
            return _plain_text(messages[0])
        if self.system and messages and messages[0].role != "system":
            messages = [Message("system", (Text(self.system),)), *messages]
        kept = len(messages) - 1 if train else len(messages)
        return super().render([*map(_stripped, messages[:kept]), *messages[kept:]], train)

    def segments(self, messages: Sequence[Message | Mapping[str, Any]], train: bool = False) -> list[Segment]:
        """Return the tokenised prompt, BOS in front, learned answers as what follows their role's line."""
        segments = super().segments(messages, train)
        newline = self.text_ids("\n")
        for index, (before, segment) in enumerate(pairwise(segments), start=1):
            if self._is_text(before) and self._is_text(segment):
                text = "".join(piece.text for piece in segment.pieces)
                segments[index] = replace(segment, ids=self.text_ids("\n" + text)[len(newline) :])
        return [_bos(self), *segments]

    def _is_text(self, segment: Segment) -> bool:
        return segment.media is None and not self._is_control_token(segment.pieces[0])


class FM9GOldTemplate(Template):
    """``<用户>question<AI>answer<用户>..``: nothing between the turns, nothing stripped; all but BOS is ordinary text.

    A system text, for which these models have no form, goes plainly in front. In training, ``</s>`` follows the last
    answer only, as a conversation that goes on has none.
    """

    template_type = "fm9g-old"
    modalities = ()
    chat_format = ChatFormat(user=("<用户>", ""), assistant="<AI>", answer=("", ""), control=(BOS, END_OF_TEXT))

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The id that ends an answer."""
        return (self._control_ids[END_OF_TEXT],)

    def render(self, messages: Sequence[Message | Mapping[str, Any]], train: bool = False) -> list[Piece]:
        """Return the prompt as pieces."""
        messages = to_messages(messages)
        if train and [message.role for message in messages] == ["assistant"]:
            return _plain_text(messages[0])
        end = [Piece(END_OF_TEXT, control=True, train=messages[-1].train)] if train else []
        return [*super().render(messages, train), *end]

    def segments(self, messages: Sequence[Message | Mapping[str, Any]], train: bool = False) -> list[Segment]:
        """Return the tokenised prompt, BOS in front."""
        return [_bos(self), *super().segments(messages, train)]


def _stripped(message: Message) -> Message:
    return message if message.media else replace(message, parts=(Text(message.text.strip()),))


def _plain_text(message: Message) -> list[Piece]:
    return [Piece(message.text, train=message.train), Piece(END_OF_TEXT, control=True, train=message.train)]


def _bos(template: Template) -> Segment:
    return Segment((Piece(BOS, control=True),), [template._control_ids[BOS]])
