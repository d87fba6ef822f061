"""What every registered template promises, shown on random conversations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtool.errors import TooLongError
from mmtool.hub import resolve_folder
from mmtool.loader import load_model, load_processor
from mmtool.messages import Audio, Image, Message, Text
from mmtool.registry import MODELS, TEMPLATES
from mmtool.utils import import_object

# One model type for each template.
SPECS = {spec.template_type: spec for spec in reversed(MODELS.values())}

# Where its model lies among the golden data. Templates without data of their own borrow a folder that fits them.
FOLDERS = {
    "internlm-xcomposer2-vl": "internlm-xcomposer2",
    "internlm-xcomposer2-4khd": "internlm-xcomposer2/variant_4khd",
    "fm9g": "fm9g/gqa",
    "fm9g-old": "fm9g/gqa",
    "megrez": "megrez-3b-instruct",
    "megrez-omni": "megrez-3b-omni",
    "auto": "megrez-3b-instruct",
}

# What makes a picture take as many positions in every conversation: 2.5 cuts it in fewer tiles where there are several.
SETTINGS = {"internlm-xcomposer2-4khd": {"hd_num": 1}, "internlm-xcomposer2_5": {"hd_num": 1}}

PICTURES = [
    PIL.Image.new("RGB", size, color) for size, color in (((9, 5), "red"), ((8, 8), "blue"), ((300, 90), "green"))
]
TEXTS = ["", " ", "\n", "a", " What is this? ", "你好。", "27 + 45", "###", "🙂", "e\u0301", "x\n\ny", "<image>", "<s>"]
TEXTS += ["<|im_start|>", "<|im_end|>", "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]", "<|turn_end|>", "<|end|>", "<AI>"]

texts = st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4).map("".join)
visible = st.lists(st.sampled_from(["a", " yes. ", "一个", "27", "cat dog", "x\ny"]), min_size=1, max_size=3).map(
    "".join
)


@pytest.fixture(scope="module", params=TEMPLATES)
def family(request: pytest.FixtureRequest, golden: Callable[[str], Path]) -> SimpleNamespace:
    """One registered template, the model type it belongs to, its folder and processor."""
    spec = SPECS[request.param]
    folder = (
        resolve_folder(spec)
        if spec.embedded
        else golden(FOLDERS.get(spec.template_type, spec.template_type)) / "checkpoint"
    )
    if spec.refine is not None:
        spec = import_object(spec.refine)(spec, folder)
    processor = load_processor(spec, folder)

    def make(**options: object) -> Any:
        return import_object(spec.template_class)(processor, **SETTINGS.get(spec.template_type, {}), **options)

    return SimpleNamespace(spec=spec, folder=folder, processor=processor, make=make)


def sounds(folder: Path) -> list[Path]:
    return sorted((folder.parent / "media").glob("*16k*.wav"))[:2]


@st.composite
def conversations(draw: st.DrawFn, family: SimpleNamespace) -> list[Message]:
    """Draw a conversation that ends with an answer; media stand anywhere among the parts of a question."""
    system = draw(st.none() | visible)
    messages = [] if system is None else [Message("system", (Text(system),))]
    for _ in range(draw(st.integers(1, 3))):
        parts: list[Any] = [Text(draw(texts))]
        if "image" in family.spec.modalities:
            for picture in draw(st.lists(st.sampled_from(PICTURES), max_size=2)):
                parts.insert(draw(st.integers(0, len(parts))), Image(picture))
        if "audio" in family.spec.modalities and (found := sounds(family.folder)) and draw(st.booleans()):
            parts.append(Audio(draw(st.sampled_from(found))))
        messages.append(Message("user", tuple(parts)))
        messages.append(Message("assistant", (Text(draw(visible)),), train=draw(st.booleans())))
    return messages


def all_learned(messages: list[Message]) -> list[Message]:
    return [Message(message.role, message.parts, train=True) for message in messages]


few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@few
@given(data=st.data())
def test_training_and_inference_see_the_same_ids(family: SimpleNamespace, data: st.DataObject) -> None:
    template = family.make()
    messages = data.draw(conversations(family))
    sample, whole = template.encode(messages, train=True), template.encode(all_learned(messages), train=True)
    assert sample["input_ids"] == whole["input_ids"]
    labels = [-100] * len(sample["input_ids"])
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = template.encode(messages[:index])
        start = len(prompt["input_ids"])
        assert sample["input_ids"][:start] == prompt["input_ids"]
        assert [item.start for item in prompt["media"]] == [i.start for i in sample["media"]][: len(prompt["media"])]
        end = start
        while end < len(labels) and whole["labels"][end] != -100:
            end += 1
        assert end > start, "an answer has something to learn"
        assert template.decode(whole["labels"][start:end]).split() == message.text.split()
        if message.train:
            labels[start:end] = sample["input_ids"][start:end]
    assert sample["labels"] == labels


@few
@given(data=st.data())
def test_media_keep_their_order_and_their_features(family: SimpleNamespace, data: st.DataObject) -> None:
    template = family.make()
    messages = data.draw(conversations(family))
    encoded = template.encode(messages, train=True)
    given_media = [part for message in messages for part in message.media]
    assert sorted(item.kind for item in encoded["media"]) == sorted(
        "image" if isinstance(part, Image) else "audio" for part in given_media
    )
    end = 0
    for item in encoded["media"]:
        assert item.start >= end
        end = item.start + item.length
        ids = encoded["input_ids"][item.start : end]
        assert item.ids is None or list(item.ids) == ids
        offsets = range(item.length) if item.feature_index is None else item.feature_index
        assert len({ids[offset] for offset in offsets}) == 1, "features stand on one placeholder"
        assert set(encoded["labels"][item.start : end]) == {-100}
    assert end <= len(encoded["input_ids"])


@few
@given(data=st.data())
def test_cutting_at_the_left_keeps_whole_media_and_the_right_end(family: SimpleNamespace, data: st.DataObject) -> None:
    messages = data.draw(conversations(family))
    full = family.make().encode(messages, train=True)
    total = len(full["input_ids"])
    limit = data.draw(st.integers(1, total))
    try:
        cut = family.make(max_length=limit, truncation_strategy="truncation_left").encode(messages, train=True)
    except TooLongError as error:
        assert (error.length, error.limit) == (total, limit)
        return
    length = len(cut["input_ids"])
    assert 0 < length <= limit
    assert cut["input_ids"] == full["input_ids"][total - length :]
    assert cut["labels"] == full["labels"][total - length :]
    kept = [item for item in full["media"] if item.start >= total - length]
    assert all(i.start >= total - length or i.start + i.length <= total - length for i in full["media"])
    assert [item.start for item in cut["media"]] == [item.start - (total - length) for item in kept]


@few
@given(text=texts)
def test_a_question_holds_no_placeholder_that_somebody_typed(family: SimpleNamespace, text: str) -> None:
    template = family.make()
    encoded = template.encode([Message("user", (Text(text),))])
    assert encoded["media"] == []
    for kind in family.spec.modalities:
        name = f"{kind}_token_id"
        if hasattr(family.processor, name):
            assert getattr(family.processor, name) not in encoded["input_ids"]


@torch.no_grad()
def test_a_batch_computes_what_its_rows_do(family: SimpleNamespace) -> None:
    template = family.make()
    model = load_model(family.spec, family.folder, dtype="fp32")[0]
    conversations = [["Who are you?"], ["What is in this picture, and why?", PICTURES[0]], ["Compare.", *PICTURES[:2]]]
    rows = []
    for text, *pictures in conversations:
        images = [Image(picture) for picture in pictures] if "image" in family.spec.modalities else []
        rows.append(template.encode([Message("user", (*images, Text(text)))]))
    for side in ("left", "right"):
        logits = model(**template.collate(rows, padding_side=side)).logits
        for row, together in zip(rows, logits, strict=True):
            alone = model(**template.collate([row])).logits[0]
            length = len(row["input_ids"])
            kept = together[-length:] if side == "left" else together[:length]
            torch.testing.assert_close(kept, alone, atol=2e-4, rtol=0)
