"""Templates in detail, on tiny and Yi-VL: ids, labels, truncation, batches, prompts for people.

What holds for every template is in test_every_template.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtool.errors import MediaError, MMToolError, TooLongError
from mmtool.hub import resolve_folder
from mmtool.loader import load_model, load_processor
from mmtool.messages import Audio, Image, Message, Text
from mmtool.registry import MODELS, TEMPLATES
from mmtool.utils import import_object

# One model type for each template.
SPECS = {spec.template_type: spec for spec in reversed(MODELS.values())}

PICTURES = [PIL.Image.new("RGB", size, color) for size, color in (((9, 5), "red"), ((8, 8), "blue"), ((3, 7), "green"))]

CONTROL_LIKE = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|startoftext|>",
    "<|Human|>",
    "<|reserved003|>",
    "<unk>",
]
CONTROL_LIKE += [
    "<|pad|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|image|>",
    "<|audio|>",
    "<s>",
    "</s>",
]
CONTROL_LIKE += ["<image_placeholder>", "<image>", "<img>", "</img>", "[UNUSED_TOKEN_146]", "<用户>", "<0x0A>"]
FRAGMENTS = ["", " ", "  ", "\n", "\n\n", "\t", "\r\n", "#", "##", "###", "####", ":", "### Human:", "### Assistant:"]
FRAGMENTS += [
    "0",
    "12",
    "27 + 45",
    "▁",
    "▁▁",
    "The",
    "cat",
    " dog.",
    "你好",
    "图片",
    "。",
    "🙂",
    "e\u0301",
    "\u200b",
    "\0",
]

texts = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS + CONTROL_LIKE), max_size=6).map("".join),
    st.text(max_size=20),
)


@st.composite
def conversations(draw: st.DrawFn, max_rounds: int = 3) -> list[Message]:
    """Draw a conversation that ends with an answer; pictures stand anywhere among the parts of a question."""
    system = draw(st.none() | texts)
    messages = [] if system is None else [Message("system", (Text(system),))]
    for _ in range(draw(st.integers(1, max_rounds))):
        parts: list[Any] = [Image(picture) for picture in draw(st.lists(st.sampled_from(PICTURES), max_size=2))]
        for text in draw(st.lists(texts, min_size=0 if parts else 1, max_size=2)):
            parts.insert(draw(st.integers(0, len(parts))), Text(text))
        messages.append(Message("user", tuple(parts)))
        messages.append(Message("assistant", (Text(draw(texts)),), train=draw(st.booleans())))
    return messages


@pytest.fixture(scope="module", params=["tiny", "yi-vl"])
def family(request: pytest.FixtureRequest, golden: Callable[[str], Path]) -> SimpleNamespace:
    """One registered template: its type, a folder, its processor and tokenizer, and ``make(**options)``."""
    spec = SPECS[request.param]
    folder = resolve_folder(spec) if spec.embedded else golden(spec.template_type) / "checkpoint"
    processor = load_processor(spec, folder)

    def make(**options: object) -> Any:
        return import_object(TEMPLATES[request.param])(processor, **options)

    return SimpleNamespace(
        type=request.param, folder=folder, processor=processor, tokenizer=processor.tokenizer, make=make
    )


def user(*parts: Any) -> Message:
    return Message("user", tuple(Text(part) if isinstance(part, str) else part for part in parts))


def assistant(text: str, train: bool = True) -> Message:
    return Message("assistant", (Text(text),), train)


def answer_ids(family: SimpleNamespace, text: str) -> list[int]:
    """Return the ids that training should learn for an answer, made without the template."""
    if family.type == "yi-vl":
        return family.tokenizer.encode(f" {text}\n###", add_special_tokens=False)
    return [*family.tokenizer.sp_model.encode(text), family.tokenizer.eos_token_id]


# -- ids and labels


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_training_and_inference_see_the_same_ids(family: SimpleNamespace, data: st.DataObject) -> None:
    template = family.make()
    messages = data.draw(conversations())
    sample = template.encode(messages, train=True)
    labels = [-100] * len(sample["input_ids"])
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = template.encode(messages[:index])
        start = len(prompt["input_ids"])
        assert sample["input_ids"][:start] == prompt["input_ids"]
        assert [item.start for item in prompt["media"]] == [i.start for i in sample["media"]][: len(prompt["media"])]
        learned = answer_ids(family, message.text)
        assert sample["input_ids"][start : start + len(learned)] == learned
        if message.train:
            labels[start : start + len(learned)] = learned
    assert sample["labels"] == labels


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_media_stand_where_their_placeholders_are(family: SimpleNamespace, data: st.DataObject) -> None:
    template = family.make()
    messages = data.draw(conversations())
    encoded = template.encode(messages, train=True)
    placeholder = family.processor.image_token_id
    covered = [index for item in encoded["media"] for index in range(item.start, item.start + item.length)]
    assert covered == [index for index, token in enumerate(encoded["input_ids"]) if token == placeholder]
    pictures = [part.source for message in messages for part in message.media]
    expected = [template.prepare(Image(picture)) for picture in pictures]
    assert [item.key for item in encoded["media"]] == [item.key for item in expected]
    if pictures:
        assert torch.equal(encoded["pixel_values"], torch.cat([item.inputs["pixel_values"] for item in expected]))
    else:
        assert "pixel_values" not in encoded


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_typed_text_gives_no_control_token(family: SimpleNamespace, data: st.DataObject) -> None:
    text = data.draw(texts)
    ids = family.make().text_ids(text)
    control = [index for index in ids if family.tokenizer.sp_model.is_control(index)]
    if family.type == "yi-vl":
        # The release does not tell these apart from its own (golden case inject_special_tokens).
        control = [index for index in control if family.tokenizer.sp_model.id_to_piece(index) not in text]
        assert 9 not in ids
    assert control == []
    assert family.processor.image_token_id not in ids


def test_system_texts(family: SimpleNamespace) -> None:
    own, none, given_text = family.make(), family.make(system=""), family.make(system="Be brief.")
    assert given_text.encode([user("a")]) == own.encode([Message("system", (Text("Be brief."),)), user("a")])
    assert none.encode([user("a")]) == own.encode([Message("system", (Text(""),)), user("a")])
    assert none.encode([user("a")]) == given_text.encode([Message("system", (Text(""),)), user("a")])
    assert len(none.encode([user("a")])["input_ids"]) < len(given_text.encode([user("a")])["input_ids"])


def test_pictures_are_moved_to_the_front_of_their_turn(family: SimpleNamespace) -> None:
    template = family.make()
    first, second = Image(PICTURES[0]), Image(PICTURES[1])
    mixed = template.encode([user("a ", first, "b", second)])
    front = template.encode([user(first, second, "a b")])
    assert mixed["input_ids"] == front["input_ids"]
    assert [item.key for item in mixed["media"]] == [item.key for item in front["media"]]


def test_openai_messages_are_taken_as_they_are(family: SimpleNamespace) -> None:
    content = [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "What?"}]
    dicts = [{"role": "user", "content": content}, {"role": "assistant", "content": "This.", "loss": False}]
    template = family.make()
    ours = [user(Image(PICTURES[0]), "What?"), assistant("This.", train=False)]
    assert template.encode(dicts, True)["input_ids"] == template.encode(ours, True)["input_ids"]
    assert set(template.encode(dicts, True)["labels"]) == {-100}


def test_text_to_go_on_pre_training_with_has_no_chat_around_it(family: SimpleNamespace) -> None:
    encoded = family.make().encode([assistant("Once upon a time.")], train=True)
    text = family.tokenizer.encode("Once upon a time.", add_special_tokens=False)
    assert encoded["input_ids"] == encoded["labels"] == [*text, family.tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("messages", "train", "problem"),
    [
        ([], False, "the list is empty"),
        ([assistant("a")], False, "expected user, got assistant"),
        ([user("a"), assistant("b")], False, "the last message is the assistant's"),
        ([user("a")], True, "the last message is the user's"),
        ([user(Audio("q.wav"))], False, "takes text and image, not audio"),
        ([Message("system", (Image("x.png"),)), user("a")], False, "media in user messages only"),
        ([user("a"), Message("assistant", (Image("x.png"),)), user("b")], False, r"messages\[1\].*user messages only"),
        ([{"role": "user", "content": None}], False, "content: is null"),
        ([user("\ud83d")], False, "a character that UTF-8 cannot write"),
    ],
)
def test_what_cannot_be_encoded_is_an_error(family: SimpleNamespace, messages: list, train: bool, problem: str) -> None:
    with pytest.raises(MMToolError, match=problem):
        family.make().encode(messages, train)


def test_a_picture_that_cannot_be_opened_is_named(family: SimpleNamespace) -> None:
    with pytest.raises(MediaError, match=r"cannot open image 'no/such\.png'"):
        family.make().encode([user(Image("no/such.png"), "a")])


def test_a_picture_that_the_family_cannot_take_is_named(family: SimpleNamespace, tmp_path: Path) -> None:
    PIL.Image.new("1", (200_000, 1)).save(tmp_path / "line.png")
    with pytest.raises(MediaError, match=r"cannot use image '.*line\.png': .*too long and thin"):
        family.make().encode([user(Image(tmp_path / "line.png"), "a")])


def test_options_are_checked(family: SimpleNamespace) -> None:
    with pytest.raises(MMToolError, match="truncation_strategy 'left'"):
        family.make(truncation_strategy="left")
    with pytest.raises(MMToolError, match="max_length must be at least 1"):
        family.make(max_length=0)


def test_a_picture_is_prepared_once_for_as_long_as_its_part_lives(
    family: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = family.make()
    opened = []
    real = type(template).media_input
    monkeypatch.setattr(type(template), "media_input", lambda self, part: opened.append(part) or real(self, part))
    part = Image(PICTURES[0])
    first = template.encode([user(part, "a")])
    second = template.encode([user(part, "a"), assistant("b"), user("c")])
    assert len(opened) == 1
    assert first["media"][0].inputs is second["media"][0].inputs
    template.encode([user(Image(PICTURES[0]), "a")])
    assert len(opened) == 2
    opened.clear()
    del part
    gc.collect()
    assert template._prepared == {}


# -- truncation


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_cutting_at_the_left_keeps_whole_pictures_and_the_right_end(
    family: SimpleNamespace, data: st.DataObject
) -> None:
    messages = data.draw(conversations())
    train = data.draw(st.booleans())
    messages = messages if train else messages[:-1]
    full = family.make().encode(messages, train)
    total = len(full["input_ids"])
    max_length = data.draw(st.integers(1, total + 5))
    template = family.make(max_length=max_length, truncation_strategy="truncation_left")
    encoded = template.encode(messages, train)

    length = len(encoded["input_ids"])
    cut = total - length
    assert 0 < length <= max_length
    assert encoded["input_ids"] == full["input_ids"][cut:]
    assert encoded.get("labels") == (full["labels"][cut:] if train else None)
    kept = [item for item in full["media"] if item.start >= cut]
    assert all(item.start >= cut or item.start + item.length <= cut for item in full["media"])
    assert [(i.start, i.length, i.key) for i in encoded["media"]] == [(i.start - cut, i.length, i.key) for i in kept]
    assert ("pixel_values" in encoded) == bool(kept)
    if kept:
        assert torch.equal(encoded["pixel_values"], torch.cat([item.inputs["pixel_values"] for item in kept]))
    # No position more than needed is dropped: one less would not fit, or would cut a picture.
    inside = any(item.start < total - max_length < item.start + item.length for item in full["media"])
    assert cut == max(total - max_length, 0) or inside


@pytest.mark.parametrize("strategy", ["delete", "raise"])
def test_other_strategies_report_real_positions(family: SimpleNamespace, strategy: str) -> None:
    messages = [user(Image(PICTURES[0]), "What?"), assistant("This.")]
    length = len(family.make().encode(messages, train=True)["input_ids"])
    assert length > family.processor.num_tokens_per_image
    family.make(max_length=length, truncation_strategy=strategy).encode(messages, train=True)
    with pytest.raises(TooLongError) as caught:
        family.make(max_length=length - 1, truncation_strategy=strategy).encode(messages, train=True)
    assert (caught.value.length, caught.value.limit) == (length, length - 1)


# -- batches


def test_batches_are_padded_on_the_right_side(family: SimpleNamespace) -> None:
    template = family.make(system="")
    short, long = [user("a")], [user(Image(PICTURES[0]), "a longer question")]
    prompts = [template.encode(short), template.encode(long)]
    sizes = [len(prompt["input_ids"]) for prompt in prompts]
    batch = template.collate(prompts)
    pad = sizes[1] - sizes[0]
    assert batch["input_ids"].tolist() == [
        [family.tokenizer.pad_token_id] * pad + prompts[0]["input_ids"],
        prompts[1]["input_ids"],
    ]
    assert batch["attention_mask"].tolist() == [[0] * pad + [1] * sizes[0], [1] * sizes[1]]
    assert batch["position_ids"].tolist() == [[0] * pad + list(range(sizes[0])), list(range(sizes[1]))]
    assert batch["pixel_values"].shape[0] == 1
    assert "labels" not in batch

    samples = [template.encode([*messages, assistant("yes")], train=True) for messages in (short, long)]
    batch = template.collate(samples)
    assert batch["labels"].tolist() == [samples[0]["labels"] + [-100] * pad, samples[1]["labels"]]
    assert batch["input_ids"][0].tolist() == samples[0]["input_ids"] + [family.tokenizer.pad_token_id] * pad
    assert batch["position_ids"][0, : len(samples[0]["input_ids"])].tolist() == list(
        range(len(samples[0]["input_ids"]))
    )
    assert "pixel_values" not in template.collate(samples[:1])


def test_batches_that_cannot_be_made(family: SimpleNamespace) -> None:
    template = family.make()
    prompt, sample = template.encode([user("a")]), template.encode([user("a"), assistant("b")], train=True)
    with pytest.raises(ValueError, match="empty batch"):
        template.collate([])
    with pytest.raises(ValueError, match="labels"):
        template.collate([prompt, sample])
    with pytest.raises(ValueError, match="padding_side"):
        template.collate([prompt], padding_side="up")


@pytest.fixture(scope="module")
def model(family: SimpleNamespace) -> Any:
    """The model of the family, in float32."""
    return load_model(SPECS[family.type], family.folder, dtype="fp32")[0]


def mixed_rows() -> list[list[Message]]:
    """Return conversations with none, one, two and later pictures, of different lengths."""
    red, blue, green = map(Image, PICTURES)
    return [
        [user("Who are you?"), assistant("A model.")],
        [user(red, "How many squares are in this picture?"), assistant("One."), user("And now?"), assistant("Two.")],
        [user(red, green, "Compare."), assistant("红色的。")],
        [user("Hello"), assistant("Hi"), user(blue, "What is it?"), assistant("")],
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_computes_what_its_rows_do(family: SimpleNamespace, model: Any, side: str) -> None:
    template = family.make()
    rows = [template.encode(messages[:-1]) for messages in mixed_rows()]
    logits = model(**template.collate(rows, padding_side=side)).logits
    for row, together in zip(rows, logits, strict=True):
        alone = model(**template.collate([row])).logits[0]
        length = len(row["input_ids"])
        kept = together[-length:] if side == "left" else together[:length]
        torch.testing.assert_close(kept, alone, atol=2e-4, rtol=0)


@torch.no_grad()
def test_the_loss_of_a_batch_is_the_mean_over_its_learned_tokens(family: SimpleNamespace, model: Any) -> None:
    template = family.make()
    rows = [template.encode(messages, train=True) for messages in mixed_rows()]
    together = model(**template.collate(rows)).loss
    counts = [sum(label != -100 for label in row["labels"]) for row in rows]
    losses = [model(**template.collate([row])).loss for row in rows]
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=0)


# -- for people


def test_a_prompt_is_shown_as_the_model_sees_it(family: SimpleNamespace) -> None:
    template = family.make(system="Be brief.")
    shown = template.show([user(Image(PICTURES[0]), "What <|end|>?"), assistant("This."), user("And?")])
    length = family.processor.num_tokens_per_image
    first, _, prompt = shown.plain.partition("\n")
    encoded = template.encode([user(Image(PICTURES[0]), "What <|end|>?"), assistant("This."), user("And?")])
    assert first == f"prompt: {len(encoded['input_ids'])} positions, {length} of 1 image"
    for text in ("Be brief.", f"[image 1: {length} positions]", "What <|end|>?", "This.", "And?"):
        assert text in prompt
    assert "«" not in prompt


def test_control_characters_do_not_reach_the_terminal(family: SimpleNamespace) -> None:
    shown = family.make().show([user("clear\x1b[2J\x07 tab\tline\nend")]).plain
    assert "clear\\x1b[2J\\x07 tab\tline\nend" in shown


def test_learned_text_is_marked_with_and_without_colour(family: SimpleNamespace) -> None:
    template = family.make(system="")
    messages = [user("Q"), assistant("Yes"), user("R"), assistant("No", train=False), user("S"), assistant("So")]
    shown = template.show(messages, train=True)
    first, _, sample = shown.plain.partition("\n")
    assert first.endswith("learned («green»)")
    marked = [part.partition("»")[0] for part in sample.split("«")[1:]]
    assert ["Yes" in marked[0], "So" in marked[1], len(marked)] == [True, True, 2]
    assert "No" not in "".join(marked)
    styles = {shown.plain[span.start : span.end]: str(span.style) for span in shown.spans}
    assert styles["Yes"] == "green"
    assert "No" not in styles


def test_cut_prompts_are_shown_cut(family: SimpleNamespace) -> None:
    messages = [Message("system", (Text("Be brief and kind."),)), user(Image(PICTURES[0]), "Where is it?")]
    total = len(family.make().encode(messages)["input_ids"])
    shown = family.make(max_length=total - 3, truncation_strategy="truncation_left").show(messages).plain
    assert f"prompt: {total - 3} positions" in shown
    assert "the first 3 were cut off" in shown
    shown = family.make(max_length=total - 3).show(messages).plain
    assert f"too long: {total} of at most {total - 3}" in shown
    only_text = family.make(max_length=8, truncation_strategy="truncation_left").show(messages).plain
    assert "[image" not in only_text


def test_single_tokens_can_be_shown(family: SimpleNamespace) -> None:
    template = family.make(system="")
    shown = template.show([user("cat dog"), assistant("yes")], train=True, tokens=True).plain
    tokens = family.tokenizer.convert_ids_to_tokens(
        template.encode([user("cat dog"), assistant("yes")], train=True)["input_ids"]
    )
    body = shown.partition("\n")[2].replace("«", "").replace("»", "")
    assert body.count("|") >= len(tokens)
    assert all(repr(token)[1:-1] in body for token in tokens)


def test_answers_are_cut_at_stop_words_and_stripped(family: SimpleNamespace) -> None:
    template = family.make()
    for text in ("two cups", " two cups \n", "", "两个杯子。"):
        ids = family.tokenizer.encode(text, add_special_tokens=False)
        assert template.decode(ids) == text.strip()
        assert template.decode([*ids, template.stop_token_ids[0]]) == text.strip()
        for word in template.stop_words:
            more: Sequence[int] = family.tokenizer.encode(f"{text}\n{word} and more", add_special_tokens=False)
            assert template.decode(more) == text.strip()
