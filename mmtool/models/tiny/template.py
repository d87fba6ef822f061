"""The chat format of the embedded model: every role is a control token, and nothing that is typed becomes one."""

from __future__ import annotations

from mmtool.template.base import Template
from mmtool.template.formats import ChatFormat


class TinyTemplate(Template):
    """Prompts of the tiny model; it has no default system text, and pictures stand in front of a question."""

    template_type = "tiny"
    chat_format = ChatFormat(
        system=("<|system|>", "<|end|>"),
        user=("<|user|>", "<|end|>"),
        assistant="<|assistant|>",
        answer=("", "<|end|>"),
        control=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    )
