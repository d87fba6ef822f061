"""A conversation as data: messages made of text, image and audio parts, read from OpenAI-like dicts or swift 2.x calls.

Nothing is opened here: a picture is its path, URL, data URI, bytes or PIL image until ``media.py`` loads it.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mmtool.errors import MMToolError
from mmtool.utils import counted

if TYPE_CHECKING:
    import PIL.Image

ROLES = ("system", "user", "assistant")

# The content may not hold another tag, so that an empty pair stays literal text and swallows nothing behind it.
_INLINE_MEDIA = re.compile(r"<img>(?P<image>(?:(?!</?img>).)+)</img>|<audio>(?P<audio>(?:(?!</?audio>).)+)</audio>")


@dataclass(frozen=True)
class Text:
    """Plain text; whoever wrote it, no control token is meant by it."""

    text: str


@dataclass(frozen=True)
class Image:
    """A picture: path, URL, data URI, encoded bytes or a PIL image."""

    source: str | Path | bytes | PIL.Image.Image


@dataclass(frozen=True)
class Audio:
    """A sound: path, URL, data URI or encoded bytes."""

    source: str | Path | bytes


Part: TypeAlias = Text | Image | Audio


@dataclass(frozen=True)
class ToolCall:
    """A function that an answer asks to be called; ``id`` is what its result refers to."""

    id: str
    name: str
    arguments: Mapping[str, Any]

    @classmethod
    def from_json(cls, id: str, name: str, arguments: str) -> ToolCall:
        """Read the arguments from JSON; raise ValueError where that is no object."""
        read = json.loads(arguments)
        if not isinstance(read, dict):
            raise ValueError("expected an object")
        return cls(id, name, read)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: ``system``, ``user`` or ``assistant``; ``tool`` for the result of a call, where the template knows tools.
        parts: what was said, in the order given; a family's template may reorder.
        train: whether an assistant turn is learned in training; of no meaning for other roles.
        tool_calls: what an assistant turn asks to be called, after what it says.
        tool_call_id: which call a ``tool`` turn is the result of.
    """

    role: str
    parts: tuple[Part, ...]
    train: bool = True
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        """Raise TypeError for parts that are none."""
        if isinstance(self.parts, str) or not all(isinstance(part, Text | Image | Audio) for part in self.parts):
            raise TypeError(f"the parts of a message are Text, Image and Audio objects, not {self.parts!r}")

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def media(self) -> tuple[Image | Audio, ...]:
        """The other parts, in order."""
        return tuple(part for part in self.parts if not isinstance(part, Text))


def to_messages(data: Sequence[Mapping[str, Any] | Message]) -> list[Message]:
    """Read a conversation from OpenAI-like dicts; ``Message`` objects pass through.

    ``content`` is a string or a list of parts: ``{"type": "text", "text"}``, ``{"type": "image", "image"}``,
    ``{"type": "image_url", "image_url": str | {"url"}}``, the same for ``audio`` and ``audio_url``, and
    ``{"type": "input_audio", "input_audio": {"data": base64}}``. ``loss: false`` on an assistant message keeps it out
    of training.

    Raises:
        MMToolError: naming the place, ``messages[1].content[0].image: ...``.
    """
    if isinstance(data, str | bytes | Mapping) or not isinstance(data, Sequence):
        raise MMToolError(
            f"messages: expected a list of messages, got {_type_name(data)}",
            "Write [{'role': 'user', 'content': 'Hello'}].",
        )
    if not data:
        raise MMToolError("messages: the list is empty", "Give at least one message with the role user.")
    return [_read_message(item, f"messages[{index}]") for index, item in enumerate(data)]


def split_inline_media(text: str) -> tuple[Part, ...]:
    """Split ``text`` at ``<img>path or URL</img>`` and ``<audio>..</audio>``; tags do not span lines or nest."""
    parts: list[Part] = []
    position = 0
    for match in _INLINE_MEDIA.finditer(text):
        if match.start() > position:
            parts.append(Text(text[position : match.start()]))
        parts.append(Image(match["image"]) if match["image"] is not None else Audio(match["audio"]))
        position = match.end()
    if position < len(text) or not parts:
        parts.append(Text(text[position:]))
    return tuple(parts)


