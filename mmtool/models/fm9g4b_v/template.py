"""The FM9G4B-V chat format: ChatML, pictures as numbered blocks of slices where they stand among the texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmtool.messages import Image, Message, Part, Text, to_messages
from mmtool.models.common.chatml import BOS, ChatMLTemplate
from mmtool.template.base import MediaInput, Segment
from mmtool.template.formats import Piece

# Special tokens that answers about places are made of, and that questions may hold: they mean nothing to the format.
_GROUNDING = re.compile("(" + "|".join(f"</?{name}>" for name in ("ref", "box", "quad", "point")) + ")")


class FM9GVTemplate(ChatMLTemplate):
    """Prompts of fm9g4b-v-chat; training has the same layout, and learns every answer with its end token.

    The parts of a message are joined by newlines. Pictures are numbered over the whole conversation. Nothing that
    somebody types becomes a picture or a token of the format; the tokens of grounding do become what they are.
    """

    template_type = "fm9g4b-v"
    penalize_prompt = False  # the release generates from embeddings
    skip_special_tokens = False  # they carry the places in answers

    @property
    def hidden_token_ids(self) -> tuple[int, ...]:
        """The id of ``<unk>``, which the release removes from answers."""
        return (self.processor.image_token_id,)

    def text_ids(self, text: str) -> list[int]:
        """Tokenise text; of the special tokens in it, only those of grounding become tokens."""
        ids: list[int] = []
        for part in _GROUNDING.split(text):
            if _GROUNDING.fullmatch(part):
                ids.append(self.tokenizer.convert_tokens_to_ids(part))
            elif part:
                ids += super().text_ids(part)
        return ids

    def media_input(self, part: Image) -> MediaInput:
        """Open a picture and prepare its tensors; its ids are those of a picture without a number."""
        item = super().media_input(part)
        inputs = dict(item.inputs)
        columns, rows = inputs.pop("image_grids")[0].tolist()
        ids = self._expansion_ids(self.processor.expansion((columns, rows), None))
        features = tuple(index for index, token in enumerate(ids) if token == self.processor.image_token_id)
        return replace(item, inputs=inputs, length=len(ids), ids=ids, feature_index=features)

    def render(self, messages: Sequence[Message | Mapping[str, Any]], train: bool = False) -> list[Piece]:
        """Return the prompt as pieces: a newline between the parts of a message, and one behind the last answer."""
        messages = [replace(message, parts=_joined(message)) for message in to_messages(messages)]
        pieces = super().render(messages, train)
        is_chat = len(messages) > 1
        return [*pieces, Piece(self.chat_format.between, control=True)] if train and is_chat else pieces

    def segments(self, messages: Sequence[Message | Mapping[str, Any]], train: bool = False) -> list[Segment]:
        """Return the tokenised prompt, pictures numbered."""
        segments = super().segments(messages, train)
        if self.processor.image_processor.use_image_id:
            number = 0
            for index, segment in enumerate(segments):
                if segment.media is not None:
                    item = self._numbered(segment.media, number)
                    segments[index] = replace(segment, ids=list(item.ids), media=item)
                    number += 1
        return segments

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a whole answer: without ``<unk>``, BOS and stop token, other special tokens shown."""
        kept = [index for index in ids if index not in self.hidden_token_ids]
        if kept and kept[0] == self._control_ids[BOS]:
            del kept[0]
        if kept and kept[-1] in self.stop_token_ids:
            del kept[-1]
        return super().decode(kept)

    def _numbered(self, item: MediaInput, number: int) -> MediaInput:
        """Return a picture with its number in front."""
        head = self._expansion_ids(f"<image_id>{number}</image_id>")
        return replace(
            item,
            length=len(head) + item.length,
            ids=head + item.ids,
            feature_index=tuple(len(head) + index for index in item.feature_index),
        )

    def _expansion_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))


def _joined(message: Message) -> tuple[Part, ...]:
    """Return the parts of a message with a newline between them."""
    parts = [message.parts[0]] if message.parts else []
    for part in message.parts[1:]:
        parts += [Text("\n"), part]
    return tuple(parts)
