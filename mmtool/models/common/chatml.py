"""ChatML as the FM9G releases write it, for a tokenizer that puts a ``▁`` in front of every stretch of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from mmtool.messages import Message
from mmtool.template.base import Segment, Template
from mmtool.template.formats import ChatFormat, Piece

BOS, END_OF_TEXT, END_OF_TURN = "<s>", "</s>", "<|im_end|>"


class ChatMLTemplate(Template):
    """ChatML without a default system text; BOS comes from the tokenizer, so it is not part of the prompt's text.

    The ``▁`` stands in front of every stretch of text between special tokens. An answer to learn is no new stretch: it
    goes on where the role's line ended, as what the model writes does.
    """

    chat_format = ChatFormat(
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant="<|im_start|>assistant\n",
        answer=("", END_OF_TURN),
        between="\n",
        media_in_place=True,
        control=(BOS, END_OF_TEXT, "<|im_start|>", END_OF_TURN),
    )

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: of a turn, and of a text."""
        return self._control_ids[END_OF_TURN], self._control_ids[END_OF_TEXT]

    def segments(self, messages: Sequence[Message | Mapping[str, Any]], train: bool = False) -> list[Segment]:
        """Return the tokenised prompt, BOS in front, answers as what follows their role's line."""
        segments = super().segments(messages, train)
        newline = self.text_ids("\n")
        for index, (before, segment) in enumerate(pairwise(segments), start=1):
            if self._is_text(before) and self._is_text(segment):
                text = "".join(piece.text for piece in segment.pieces)
                segments[index] = replace(segment, ids=self.text_ids("\n" + text)[len(newline) :])
        return [bos_segment(self), *segments]

    def _is_text(self, segment: Segment) -> bool:
        return segment.media is None and not self._is_control_token(segment.pieces[0])


def bos_segment(template: Template) -> Segment:
    """Return the token in front of every prompt."""
    return Segment((Piece(BOS, control=True),), [template._control_ids[BOS]])
