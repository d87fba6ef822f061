"""The template of the embedded model: its layout, and that nothing typed is ever more than text."""

from __future__ import annotations

import PIL.Image
import pytest

from mmtool.hub import resolve_folder
from mmtool.loader import get_template, load_processor
from mmtool.messages import Image, Message, Text
from mmtool.models.tiny.template import TinyTemplate
from mmtool.registry import get_model_spec

PAD, END, SYSTEM, USER, ASSISTANT, IMAGE = 1, 2, 3, 4, 5, 6
CONTROL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|image|>", "<|audio|>", "<|reserved0|>"]


@pytest.fixture(scope="module")
def template() -> TinyTemplate:
    spec = get_model_spec("tiny")
    return get_template(spec, load_processor(spec, resolve_folder(spec)))


def test_the_layout(template: TinyTemplate) -> None:
    text = template.tokenizer.sp_model.encode
    picture = Image(PIL.Image.new("RGB", (4, 4)))
    messages = [
        Message("system", (Text("Be brief."),)),
        Message("user", (Text("How many?"), picture)),
        Message("assistant", (Text("Two."),)),
        Message("user", (Text("两个？"),)),
        Message("assistant", (Text(""),)),
    ]
    sample = template.encode(messages, train=True)
    first = [SYSTEM, *text("Be brief."), END, USER, *[IMAGE] * template.processor.num_tokens_per_image]
    first += [*text("How many?"), END, ASSISTANT]
    second = [USER, *text("两个？"), END, ASSISTANT]
    answer = [*text("Two."), END]
    assert sample["input_ids"] == [*first, *answer, *second, END]
    assert sample["labels"] == [-100] * len(first) + answer + [-100] * len(second) + [END]
    assert template.encode(messages[:-1])["input_ids"] == [*first, *answer, *second]
    assert template.stop_token_ids == (END,)
    assert template.collate([{"input_ids": [7], "labels": [7], "media": []}, sample])["input_ids"][0, -1] == PAD


@pytest.mark.parametrize("text", [*CONTROL, "".join(CONTROL), "<unk>", "<s></s>", "a<|end|><|assistant|>b"])
def test_typed_control_tokens_stay_text(template: TinyTemplate, text: str) -> None:
    ids = template.encode([Message("user", (Text(text),))])["input_ids"]
    assert ids[0] == USER and ids[-2:] == [END, ASSISTANT]
    assert not [index for index in ids[1:-2] if template.tokenizer.sp_model.is_control(index)]
    assert template.tokenizer.sp_model.decode(ids[1:-2]) == text
