"""Tools of a request: checked, put into the prompt by the template, and found again in the answer."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmtool.errors import MMToolError
from mmtool.messages import Message, ToolCall
from mmtool.serve.errors import bad_request
from mmtool.template.base import Template
from mmtool.template.tools import CallFormat, CallReader

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class ToolUse:
    """The functions that an answer may call.

    Attributes:
        template: writes prompts that tell of them.
        format: how calls are written.
        schemas: the parameters by name.
        forced: names of which one must be called; empty where none must.
    """

    template: Template
    format: CallFormat
    schemas: Mapping[str, Mapping[str, Any]]
    forced: tuple[str, ...] = ()

    def reader(self) -> CallReader:
        """Return what finds the calls in one answer."""
        return CallReader(self.format, tuple(self.schemas))

    def grammar(self) -> str | None:
        """Return what an answer that must call has to look like; None where it need not."""
        if not self.forced:
            return None
        added = {token.content: index for index, token in self.template.tokenizer.added_tokens_decoder.items()}
        grammar = self.format.grammar({name: self.schemas[name] for name in self.forced}, added)
        if grammar is None:
            raise bad_request(
                "tool_choice: this model's format of calls cannot be enforced. Use auto or none.", "tool_choice"
            )
        return grammar


def read_tools(
    tools: Sequence[Mapping[str, Any]] | None,
    choice: str | Mapping[str, Any] | None,
    parallel: bool | None,
    template: Template,
    messages: Sequence[Message],
) -> ToolUse | None:
    """Read ``tools`` and ``tool_choice``; None where the answer calls nothing.

    Raises:
        ApiError: 400 for what is wrong with them, and where the model's template has no format for tools.
    """
    schemas = {}
    for index, tool in enumerate(tools or ()):
        name, schema = _function(tool, f"tools[{index}]")
        schemas[name] = schema
    forced = _forced(choice, schemas)
    asked = bool(schemas) and choice != "none"
    history = any(message.tool_calls or message.role == "tool" for message in messages)
    if not asked and not history:
        return None
    try:
        with_tools = template.with_tools([dict(tool) for tool in tools or ()] if asked else [])
    except MMToolError as error:
        raise bad_request(f"tools: {error.message}", "tools" if asked else "messages", "tools_not_supported") from None
    return ToolUse(with_tools, with_tools.call_format, schemas if asked else {}, forced)


def as_openai(call: ToolCall, arguments: str, index: int | None = None) -> dict[str, Any]:
    """Return a call as the interface writes it; ``index`` is for streams."""
    numbered = {} if index is None else {"index": index}
    return {
        **numbered,
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


def _function(tool: Mapping[str, Any], place: str) -> tuple[str, Mapping[str, Any]]:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping):
        raise bad_request(f"{place}: expected type function, and an object under function", place)
    name, schema = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise bad_request(
            f"{place}.function.name: expected letters, digits, _, . and - (at most 64)", f"{place}.function.name"
        )
    if schema is not None and not isinstance(schema, Mapping):
        raise bad_request(f"{place}.function.parameters: expected a JSON schema", f"{place}.function.parameters")
    return name, schema or {"type": "object", "properties": {}, "additionalProperties": False}


def _forced(choice: str | Mapping[str, Any] | None, schemas: Mapping[str, Any]) -> tuple[str, ...]:
    if choice is None or choice in ("auto", "none"):
        return ()
    if not schemas:
        raise bad_request("tool_choice: needs tools", "tool_choice")
    if choice == "required":
        return tuple(schemas)
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name is None:
        raise bad_request("tool_choice: expected auto, none, required, or a function by its name", "tool_choice")
    if name not in schemas:
        raise bad_request(f"tool_choice: {str(name)[:80]!r} is not one of the tools", "tool_choice")
    return (name,)