def conversation(
    query: str,
    history: Iterable[Sequence[str]] | None = (),
    system: str | None = None,
    images: Any = (),
    audios: Any = (),
    media_style: Literal["round", "inline", "none"] = "round",
) -> list[Message]:
    """Turn the arguments of a swift 2.x call into messages that end with ``query``.

    Args:
        query: the new question.
        history: the earlier rounds as ``[question, answer]``, oldest first.
        system: the system text; None leaves the template's default, ``""`` asks for none.
        images: for ``round`` models one entry per round, oldest first, None or ``""`` for a round without; fewer
            entries go to the first rounds, more are an error. For ``inline`` models they go in front of the first
            question, unless the text has ``<img>`` tags, which is an error. One entry may be given without a list.
        audios: the same for sounds.
        media_style: ``round``, ``inline`` (``<img>..</img>`` in questions and answers are media) or ``none``.
    """
    if not isinstance(query, str):
        raise MMToolError(f"query: expected a string, got {_type_name(query)}")
    if system is not None and not isinstance(system, str):
        raise MMToolError(f"system: expected a string, got {_type_name(system)}")

    rounds = [*_read_history(history), (query, None)]
    media = {"images": _read_media_list(images, "images"), "audios": _read_media_list(audios, "audios")}
    place = {"round": _place_per_round, "inline": _place_inline, "none": _place_none}[media_style]
    fronts = place(rounds, media)
    read_text = split_inline_media if media_style == "inline" else _plain_text
    messages = [] if system is None else [Message("system", (Text(system),))]
    for front, (question, answer) in zip(fronts, rounds, strict=True):
        messages.append(Message("user", (*front, *read_text(question))))
        if answer is not None:
            messages.append(Message("assistant", read_text(answer)))
    return messages


def check_turns(messages: Sequence[Message], train: bool = False) -> None:
    """Check the order of roles: one system message at most, first; then user and assistant in turn.

    Raises:
        MMToolError: where the order is wrong, or the last message is not the user's (with ``train``: not the
            assistant's).
    """
    first = 1 if messages and messages[0].role == "system" else 0
    for index, message in enumerate(messages[first:], first):
        expected = ("user", "assistant")[(index - first) % 2]
        if message.role != expected:
            raise MMToolError(
                f"messages[{index}].role: expected {expected}, got {message.role}",
                "Start with the user (after one system message at most); then user and assistant take turns.",
            )
    last = messages[-1].role if len(messages) > first else "system"
    wanted = "assistant" if train else "user"
    if last != wanted:
        raise MMToolError(
            f"messages[{len(messages) - 1}].role: the last message is the {last}'s, not the {wanted}'s",
            "A training sample ends with an answer." if train else "End with the question to be answered.",
        )


def _read_message(item: Mapping[str, Any] | Message, place: str) -> Message:
    if isinstance(item, Message):
        return item
    if not isinstance(item, Mapping):
        raise MMToolError(
            f"{place}: expected an object with role and content, got {_type_name(item)}",
            "Write {'role': 'user', 'content': 'Hello'}.",
        )
    role = item.get("role")
    if role not in ROLES:
        found = "is missing" if role is None else f"unknown role {shown(role)}"
        raise MMToolError(f"{place}.role: {found}", f"Use {', '.join(ROLES)}.")
    train = item.get("loss", True)
    if train not in (True, False, None):
        raise MMToolError(f"{place}.loss: expected true or false, got {shown(train)}")
    return Message(role, _read_content(item, place), train=True if train is None else bool(train))


def _read_content(item: Mapping[str, Any], place: str) -> tuple[Part, ...]:
    content = item.get("content")
    if isinstance(content, str):
        return (Text(content),)
    if content is None:
        state = "is null" if "content" in item else "is missing"
        raise MMToolError(f"{place}.content: {state}", "Give a string, '' for an empty one, or a list of parts.")
    if not isinstance(content, list | tuple):
        raise MMToolError(f"{place}.content: expected a string or a list of parts, got {_type_name(content)}")
    if not content:
        raise MMToolError(f"{place}.content: the list is empty", "Give a string or at least one part.")
    return tuple(_read_part(part, f"{place}.content[{index}]") for index, part in enumerate(content))


def _read_part(part: Any, place: str) -> Part:
    if isinstance(part, Text | Image | Audio):
        return part
    if not isinstance(part, Mapping):
        raise MMToolError(f"{place}: expected an object with a type, got {_type_name(part)}")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _PART_READERS:
        found = "is missing" if kind is None else f"unknown type {shown(kind)}"
        raise MMToolError(f"{place}.type: {found}", f"Use {', '.join(_PART_READERS)}.")
    if part.get(kind) is None:
        raise MMToolError(f"{place}.{kind}: is missing", f"A part of type {kind} has its value under {kind!r}.")
    return _PART_READERS[kind](part[kind], f"{place}.{kind}")


def _read_text(value: Any, place: str) -> Text:
    if not isinstance(value, str):
        raise MMToolError(f"{place}: expected a string, got {_type_name(value)}")
    return Text(value)


def _read_image(value: Any, place: str) -> Image:
    return Image(_read_source(value, place, pictures=True))


def _read_audio(value: Any, place: str) -> Audio:
    return Audio(_read_source(value, place, pictures=False))


def _read_image_url(value: Any, place: str) -> Image:
    return Image(_read_url(value, place))


def _read_audio_url(value: Any, place: str) -> Audio:
    return Audio(_read_url(value, place))


def _read_input_audio(value: Any, place: str) -> Audio:
    data = value.get("data") if isinstance(value, Mapping) else None
    if not isinstance(data, str) or not data:
        raise MMToolError(f"{place}: expected an object with base64 under 'data', got {_type_name(value)}")
    try:
        return Audio(base64.b64decode(data, validate=True))
    except (binascii.Error, ValueError) as error:
        raise MMToolError(f"{place}.data: is not base64 ({error})", "Encode the bytes of the sound file.") from None


