"""What ``model.chat(...)`` of the releases have in common: a processor from the model's folder, an answer in deltas.

The prompts come from the family's template and the answers from the engine, as everywhere else. What a release calls
its arguments, and what it samples with, stands in the ``chat.py`` of its family.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmtool.messages import Message
from mmtool.utils import import_object

if TYPE_CHECKING:
    from mmtool.template.base import Template

# The processors of models that have been talked to; they go with them.
_processors: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def processor_of(model: Any, processor_class: Any) -> Any:
    """Return the processor of the folder that ``model`` was loaded from; it is read once."""
    if model not in _processors:
        _processors[model] = processor_class.from_pretrained(model.name_or_path)
    return _processors[model]


def deltas(model: Any, template: Template, messages: Sequence[Message], sampling: Mapping[str, Any]) -> Iterator[Any]:
    """Give the answer to a conversation as it comes; the joined ``text`` of the deltas is the whole of it."""
    # The engine stands above the models; the path is imported with the first answer.
    return import_object("mmtool.llm:stream_chat")(model, template, messages, **sampling)


def answer_of(model: Any, template: Template, messages: Sequence[Message], sampling: Mapping[str, Any]) -> str:
    """Return the answer to a conversation."""
    return "".join(delta.text for delta in deltas(model, template, messages, sampling))
