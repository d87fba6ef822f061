"""Both engines against ``generate`` on the processor's own inputs, for models of many kinds."""

import dataclasses

import pytest
import torch

from mmtool.engine.base import Sampling, request_from
from mmtool.engine.create import create_engine
from mmtool.engine.generic import GenericEngine
from mmtool.engine.pt import PtEngine
from mmtool.messages import Message, Text

ENGINES = {
    "qwen2_vl": PtEngine, "qwen2_5_vl": PtEngine, "llava_onevision": PtEngine, "idefics3": PtEngine,
    "internvl": PtEngine, "llama": PtEngine, "qwen3": PtEngine,
    "qwen3_vl": GenericEngine, "gemma3": GenericEngine, "qwen2_audio": GenericEngine, "gemma2": GenericEngine,
    "cohere": GenericEngine, "mamba": GenericEngine,
}  # fmt: skip
WITH_MEDIA = ["qwen2_vl", "llava_onevision", "idefics3", "internvl", "qwen3_vl", "gemma3", "qwen2_audio"]
LENGTH = 6


def answers(engine, requests):
    ids = {}
    for delta in engine.generate(requests):
        ids[delta.index] = ids.get(delta.index, ()) + delta.token_ids
    return [ids[index] for index in sorted(ids)]


@pytest.mark.parametrize("name", ENGINES)
def test_greedy_answers_are_those_of_generate_alone_and_in_a_batch(opened, conversations, name):
    known = opened(name)
    chats = list(conversations(known).values())
    wanted = [known.generated(messages, LENGTH) for messages in chats]
    requests = [request_from(known.template, messages, Sampling(max_new_tokens=LENGTH)) for messages in chats]
    for max_batch_size in (1, 3):
        engine = create_engine(known.model, known.processor, max_batch_size=max_batch_size)
        assert type(engine) is ENGINES[name]
        assert answers(engine, requests) == wanted


@pytest.mark.parametrize("name", WITH_MEDIA)
def test_second_round_runs_no_tower_and_computes_only_what_is_new(opened, name):
    known = opened(name)
    engine = create_engine(known.model, known.processor)
    question = Message("user", (known.media(1), Text("what?")))
    first = engine.answer(request_from(known.template, [question], Sampling(max_new_tokens=LENGTH)))
    assert (engine.stats.vision_runs, first.usage.image_features_computed) == (1, 1)
    answer, again = Message("assistant", (Text("a circle"),)), Message("user", (Text("and this?"),))
    request = request_from(known.template, [question, answer, again], Sampling(max_new_tokens=LENGTH))
    second = engine.answer(request)
    assert (engine.stats.vision_runs, second.usage.image_features_computed) == (1, 0)
    assert second.usage.cached_tokens >= first.usage.prompt_tokens
    fresh = create_engine(known.model, known.processor).answer(request)
    assert second.token_ids == fresh.token_ids
    assert fresh.usage.cached_tokens == 0


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "gemma3"])
def test_features_outlive_the_conversation(opened, name):
    known = opened(name)
    engine = create_engine(known.model, known.processor)
    request = request_from(known.template, [Message("user", (known.media(1), Text("what?")))])
    request = dataclasses.replace(request, sampling=Sampling(max_new_tokens=LENGTH))
    first = engine.answer(request)
    engine.clear()
    again = engine.answer(request)
    assert again.token_ids == first.token_ids
    assert again.usage.image_features_computed == again.usage.cached_tokens == 0
    assert engine.stats.vision_runs == 1


def test_a_cache_that_cannot_be_cut_back_is_not_used_again(opened):
    known = opened("mamba")
    engine = create_engine(known.model, known.processor)
    request = request_from(known.template, [Message("user", (Text("Hi there"),))], Sampling(max_new_tokens=LENGTH))
    assert engine.answer(request).token_ids == engine.answer(request).token_ids
    assert engine.stats.cached_tokens == 0


def test_what_goes_wrong_in_one_request_leaves_the_others_alone(opened):
    known = opened("gemma3")
    engine = create_engine(known.model, known.processor, max_batch_size=2)
    good = request_from(known.template, [Message("user", (Text("Hi"),))], Sampling(max_new_tokens=LENGTH))
    bad = request_from(known.template, [Message("user", (known.media(1), Text("Hi")))], Sampling(max_new_tokens=LENGTH))
    medium = bad.media[0]
    broken = dataclasses.replace(medium, inputs={"pixel_values": torch.zeros(1, 2, 20, 20)}, key="0" * 32)
    deltas = list(engine.generate([dataclasses.replace(bad, media=[broken]), good], errors="yield"))
    assert [delta.index for delta in deltas if delta.error is not None] == [0]
    assert len([delta for delta in deltas if delta.index == 1]) == LENGTH
    assert engine.answer(bad).usage.image_features_computed == 1


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3"])
def test_streaming_stop_words_and_repetition_penalty(opened, name):
    known = opened(name)
    messages = [Message("user", (Text("What is this? Hi"),))]
    engine = create_engine(known.model, known.processor)
    request = request_from(known.template, messages, Sampling(max_new_tokens=12, repetition_penalty=1.3))
    inputs = known.native(messages)
    out = known.model.generate(**inputs, do_sample=False, max_new_tokens=12, pad_token_id=0, repetition_penalty=1.3)
    answer = engine.answer(request)
    assert answer.token_ids == tuple(out[0, inputs["input_ids"].shape[1] :].tolist())
    plain = engine.answer(dataclasses.replace(request, strip=False))
    if len(plain.text) > 3:
        cut = engine.answer(dataclasses.replace(request, strip=False, stop_words=(plain.text[2:4],)))
        assert (cut.text, cut.finish_reason) == (plain.text[: plain.text.find(plain.text[2:4])], "stop")
