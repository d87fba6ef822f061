"""How a chat template writes calls of tools is read off what it writes for one."""

import json

import jinja2
import pytest

from mmtool.errors import MMToolError
from mmtool.models.generic.tools import find_call_format
from mmtool.template.tools import JsonCalls, PythonCalls

HEAD = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
TAIL = "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
CALL = "{% for c in m.tool_calls or [] %}CALL{% endfor %}"
JSON = '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}'
SPECIAL = ("<|end|>", "[TOOL_CALLS]", "<|tool_call_start|>", "<|tool_call_end|>")


def renderer(call, head=HEAD):
    environment = jinja2.Environment()
    environment.filters["tojson"] = json.dumps
    template = environment.from_string(head + CALL.replace("CALL", call) + TAIL)

    def render(messages, add_generation_prompt, tools=None):
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt, tools=tools)

    return render


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            "<tool_call>\n" + JSON + "}\n</tool_call>",
            JsonCalls("<tool_call>\n", "\n</tool_call>"),
        ),
        (
            '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}',
            JsonCalls("", "", arguments_key="parameters"),
        ),
        (
            "[TOOL_CALLS][" + JSON + ', "id": "1"}]',
            JsonCalls("[TOOL_CALLS]", "", special=True, listed=True),
        ),
        (
            "<|tool_call_start|>[{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}='{{ v }}'"
            "{% endfor %})]<|tool_call_end|>",
            PythonCalls("<|tool_call_start|>[", "]<|tool_call_end|>", special=True),
        ),
    ],
)
def test_the_format_of_calls(call, expected):
    assert find_call_format(renderer(call), "<|end|>", SPECIAL, as_parts=False) == expected


@pytest.mark.parametrize(
    ("call", "head", "said"),
    [
        ("", HEAD, "not known"),
        ("{{ c.function.name }} please", HEAD, "not known"),
        ("x", HEAD.replace("{{ t | tojson }}", ""), "does not show tools"),
        ("{{ c.function.nothing.at_all }}", HEAD, "does not take calls"),
    ],
)
def test_a_template_without_a_format_says_so(call, head, said):
    with pytest.raises(MMToolError, match=said):
        find_call_format(renderer(call, head), "<|end|>", SPECIAL, as_parts=False)
