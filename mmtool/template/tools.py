"""Calls of tools in an answer: how a family writes them, and how they are found while the answer comes.

Two kinds are known: JSON objects with a name and arguments (Hermes, Qwen, Llama, Mistral and their like), and lines of
Python between two marks (MiniCPM3, LFM2).
"""

from __future__ import annotations

import ast
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmtool.messages import ToolCall


@dataclass(frozen=True)
class CallFormat(ABC):
    """What stands around the calls of an answer.

    Attributes:
        begin: before a call; empty where an answer that calls a tool is nothing but the call.
        end: after it; empty where the answer ends there.
        special: whether ``begin`` or ``end`` are special tokens, which must then be kept in the text of the answer.
    """

    begin: str
    end: str
    special: bool = False

    @abstractmethod
    def read(self, text: str) -> list[tuple[str, dict[str, Any]]] | None:
        """Return names and arguments of the calls in what stands between ``begin`` and ``end``; None if it is none."""

    @abstractmethod
    def grammar(self, schemas: Mapping[str, Mapping[str, Any]], added: Mapping[str, int]) -> str | None:
        """Return a Lark grammar, in llguidance's dialect, of one call; None where there is none.

        Args:
            schemas: the parameters of the functions that may be called, by name.
            added: ids of the tokens that a tokenizer has beside its vocabulary: they are no text for a grammar.
        """


@dataclass(frozen=True)
class JsonCalls(CallFormat):
    """Calls as JSON: ``{"name": .., "arguments": {..}}``, or with ``listed`` a list of such objects."""

    name_key: str = "name"
    arguments_key: str = "arguments"
    listed: bool = False

    def read(self, text: str) -> list[tuple[str, dict[str, Any]]] | None:
        """Read JSON objects, one after the other or in a list."""
        decoder, found, position = json.JSONDecoder(), [], 0
        try:
            while position < len(text):
                value, position = decoder.raw_decode(text, position)
                found += value if isinstance(value, list) else [value]
                while position < len(text) and (text[position].isspace() or text[position] in ",;"):
                    position += 1
        except (ValueError, RecursionError):
            return None
        return self._calls(found) or None

    def _calls(self, found: Iterable[Any]) -> list[tuple[str, dict[str, Any]]] | None:
        calls = []
        for item in found:
            name = item.get(self.name_key) if isinstance(item, dict) else None
            arguments = item.get(self.arguments_key, {}) if isinstance(name, str) else None
            if not isinstance(arguments, dict):
                return None
            calls.append((name, arguments))
        return calls

    def grammar(self, schemas: Mapping[str, Mapping[str, Any]], added: Mapping[str, int]) -> str | None:
        """Return the call as a JSON schema between the marks."""
        options = [
            {
                "type": "object",
                "properties": {self.name_key: {"const": name}, self.arguments_key: dict(schema)},
                "required": [self.name_key, self.arguments_key],
                "additionalProperties": False,
            }
            for name, schema in schemas.items()
        ]
        schema: dict[str, Any] = {"anyOf": options}
        if self.listed:
            schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
        # As models are trained to write calls, with no room for blanks without end.
        schema["x-guidance"] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        parts = [*_terminals(self.begin, added), "call", *_terminals(self.end, added)]
        return f"start: {' '.join(parts)}\ncall: %json {json.dumps(schema)}"


@dataclass(frozen=True)
class PythonCalls(CallFormat):
    """Calls as Python, ``name(key=value)``: line by line, or in a list."""

    def read(self, text: str) -> list[tuple[str, dict[str, Any]]] | None:
        """Read the calls; only constants, lists and dicts count as values, and nothing is run."""
        code = text.strip().removeprefix("```python").removeprefix("```").removesuffix("```").strip()
        try:
            lines = [line.value for line in ast.parse(code).body if isinstance(line, ast.Expr)]
            calls = []
            for call in (item for line in lines for item in getattr(line, "elts", [line])):  # also several in a list
                if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name | ast.Attribute):
                    return None
                pairs = {item.arg: ast.literal_eval(item.value) for item in call.keywords if item.arg is not None}
                json.dumps(pairs)  # raises where a value has no JSON, such as a set
                calls.append((ast.unparse(call.func), pairs))
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            return None
        return calls or None

    def grammar(self, schemas: Mapping[str, Mapping[str, Any]], added: Mapping[str, int]) -> str | None:
        """There is none: JSON schemas say nothing about Python."""
        return None


def _terminals(text: str, added: Mapping[str, int]) -> list[str]:
    """Return ``text`` as terminals of a grammar: added tokens by their ids, the rest as strings."""
    known = re.compile("(" + "|".join(map(re.escape, sorted(filter(None, added), key=len, reverse=True))) + ")")
    pieces = known.split(text) if added else [text]
    return [f"<[{added[piece]}]>" if piece in added else json.dumps(piece) for piece in pieces if piece]


@dataclass
class CallReader:
    """Splits an answer into text and calls while it comes.

    What could still become a call is held back; what looked like one and is none comes out as text.
    """

    format: CallFormat
    names: Sequence[str]
    _held: str = ""
    _inside: bool = False
    _any_text: bool = False
    _text_behind: bool = False
    calls: list[ToolCall] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Models are not exact about the blanks beside the marks."""
        self._begin, self._end = self.format.begin.strip(), self.format.end.strip()

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Take a piece of the answer; return the text and the calls that are certain now."""
        self._held += text
        shown, calls = "", list[ToolCall]()
        while True:
            if self._inside:
                end = self._held.find(self._end) if self._end else -1
                if end < 0:
                    return shown, calls
                body, self._held = self._held[:end], self._held[end + len(self._end) :]
                self._inside = False
                more, found = self._settle(body, self._end)
                shown, calls = shown + more, calls + found
                continue
            start = self._find_begin()
            if start is None:
                certain = self._certain()
                more, self._held = self._held[:certain], self._held[certain:]
                return shown + self._text(more), calls
            shown += self._text(self._held[:start])
            self._held = self._held[start + len(self._begin) :]
            self._inside = True

    def flush(self) -> tuple[str, list[ToolCall]]:
        """Return what is left at the end of the answer."""
        held, self._held = self._held, ""
        if not self._inside:
            return self._text(held), []
        self._inside = False
        return self._settle(held, "")

    def _find_begin(self) -> int | None:
        if self._begin:
            at = self._held.find(self._begin)
            return at if at >= 0 else None
        # Without a mark, only an answer that starts as JSON can be a call, and it is one up to its end.
        text = self._held.lstrip()
        return len(self._held) - len(text) if text[:1] in ("{", "[") and not self._any_text and not self.calls else None

    def _certain(self) -> int:
        begin = self._begin
        if not begin:
            return len(self._held) if self._held.strip() or self._any_text else 0
        for length in range(min(len(begin) - 1, len(self._held)), 0, -1):
            if self._held.endswith(begin[:length]):
                return len(self._held) - length
        return len(self._held)

    def _text(self, text: str) -> str:
        if not self._any_text:
            self._any_text = bool(text.strip())
        if self.calls and not self._text_behind:  # without the line breaks between calls
            text = text.lstrip()
            self._text_behind = bool(text)
        return text

    def _settle(self, body: str, end: str) -> tuple[str, list[ToolCall]]:
        read = self.format.read(body.strip())
        if read is None or any(name not in self.names for name, _ in read):
            return self._text(self._begin + body + end), []
        found = [ToolCall("", name, arguments) for name, arguments in read]
        self.calls += found
        return "", found
