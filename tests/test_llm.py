"""The Python API: the scripts of the old guides run, and every call keeps what it promises."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from transformers import GenerationConfig

from mmtool import llm
from mmtool.errors import CheckpointError, MMToolError, TooLongError
from mmtool.llm import ModelType, chat, get_model_tokenizer, get_template, inference, inference_stream, stream_chat
from mmtool.messages import Image, Message, Text
from mmtool.utils import seed_everything

GUIDE = """
from mmtool.llm import (
    get_model_tokenizer, get_template, inference, ModelType,
    get_default_template_type, inference_stream
)
from mmtool.utils import seed_everything
import torch

model_type = ModelType.tiny
template_type = get_default_template_type(model_type)
print(f'template_type: {template_type}')

model, tokenizer = get_model_tokenizer(model_type, torch.float16,
                                       model_kwargs={'device_map': 'auto'}, model_id_or_path=FOLDER)
model.generation_config.max_new_tokens = 12
template = get_template(template_type, tokenizer)
seed_everything(42)

images = [PICTURE]
query = '距离各城市多远？'
response, history = inference(model, template, query, images=images)
print(f'query: {query}')
print(f'response: {response}')

# streaming
query = '距离最远的城市是哪？'
images = IMAGES
gen = inference_stream(model, template, query, history, images=images)
print_idx = 0
print(f'query: {query}\\nresponse: ', end='')
for response, history in gen:
    delta = response[print_idx:]
    print(delta, end='', flush=True)
    print_idx = len(response)
print()
print(f'history: {history}')
"""


@pytest.fixture(scope="module")
def opened() -> tuple[Any, Any]:
    """The embedded model and its template."""
    model, tokenizer = get_model_tokenizer(ModelType.tiny, torch.float32)
    return model, get_template(None, tokenizer)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A picture file: a red square on white."""
    image = PIL.Image.new("RGB", (120, 90), "white")
    image.paste("red", (30, 20, 80, 70))
    path = tmp_path_factory.mktemp("pictures") / "square.png"
    image.save(path)
    return str(path)


def question(text: str, *pictures: object) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.mark.parametrize("images", ["images", "images * 2", "[PICTURE, None]", "[None, PICTURE]"])
@pytest.mark.parametrize("model_type", ["tiny", "yi_vl_6b_chat"])
def test_the_script_of_the_guide_runs(
    picture: str, images: str, model_type: str, golden: Callable[[str], Path]
) -> None:
    folder = None if model_type == "tiny" else golden("yi-vl") / "checkpoint"
    script = GUIDE.replace("ModelType.tiny", f"ModelType.{model_type}").replace("IMAGES", images)
    names: dict[str, Any] = {"PICTURE": picture, "FOLDER": folder}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(script, names)
    history, template_type = names["history"], names["template_type"]
    assert out.getvalue().startswith(f"template_type: {template_type}\nquery: 距离各城市多远？\nresponse: ")
    assert [question for question, _ in history] == ["距离各城市多远？", "距离最远的城市是哪？"]
    assert history[1][1] == names["response"]
    assert out.getvalue().endswith(f"response: {history[1][1]}\nhistory: {history}\n")


def test_a_stream_only_grows_and_ends_with_what_inference_returns(opened: tuple, picture: str) -> None:
    model, template = opened
    history = [("Hello", "Hi!")]
    steps = list(inference_stream(model, template, "How many?", history, images=[None, picture], max_new_tokens=12))
    for (before, _), (after, _) in itertools.pairwise(steps):
        assert after.startswith(before) and after != before
    response, updated = inference(model, template, "How many?", history, images=[None, picture], max_new_tokens=12)
    assert steps[-1] == (response, updated)
    assert updated == [["Hello", "Hi!"], ["How many?", response]]
    assert history == [("Hello", "Hi!")]


def test_an_empty_answer_is_yielded_too(opened: tuple) -> None:
    model, template = opened
    tokens = chat(model, template, question("Hi"), max_new_tokens=3).token_ids
    start = template.tokenizer.decode(tokens)[:1]  # an answer that begins with its stop word is empty
    assert start
    assert list(inference_stream(model, template, "Hi", max_new_tokens=9, stop_words=[start])) == [("", [["Hi", ""]])]


def test_old_and_new_calls_give_the_same_answer(opened: tuple, picture: str) -> None:
    model, template = opened
    settings = {"max_new_tokens": 8, "do_sample": False}
    answer = chat(
        model, template, [{"role": "system", "content": "Be brief."}, *question("What?", picture)], **settings
    )
    response, _ = inference(model, template, "What?", system="Be brief.", images=[picture], **settings)
    assert response == answer.text
    with PIL.Image.open(picture) as image:
        objects = [Message("system", (Text("Be brief."),)), Message("user", (Image(image), Text("What?")))]
        assert chat(model, template, objects, **settings).token_ids == answer.token_ids
    objects[1] = Message("user", (Image(Path(picture)), Text("What?")))
    deltas = list(stream_chat(model, template, objects, **settings))
    assert "".join(delta.text for delta in deltas) == answer.text
    assert [token for delta in deltas for token in delta.token_ids] == list(answer.token_ids)
    assert answer.finish_reason in ("stop", "length")
    assert deltas[-1].usage.completion_tokens == len(answer.token_ids)


def test_the_next_turn_computes_neither_picture_nor_history_again(opened: tuple, picture: str) -> None:
    model, template = opened
    messages = question("What colour is the square?", picture)
    first = chat(model, template, messages, max_new_tokens=8)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And where is it?"}]
    second = chat(model, template, messages, max_new_tokens=8)
    assert second.usage.image_features_computed == 0
    assert second.usage.cached_tokens >= first.usage.prompt_tokens


