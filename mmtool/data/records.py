"""The steps that the readers of ``formats.py`` share: take values from a row, read its turns, put media at their tags.

A reader takes the keys it knows from a ``Record``; what it leaves behind ends up in ``Conversation.extra``.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from mmtool.data.references import MediaFolders, is_absent, is_reference
from mmtool.errors import DataError
from mmtool.messages import Audio, Image, Message, Part, Text, shown
from mmtool.utils import counted

QUERY_KEYS = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSE_KEYS = (
    "response", "answer", "output", "targets", "target", "answer_key", "answers", "solution", "text", "completion",
    "content",
)  # fmt: skip
SYSTEM_KEYS = ("system", "system_prompt")
TURN_KEYS = ("messages", "conversations", "conversation")

Kind: TypeAlias = type[Image] | type[Audio]
MEDIA_KEYS: dict[Kind, tuple[str, str]] = {Image: ("images", "image"), Audio: ("audios", "audio")}
TAGS: dict[Kind, str] = {Image: "<image>", Audio: "<audio>"}

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
}
AGENT_ROLES = frozenset({"tool", "tool_call", "tool_response", "function", "function_call", "observation"})

_PREFERENCE = "is preference data, which is not supported"
_UNSUPPORTED = {
    "rejected": _PREFERENCE,
    "rejected_response": _PREFERENCE,
    "rejected_messages": _PREFERENCE,
    "video": "video is not supported",
    "videos": "video is not supported",
    "tools": "tool calls (agent data) are not supported",
}


@dataclass(frozen=True)
class Conversation:
    """One row in the neutral form.

    >>> Conversation((Message("user", (Text("Hi"),)), Message("assistant", (Text("Hello"),)))).label
    'Hello'

    Attributes:
        messages: a system message at most, then user and assistant in turn. A lone assistant message is text for
            pre-training.
        raw: the first message is a complete prompt that has its role marks already; no template goes round it.
        extra: keys of the row that the format does not use, such as ``id``.
        warnings: what looks like a mistake in the row but can be read.
    """

    messages: tuple[Message, ...]
    raw: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def label(self) -> str | None:
        """The text of the last answer; None where the row ends with a question."""
        last = self.messages[-1]
        return last.text if last.role == "assistant" else None

    @property
    def system(self) -> str | None:
        """The system text of the row, or None."""
        first = self.messages[0]
        return first.text if first.role == "system" else None

    @property
    def media(self) -> tuple[Image | Audio, ...]:
        """Every picture and sound, in the order of the messages."""
        return tuple(part for message in self.messages for part in message.media)

    def prompt(self) -> list[Message]:
        """Return the messages without the last answer; no user message is among them in text for pre-training."""
        return list(self.messages if self.label is None else self.messages[:-1])


@dataclass(frozen=True)
class Turn:
    """One message as the row writes it; ``place`` names its content in errors."""

    role: str
    content: Any
    place: str
    train: bool = True

    @property
    def text(self) -> str:
        """The content, which must be text."""
        return as_text(self.content, self.place)

    def message(self, *items: Part | str) -> Message:
        """Return the message that holds ``items``; strings are text, neighbours are joined."""
        return Message(self.role, join_parts(items), self.train)


@dataclass(frozen=True)
class MediaColumn:
    """The pictures or sounds of a row; None stands for a gap. ``single``: written without a list."""

    kind: Kind
    key: str
    entries: tuple[Image | Audio | None, ...]
    single: bool

    def without_gaps(self) -> tuple[Image | Audio, ...]:
        """Return the entries; a gap says nothing outside of rounds, so one beside real entries is an error."""
        entries = tuple(entry for entry in self.entries if entry is not None)
        if entries and len(entries) < len(self.entries):
            gap = self.entries.index(None)
            raise DataError(
                f"{self.key}[{gap}]: is empty, and the list does not have one entry per round",
                "Leave gaps out, or give one entry per question, null where there is none, and no tags in the text.",
            )
        return entries


class Record:
    """A row while it is read: knows which keys were taken and where its media are.

    >>> from pathlib import Path
    >>> record = Record({"id": 7, "prompt": "Hi"}, MediaFolders(Path(".")))
    >>> record.text("query", "prompt"), record.extra()
    ('Hi', {'id': 7})
    """

    def __init__(self, row: Mapping[str, Any], folders: MediaFolders, media_style: str = "round") -> None:
        self.row = row
        self.folders = folders
        self.media_style = media_style
        self.warnings: list[str] = []
        self._taken: set[str] = set()
        self._columns: dict[Kind, MediaColumn | None] = {}

    def take(self, *keys: str) -> tuple[str, Any]:
        """Return the first of ``keys`` that has a value, and the value; else the first that is there, and None."""
        there = [key for key in keys if key in self.row]
        filled = [key for key in there if self.row[key] is not None]
        self._taken.update(set(there) - set(filled[1:]))
        key = next(iter(filled or there), keys[0])
        return key, self.row.get(key)

    def text(self, *keys: str) -> str | None:
        """Return the text under the first of ``keys`` that has a value, or None."""
        key, value = self.take(*keys)
        return None if value is None else as_text(value, key)

    def answer(self, *keys: str) -> str | None:
        """Return the answer under the first of ``keys`` that has a value; of a list, the first entry."""
        key, value = self.take(*keys)
        if isinstance(value, list):
            key, value = f"{key}[0]", value[0] if value else None
        return None if value is None else as_text(value, key)

    def history(self) -> list[tuple[str, str]]:
        """Return the earlier rounds, oldest first; a string that holds a JSON or Python list will do."""
        key, value = self.take("history")
        rounds = []
        for index, pair in enumerate(as_list(value, key) if value not in (None, "") else ()):
            place = f"{key}[{index}]"
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise DataError(f"{place}: expected [query, response], got {shown(pair)}")
            rounds.append((as_text(pair[0], f"{place}[0]"), as_text(pair[1], f"{place}[1]")))
        return rounds

    def media(self, kind: Kind) -> MediaColumn | None:
        """Return the pictures or sounds under the plural or singular key; None where the row has neither key."""
        if kind not in self._columns:
            self._columns[kind] = self._read_column(kind)
        return self._columns[kind]

    def _read_column(self, kind: Kind) -> MediaColumn | None:
        plural, singular = MEDIA_KEYS[kind]
        if plural not in self.row and singular not in self.row:
            return None
        key, value = self.take(plural, singular)
        if key == plural and self.row.get(singular) is not None and not is_absent(self.row[singular]):
            raise DataError(f"{singular}: given beside {plural!r}", f"Put every reference under {plural!r}.")
        entries, single = as_entries(value, key)
        return MediaColumn(kind, key, tuple(self.open(kind, item, place) for place, item in entries), single)

    def media_columns(self) -> list[MediaColumn]:
        """Return the columns that the row has, pictures first."""
        columns = (self.media(kind) for kind in MEDIA_KEYS)
        return [column for column in columns if column is not None]

    def open(self, kind: Kind, reference: Any, place: str) -> Image | Audio | None:
        """Return the medium that ``reference`` names, None for an empty one."""
        return None if is_absent(reference) else kind(self.folders.resolve(reference, place))

    def locate(self, part: Part, place: str) -> Part:
        """Return ``part`` with the path of its medium resolved; text stays as it is."""
        return part if isinstance(part, Text) else type(part)(self.folders.resolve(part.source, place))

    def turns(self, other_role: str | None = None) -> list[Turn]:
        """Return the messages of the row, after its system column if they bring no system text of their own.

        Roles get their plain names; null as the last answer is no answer.

        Args:
            other_role: what a role of any other name means; None makes it an error.
        """
        key, value = self.take(*TURN_KEYS)
        items = as_list(value, key)
        if not items:
            raise DataError(f"{key}: the list is empty")
        turns = [_read_turn(item, f"{key}[{index}]", other_role) for index, item in enumerate(items)]
        if turns[-1].role == "assistant" and turns[-1].content is None:
            turns.pop()
        for turn in turns:
            if turn.content is None:
                raise DataError(f"{turn.place}: is null", "Only the last answer may be left out.")
        return self.with_system(turns)

    def with_system(self, turns: list[Turn]) -> list[Turn]:
        """Return ``turns`` after the system column of the row, which gives way to a system message among them."""
        text = self.text(*SYSTEM_KEYS)
        if text is None or (turns and turns[0].role == "system"):
            return turns
        return [Turn("system", text, "system"), *turns]

    def extra(self) -> dict[str, Any]:
        """Return what was not taken.

        Raises:
            DataError: where that includes media, which must never be dropped.
        """
        extra = {key: value for key, value in self.row.items() if key not in self._taken}
        for key in (key for keys in MEDIA_KEYS.values() for key in keys):
            if not _is_empty(extra.get(key)):
                raise DataError(f"{key}: this format has no place for it", "Name the format with --dataset_format.")
        return extra


def check_supported(row: Mapping[str, Any]) -> None:
    """Refuse preference data, video and tool calls, by key.

    Raises:
        DataError: naming the key.
    """
    for key, reason in _UNSUPPORTED.items():
        if not _is_empty(row.get(key)):
            raise DataError(f"{key}: {reason}", f"Remove {key!r} from the data.")


def check_order(turns: Sequence[Turn]) -> None:
    """Check that user and assistant take turns, after one system message at most.

    A lone assistant message is allowed: text for pre-training.
    """
    body = turns[1:] if turns and turns[0].role == "system" else turns
    if not body:
        raise DataError("the row has no question and no answer")
    if [turn.role for turn in body] == ["assistant"]:
        return
    for index, turn in enumerate(body):
        expected = ("user", "assistant")[index % 2]
        if turn.role != expected:
            raise DataError(
                f"{turn.place}: expected a turn of the {expected}, got {turn.role}",
                "After one system message at most, user and assistant take turns, the user first.",
            )


def place_media(
    turns: Sequence[Turn], record: Record, *, prepend: bool, queries_only: bool = False, skip: Kind | None = None
) -> list[Message]:
    """Return the messages of text ``turns`` with each medium of the record at its ``<image>`` or ``<audio>`` tag.

    A tag counts only if the row has the key of its medium; otherwise it is plain text.

    Args:
        turns: the messages; system text is never searched for tags.
        record: the row, for its media columns.
        prepend: put media beyond the number of tags in front of the first question; else they are an error.
        queries_only: leave tags in answers as text.
        skip: a kind of media that the caller places.
    """
    columns = [column for column in record.media_columns() if column.kind is not skip]
    roles = ("user",) if queries_only else ("user", "assistant")
    open_turns = [turn for turn in turns if turn.role in roles]
    _warn_of_tags(open_turns, columns, record)
    front, queues = _match_tags(open_turns, columns, prepend)
    first = next((turn for turn in turns if turn.role == "user"), None)
    if front and first is None:
        raise DataError(f"{columns[0].key}: the row has no question to put it in")
    messages = []
    for turn in turns:
        items = _fill_tags(turn.text, queues) if turn.role in roles else [turn.text]
        messages.append(turn.message(*front, *items) if turn is first else turn.message(*items))
    return messages


def _match_tags(
    turns: Sequence[Turn], columns: Iterable[MediaColumn], prepend: bool
) -> tuple[list[Part], dict[str, list[Part]]]:
    """Return the media without a tag, and by tag those with one."""
    front: list[Part] = []
    queues: dict[str, list[Part]] = {}
    for column in columns:
        tag, entries = TAGS[column.kind], column.without_gaps()
        num_tags = sum(turn.text.count(tag) for turn in turns)
        missing = len(entries) - num_tags
        if missing < 0 or (missing and not prepend):
            raise DataError(
                f"{column.key}: {counted(num_tags, f'{tag} tag')} in the text for {counted(len(entries), 'entry')}",
                f"Write {tag} where each entry belongs.",
            )
        front += entries[:missing]  # as if their tags stood in front of the text: they take the first entries
        queues[tag] = list(entries[missing:])
    return front, queues


def _fill_tags(text: str, queues: Mapping[str, list[Part]]) -> list[Part | str]:
    if not queues:
        return [text]
    pieces = re.split(f"({'|'.join(queues)})", text)
    return [queues[piece].pop(0) if piece in queues else piece for piece in pieces]


def _warn_of_tags(turns: Sequence[Turn], columns: Sequence[MediaColumn], record: Record) -> None:
    for kind, tag in TAGS.items():
        known = any(column.kind is kind for column in columns)
        if not known and any(tag in turn.text for turn in turns):
            record.warnings.append(f"{tag} stays text, because the row has no {MEDIA_KEYS[kind][0]!r}")


def join_parts(items: Iterable[Part | str]) -> tuple[Part, ...]:
    """Return ``items`` as parts: neighbouring text joined, empty text left out unless there is nothing else.

    >>> join_parts(["a", "", Text("b")])
    (Text(text='ab'),)
    """
    parts: list[Part] = []
    for item in items:
        part = Text(item) if isinstance(item, str) else item
        if not isinstance(part, Text):
            parts.append(part)
        elif parts and isinstance(parts[-1], Text):
            parts[-1] = replace(parts[-1], text=parts[-1].text + part.text)
        elif part.text:
            parts.append(part)
    return tuple(parts) or (Text(""),)


def as_text(value: Any, place: str) -> str:
    """Return ``value``, which must be text or a number.

    >>> as_text(4, "answer")
    '4'
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{place}: expected text, got {shown(value)}")


