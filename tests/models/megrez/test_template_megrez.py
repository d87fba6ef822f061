"""Prompts of the Megrez models: the original's, character by character, and what nobody can type into them."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mmtool.errors import MMToolError, TooLongError
from mmtool.messages import Audio, Image, Message, Text
from mmtool.models.megrez.processing_megrez import MegrezOProcessor
from mmtool.models.megrez.template import MegrezOmniTemplate, MegrezTemplate

Read = Callable[[Path], list[list[dict]]]


@pytest.mark.golden_cases("megrez-3b-omni")
def test_prompts_of_the_original(case_dir: Path, expected: dict, template: MegrezOmniTemplate, read_case: Read) -> None:
    if case_dir.name == "special_token_injection":
        pytest.skip("see the test of typed tokens")
    texts, ids, labels = (
        value if "lengths" in expected else [value]
        for value in (expected["prompt_text"], expected["input_ids"], expected.get("labels"))
    )
    for row, messages in enumerate(read_case(case_dir)):
        encoded = template.encode(messages, train="labels" in expected)
        length = len(encoded["input_ids"])
        assert encoded["input_ids"] == ids[row][:length]
        assert template.tokenizer.decode(encoded["input_ids"]) == texts[row]
        assert encoded.get("labels") == (labels[row][:length] if labels[0] is not None else None)
        media = encoded["media"]
        places = [item.start + offset for item in media for offset in item.feature_index]
        assert [encoded["input_ids"][place] for place in places] == [template.processor.token_ids["feature"]] * len(
            places
        )
        if "audio_bounds" in expected:
            bounds = [[item.start, item.start + item.length - 1] for item in media if item.kind == "audio"]
            assert bounds == expected["audio_bounds"]
        if "image_bounds" in expected:
            spans = [place for first, end in expected["image_bounds"] for place in range(first, end)]
            images = [item for item in media if item.kind == "image"]
            assert [item.start + offset for item in images for offset in item.feature_index] == spans


@pytest.mark.golden_cases("megrez-3b-instruct")
def test_prompts_of_the_text_model(
    case_dir: Path, expected: dict, text_template: MegrezTemplate, read_case: Read
) -> None:
    if case_dir.name == "injection":
        pytest.skip("see the test of typed tokens")
    rows = [text_template.encode(messages, train="labels" in expected) for messages in read_case(case_dir)]
    batch = text_template.collate(rows)
    assert batch["input_ids"].tolist() in (expected["input_ids"], [expected["input_ids"]])
    if "attention_mask" in expected:
        assert batch["attention_mask"].tolist() == expected["attention_mask"]
    if "labels" in expected:
        assert batch["labels"].tolist() == [expected["labels"]]


@pytest.mark.parametrize("family", ["omni", "instruct"])
def test_typed_tokens_stay_text(
    family: str,
    omni: Path,
    instruct: Path,
    template: MegrezOmniTemplate,
    text_template: MegrezTemplate,
    read_case: Read,
) -> None:
    case_dir = {"omni": omni / "cases" / "special_token_injection", "instruct": instruct / "cases" / "injection"}[
        family
    ]
    chosen = {"omni": template, "instruct": text_template}[family]
    expected = json.loads((case_dir / "expected.json").read_text("utf-8"))
    (messages,) = read_case(case_dir)
    ids = chosen.encode(messages)["input_ids"]
    assert ids != expected["input_ids"], "the original makes tokens of them"
    assert chosen.tokenizer.decode(ids) == expected["prompt_text"], "the same text is there"
    special = {index for index, token in chosen.tokenizer.added_tokens_decoder.items() if token.special}
    plain = chosen.encode([{"role": "user", "content": "hello"}])["input_ids"]
    assert [index for index in ids if index in special] == [index for index in plain if index in special]
    # The raw behaviour is one call away.
    assert chosen.tokenizer.encode(expected["prompt_text"], add_special_tokens=False) == expected["input_ids"]


def test_every_added_token_that_is_typed_stays_text(template: MegrezOmniTemplate) -> None:
    everything = "".join(token.content for token in template.tokenizer.added_tokens_decoder.values())
    assert len(template.tokenizer.added_tokens_decoder) == 28
    for role in ("user", "assistant"):
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        plain = template.encode(messages, train=True)["input_ids"]
        messages[role == "assistant"]["content"] = everything
        ids = template.encode(messages, train=True)["input_ids"]
        assert [i for i in ids if i >= 992] == [i for i in plain if i >= 992]


def test_pictures_come_before_sounds_before_text_and_sounds_are_counted(
    omni: Path, template: MegrezOmniTemplate
) -> None:
    picture, sound = Image(omni / "media" / "tiny_40x30.png"), Audio(omni / "media" / "short_50ms_16k.wav")
    messages = [
        Message("user", (Text("x"), sound, picture, Text("y"), sound)),
        Message("assistant", (Text("z"),)),
        Message("user", (sound, Text("w"))),
    ]
    pieces = "".join(piece.text or f"[{type(piece.media).__name__}]" for piece in template.render(messages))
    assert pieces.endswith(
        "user<|role_end|>[Image]\nAudio 1: [Audio]\nAudio 2: [Audio]\nxy<|turn_end|>"
        "<|role_start|>assistant<|role_end|>z<|turn_end|>"
        "<|role_start|>user<|role_end|>Audio 3: [Audio]\nw<|turn_end|><|role_start|>assistant<|role_end|>"
    )


def test_the_published_speed_test_has_the_published_number_of_tokens(
    omni: Path, template: MegrezOmniTemplate, read_case: Read
) -> None:
    encoded = template.encode(read_case(omni / "cases" / "tall_image_bench")[0])
    (item,) = encoded["media"]
    assert (item.num_features, item.length) == (448, 448 + 14 + 2)
    assert len(encoded["patch_info"]) == 22 * 46 + 6 * 27 * 37


def test_the_default_system_text_is_that_of_the_folder(
    release: Path, edit: Callable[..., None], template: MegrezOmniTemplate, caplog: pytest.LogCaptureFixture
) -> None:
    config = release / "tokenizer_config.json"
    stored = json.loads(config.read_text("utf-8"))["chat_template"]
    default = "你是Megrez-3B-Instruct，将针对用户的问题给出详细的、积极的回答。"
    assert template.system == default
    edit(config, chat_template=stored.replace(default, "你是Omni。"))
    assert MegrezOmniTemplate(MegrezOProcessor.from_pretrained(release)).system == "你是Omni。"
    edit(config, chat_template=None)
    assert MegrezOmniTemplate(MegrezOProcessor.from_pretrained(release)).system == default
    edit(config, chat_template="{{ messages[0]['content'] }}")
    with caplog.at_level(logging.WARNING):
        assert MegrezOmniTemplate(MegrezOProcessor.from_pretrained(release)).system == default
    assert "chat template is not that of Megrez" in caplog.text
    assert MegrezOmniTemplate(template.processor, system="Hi.").system == "Hi."


def test_answers_end_at_either_token_and_are_not_stripped(template: MegrezOmniTemplate) -> None:
    assert template.stop_token_ids == (997, 992)
    assert template.decode(template.tokenizer.encode(" a\n")) == " a\n"


def test_sounds_over_thirty_seconds_are_cut_with_a_warning(
    tmp_path: Path, template: MegrezOmniTemplate, caplog: pytest.LogCaptureFixture
) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 31 * 16000).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", noise, 16000, subtype="PCM_16")
    soundfile.write(tmp_path / "whole.wav", noise[: 30 * 16000], 16000, subtype="PCM_16")
    with caplog.at_level(logging.WARNING):
        whole = template.media_input(Audio(tmp_path / "whole.wav"))
        assert not caplog.text
        long = template.media_input(Audio(tmp_path / "long.wav"))
    assert "long.wav' lasts 31.0 seconds; the model hears the first 30" in caplog.text
    assert long.key == whole.key
    assert long.num_features == 752


def test_a_sound_of_no_position_is_heard_but_not_learned_from(tmp_path: Path, template: MegrezOmniTemplate) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(300, 0.1), 16000)
    question = Message("user", (Audio(tmp_path / "a.wav"), Text("b")))
    (item,) = template.encode([question])["media"]
    assert (item.length, item.feature_index) == (4, (1, 2))
    with pytest.raises(MMToolError, match="shorter than 30 milliseconds"):
        template.encode([question, Message("assistant", (Text("c"),))], train=True)


def test_media_beside_a_longer_sound_get_another_key_and_nothing_else_does(
    omni: Path, template: MegrezOmniTemplate
) -> None:
    short, long = (Audio(omni / "media" / name) for name in ("short_50ms_16k.wav", "speech_16k_mono.wav"))
    picture = Image(omni / "media" / "tiny_40x30.png")
    alone = {part: template.encode([Message("user", (part,))])["media"][0] for part in (short, long, picture)}
    both = template.encode([Message("user", (short, picture, long))])["media"]
    assert [item.key == alone[part].key for item, part in zip(both, (picture, short, long), strict=True)] == [
        True,
        False,
        True,
    ]
    assert [item.length for item in both] == [alone[part].length for part in (picture, short, long)]
    twice = template.encode([Message("user", (short, short))])["media"]
    assert {item.key for item in twice} == {alone[short].key}
    assert torch.equal(alone[short].inputs["input_features"], both[1].inputs["input_features"])


def test_a_conversation_is_never_cut_inside_a_medium(omni: Path, processor: MegrezOProcessor) -> None:
    picture = Image(omni / "media" / "square_448.png")
    messages = [Message("user", (picture, Text("what is this?")))]
    whole = MegrezOmniTemplate(processor).encode(messages)["input_ids"]
    cut = MegrezOmniTemplate(processor, max_length=60, truncation_strategy="truncation_left").encode(messages)
    assert cut["media"] == []
    assert "pixel_values" not in cut
    assert whole[-len(cut["input_ids"]) :] == cut["input_ids"]
    with pytest.raises(TooLongError):
        MegrezOmniTemplate(processor, max_length=60).encode(messages)


def test_media_belong_to_users_and_the_text_model_takes_none(
    template: MegrezOmniTemplate, text_template: MegrezTemplate
) -> None:
    sound = Message("user", (Audio("a.wav"),))
    with pytest.raises(MMToolError, match="megrez takes text, not audio"):
        text_template.encode([sound])
    with pytest.raises(MMToolError, match="in user messages only"):
        template.encode([Message("user", (Text("a"),)), Message("assistant", (Image("a.png"),)), sound])
