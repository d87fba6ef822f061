"""The InternLM-XComposer2 chat format: turns between control tokens, pictures where they stand in the text.

Source: the chat and fine-tuning code of the releases. The variants differ in where BOS stands, in their default system
text, and in what they do with pictures, so each has a class, which refuses the processor of another one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from mmtool.errors import MMToolError
from mmtool.messages import Message, to_messages
from mmtool.models.internlm_xcomposer2.processing_internlm_xcomposer2 import TILING
from mmtool.models.internlm_xcomposer2.spec import VARIANT_OF_TYPE
from mmtool.template.base import Segment, Template
from mmtool.template.formats import ChatFormat, Piece

BOS, TURN, END = "<s>", "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"
_BLANKS = re.compile(r"\s*(<s>|</s>|<unk>)\s*")

_NAME = "InternLM-XComposer (浦语·灵笔)"
_MAKER = (
    "that is developed by Shanghai AI Laboratory (上海人工智能实验室). "
    "It is designed to be helpful, honest, and harmless."
)
_LANGUAGES = (
    f"- {_NAME} can understand and communicate fluently in the language chosen by the user such as English and 中文."
)
# What ms-swift gives the 7b chat release, whose own default is not known.
TEXT_SYSTEM = (
    f"You are an AI assistant whose name is {_NAME}.\n"
    f"- {_NAME} is a conversational language model {_MAKER}\n"
    f"{_LANGUAGES}"
)
# What the chat code of the other releases has.
IMAGE_SYSTEM = (
    f"You are an AI assistant whose name is {_NAME}.\n"
    f"- {_NAME} is a multi-modality conversational language model {_MAKER}\n"
    f"{_LANGUAGES}\n"
    f"- {_NAME} is capable of comprehending and articulating responses effectively based on the provided image."
)


class XComposer2Template(Template):
    """Prompts of internlm-xcomposer2-7b-chat.

    Every text between pictures has a BOS of its own, as in the release's chat code, in training as well: what is
    learned is what is asked. Where there is no picture, a prompt has one BOS instead of the release's two, and of the
    end tokens only that of the last answer is learned: ms-swift's layout, whose losses are recorded in the golden data.
    The authors' fine-tuning code has one BOS in all, learns all end tokens, and puts an EOS at the very end.

    Nothing typed becomes a picture. Control pieces that somebody types become control tokens, since the release does
    not tell them apart (golden cases ``inject_end_token`` and ``inject_eos``).

    Args:
        processor: of the model.
        hd_num: most tiles of every picture; None is the release's own number.
        settings: as in ``Template``.
    """

    template_type = "internlm-xcomposer2"
    default_system = TEXT_SYSTEM
    stop_words = (END,)
    penalize_prompt = False  # the release generates from embeddings
    strip_answer = False
    chat_format = ChatFormat(
        start=BOS,
        system=(f"{TURN}system\n", f"{END}\n"),
        user=(f"{TURN}user\n", f"{END}\n"),
        assistant=f"{TURN}assistant\n",
        answer=("", END),
        between="\n",
        media_in_place=True,
        control=(BOS, TURN, END),
    )
    variant: ClassVar[str] = "2.0"
    bos_in_every_part: ClassVar[bool] = True
    extra_bos_without_picture: ClassVar[bool] = False

    def __init__(self, processor: Any, *, hd_num: int | None = None, **settings: Any) -> None:
        """Check that the processor is of this variant."""
        if processor.variant != self.variant:
            fitting = [name for name, variant in VARIANT_OF_TYPE.items() if variant == processor.variant]
            raise MMToolError(
                f"the template {self.template_type} does not fit: this is a {' or '.join(fitting)} model",
                f"Leave out --template_type, or pass {fitting[0].removesuffix('-7b-chat')}.",
            )
        super().__init__(processor if hd_num is None else processor.with_hd_num(hd_num), **settings)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """EOS and the end of a turn."""
        return (self.tokenizer.eos_token_id, self._control_ids[END])

    def text_ids(self, text: str) -> list[int]:
        """Tokenise text as the release does: typed control pieces count, and blanks around ``<s>`` are dropped."""
        return self.tokenizer.encode(_BLANKS.sub(r"\1", text), add_special_tokens=False)

    def render(self, messages: Sequence[Message | Mapping[str, Any]], train: bool = False) -> list[Piece]:
        """Return the prompt as pieces of text and media; see the class."""
        messages = to_messages(messages)
        pieces = super().render(messages, train)
        if not self.bos_in_every_part:
            if train and len(messages) > 1:  # else it is text to go on pre-training with, which has it
                pieces.append(Piece(self.tokenizer.eos_token, control=True, train=messages[-1].train, answer=True))
            return pieces
        inner = [replace(p, train=False) if p.control and p.text == END else p for p in pieces[:-1]]
        first = next((message for message in messages if message.role == "user"), messages[0])
        if self.extra_bos_without_picture and not first.media:
            inner.insert(0, Piece(BOS, control=True))
        return _with_bos([*inner, *pieces[-1:]])


class XComposer2VLTemplate(XComposer2Template):
    """Prompts of internlm-xcomposer2-vl-7b-chat."""

    template_type = "internlm-xcomposer2-vl"
    default_system = IMAGE_SYSTEM


class XComposer24KHDTemplate(XComposer2Template):
    """Prompts of internlm-xcomposer2-4khd-7b-chat. The release takes one picture; more are treated alike.

    Conversations whose first question has no picture begin with two BOS, as its chat code has it for those without any.
    """

    template_type = "internlm-xcomposer2-4khd"
    default_system = IMAGE_SYSTEM
    variant = "4khd"
    extra_bos_without_picture = True


class XComposer25Template(XComposer2Template):
    """Prompts of internlm-xcomposer2_5-7b-chat: one BOS, and smaller pictures where there are several.

    Training is that of the authors' fine-tuning code: all end tokens are learned, and an EOS behind the last answer.

    Args:
        processor: of the model.
        image_position: ``explicit``: pictures stay where the messages have them. ``auto``: the only picture of a
            conversation goes in front of everything, as in the release's own examples.
        settings: as in ``XComposer2Template``. An ``hd_num`` counts for several pictures as well.
    """

    template_type = "internlm-xcomposer2_5"
    default_system = IMAGE_SYSTEM
    variant = "2.5"
    bos_in_every_part = False
    hd_num_of_several: ClassVar[int] = 6

    def __init__(
        self, processor: Any, *, image_position: Literal["explicit", "auto"] = "explicit", **settings: Any
    ) -> None:
        if image_position not in ("explicit", "auto"):
            raise MMToolError(f"image_position {image_position!r} is neither explicit nor auto")
        super().__init__(processor, **settings)
        self.image_position = image_position
        self._for_several: XComposer25Template | None = None
        if self.processor.image_processor.hd_num == TILING[self.variant]["hd_num"]:
            self._for_several = copy.copy(self)
            self._for_several._prepared = {}  # the same pictures, cut in another way
            self._for_several.processor = self.processor.with_hd_num(self.hd_num_of_several)

    def segments(self, messages: Sequence[Message | Mapping[str, Any]], train: bool = False) -> list[Segment]:
        """Return the tokenised prompt; how many tiles a picture may have depends on the whole conversation."""
        messages = to_messages(messages)
        several = sum(len(message.media) for message in messages) > 1
        if several and self._for_several is not None:
            return self._for_several.segments(messages, train)
        return super().segments(messages, train)

    def render(self, messages: Sequence[Message | Mapping[str, Any]], train: bool = False) -> list[Piece]:
        """Return the prompt as pieces of text and media; see the class."""
        pieces = super().render(messages, train)
        pictures = [piece for piece in pieces if piece.media is not None]
        if self.image_position == "explicit" or len(pictures) != 1:
            return pieces
        rest = [piece for piece in pieces if piece.media is None]
        return [rest[0], *pictures, *rest[1:]]  # the first is BOS


def _with_bos(pieces: Sequence[Piece]) -> list[Piece]:
    """Put BOS in front of every text that follows a picture."""
    done: list[Piece] = []
    for piece in pieces:
        if done and done[-1].media is not None and piece.media is None:
            done.append(Piece(BOS, control=True))
        done.append(piece)
    return done
