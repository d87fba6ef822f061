"""How likely a prompt is: the numbers of the model's own forward, whatever else runs, was seen, or fails."""

import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM

from mmtool.engine.generic import GenericEngine
from mmtool.errors import MMToolError


def expected(small, request):
    """Log-probabilities of all following tokens, ``(prompt - 1, vocabulary)``, by the model's ``forward``."""
    with torch.no_grad():
        logits = small.model(input_ids=torch.tensor([request.input_ids])).logits[0]
    return logits.float().log_softmax(-1)[:-1]


def check(small, request, deltas):
    """The first delta has them all, and the others none."""
    first, *others = deltas
    assert not any(delta.prompt_logprobs for delta in others)
    chances = expected(small, request)
    following = request.input_ids[1:]
    assert [item.token_id for item in first.prompt_logprobs] == following
    found = torch.tensor([item.logprob for item in first.prompt_logprobs])
    torch.testing.assert_close(found, chances[range(len(following)), following], rtol=0, atol=2e-4)
    for item, row in zip(first.prompt_logprobs, chances, strict=True):
        values, ids = row.topk(request.prompt_logprobs)
        assert [index for index, _ in item.top] == ids.tolist()
        torch.testing.assert_close(torch.tensor([value for _, value in item.top]), values, rtol=0, atol=2e-4)
    assert sum((delta.token_ids for delta in deltas), ()) == small.generated(request)


@pytest.mark.parametrize("length", [1, 2, 64, 65, 66, 150])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk": 16}, {"max_batch_size": 4, "prompts_beside": True}])
def test_they_are_those_of_the_model(small, length, options):
    engine = small.engine(**options)
    request = small.request(small.ids(length, length), max_new_tokens=4, prompt_logprobs=3)
    check(small, request, list(engine.generate([request])))


def test_they_do_not_depend_on_what_runs_beside_or_was_seen_before(small):
    engine = small.engine(max_batch_size=4, prefill_chunk=32)
    common = small.ids(1, 40)
    requests = [small.request(common, small.ids(seed, 9 * seed), max_new_tokens=6) for seed in range(2, 6)]
    for number in (1, 3):
        requests[number] = dataclasses.replace(requests[number], prompt_logprobs=number - 1)
    for _ in range(2):
        own = [[] for _ in requests]
        for delta in engine.generate(requests):
            own[delta.index].append(delta)
        for request, deltas in zip(requests, own, strict=True):
            if request.prompt_logprobs is None:
                assert not any(delta.prompt_logprobs for delta in deltas)
                assert sum((delta.token_ids for delta in deltas), ()) == small.generated(request)
            else:
                check(small, request, deltas)
                assert deltas[-1].usage.cached_tokens == 0
    assert engine.answer(requests[0]).usage.cached_tokens > 40  # what was scored can be gone on from


def test_a_part_that_is_computed_again_counts_once(small, monkeypatch):
    engine = small.engine(prefill_chunk=50)
    score, failed = engine._score_prompt, []

    def failing(run, states, start):
        score(run, states, start)
        if start == 50 and not failed:
            failed.append(start)
            raise torch.OutOfMemoryError("once")

    monkeypatch.setattr(engine, "_score_prompt", failing)
    monkeypatch.setattr("mmtool.engine.pt.PREFILL_ALONE", 50)  # else, with nobody waiting, it is one part
    request = small.request(small.ids(1, 120), max_new_tokens=3, prompt_logprobs=1)
    check(small, request, list(engine.generate([request])))
    assert failed


def test_the_engine_for_any_model_gives_the_same(small):
    model = small.network()
    torch.manual_seed(4)
    network = LlamaForCausalLM(model.config.text_config).eval()
    requests = [small.request(small.ids(seed, 5 + 60 * seed), prompt_logprobs=2) for seed in range(3)]
    requests += [small.request(requests[-1].input_ids, prompt_logprobs=0)]
    found = []
    for engine in (small.engine(network), GenericEngine(network, small.tokenizer, max_batch_size=2)):
        found.append([next(iter(engine.generate([request]))).prompt_logprobs for request in requests])
    for request, ours, theirs in zip(requests, *found, strict=True):
        assert len(ours) == len(theirs) == len(request.input_ids) - 1
        for one, other in zip(ours, theirs, strict=True):
            assert one.token_id == other.token_id
            assert [index for index, _ in one.top] == [index for index, _ in other.top]
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_what_cannot_be_told_is_refused(small, monkeypatch):
    with pytest.raises(MMToolError, match="prompts with media"):
        small.engine().answer(small.request(small.picture(1), small.ids(1, 3), prompt_logprobs=0))
    for count in (-1, 21):
        with pytest.raises(MMToolError, match=f"from 0 to 20, got {count}"):
            small.engine().answer(small.request(small.ids(1, 3), prompt_logprobs=count))
    engine = GenericEngine(LlamaForCausalLM(small.model.config.text_config).eval(), small.tokenizer)
    monkeypatch.setattr("mmtool.engine.generic.SCORED_BYTES", 9 * 4 * small.vocabulary)
    assert engine.answer(small.request(small.ids(1, 9), prompt_logprobs=0)).token_ids
    with pytest.raises(MMToolError, match="10 positions, the most is 9"):
        engine.answer(small.request(small.ids(1, 10), prompt_logprobs=0))
