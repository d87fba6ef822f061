"""What a chat template makes of a conversation, with every text and every medium found again in the result.

The template is rendered twice: with marks in the place of the texts, which shows what the template itself writes, and
with the texts, which shows what becomes of them (many templates strip whitespace).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import jinja2

from mmtool.errors import MMToolError
from mmtool.messages import Audio, Image, Message, Text
from mmtool.template.formats import Piece

# Private characters round a number; what somebody types is never searched for them.
_MARK = re.compile("\ue0f0(\\d+)\ue0f1")
_ANSWER_HEAD = "</think>"  # behind it is the answer proper; templates drop what is before in earlier rounds
# By piece: where in it an answer starts or ends, whether what follows is one, and whether it is learned.
Borders = dict[int, list[tuple[int, bool, bool]]]
_ROLES = ("system", "user", "assistant")
_NOT_NESTED = "Train on conversations of one round, or take a chat template that writes answers as it asks for them."


class ChatWriter:
    """Renders conversations with the chat template of a processor.

    Args:
        render: ``(messages, add_generation_prompt) -> str``, raising what jinja2 raises.
        places: what the template writes where a medium goes, by kind: ``{"image": "<image>"}``.
        special_tokens: the texts of all special tokens.
        end_tokens: the texts of those that end an answer, as far as they are known.
    """

    def __init__(
        self,
        render: Callable[[list[dict[str, Any]], bool], str],
        places: dict[str, str],
        special_tokens: Collection[str],
        end_tokens: Collection[str],
    ) -> None:
        self._render = render
        self._places = places
        self._special_tokens = [token for token in special_tokens if token]
        self._place = re.compile("|".join(map(re.escape, places.values())) or "(?!)")
        self._as_parts = self._find_layout(bool(places))
        self.end = self._find_end(self._special_tokens, [token for token in end_tokens if token])

    def with_render(self, render: Callable[[list[dict[str, Any]], bool], str]) -> ChatWriter:
        """Return a writer for the same template, asked in another way."""
        writer = copy.copy(self)
        writer._render = render
        return writer

    @property
    def user_as_parts(self) -> bool:
        """Whether the template reads a question as a list of parts."""
        return self._as_parts["user"]

    def pieces(self, messages: Sequence[Message], train: bool) -> list[Piece]:
        """Return the pieces of a conversation: what the template writes, the texts, and the media.

        Answers begin where their prompt ends, and are followed by ``end``, if the template writes it; both are marked
        as learned, and so is nothing else.

        Raises:
            MMToolError: where the template cannot express the conversation, or writes an answer that is to be learned
                differently from how it asks for it.
        """
        messages = self._with_system_in_place(messages)
        marked, texts = self._written(messages, not train)
        pieces = [Piece(text, control=True) for text in marked.between]
        merged = [item for pair in zip(pieces, [*texts, None], strict=True) for item in pair if item is not None]
        merged = self._mark_answers(merged, marked, messages, train)
        return [piece for piece in self._with_media(merged, messages) if piece.text or piece.media]

    # -- what the template writes ------------------------------------------------------------------------------------

    def _written(self, messages: Sequence[Message], prompt: bool) -> tuple[Marked, list[Piece]]:
        """Render with marks in the place of the texts, and return what becomes of the texts.

        Some templates take an answer apart to write its thoughts in another place. Such an answer is then left to the
        template as it is, if there is no control token in it.
        """
        shown = self._call(messages, prompt, marks=False)
        thoughtful = {number for number, part in _texts(messages) if _is_thoughtful(messages, number, part)}
        for as_they_are in (set(), thoughtful) if thoughtful else (set(),):
            marked = Marked(self._call(messages, prompt, marks=True, as_they_are=as_they_are))
            given = {number: part.text for number, part in _texts(messages)}
            lost = {number for number, text in given.items() if text} - set(marked.numbers) - as_they_are
            if lost:
                role = _role_of(messages, min(lost))
                raise MMToolError(f"the chat template of this model has no place for a text of the {role}")
            found = _align(shown, marked.between, [_variants(given[number]) for number in marked.numbers])
            if found is not None:
                typed = [token for number in as_they_are for token in self._special_tokens if token in given[number]]
                if typed:
                    raise MMToolError(f"an answer with thoughts has the control token {typed[0]!r} in it")
                return marked, [Piece(text) for text in found]
        raise MMToolError(
            "the chat template of this model changes the texts of this conversation in a way that cannot be followed"
        )

    def _call(self, messages: Sequence[Message], prompt: bool, marks: bool, as_they_are: Collection[int] = ()) -> str:
        marked = {number for number, part in _texts(messages) if marks and part.text and number not in as_they_are}
        texts = {number: _mark(number) if number in marked else part.text for number, part in _texts(messages)}
        try:
            return self._render(self._as_dicts(messages, texts, self._as_parts), prompt)
        except (jinja2.TemplateError, TypeError, ValueError, IndexError, KeyError) as error:
            raise MMToolError(f"the chat template of this model refuses the conversation: {error}") from error

    def _as_dicts(
        self, messages: Sequence[Message], texts: dict[int, str], as_parts: dict[str, bool]
    ) -> list[dict[str, Any]]:
        dicts, number = [], 0
        for message in messages:
            content: list[dict[str, str]] = []
            for part in message.parts:
                if isinstance(part, Text):
                    content.append({"type": "text", "text": texts[number]})
                else:
                    kind = kind_of(part)
                    content.append({"type": kind, kind: kind})
                number += 1
            flat = "".join(item.get("text", self._places.get(item["type"], "") + "\n") for item in content)
            # The results of tools are read like questions.
            in_parts = as_parts["user" if message.role == "tool" else message.role]
            dicts.append({"role": message.role, "content": content if in_parts else flat, **_of_tools(message)})
        return dicts

    def _find_layout(self, has_media: bool) -> dict[str, bool]:
        """Return for each role whether the template reads its content as a list of parts, rather than as a string.

        Templates of models with media mostly want lists, others strings; some want both, depending on the role.
        """
        alone = [Message("user", (Text("0"),)), Message("assistant", (Text("1"),))]
        first = (True, False) if has_media else (False, True)
        for system, user, assistant in product(first, repeat=3):
            as_parts = dict(zip(_ROLES, (system, user, assistant), strict=True))
            for messages in ([Message("system", (Text("s"),)), *alone], alone):
                texts = {index: _mark(index) for index in range(len(messages))}
                try:
                    shown = self._render(self._as_dicts(messages, texts, as_parts), False)
                except (jinja2.TemplateError, TypeError, ValueError, IndexError, KeyError):
                    continue
                if Marked(shown).numbers == list(range(len(messages))) and "'type'" not in shown:
                    return as_parts
        raise MMToolError("the chat template of this model shows neither a question nor its answer")

    def _find_end(self, special_tokens: Collection[str], end_tokens: Collection[str]) -> str:
        """Return what ends an answer: up to the first end token behind it, else the first special token; or nothing."""
        messages = [Message("user", (Text("0"),)), Message("assistant", (Text("1"),))]
        tail = Marked(self._call(messages, False, marks=True)).between[-1]
        for tokens in (end_tokens, special_tokens):
            ends = [tail.index(token) + len(token) for token in tokens if token in tail]
            if ends:
                return tail[: min(ends)]
        return ""

    def _with_system_in_place(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Leave an empty system message out where the template then writes less: without it, or with its default."""
        if messages[0].role != "system" or messages[0].text:
            return messages
        shorter = []
        for candidate in (messages, messages[1:]):
            try:
                shorter.append((len(self._call(candidate, False, marks=True)), candidate))
            except MMToolError:  # no place for a system text
                continue
        return min(shorter, key=lambda pair: pair[0])[1] if shorter else messages

    # -- the answers -------------------------------------------------------------------------------------------------

    def _mark_answers(
        self, pieces: list[Piece], marked: Marked, messages: Sequence[Message], train: bool
    ) -> list[Piece]:
        """Split the pieces at the borders of the answers, and mark those as learned."""
        borders: Borders = {}
        number = 0
        for index, message in enumerate(messages):
            own = [n for n in range(number, number + len(message.parts)) if n in marked.numbers]
            number += len(message.parts)
            if message.role != "assistant":
                continue
            gap, offset = self._answer_start(messages[:index], marked)
            if own and gap != marked.numbers.index(own[0]):
                gap = None
            if gap is None and train and message.train:
                raise MMToolError(
                    "the chat template of this model writes an answer differently from how it asks for it, so that "
                    f"messages[{index}] cannot be learned",
                    _NOT_NESTED,
                )
            if own:
                first, last = (marked.numbers.index(n) for n in (own[0], own[-1]))
                offset = len(pieces[2 * first].text) if gap is None else offset
                ends = len(self.end) if marked.between[last + 1].startswith(self.end) else 0
                borders.setdefault(2 * first, []).append((offset, True, message.train))
                borders.setdefault(2 * last + 2, []).append((ends, False, False))
            elif gap is not None:  # an answer that is empty, or left to the template as it is
                ends = marked.between[gap].find(self.end, offset)
                if ends >= 0:
                    borders.setdefault(2 * gap, []).append((offset, True, message.train))
                    borders.setdefault(2 * gap, []).append((ends + len(self.end), False, False))
        return list(_split(pieces, borders))

    def _answer_start(self, before: Sequence[Message], marked: Marked) -> tuple[int | None, int]:
        """Return where the prompt of an answer ends: in which gap between marks, and how far in it.

        The gap is None where the prompt is not the beginning of what the template writes with the answer behind it.
        """
        as_they_are = {number for number, part in _texts(before) if part.text and number not in marked.numbers}
        prompt = Marked(self._call(before, True, marks=True, as_they_are=as_they_are))
        count = len(prompt.numbers)
        nested = (
            count < len(marked.between)
            and prompt.numbers == marked.numbers[:count]
            and prompt.between[:-1] == marked.between[:count]
            and marked.between[count].startswith(prompt.between[-1])
        )
        return (count, len(prompt.between[-1])) if nested else (None, 0)

    # -- the media ---------------------------------------------------------------------------------------------------

    def _with_media(self, pieces: Sequence[Piece], messages: Sequence[Message]) -> Iterator[Piece]:
        """Put the media where the template wrote their places."""
        waiting = {kind: [part for m in messages for part in m.media if kind_of(part) == kind] for kind in self._places}
        counts = {kind: len(parts) for kind, parts in waiting.items()}
        kinds = {place: kind for kind, place in self._places.items()}
        for piece in pieces:
            position = 0
            for match in self._place.finditer(piece.text) if piece.control else ():
                kind = kinds[match[0]]
                if not waiting[kind]:
                    raise MMToolError(f"the chat template of this model writes more {kind} places than {counts[kind]}")
                yield replace(piece, text=piece.text[position : match.start()])
                yield Piece(media=waiting[kind].pop(0))
                position = match.end()
            yield replace(piece, text=piece.text[position:])
        for kind, left in waiting.items():
            if left:
                raise MMToolError(
                    f"the chat template of this model has no place for {len(left)} of {counts[kind]} {kind}s"
                )


