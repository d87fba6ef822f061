"""The text around the turns of a conversation, as data: what a chat format is, and the pieces it makes of messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mmtool.messages import Audio, Image, Message, Part, Text


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt: text, or one medium.

    Attributes:
        text: empty for a medium.
        media: the picture or sound that stands here, else None.
        control: written by the chat format, not by anybody in the conversation; only here control tokens are meant.
        train: the model learns to write it.
        answer: it belongs to an answer, learned or not; tokens never reach across the border of one.
    """

    text: str = ""
    media: Image | Audio | None = None
    control: bool = False
    train: bool = False
    answer: bool = False


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """What a family writes around the texts of a conversation.

    A prompt is ``start``, the system text between the two ``system`` strings (left out with them where there is none),
    ``begin``; then for every round the question between the two ``user`` strings, ``assistant``, and the answer
    between the two ``answer`` strings. A prompt to be answered ends with ``assistant``. The answer and both ``answer``
    strings are what training learns.

    Attributes:
        start: before everything else.
        system: before and after the system text.
        begin: before the first question, with or without a system text.
        user: before and after a question.
        assistant: between a question and its answer.
        answer: before and after an answer.
        between: after an answer that another question follows; not learned.
        media_in_place: media stay where they are among the texts of a question, instead of moving to its front.
        media_end: between the media in front of a question and its text.
        control: the strings in the fields above that are one control token each.
    """

    start: str = ""
    system: tuple[str, str] = ("", "")
    begin: str = ""
    user: tuple[str, str]
    assistant: str
    answer: tuple[str, str]
    between: str = ""
    media_in_place: bool = False
    media_end: str = ""
    control: tuple[str, ...] = ()

    def head(self, system: str) -> Iterator[Piece]:
        """Give the pieces before the first question."""
        yield mark(self.start)
        if system:
            yield from (mark(self.system[0]), Piece(system), mark(self.system[1]))
        yield mark(self.begin)

    def question(self, message: Message) -> Iterator[Piece]:
        """Give the pieces of a user's turn, up to where the answer starts."""
        yield mark(self.user[0])
        if self.media_in_place:
            yield from map(_plain, message.parts)
        else:
            yield from map(_plain, message.media)
            if message.media:
                yield mark(self.media_end)
            yield Piece(message.text)
        yield mark(self.user[1] + self.assistant)

    def answered(self, message: Message, last: bool) -> Iterator[Piece]:
        """Give the pieces of an assistant's turn."""
        for piece in (mark(self.answer[0]), *map(_plain, message.parts), mark(self.answer[1])):
            is_text = piece.media is None
            yield replace(piece, train=message.train and is_text, answer=is_text)
        if not last:
            yield mark(self.between)

    def pieces(self, turns: Sequence[Message], system: str) -> Iterator[Piece]:
        """Give the pieces of a conversation whose ``turns`` alternate, the user first; empty pieces included."""
        yield from self.head(system)
        for index, message in enumerate(turns):
            if message.role == "user":
                yield from self.question(message)
            else:
                yield from self.answered(message, last=index == len(turns) - 1)


def mark(text: str) -> Piece:
    """Return a piece that the chat format writes."""
    return Piece(text, control=True)


def _plain(part: Part) -> Piece:
    return Piece(part.text) if isinstance(part, Text) else Piece(media=part)
