"""Calls of tools are found in an answer while it comes, however it is cut into pieces."""

import json

import pytest

from mmtool.template.tools import CallReader, JsonCalls, PythonCalls

HERMES = JsonCalls("<tool_call>\n", "\n</tool_call>")
LLAMA = JsonCalls("", "", arguments_key="parameters")
MISTRAL = JsonCalls("[TOOL_CALLS]", "", special=True, listed=True)
PYTHON = PythonCalls("<|tool_call_start|>", "<|tool_call_end|>")
NAMES = ("weather", "time")


def read(format, text, size):
    reader = CallReader(format, NAMES)
    shown, calls = "", []
    for start in range(0, len(text), size):
        more, found = reader.push(text[start : start + size])
        shown, calls = shown + more, calls + found
    more, found = reader.flush()
    return shown + more, [(call.name, dict(call.arguments)) for call in calls + found]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("format", "text", "shown", "calls"),
    [
        (HERMES, "Just text, 2 < 3.", "Just text, 2 < 3.", []),
        (HERMES, '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>', "", [("time", {})]),
        (HERMES, '<tool_call>{"name": "time"}</tool_call>', "", [("time", {})]),
        (
            HERMES,
            'Let me see.<tool_call>\n{"name": "weather", "arguments": {"city": "Xi\'an </x>"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "time", "arguments": {"zone": 8}}\n</tool_call>',
            "Let me see.",
            [("weather", {"city": "Xi'an </x>"}), ("time", {"zone": 8})],
        ),
        (HERMES, '<tool_call>\n{"name": "time", "arguments": {}}', "", [("time", {})]),  # cut before its end mark
        (HERMES, "<tool_call>\n{broken\n</tool_call>", "<tool_call>\n{broken\n</tool_call>", []),
        (HERMES, '<tool_call>{"name": "rm"}</tool_call>', '<tool_call>{"name": "rm"}</tool_call>', []),
        (HERMES, "a <tool_call", "a <tool_call", []),
        (LLAMA, '{"name": "time", "parameters": {"zone": 1}}', "", [("time", {"zone": 1})]),
        (LLAMA, '{"answer": 5}', '{"answer": 5}', []),
        (LLAMA, 'It is {"name": "time"}', 'It is {"name": "time"}', []),
        (
            MISTRAL,
            '[TOOL_CALLS][{"name": "time", "arguments": {}}, {"name": "weather", "arguments": {"city": "B"}}]',
            "",
            [("time", {}), ("weather", {"city": "B"})],
        ),
        (
            PYTHON,
            "<|tool_call_start|>\n```python\nweather(city='B', days=[1])\ntime()\n```\n<|tool_call_end|>\nOne moment.",
            "One moment.",
            [("weather", {"city": "B", "days": [1]}), ("time", {})],
        ),
        (
            PythonCalls("<|tool_call_start|>[", "]<|tool_call_end|>", special=True),
            "<|tool_call_start|>[weather(city='[B]'), time()]<|tool_call_end|>",
            "",
            [("weather", {"city": "[B]"}), ("time", {})],
        ),
        (
            PYTHON,
            "<|tool_call_start|>\n```python\nweather(city=open('/etc/passwd'))\n```\n<|tool_call_end|>",
            "<|tool_call_start|>\n```python\nweather(city=open('/etc/passwd'))\n```\n<|tool_call_end|>",
            [],
        ),
    ],
)
def test_text_and_calls_are_told_apart(format, text, shown, calls, size):
    assert read(format, text, size) == (shown, calls)


def test_text_is_not_held_back_longer_than_needed():
    reader = CallReader(HERMES, NAMES)
    assert reader.push("Hello <")[0] == "Hello "
    assert reader.push("b>")[0] == "<b>"
    assert CallReader(LLAMA, NAMES).push("Hello")[0] == "Hello"


def test_a_forced_call_has_a_grammar_that_a_json_schema_makes():
    schema = {"type": "object", "properties": {"zone": {"type": "integer"}}}
    start, call = HERMES.grammar({"time": schema}, {"<tool_call>": 7, "</tool_call>": 8}).splitlines()
    assert start == r'start: <[7]> "\n" call "\n" <[8]>'
    assert json.loads(call.partition("%json ")[2])["anyOf"]
    assert LLAMA.grammar({"time": schema}, {}).startswith("start: call\n")
