"""What a request can ask for, on the embedded model: as the pt engine does it, wherever nothing is drawn at random."""

import dataclasses

import pytest
import torch

from mmtool.engine.vllm import VllmSettings, import_vllm
from mmtool.errors import MMToolError, TooLongError

QUESTION = "Tell me about the picture, please."


@pytest.fixture(scope="module")
def pair(open_pair):
    return open_pair("tiny")


@pytest.fixture(scope="module")
def engine(pair, start_vllm):
    return start_vllm(pair)


class AllowedIds:
    """A grammar of ``length`` tokens, each out of ``ids``."""

    def __init__(self, ids, length):
        self.packed = torch.zeros(40, dtype=torch.int32)
        for token_id in ids:
            self.packed[token_id // 32] |= 1 << (token_id % 32) if token_id % 32 < 31 else -(1 << 31)
        self.left = length

    @property
    def finished(self):
        return self.left == 0

    def allowed(self):
        return self.packed

    def accept(self, token_id):
        self.left -= 1


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.9},
        {"logit_bias": {300: 100.0}},
        {"logit_bias": {300: 6.0, 301: 6.0, 302: -100.0}},
        {"min_new_tokens": 20, "ignore_eos": False, "max_new_tokens": 30},
        {"ignore_eos": False, "max_new_tokens": 30},
        {"temperature": 0.0, "do_sample": True},
    ],
    ids=str,
)
def test_what_changes_the_likeliest_token(pair, engine, answers, settings):
    requests = [pair.request(["square.png", QUESTION], **settings), pair.request("Hello", **settings)]
    assert answers(engine, requests) == answers(pair.pt, requests)


def test_a_penalty_that_does_not_see_the_prompt(pair, engine, answers):
    request = pair.request(["square.png", QUESTION], repetition_penalty=3.0)
    request.penalize_prompt = False
    other = pair.request(["square.png", QUESTION], repetition_penalty=3.0)
    found = answers(engine, [request, other])
    assert found == answers(pair.pt, [request, other])
    assert found[0] != found[1]


def test_stop_texts_cut_across_token_borders(pair, engine):
    plain = engine.answer(pair.request("Hello")).text
    word = plain[3:6]
    request = pair.request("Hello", stop=(word,))
    found, expected = engine.answer(request), pair.pt.answer(request)
    assert (found.text, found.token_ids) == (expected.text, expected.token_ids)
    assert found.text == plain[: plain.index(word)].rstrip()
    assert found.finish_reason == "stop"


def test_a_grammar(pair, engine, deltas):
    ids = [200, 223, 255, 287, 301]

    def asked():
        free, bound = pair.request("Hello"), pair.request("Hello", max_new_tokens=20)
        bound.grammar = AllowedIds(ids, 7)
        return [free, bound]

    found, expected = deltas(engine, asked()), deltas(pair.pt, asked())
    for one, other in zip(found, expected, strict=True):
        assert [delta.token_ids for delta in one] == [delta.token_ids for delta in other]
        assert one[-1].finish_reason == other[-1].finish_reason
    assert {delta.token_ids[0] for delta in found[1]} <= set(ids)
    assert len(found[1]) == 7


def test_drawing_is_repeatable_whatever_runs_beside_it(pair, engine, answers):
    def drawn(seed):
        settings = {"do_sample": True, "temperature": 2.0, "top_k": 500, "min_p": 1e-5, "max_new_tokens": 30}
        return pair.request(["large.png", QUESTION], seed=seed, **settings)

    (alone,) = answers(engine, [drawn(1)])
    among = answers(engine, [drawn(2), drawn(1), drawn(None), drawn(3)])
    assert among[1] == alone
    assert among[0] != alone


def test_what_a_conversation_has_in_common_with_an_earlier_one_is_kept(pair, engine):
    long = "word " * 150
    first = engine.answer(pair.request(["wide.png", long]))
    assert first.usage.cached_tokens == 0
    assert first.usage.image_features_computed == 1
    second = engine.answer(pair.request(["wide.png", long], "And now?"))
    assert second.usage.cached_tokens >= 128
    assert second.usage.image_features_computed == 0


def test_a_cancelled_request_is_gone_and_the_others_go_on(pair, engine):
    seen = []
    long = engine.submit(pair.request("Hello", max_new_tokens=200), seen.append)
    waiting = engine.submit(pair.request("Hello", max_new_tokens=200), seen.append)
    engine.cancel(waiting)
    assert seen[-1].finish_reason == "cancelled"
    for _ in range(3):
        engine.step()
    engine.cancel(long)
    assert seen[-1].finish_reason == "cancelled"
    assert 0 < seen[-1].usage.completion_tokens <= 3
    assert not engine.busy
    assert not engine.llm.has_unfinished_requests()
    assert engine.answer(pair.request("Hello")).token_ids == pair.pt.answer(pair.request("Hello")).token_ids


def test_what_can_never_run_is_refused(pair, engine):
    request = pair.request("Hello")
    with pytest.raises(TooLongError):
        engine.check(dataclasses.replace(request, input_ids=[5] * engine.max_model_len))
    with pytest.raises(MMToolError, match="unknown adapter"):
        engine.submit(dataclasses.replace(request, adapter="none"), print)
    bad = dataclasses.replace(request, input_ids=[10**6])
    found = list(engine.generate([bad, request], errors="yield"))
    assert [delta.index for delta in found if delta.error] == [0]
    assert found[-1].finish_reason == "length"


def test_facts_of_the_engine(pair, engine):
    assert engine.max_model_len == pair.pt.max_model_len
    assert engine.max_batch_size == 4
    assert 0 < engine.kv_bytes <= 2**30
    assert import_vllm().__version__


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"more": {"no_such_thing": 1}}, "no_such_thing"),
        ({"more": {"model": "x"}}, "model is set by mmtool"),
        ({"max_model_len": 10**7}, "max_model_len"),
    ],
)
def test_settings_that_vllm_does_not_take_are_named(pair, settings, message):
    from mmtool.engine.vllm import VllmEngine

    with pytest.raises(MMToolError, match=message):
        VllmEngine(pair.spec, pair.folder, pair.template.tokenizer, VllmSettings(dtype="float32", **settings))


def test_prompts_are_as_likely_as_for_the_pt_engine(pair, engine):
    texts = ("Hello", "What is the capital of France, and of Germany? Say it in one word each.")
    requests = [dataclasses.replace(pair.request(text), prompt_logprobs=count) for count, text in enumerate(texts)]
    for _ in range(2):  # what was computed before changes nothing
        for request in requests:
            ours, theirs = (next(iter(one.generate([request]))).prompt_logprobs for one in (pair.pt, engine))
            assert [item.token_id for item in theirs] == [item.token_id for item in ours] == request.input_ids[1:]
            assert [item.logprob for item in theirs] == pytest.approx([item.logprob for item in ours], abs=1e-4)
            assert [[index for index, _ in item.top] for item in theirs] == [
                [index for index, _ in item.top] for item in ours
            ]
