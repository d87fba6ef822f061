"""Tools through a model's own chat template: how its answers call them is read off what the template writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jinja2

from mmtool.errors import MMToolError
from mmtool.messages import Message, check_turns
from mmtool.template.tools import CallFormat, JsonCalls, PythonCalls

_NAME, _ARGUMENTS = "probed_function", {"probed_key": "probed value"}
_PYTHON_CALL = re.compile(r"probed_function\(probed_key=(?P<quote>['\"])probed value(?P=quote)\)")
_UNKNOWN = "the chat template of this model writes calls of tools in a way that is not known"
_USER = {"role": "user", "content": "0"}
_CALL = {"id": "abcdef123", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
_PROBED_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {"probed_key": {"type": "string", "description": "Any."}}},
    },
}

Render = Callable[[list[dict[str, Any]], bool, list[dict[str, Any]]], str]


def find_call_format(render: Render, end: str, special_tokens: Collection[str], as_parts: bool) -> CallFormat:
    """Return how a chat template writes calls.

    Args:
        render: ``(messages, add_generation_prompt, tools) -> str``.
        end: what ends an answer.
        special_tokens: which texts a decoder leaves out.
        as_parts: whether the template reads a user's content as a list.

    Raises:
        MMToolError: where it does not know tools, or writes their calls in a way that is not known.
    """
    user = {**_USER, "content": [{"type": "text", "text": "0"}]} if as_parts else _USER
    try:
        prompt = render([user], True, [_PROBED_TOOL])
        if _NAME not in prompt:
            raise MMToolError("the chat template of this model does not show tools")
        answer = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
        written = render([user, answer], False, [_PROBED_TOOL])
    except (jinja2.TemplateError, TypeError, ValueError, IndexError, KeyError) as error:
        raise MMToolError(f"the chat template of this model does not take calls of tools: {error}") from error
    written = written[len(prompt) :] if written.startswith(prompt) else written[written.rfind(_NAME) - 200 :]
    found = _find_json(written)
    python = _PYTHON_CALL.search(written)
    if found is None and python is None:
        raise MMToolError(_UNKNOWN)
    start, stop = found[:2] if found is not None else python.span()
    begin, tail = written[:start], written[stop:]
    tail = tail[: tail.index(end)] if end and end in tail else ""
    special = any(token in begin + tail for token in special_tokens if token)
    if found is not None:
        return _json_calls(begin, tail, special, found[2])
    if not begin.strip():  # nothing would tell a call from an answer that is code
        raise MMToolError(_UNKNOWN)
    return PythonCalls(begin, tail, special)


def _json_calls(begin: str, tail: str, special: bool, value: Any) -> JsonCalls:
    listed = isinstance(value, list)
    call = value[0] if listed else value
    keys = [next((key for key, item in call.items() if item == wanted), None) for wanted in (_NAME, _ARGUMENTS)]
    if None in keys:
        raise MMToolError(_UNKNOWN)
    return JsonCalls(begin, tail, special, name_key=keys[0], arguments_key=keys[1], listed=listed)


def _find_json(text: str) -> tuple[int, int, Any] | None:
    """Return where in ``text`` the JSON is that has the probed call, and its value."""
    decoder = json.JSONDecoder()
    for start, char in enumerate(text):
        if char in "[{":
            try:
                value, stop = decoder.raw_decode(text, start)
            except ValueError:
                continue
            call = value[0] if isinstance(value, list) and value else value
            if isinstance(call, dict) and _NAME in call.values():
                return start, stop, value
    return None


def check_no_control(value: Any, special_tokens: Collection[str], place: str) -> None:
    """Refuse tools and calls with control tokens in them: the template writes them as its own text.

    Raises:
        MMToolError: naming the token.
    """
    for text in _strings(value):
        for token in special_tokens:
            if token and token in text:
                raise MMToolError(f"{place} has the control token {token!r} in it")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def check_tool_turns(messages: Sequence[Message], train: bool) -> None:
    """Check the order of roles where calls and their results stand between a question and its answer.

    Raises:
        MMToolError: naming the message.
    """
    rest: list[Message] = []
    open_calls = False
    for index, message in enumerate(messages):
        if message.role == "tool":
            if not open_calls:
                raise MMToolError(f"messages[{index}].role: the result of a tool follows the call of one")
        elif message.tool_calls:
            if not rest or rest[-1].role != "user":
                raise MMToolError(f"messages[{index}].role: a call of tools follows a question, or results of tools")
            open_calls = True
        else:
            if open_calls and message.role != "assistant" and messages[index - 1].role != "tool":
                raise MMToolError(f"messages[{index}].role: expected tool, the result of the call before")
            open_calls = False
            rest.append(message)
    if messages[-1].tool_calls:
        raise MMToolError(f"messages[{len(messages) - 1}]: the result of the call is missing")
    check_turns(rest, train)
