"""Messages of a request to a conversation: who said what, which media are where, and what may be opened.

Nothing is opened here: a picture is the text that the request gives for it, until ``media`` fetches it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmtool.messages import Audio, Image, Message, Part, Text, ToolCall, shown
from mmtool.serve.errors import bad_request

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_URL = re.compile(r"(?i)https?://|data:|file://")
_AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg")


@dataclass
class Conversation:
    """What a request says.

    Attributes:
        messages: the turns; media are still to be fetched.
        places: the media in reading order, with where they stand in the request: ``messages[0].content[1].image_url``.
    """

    messages: list[Message]
    places: list[tuple[Image | Audio, str]] = field(default_factory=list)

    def with_parts(self, found: Mapping[int, Image | Audio]) -> list[Message]:
        """Return the messages with other parts in the place of the media; ``found`` is by ``id`` of those."""
        return [
            Message(
                message.role,
                tuple(found.get(id(part), part) for part in message.parts),
                tool_calls=message.tool_calls,
                tool_call_id=message.tool_call_id,
            )
            for message in self.messages
        ]


def read_conversation(given: Sequence[Mapping[str, Any]], modalities: Sequence[str], max_media: int) -> Conversation:
    """Read the ``messages`` of a request.

    Raises:
        ApiError: 400, naming the place.
    """
    conversation = Conversation([])
    for index, item in enumerate(given):
        place = f"messages[{index}]"
        role = item.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise bad_request(f"{place}.role: expected one of {', '.join(_ROLES)}, got {shown(role)}", f"{place}.role")
        calls = _tool_calls(item.get("tool_calls"), role, place)
        parts = _content(item.get("content"), role, place, bool(calls), conversation)
        call_id = item.get("tool_call_id") if role == "tool" else None
        if role == "tool" and not isinstance(call_id, str):
            raise bad_request(f"{place}.tool_call_id: is missing", f"{place}.tool_call_id")
        conversation.messages.append(Message(_ROLES[role], parts, tool_calls=calls, tool_call_id=call_id))
    if len(conversation.places) > max_media:
        raise bad_request(
            f"{len(conversation.places)} pictures and sounds, more than the {max_media} that a request may have",
            "messages",
            "too_many_media",
        )
    for part, place in conversation.places:
        kind = "image" if isinstance(part, Image) else "audio"
        if kind not in modalities:
            takes = " and ".join(("text", *modalities))
            raise bad_request(f"{place}: this model takes {takes}, not {kind}", place, "unsupported_media")
    return conversation


def _content(content: Any, role: str, place: str, may_miss: bool, into: Conversation) -> tuple[Part, ...]:
    place = f"{place}.content"
    if isinstance(content, str):
        return (Text(content),)
    if content is None and may_miss:
        return (Text(""),)
    if not isinstance(content, list) or not content:
        found = "is missing" if content is None else f"expected a string or a list of parts, got {shown(content)}"
        raise bad_request(f"{place}: {found}", place)
    return tuple(_part(part, role, f"{place}[{index}]", into) for index, part in enumerate(content))


def _part(part: Any, role: str, place: str, into: Conversation) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    value = part.get(kind) if isinstance(kind, str) else None
    if kind in ("text", "refusal") and (kind == "text" or role == "assistant"):
        if not isinstance(value, str):
            raise bad_request(f"{place}.{kind}: expected a string, got {shown(value)}", place)
        return Text(value)
    if kind not in ("image_url", "audio_url", "input_audio"):
        raise bad_request(
            f"{place}.type: expected text, image_url, input_audio or audio_url, got {shown(kind)}", f"{place}.type"
        )
    place = f"{place}.{kind}"
    source = _base64(value, place) if kind == "input_audio" else _url(value, place)
    medium = Image(source) if kind == "image_url" else Audio(source)
    into.places.append((medium, place))
    return medium


def _url(value: Any, place: str) -> str:
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str) or not _URL.match(url):
        raise bad_request(
            f"{place}: expected a URL with https:// or a data URI, got {shown(url)}", place, "invalid_media"
        )
    return url


def _base64(value: Any, place: str) -> str:
    """Return a data URI; the base64 is read where media are fetched, in a thread."""
    data = value.get("data") if isinstance(value, dict) else None
    if not isinstance(data, str) or not data:
        raise bad_request(f"{place}: expected an object with base64 under data, got {shown(value)}", place)
    named = value.get("format")
    if named is not None and named not in _AUDIO_FORMATS:
        raise bad_request(f"{place}.format: expected one of {', '.join(_AUDIO_FORMATS)}, got {shown(named)}", place)
    return f"data:audio/{named or 'x'};base64,{data}"


def _tool_calls(given: Any, role: str, place: str) -> tuple[ToolCall, ...]:
    if given is None or (given == [] and role == "assistant"):
        return ()
    place = f"{place}.tool_calls"
    if role != "assistant":
        raise bad_request(f"{place}: only the assistant calls tools", place)
    if not isinstance(given, list):
        raise bad_request(f"{place}: expected a list, got {shown(given)}", place)
    return tuple(_tool_call(call, f"{place}[{index}]") for index, call in enumerate(given))


def _tool_call(call: Any, place: str) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(name, str) or not isinstance(arguments, str) or not isinstance(call.get("id"), str):
        raise bad_request(f"{place}: expected id, and function with name and arguments (strings)", place)
    try:
        return ToolCall.from_json(call["id"], name, arguments)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"{place}.function.arguments: not a JSON object ({error})", place) from None
