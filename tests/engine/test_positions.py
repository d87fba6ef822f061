"""Models whose rotary angles grow with the length: one base per sequence, whoever runs beside it."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mmtool.engine.base import Request, Sampling
from mmtool.engine.pt import PtEngine

LIMIT = 48
LENGTHS = {"short": 12, "crossing": 44, "exact": LIMIT, "long": 70, "longer": 97}


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LIMIT, eos_token_id=None, bos_token_id=None,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
    )  # fmt: skip
    torch.manual_seed(2)
    network = LlamaForCausalLM(config).eval().requires_grad_(False)
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.normal_(0, 2 * weight[0].numel() ** -0.5)
    return network


class Letters:
    """A tokenizer that is only asked for text."""

    def decode(self, ids, **_):
        return "".join(chr(97 + index % 26) for index in ids)

    def convert_ids_to_tokens(self, index):
        return chr(97 + index % 26)


def ids(name):
    return torch.randint(300, (LENGTHS[name],), generator=torch.Generator().manual_seed(LENGTHS[name])).tolist()


def generated(model, prompt, length=9):
    """What a model that has seen nothing longer before answers."""
    out = copy.deepcopy(model).generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        max_new_tokens=length, pad_token_id=0,
    )  # fmt: skip
    return tuple(out[0, len(prompt) :].tolist())


def answers(engine, prompts, length=9):
    requests = [Request(input_ids=prompt, sampling=Sampling(max_new_tokens=length)) for prompt in prompts]
    found = {}
    for delta in engine.generate(requests):
        found[delta.index] = found.get(delta.index, ()) + delta.token_ids
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("max_batch_size", [1, 3, 5])
def test_rows_do_not_change_each_others_base(model, max_batch_size):
    prompts = [ids(name) for name in ("long", "short", "crossing", "longer", "exact", "short")]
    engine = PtEngine(copy.deepcopy(model), Letters(), max_batch_size=max_batch_size, prefill_chunk=16)
    assert answers(engine, prompts) == [generated(model, prompt) for prompt in prompts]
    assert answers(engine, prompts[::-1]) == [generated(model, prompt) for prompt in prompts[::-1]]


def test_keys_of_a_stretched_sequence_are_not_used_for_another(model):
    engine = PtEngine(copy.deepcopy(model), Letters())
    prompt = ids("crossing")
    answer = answers(engine, [prompt])[0]
    follow_up = [*prompt, *answer, *ids("short")]
    assert answers(engine, [follow_up]) == [generated(model, follow_up)]
    assert engine.stats.cached_tokens == 0
    assert answers(engine, [follow_up[:30]]) == [generated(model, follow_up[:30])]
    assert engine.stats.cached_tokens == 0
    assert answers(engine, [follow_up[:40]]) == [generated(model, follow_up[:40])]
    assert engine.stats.cached_tokens == 30


def test_length_is_not_refused(model):
    assert PtEngine(copy.deepcopy(model), Letters()).max_model_len > 1000 * LIMIT