class Marked:
    """A rendered template taken apart at its marks: ``between[0]``, mark ``numbers[0]``, ``between[1]``, ..."""

    def __init__(self, rendered: str) -> None:
        pieces = _MARK.split(rendered)
        self.between: list[str] = pieces[::2]
        self.numbers = [int(number) for number in pieces[1::2]]


def _of_tools(message: Message) -> dict[str, Any]:
    """Return what transformers adds to a message for a call of tools, or for the result of one."""
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
        for call in message.tool_calls
    ]
    return ({"tool_calls": calls} if calls else {}) | (
        {"tool_call_id": message.tool_call_id} if message.tool_call_id is not None else {}
    )


def kind_of(part: Image | Audio) -> str:
    """Return ``image`` or ``audio``."""
    return "image" if isinstance(part, Image) else "audio"


def _mark(number: int) -> str:
    return f"\ue0f0{number}\ue0f1"


def _texts(messages: Sequence[Message]) -> list[tuple[int, Text]]:
    """Return the text parts with their numbers among all parts."""
    parts = [part for message in messages for part in message.parts]
    return [(number, part) for number, part in enumerate(parts) if isinstance(part, Text)]


def _is_thoughtful(messages: Sequence[Message], number: int, part: Text) -> bool:
    return _ANSWER_HEAD in part.text and _role_of(messages, number) == "assistant"