def test_answers_follow_the_model_when_its_weights_change(opened: tuple) -> None:
    model, template = opened
    before = chat(model, template, question("Hi"), max_new_tokens=6)
    weight = model.lm_head.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.neg_()
        changed = chat(model, template, question("Hi"), max_new_tokens=6)
        assert changed.usage.cached_tokens == 0
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert changed.token_ids != before.token_ids
    assert chat(model, template, question("Hi"), max_new_tokens=6).token_ids == before.token_ids


def test_the_generation_config_counts_as_it_is_at_the_call(opened: tuple) -> None:
    model, template = opened
    asked = question("Tell me a long story about a cat.")
    kept = model.generation_config.max_new_tokens
    try:
        for number in (2, 1):
            model.generation_config.max_new_tokens = number
            assert len(chat(model, template, asked).token_ids) <= number
    finally:
        model.generation_config.max_new_tokens = kept
    config = GenerationConfig(max_new_tokens=3)
    assert len(chat(model, template, asked, generation_config=config).token_ids) <= 3
    assert len(chat(model, template, asked, generation_config=config, max_new_tokens=1).token_ids) == 1
    response, _ = inference(model, template, "Hi", generation_config=config)
    assert response == chat(model, template, question("Hi"), generation_config=config).text


def test_seeds_repeat_answers(opened: tuple) -> None:
    model, template = opened
    settings = {"max_new_tokens": 12, "do_sample": True, "temperature": 3.0}

    def draw() -> tuple[int, ...]:
        return chat(model, template, question("Hi"), **settings).token_ids

    seed_everything(2)
    first, other = draw(), draw()
    seed_everything(2)
    assert draw() == first
    assert other != first


def test_a_stream_may_be_left(opened: tuple) -> None:
    model, template = opened
    whole = chat(model, template, question("Who are you?"), max_new_tokens=6).token_ids
    stream = inference_stream(model, template, "Who are you?", max_new_tokens=6)
    next(stream)
    stream.close()
    assert chat(model, template, question("Who are you?"), max_new_tokens=6).token_ids == whole


def test_the_type_is_found_in_the_folder(opened: tuple, tmp_path: Path) -> None:
    folder = Path(opened[0].config.name_or_path)
    model, tokenizer = get_model_tokenizer(None, model_id_or_path=folder, load_model=False)
    assert model is None
    template = get_template(None, tokenizer, default_system="Be kind.", max_length=20)
    assert (template.template_type, template.system, template.max_length) == ("tiny", "Be kind.", 20)
    assert template.tokenizer is tokenizer
    with pytest.raises(CheckpointError, match="holds a tiny model"):
        get_model_tokenizer(ModelType.yi_vl_6b_chat, model_id_or_path=folder)
    with pytest.raises(MMToolError):
        get_model_tokenizer(None, model_id_or_path=tmp_path / "nothing")


def test_dtypes_and_keywords_of_from_pretrained(opened: tuple) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model, _ = get_model_tokenizer("tiny", dtype, {"device_map": "auto", "low_cpu_mem_usage": True})
        assert model.dtype == dtype
    model, _ = get_model_tokenizer("tiny", torch.float32, {"attn_implementation": "eager"})
    assert model.config.get_text_config()._attn_implementation == "eager"


def test_unneeded_keywords_are_noted_once(opened: tuple, caplog: pytest.LogCaptureFixture) -> None:
    llm._noted.clear()
    with caplog.at_level(logging.WARNING, logger="mmtool"):
        for _ in range(2):
            get_model_tokenizer("tiny", load_model=False, trust_remote_code=True, revision=None)
    assert [record.getMessage() for record in caplog.records] == [
        "get_model_tokenizer(trust_remote_code=...) is not needed: the models are part of mmtool"
    ]


def test_mistakes_are_told(opened: tuple, picture: str) -> None:
    model, template = opened
    with pytest.raises(TypeError, match="unexpected keyword argument 'trust_remote_cod'"):
        get_model_tokenizer("tiny", trust_remote_cod=True)
    with pytest.raises(TypeError, match="'max_newtokens'"):
        inference(model, template, "Hi", max_newtokens=3)
    with pytest.raises(MMToolError, match=r"tools=\.\.\.\) is not supported"):
        inference(model, template, "Hi", tools=[{"name": "search"}])
    with pytest.raises(MMToolError, match="2 entries for 1 round"):
        inference(model, template, "Hi", images=[picture] * 2)
    with pytest.raises(MMToolError, match="unknown model_type 'yi_vl'"):
        get_model_tokenizer("yi_vl")
    with pytest.raises(MMToolError, match="unknown template_type 'yi_vl'"):
        get_template("yi_vl", template.tokenizer)
    with pytest.raises(MMToolError, match="does not come from get_model_tokenizer"):
        get_template(None, type(template.tokenizer).from_pretrained(template.tokenizer.name_or_path))
    short = get_template(None, template.tokenizer, max_length=5)
    with pytest.raises(TooLongError):
        inference(model, short, "a question of more than five tokens")


def test_a_deleted_model_is_freed(picture: str) -> None:
    model, tokenizer = get_model_tokenizer("tiny", torch.float32)
    template = get_template(None, tokenizer)
    inference(model, template, "What?", images=[picture], max_new_tokens=2)
    ref, weight = weakref.ref(model), weakref.ref(model.lm_head.weight)
    del model
    gc.collect()
    assert ref() is None
    assert weight() is None
