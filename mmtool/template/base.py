"""Template: the token ids, labels and media tensors of a conversation, for training and inference through one path.

A family names its ``ChatFormat`` and how many positions a medium takes (its processor knows); the rest is here.
"""

from __future__ import annotations

import hashlib
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from mmtool.errors import MediaError, MMToolError, TooLongError
from mmtool.media import MediaLimits, describe_source, load_image
from mmtool.messages import Audio, Image, Message, check_turns, to_messages
from mmtool.template.formats import ChatFormat, Piece
from mmtool.template.show import show_prompt
from mmtool.template.tools import CallFormat

if TYPE_CHECKING:
    from rich.text import Text as RichText

TRUNCATION_STRATEGIES = ("delete", "truncation_left", "raise")
IGNORED_LABEL = -100
_KIND_OF = {Image: "image", Audio: "audio"}


@dataclass(frozen=True)
class MediaInput:
    """One picture or sound of an encoded conversation.

    Attributes:
        kind: ``image`` or ``audio``.
        start: its first position in ``input_ids``.
        length: how many positions it takes, its begin and end marks included.
        inputs: the tensors the model needs for it, first dimension the rows of this medium alone.
        key: hash of ``inputs``; equal for equal content, so that features can be reused.
        ids: the token ids at its positions; None where all are its placeholder.
        feature_index: which of its positions hold features, counted from ``start``; None for all.
        token_fields: what the model wants to know of each of its positions beside the id, by name; elsewhere it is 0.
        shared: names in ``inputs`` that describe the whole conversation, so that the model gets them once.
    """

    kind: str
    start: int
    length: int
    inputs: dict[str, Tensor]
    key: str
    ids: tuple[int, ...] | None = None
    feature_index: tuple[int, ...] | None = None
    token_fields: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()

    @property
    def num_features(self) -> int:
        """How many positions hold features."""
        return self.length if self.feature_index is None else len(self.feature_index)


@dataclass(frozen=True)
class Segment:
    """A part of a prompt that is tokenised on its own: a run of text, one control token, or one medium."""

    pieces: tuple[Piece, ...]
    ids: list[int]
    media: MediaInput | None = None

    @property
    def train(self) -> bool:
        """Whether its tokens are learned; runs are split where that changes."""
        return self.pieces[0].train


