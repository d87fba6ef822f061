"""The chat formats of FM9G: ChatML (4B, 7B, 70B), and ``<用户>..<AI>`` of the 2024 models (2B, 8B)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmtool.messages import Message, Text, to_messages
from mmtool.models.common.chatml import BOS, END_OF_TEXT, ChatMLTemplate, bos_segment
from mmtool.template.base import Segment, Template
from mmtool.template.formats import ChatFormat, Piece


class FM9GTemplate(ChatMLTemplate):
    """Prompts of the 4B, 7B and 70B.

    Messages lose the white space around them, except an answer to learn at the end: the release's fine-tuning puts it
    behind the prompt as it is. Of several answers all are learned, with their end tokens.
    """

    template_type = "fm9g"
    modalities = ()

    def render(self, messages: Sequence[Message | Mapping[str, Any]], train: bool = False) -> list[Piece]:
        """Return the prompt as pieces; text to go on pre-training with ends with ``</s>``, not with a turn's end."""
        messages = to_messages(messages)
        if train and [message.role for message in messages] == ["assistant"]:
            return _plain_text(messages[0])
        if self.system and messages and messages[0].role != "system":
            messages = [Message("system", (Text(self.system),)), *messages]
        kept = len(messages) - 1 if train else len(messages)
        return super().render([*map(_stripped, messages[:kept]), *messages[kept:]], train)


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
        return [bos_segment(self), *super().segments(messages, train)]


def _stripped(message: Message) -> Message:
    return message if message.media else replace(message, parts=(Text(message.text.strip()),))


def _plain_text(message: Message) -> list[Piece]:
    return [Piece(message.text, train=message.train), Piece(END_OF_TEXT, control=True, train=message.train)]
