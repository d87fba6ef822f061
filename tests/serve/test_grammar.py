"""What an answer in JSON may look like, token by token."""

import json

import pytest

from mmtool.serve import grammar
from mmtool.serve.grammar import GrammarCompiler
from mmtool.serve.vocabulary import Vocabulary

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "boolean"}}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
VALUE = {"a": 1, "b": [True, False]}


@pytest.fixture(scope="module")
def vocabulary(tiny):
    template = tiny.template()
    return Vocabulary(template.tokenizer, len(template.tokenizer), template.stop_token_ids)


@pytest.fixture
def accepted(vocabulary):
    """``accepted(text)`` tells whether an answer may be ``text``, and may end there."""

    def check(text: str) -> bool:
        given = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
        made = GrammarCompiler(vocabulary).from_response_format(given)()
        for index in vocabulary.trie.tokenize_str(text):
            if not made.allowed()[index // 32] >> (index % 32) & 1:
                return False
            made.accept(index)
        ends = vocabulary.stop_token_ids
        return any(made.finished or made.allowed()[index // 32] >> (index % 32) & 1 for index in ends)

    return check


@pytest.mark.parametrize("indent", [None, 1, 2, 4, "\t"])
def test_json_may_be_on_one_line_or_indented(accepted, indent):
    assert accepted(json.dumps(VALUE, indent=indent))
    assert accepted(json.dumps(VALUE, separators=(",", ":")))


@pytest.mark.parametrize("text", ['{"a":  1, "b": []}', '{"a": 1, "b": [   ]}', '{"a": 1,\n\n\n"b": []}'])
def test_blanks_are_few(accepted, text):
    assert not accepted(text)


def test_an_older_library_keeps_to_one_line(accepted, monkeypatch):
    monkeypatch.setattr(grammar, "version", lambda name: "1.7.6")
    assert accepted(json.dumps(VALUE)) and accepted(json.dumps(VALUE, separators=(",", ":")))
    assert not accepted(json.dumps(VALUE, indent=1)) and not accepted('{"a":  1, "b": []}')


@pytest.mark.parametrize("text", ['{"a": "1", "b": []}', '{"b": [], "a": 1}', '{"a": 1, "b": [2]}', '{"a": 1}', "[]"])
def test_other_json_is_not_accepted(accepted, text):
    assert not accepted(text)