def _role_of(messages: Sequence[Message], number: int) -> str:
    for message in messages:
        if number < len(message.parts):
            return message.role
        number -= len(message.parts)
    raise IndexError(number)


def _variants(text: str) -> list[str]:
    """Return what templates make of a text, the likeliest first."""
    variants = [text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"), text.lstrip("\n")]
    if _ANSWER_HEAD in text:
        answer = text.rpartition(_ANSWER_HEAD)[2]
        variants += [answer, answer.lstrip("\n"), answer.strip("\n"), answer.strip()]
    return list(dict.fromkeys(variants))


def _align(shown: str, between: Sequence[str], variants: Sequence[Sequence[str]]) -> list[str] | None:
    """Return a variant of each text such that they fill the gaps ``between`` to make ``shown``; None if none do."""
    if not shown.startswith(between[0]):
        return None
    stack = [(len(between[0]), ())]  # (how much of `shown` is explained, the variants so far)
    while stack:
        position, chosen = stack.pop()
        if len(chosen) == len(variants):
            if position == len(shown):
                return list(chosen)
            continue
        index = len(chosen)
        for text in reversed(variants[index]):
            if shown.startswith(text + between[index + 1], position):
                stack.append((position + len(text) + len(between[index + 1]), (*chosen, text)))
    return None


def _split(pieces: Sequence[Piece], borders: Borders) -> Iterator[Piece]:
    answer = train = False
    for index, piece in enumerate(pieces):
        position = 0
        for offset, *following in sorted(borders.get(index, ()), key=lambda border: border[0]):
            yield replace(piece, text=piece.text[position:offset], answer=answer, train=train)
            position, (answer, train) = offset, following
        yield replace(piece, text=piece.text[position:], answer=answer, train=train)
