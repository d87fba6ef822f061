"""The engine for any model takes the same requests as the one for ours."""

import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM

from mmtool.engine.base import Sampling
from mmtool.engine.generic import GenericEngine


class Digits:
    """A grammar: three tokens below 10."""

    def __init__(self):
        self.taken = []

    @property
    def finished(self):
        return len(self.taken) == 3

    def allowed(self):
        return torch.tensor([0b1111111110], dtype=torch.int32)

    def accept(self, token_id):
        self.taken.append(token_id)


@pytest.fixture(scope="module")
def model(small):
    torch.manual_seed(4)
    network = LlamaForCausalLM(small.model.config.text_config).eval()
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 2 * weight[0].numel() ** -0.5)
    return network


def settings():
    return [
        Sampling(max_new_tokens=7),
        Sampling(max_new_tokens=9, do_sample=True, seed=1, min_p=0.05, presence_penalty=0.5, logprobs=3),
        Sampling(max_new_tokens=5, logit_bias={40: 1000.0}),
        Sampling(max_new_tokens=8, repetition_penalty=1.4, frequency_penalty=0.3),
    ]


def test_answers_are_those_of_the_other_engine(small, model):
    requests = [
        small.request(small.ids(seed, 5 + 4 * seed), sampling=sampling) for seed, sampling in enumerate(settings())
    ]
    requests.append(small.request(small.ids(9, 9)))
    for engine_class in (GenericEngine, None):
        requests[-1].grammar = Digits()
        engine = small.engine(model, max_batch_size=3)
        if engine_class is not None:
            engine = GenericEngine(model, small.tokenizer, max_batch_size=3)
        found = small.answers(engine, requests)
        assert len(found[-1]) == 3 and set(found[-1]) <= set(range(1, 9))
        if engine_class is not None:
            expected = found
    assert found == expected
    assert expected[0] == small.generated(requests[0], model)
    assert expected[2] == (40,) * 5


def test_logprobs(small, model):
    asked = small.request(small.ids(1, 9), sampling=Sampling(max_new_tokens=4, logprobs=2))
    answer = GenericEngine(model, small.tokenizer).answer(asked)
    logits = model(torch.tensor([[*asked.input_ids, *answer.token_ids]])).logits[0, 8:-1].log_softmax(-1)
    assert [said.logprob for said in answer.logprobs] == pytest.approx(logits.amax(-1).tolist(), abs=1e-4)
    assert [said.top[0][0] for said in answer.logprobs] == list(answer.token_ids)
    assert [len(said.top) for said in answer.logprobs] == [2] * 4


def test_cancelled_waiting_and_answering(small, model):
    engine = GenericEngine(model, small.tokenizer)
    asked = small.request(small.ids(1, 9), max_new_tokens=20)
    found = [[], [], []]
    runs = [engine.submit(dataclasses.replace(asked), deltas.append) for deltas in found]
    for _ in range(4):
        engine.step()
    for run in runs[:2]:
        engine.cancel(run)
    assert [deltas[-1].finish_reason for deltas in found[:2]] == ["cancelled"] * 2
    while engine.busy:
        engine.step()
    assert sum((delta.token_ids for delta in found[2]), ()) == small.generated(asked, model)