def as_list(value: Any, place: str) -> list[Any]:
    """Return ``value``, which must be a list or a string that holds one as JSON or Python writes it.

    >>> as_list("[['a', 'b']]", "history")
    [['a', 'b']]
    """
    found = parse_list(value) if isinstance(value, str) else value
    if not isinstance(found, list | tuple):
        raise DataError(f"{place}: is missing" if value is None else f"{place}: expected a list, got {shown(value)}")
    return list(found)


def parse_list(text: str) -> list[Any] | None:
    """Return the list that ``text`` writes, in JSON or as a Python literal; None if it is no list. Runs no code."""
    if not text.strip().startswith("["):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # what the two parsers raise for hostile text
            continue
        return value if isinstance(value, list) else None
    return None


def as_entries(value: Any, place: str) -> tuple[list[tuple[str, Any]], bool]:
    """Return the references of a media value with their places, and whether it was a single one.

    A string is one reference, unless it holds a list (a cell of a csv file).
    """
    parsed = parse_list(value) if isinstance(value, str) else None
    if parsed is not None and all(is_reference(item) or item is None for item in parsed):
        value = parsed
    if isinstance(value, list | tuple):
        return [(f"{place}[{index}]", item) for index, item in enumerate(value)], False
    return ([] if is_absent(value) else [(place, value)]), True


def _read_turn(item: Any, place: str, other_role: str | None) -> Turn:
    if not isinstance(item, Mapping):
        raise DataError(f"{place}: expected an object, got {shown(item)}")
    role_key = "role" if item.get("role") is not None else "from"
    content_key = "content" if "content" in item else "value"
    role = item.get(role_key)
    if (isinstance(role, str) and role in AGENT_ROLES) or item.get("tool_calls") or item.get("function_call"):
        raise DataError(f"{place}: tool calls (agent data) are not supported")
    if role is None or content_key not in item:
        raise DataError(f"{place}: has no {'role' if role is None else 'content'}", f"It has {', '.join(item)}.")
    loss = item.get("loss")
    if loss not in (None, True, False):
        raise DataError(f"{place}.loss: expected true or false, got {shown(loss)}")
    role = ROLES.get(role, other_role) if isinstance(role, str) else None
    if role is None:
        raise DataError(f"{place}.{role_key}: unknown role {shown(item[role_key])}", f"Use {', '.join(ROLES)}.")
    return Turn(role, item[content_key], f"{place}.{content_key}", loss is None or bool(loss))


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", "[]", [], {})
