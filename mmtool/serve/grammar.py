"""Answers that must have a form: JSON of a schema, or what a grammar says; the library llguidance keeps to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

import llguidance
import torch
from torch import Tensor

from mmtool.errors import MMToolError
from mmtool.serve.errors import ApiError, bad_request
from mmtool.serve.vocabulary import Vocabulary

MAX_SCHEMA = 100_000  # characters
# One line, or indented. With room for more blanks, a weak model fills it again and again.
INDENTED = {"whitespace_pattern": r" ?(\r?\n[ \t]{0,20})?"}
# For llguidance before 1.8, as vLLM wants it, which repeats the pattern without end: one line alone.
COMPACT = {"whitespace_flexible": False, "item_separator": r" ?, ?", "key_separator": r" ?: ?"}


class TokenGrammar:
    """Which tokens may come next in one answer; see ``mmtool.engine.base.Grammar``."""

    def __init__(self, matcher: llguidance.LLMatcher, size: int) -> None:
        self._matcher = matcher
        self._mask = torch.zeros((size + 31) // 32, dtype=torch.int32)

    @property
    def finished(self) -> bool:
        """Whether nothing may follow, not even a stop id."""
        return self._matcher.is_stopped()

    def allowed(self) -> Tensor:
        """Return the tokens that may come, packed: bit ``t % 32`` of entry ``t // 32``."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.data_ptr(), self._mask.numel() * 4)
        self._check()
        return self._mask

    def accept(self, token_id: int) -> None:
        """Go on with a token."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise MMToolError(f"the response format cannot be kept to: {self._matcher.get_error().splitlines()[0]}")


class GrammarCompiler:
    """Makes grammars for the tokens of one model."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def from_response_format(self, given: Mapping[str, Any] | None) -> Callable[[], TokenGrammar] | None:
        """Return what makes a grammar for each answer; None where anything may be said.

        Raises:
            ApiError: 400 for a format that is not known, or a schema that cannot be kept to.
        """
        kind = "text" if given is None else given.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            return self._compiled(_json_grammar('{"type": "object"}'), "response_format")
        if kind != "json_schema":
            raise bad_request("response_format.type: expected text, json_object or json_schema", "response_format.type")
        named = given.get("json_schema") if given is not None else None
        schema = named.get("schema") if isinstance(named, Mapping) else None
        param = "response_format.json_schema.schema"
        if not isinstance(schema, Mapping | bool):
            raise bad_request(f"{param}: expected a JSON schema", param)
        try:
            text = json.dumps(schema)
            if len(text) > MAX_SCHEMA:
                raise bad_request(f"{param}: longer than {MAX_SCHEMA} characters", param)
            return self._compiled(_json_grammar(text), param)
        except (ValueError, RecursionError) as error:
            raise bad_request(f"{param}: {error}", param) from None

    def from_lark(self, grammar: str, param: str) -> Callable[[], TokenGrammar]:
        """Return what makes the grammar for each answer."""
        return self._compiled(llguidance.LLMatcher.grammar_from_lark(grammar), param)

    def _compiled(self, grammar: str, param: str) -> Callable[[], TokenGrammar]:
        try:
            trie = self.vocabulary.trie
        except MMToolError as error:
            raise bad_request(f"{param}: {error.message}", param) from None
        matcher = llguidance.LLMatcher(trie, grammar, log_level=0)
        if matcher.is_error():
            raise ApiError(400, f"{param}: {matcher.get_error().splitlines()[0][:300]}", param=param)
        return lambda: TokenGrammar(matcher.deep_copy(), trie.vocab_size)


def _json_grammar(schema: str) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=_layout(version("llguidance")))


@cache
def _layout(installed: str) -> dict[str, Any]:
    number = tuple(int(part) for part in installed.split(".")[:2])
    return INDENTED if number >= (1, 8) else COMPACT