_PART_READERS: dict[str, Callable[[Any, str], Part]] = {
    "text": _read_text,
    "image": _read_image,
    "image_url": _read_image_url,
    "audio": _read_audio,
    "audio_url": _read_audio_url,
    "input_audio": _read_input_audio,
}


def _read_url(value: Any, place: str) -> str:
    if isinstance(value, Mapping):
        value, place = value.get("url"), f"{place}.url"
    if not isinstance(value, str):
        raise MMToolError(f"{place}: expected a URL, got {_type_name(value)}")
    if not value:
        raise MMToolError(f"{place}: is empty", "Give an http(s) URL or a data URI.")
    return value


def _read_source(value: Any, place: str, pictures: bool) -> Any:
    """Return ``value`` if it can name or hold a medium; ``{"bytes", "path"}`` of arrow data sets gives either."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytearray | memoryview):
        value = bytes(value)
    if isinstance(value, str | bytes) and not value:
        raise MMToolError(f"{place}: is empty", "Give a path, a URL, a data URI or the bytes of a file.")
    if isinstance(value, os.PathLike):
        return Path(value)
    if isinstance(value, str | bytes) or (pictures and _is_pil_image(value)):
        return value
    allowed = "a path, a URL, a data URI, bytes" + (" or a PIL image" if pictures else "")
    raise MMToolError(f"{place}: expected {allowed}, got {_type_name(value)}")


def _is_pil_image(value: Any) -> bool:
    # Whoever holds a PIL image has imported PIL; importing it here would cost every text-only run.
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(value, pil.Image)


def _read_history(history: Iterable[Sequence[str]] | None) -> list[tuple[str, str | None]]:
    rounds: list[tuple[str, str | None]] = []
    if isinstance(history, str | Mapping):
        raise MMToolError(f"history: expected a list of [question, answer], got {_type_name(history)}")
    for index, item in enumerate(history or ()):
        pair = tuple(item) if isinstance(item, list | tuple) else ()
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise MMToolError(
                f"history[{index}]: expected [question, answer], two strings, got {shown(item)}",
                "Pass on the history that inference() returned.",
            )
        rounds.append(pair)
    return rounds


def _read_media_list(entries: Any, name: str) -> list[Any]:
    if entries is None:
        return []
    if isinstance(entries, str | bytes | os.PathLike) or _is_pil_image(entries):
        return [entries]
    if not isinstance(entries, Iterable):
        raise MMToolError(f"{name}: expected a list, got {_type_name(entries)}", "Give one entry per round.")
    return list(entries)


def _plain_text(text: str) -> tuple[Part, ...]:
    return (Text(text),)


def _place_per_round(rounds: list[tuple[str, str | None]], media: dict[str, list[Any]]) -> list[list[Part]]:
    fronts: list[list[Part]] = [[] for _ in rounds]
    for name, entries in media.items():
        if len(entries) > len(rounds):
            raise MMToolError(
                f"{name}: {len(entries)} entries for {counted(len(rounds), 'round')} of questions",
                "Give one entry per round, oldest first, and None for a round without.",
            )
        for index, entry in enumerate(entries):
            if not _is_absent(entry):
                fronts[index].append(_read_entry(name, index, entry))
    return fronts


def _place_inline(rounds: list[tuple[str, str | None]], media: dict[str, list[Any]]) -> list[list[Part]]:
    fronts: list[list[Part]] = [[] for _ in rounds]
    texts = [text for pair in rounds for text in pair if text is not None]
    for name, kind in (("images", Image), ("audios", Audio)):
        given = [_read_entry(name, i, entry) for i, entry in enumerate(media[name]) if not _is_absent(entry)]
        if given and any(isinstance(part, kind) for text in texts for part in split_inline_media(text)):
            tag = "<img>" if kind is Image else "<audio>"
            raise MMToolError(f"{name}: given beside {tag} tags in the text", "Use either the tags or the list.")
        fronts[0] += given
    return fronts


def _place_none(rounds: list[tuple[str, str | None]], media: dict[str, list[Any]]) -> list[list[Part]]:
    for name, entries in media.items():
        if any(not _is_absent(entry) for entry in entries):
            raise MMToolError(f"{name}: this model takes text only", "Leave them out, or choose another model.")
    return [[] for _ in rounds]


def _is_absent(entry: Any) -> bool:
    return entry is None or (isinstance(entry, str | bytes) and not entry)


def _read_entry(name: str, index: int, entry: Any) -> Part:
    if isinstance(entry, Image | Audio):
        return entry
    read = _read_image if name == "images" else _read_audio
    return read(entry, f"{name}[{index}]")


def _type_name(value: Any) -> str:
    names = {type(None): "null", str: "a string", bytes: "bytes", list: "a list", dict: "an object", bool: "a boolean"}
    return names.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """Return a value as an error quotes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