class Template:
    """The chat format of a family, bound to the processor of a model.

    Subclasses set the class attributes, and override a method only where the family truly departs.

    Args:
        processor: has ``tokenizer``, ``image_processor`` and ``num_image_tokens(inputs, index)``.
        system: replaces the default system text; None keeps it, ``""`` is none. A system message goes first.
        max_length: most positions of an encoded conversation, media at their real length; None is no limit.
        truncation_strategy: what happens beyond: ``delete`` and ``raise`` raise ``TooLongError`` (a data set drops
            such rows under ``delete``), ``truncation_left`` drops the oldest positions.
        media_limits: what may be opened, and how large it may be.
    """

    template_type: ClassVar[str]
    chat_format: ClassVar[ChatFormat]
    default_system: ClassVar[str | None] = None
    stop_words: ClassVar[tuple[str, ...]] = ()
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    penalize_prompt: ClassVar[bool] = True  # False where the release's repetition penalty sees new tokens only
    skip_special_tokens: ClassVar[bool] = True  # in the text of an answer
    strip_answer: bool = True
    prepares_alone: ClassVar[bool] = False  # True where preparing media uses the tokenizer, which is for one thread
    call_format: CallFormat | None = None  # how answers call tools; set by ``with_tools``

    def __init__(
        self,
        processor: Any,
        *,
        system: str | None = None,
        max_length: int | None = None,
        truncation_strategy: str = "delete",
        media_limits: MediaLimits | None = None,
    ) -> None:
        """Check the options and look up the control tokens."""
        if truncation_strategy not in TRUNCATION_STRATEGIES:
            raise MMToolError(
                f"unknown truncation_strategy {truncation_strategy!r}", f"Use {', '.join(TRUNCATION_STRATEGIES)}."
            )
        if max_length is not None and max_length < 1:
            raise MMToolError(f"max_length must be at least 1, got {max_length}")
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.system = (self.default_system or "") if system is None else system
        self.max_length = max_length
        self.truncation_strategy = truncation_strategy
        self.media_limits = media_limits or MediaLimits()
        control = dict.fromkeys((*self.chat_format.control, self.tokenizer.eos_token))
        self._control_ids = {token: self._control_id(token) for token in control}
        self._split_control = re.compile("(" + "|".join(map(re.escape, control)) + ")")
        self._prepared: dict[int, tuple[weakref.ref[Image | Audio], MediaInput]] = {}

    # -- what a family may override ----------------------------------------------------------------------------------

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return (self.tokenizer.eos_token_id,)

    @property
    def hidden_token_ids(self) -> tuple[int, ...]:
        """Ids that an answer is decoded without, where special tokens are shown."""
        return ()

    def text_ids(self, text: str) -> list[int]:
        """Tokenise text; the one place that decides whether a control token typed by somebody becomes one: never."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def media_id(self, kind: str) -> int:
        """Return the placeholder id that stands at every position of a medium of ``kind``."""
        return {"image": self.processor.image_token_id}[kind]

    def media_input(self, part: Image | Audio) -> MediaInput:
        """Open a picture and prepare its tensors; ``start`` is 0 until it has a place."""
        if not isinstance(part, Image):
            raise MMToolError(f"{self.template_type} cannot hear: it takes {' and '.join(self.modalities)}, not audio")
        picture = load_image(part.source, self.media_limits)
        try:
            inputs = dict(self.processor.image_processor(images=[picture], return_tensors="pt"))
        except MediaError as error:
            raise MediaError(f"cannot use image {describe_source(part.source)}: {error.message}", error.hint) from None
        return MediaInput("image", 0, self.processor.num_image_tokens(inputs, 0), inputs, content_key(inputs))

    def finish_media(self, media: list[MediaInput]) -> list[MediaInput]:
        """Complete media whose inputs depend on the others of the conversation; positions must stay as they are."""
        return media

    def media_tensors(self, rows: Sequence[Sequence[MediaInput]]) -> dict[str, Tensor]:
        """Return the tensors of the media of several conversations by name, one after the other."""
        return _concatenated([item for media in rows for item in media])

    def check(self, messages: Sequence[Message], train: bool) -> None:
        """Raise MMToolError for a conversation that this family cannot express."""
        check_turns(messages, train)
        for index, message in enumerate(messages):
            for part in message.media:
                kind = _KIND_OF[type(part)]
                if kind not in self.modalities:
                    takes = " and ".join(("text", *self.modalities))
                    raise MMToolError(f"messages[{index}]: {self.template_type} takes {takes}, not {kind}")
                if message.role != "user":
                    raise MMToolError(
                        f"messages[{index}]: {self.template_type} takes media in user messages only, "
                        f"not in one of the {message.role}"
                    )

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> Template:
        """Return a template for conversations in which functions can be called; this one stays as it is.

        Args:
            tools: the functions as OpenAI's interface has them, ``{"type": "function", "function": {..}}``; none where
                only earlier turns called any.

        Raises:
            MMToolError: where the family has no format for that.
        """
        raise MMToolError(f"the template {self.template_type} has no format for tools")

    # -- the one path ------------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message | Mapping[str, Any]], train: bool = False) -> list[Piece]:
        """Return the prompt as pieces of text and media.

        ``train`` says that the conversation ends with an answer. One assistant message alone is then text to go on
        pre-training with: no chat format around it, only the end token behind.
        """
        messages = to_messages(messages)
        if train and [message.role for message in messages] == ["assistant"]:
            learned = messages[0].train
            return [
                Piece(self.chat_format.start, control=True),
                Piece(messages[0].text, train=learned),
                Piece(self.tokenizer.eos_token, control=True, train=learned),
            ]
        self.check(messages, train)
        has_system = messages[0].role == "system"
        system = messages[0].text if has_system else self.system
        pieces = self.chat_format.pieces(messages[has_system:], system)
        return [piece for piece in pieces if piece.text or piece.media]

    def encode(self, messages: Sequence[Message | Mapping[str, Any]], train: bool = False) -> dict[str, Any]:
        """Encode a conversation.

        Returns:
            ``input_ids`` (placeholders repeated for every position of a medium), ``media`` (list of MediaInput in
            reading order), the tensors of all media by name, concatenated, and with ``train`` ``labels``: equal to
            ``input_ids`` where an answer is learned, else -100.

        Raises:
            TooLongError: beyond ``max_length``, unless ``truncation_strategy`` is ``truncation_left``.
            MediaError: for a medium that cannot be opened.
        """
        segments = self.segments(messages, train)
        cut = self.first_kept(segments)
        input_ids: list[int] = []
        labels: list[int] = []
        media: list[MediaInput] = []
        for start, segment in _with_starts(segments):
            ids = segment.ids[max(cut - start, 0) :]
            if ids and segment.media is not None:
                media.append(replace(segment.media, start=len(input_ids)))
            input_ids += ids
            labels += ids if segment.train else [IGNORED_LABEL] * len(ids)
        media = self.finish_media(media)
        encoded: dict[str, Any] = {"input_ids": input_ids, "media": media, **self.media_tensors([media])}
        if train:
            encoded["labels"] = labels
        return encoded

    def collate(
        self, batch: Sequence[Mapping[str, Any]], padding_side: Literal["left", "right"] | None = None
    ) -> dict[str, Tensor]:
        """Pad encoded conversations to one length and stack them; ``model(**result)`` runs.

        Args:
            batch: results of ``encode``, all with labels or all without.
            padding_side: default: right for training rows, left for prompts.
        """
        if not batch:
            raise ValueError("an empty batch cannot be collated")
        with_labels = "labels" in batch[0]
        if any(("labels" in row) != with_labels for row in batch):
            raise ValueError("either all rows of a batch have labels or none")
        side = padding_side or ("right" if with_labels else "left")
        if side not in ("left", "right"):
            raise ValueError(f"padding_side {side!r} is neither left nor right")
        mask = _padded([[1] * len(row["input_ids"]) for row in batch], 0, side)
        collated = {
            "input_ids": _padded([row["input_ids"] for row in batch], self._pad_id, side),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        }
        if with_labels:
            collated["labels"] = _padded([row["labels"] for row in batch], IGNORED_LABEL, side)
        return collated | self.media_tensors([row["media"] for row in batch])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a whole answer: cut at the first stop word, stripped where the family strips."""
        kept = [index for index in ids if index not in self.hidden_token_ids]
        text = self.tokenizer.decode(kept, skip_special_tokens=self.skip_special_tokens)
        ends = [at for word in self.stop_words if (at := text.find(word)) >= 0]
        text = text[: min(ends, default=len(text))]
        return text.strip() if self.strip_answer else text

    def show(
        self, messages: Sequence[Message | Mapping[str, Any]], train: bool = False, tokens: bool = False
    ) -> RichText:
        """Return what the model really sees, for people to read; ``tokens`` shows the single tokens."""
        return show_prompt(self, messages, train, tokens)

    # -- steps -------------------------------------------------------------------------------------------------------

    def segments(self, messages: Sequence[Message | Mapping[str, Any]], train: bool = False) -> list[Segment]:
        """Return the tokenised prompt before any truncation.

        Text runs are as long as they can be, since releases tokenise whole prompts; they end only at media, at control
        tokens, and at the borders of answers. The last makes the ids up to an answer independent of the answer.
        """
        segments: list[Segment] = []
        run: list[Piece] = []
        for piece in self._atoms(self.render(messages, train)):
            is_text = piece.media is None and not self._is_control_token(piece)
            if run and (not is_text or (piece.train, piece.answer) != (run[0].train, run[0].answer)):
                segments.append(self._text_segment(run))
                run = []
            if is_text:
                run.append(piece)
            elif piece.media is None:
                segments.append(Segment((piece,), [self._control_ids[piece.text]]))
            else:
                item = self.prepare(piece.media)
                ids = [self.media_id(item.kind)] * item.length if item.ids is None else list(item.ids)
                segments.append(Segment((piece,), ids, item))
        if run:
            segments.append(self._text_segment(run))
        return segments

    def first_kept(self, segments: Sequence[Segment]) -> int:
        """Return the first position that ``max_length`` leaves; never one inside a medium.

        Raises:
            TooLongError: when the segments do not fit and ``truncation_strategy`` does not cut, or nothing is left.
        """
        length = sum(len(segment.ids) for segment in segments)
        if self.max_length is None or length <= self.max_length:
            return 0
        cut = length - self.max_length
        for start, segment in _with_starts(segments):
            if segment.media is not None and start < cut < start + len(segment.ids):
                cut = start + len(segment.ids)
        if self.truncation_strategy != "truncation_left" or cut == length:
            raise TooLongError(
                f"the conversation takes {length} positions, more than the max_length of {self.max_length}",
                "Raise --max_length, shorten it, or pass --truncation_strategy truncation_left.",
                length=length,
                limit=self.max_length,
            )
        return cut

    def _atoms(self, pieces: Sequence[Piece]) -> Iterator[Piece]:
        """Split the control tokens out of the pieces that the chat format wrote."""
        for piece in pieces:
            if not piece.control:
                yield piece
                continue
            for text in self._split_control.split(piece.text):
                if text:
                    yield replace(piece, text=text)

    def _is_control_token(self, piece: Piece) -> bool:
        return piece.control and piece.text in self._control_ids

    def _text_segment(self, run: Sequence[Piece]) -> Segment:
        text = "".join(piece.text for piece in run)
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair; tokenizers fail on it in their own ways
            raise MMToolError(
                f"the text has a character that UTF-8 cannot write: {error.object[error.start : error.end]!a}",
                "It usually comes from a file or a terminal that is not in UTF-8.",
            ) from None
        return Segment(tuple(run), self.text_ids(text))

    def prepare(self, part: Image | Audio) -> MediaInput:
        """Prepare a medium once for as long as its part lives, so that a chat's later turns do not open it again."""
        known = self._prepared.get(id(part))
        if known is not None and known[0]() is part:
            return known[1]
        item = self.media_input(part)
        self.remember(part, item)
        return item

    def remember(self, part: Image | Audio, item: MediaInput) -> None:
        """Take ``item`` for what ``prepare`` would make of ``part``, for as long as its part lives."""
        self._prepared[id(part)] = (weakref.ref(part, self._forget(id(part))), item)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is remembered: it belongs to the parts of this process."""
        return self.__dict__ | {"_prepared": {}}

    def _forget(self, key: int) -> Any:
        prepared = self._prepared  # not self: a part must not keep the template alive

        def forget(ref: weakref.ref[Image | Audio]) -> None:
            if key in prepared and prepared[key][0] is ref:
                del prepared[key]

        return forget

    def _control_id(self, token: str) -> int:
        index = self.tokenizer.convert_tokens_to_ids(token)
        if index is None or index == self.tokenizer.unk_token_id:
            raise MMToolError(
                f"the tokenizer has no token {token!r}, which the template {self.template_type} needs",
                "Check that the folder's tokenizer belongs to this model type.",
            )
        return index

    @property
    def _pad_id(self) -> int:
        pad_id = self.tokenizer.pad_token_id
        return self.stop_token_ids[0] if pad_id is None else pad_id


def _with_starts(segments: Sequence[Segment]) -> Iterator[tuple[int, Segment]]:
    start = 0
    for segment in segments:
        yield start, segment
        start += len(segment.ids)


def _concatenated(media: Sequence[MediaInput]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for item in media for name in item.inputs)
    return {name: torch.cat([item.inputs[name] for item in media if name in item.inputs]) for name in names}


def _padded(rows: Sequence[Sequence[int]], value: int, side: str) -> Tensor:
    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for target, row in zip(padded, rows, strict=True):
        span = slice(len(row)) if side == "right" else slice(len(target) - len(row), None)
        target[span] = torch.tensor(row, dtype=torch.long)
    return padded


def content_key(inputs: Mapping[str, Tensor]) -> str:
    """Return a hash of what a medium became, for ``MediaInput.key``."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(inputs.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
