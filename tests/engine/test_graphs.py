"""Decode steps in fixed shapes. On a CPU they run as they are, so this tests that filling them up is harmless."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from mmtool.engine.graphs import GraphedStep, graphed, padded_length, padded_rows
from mmtool.engine.llama_step import Chunk, LlamaStep, Rows
from mmtool.engine.slots import KVSlots, write_index

CAPACITY = 300


@pytest.fixture(scope="module")
def step() -> LlamaStep:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, max_position_embeddings=512, attn_implementation="sdpa",
    )  # fmt: skip
    decoder, head = LlamaModel(config).eval().requires_grad_(False), nn.Linear(32, 40, bias=False).requires_grad_(False)
    for weight in (*decoder.parameters(), *head.parameters()):
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.3)
    return LlamaStep(decoder, head)


def filled(step: LlamaStep, lengths: list[int], slots: int, spare: int) -> KVSlots:
    """Storage whose first rows hold prompts of these lengths, and whose others hold something too."""
    kv = KVSlots(2, spare=spare)
    kv.reserve(slots, CAPACITY, 0)
    prompts = [*lengths, *[5] * (slots - len(lengths))]
    embeds = [torch.randn(length, 32, generator=torch.Generator().manual_seed(length)) for length in prompts]
    step.fill(torch.cat(embeds), [Chunk(row, 0, length) for row, length in enumerate(prompts)], kv)
    return kv


@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [1, 9, 4], [3, 299, 20, 8, 255], [256, 255]], ids=str)
def test_filled_up_step_equals_the_step(step, lengths):
    count, slots = len(lengths), 6
    eager, fixed = filled(step, lengths, slots, 0), filled(step, lengths, slots, 1)
    positions, ids = torch.tensor(lengths), torch.arange(count) + 3
    hidden = torch.arange(max(lengths) + 1) > positions.unsqueeze(1)
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None, None]
    rows = Rows(ids, positions, max(lengths), write_index(positions, 2, CAPACITY), mask)
    expected = step.logits(step(rows, eager))
    found = GraphedStep(step, fixed, slots)(ids, positions, max(lengths))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip((*fixed.keys, *fixed.values), (*eager.keys, *eager.values), strict=True):
        assert len(one) == len(other) + 1
        torch.testing.assert_close(one[:-1], other, atol=1e-5, rtol=1e-5)  # nobody's rows but those that answer


def test_rows_that_leave_write_nothing_any_more(step):
    kv = filled(step, [4, 6, 5], 4, 1)
    graphs = GraphedStep(step, kv, 4)
    graphs(torch.tensor([1, 2, 3]), torch.tensor([4, 6, 5]), 6)
    before = [tensor[1:-1].clone() for tensor in (*kv.keys, *kv.values)]
    graphs(torch.tensor([9]), torch.tensor([5]), 5)
    for tensor, old in zip((*kv.keys, *kv.values), before, strict=True):
        assert torch.equal(tensor[1:-1], old)


def test_one_shape_serves_many_steps(step):
    graphs = GraphedStep(step, filled(step, [4, 6, 5], 4, 1), 4)
    for length in range(7, 40):
        graphs(torch.tensor([1, 2, 3]), torch.tensor([4, 6, length]), length)
    assert list(graphs.replays) == [(4, 256)]


def test_shapes_are_recorded_anew_when_storage_moves(step):
    kv = filled(step, [4], 2, 1)
    known = graphed(None, step, kv, 8)
    assert graphed(known, step, kv, 8) is known
    kv.reserve(4, CAPACITY, 10)
    renewed = graphed(known, step, kv, 8)
    assert renewed is not known
    assert (known.max_rows, renewed.max_rows) == (2, 4)


def test_paddings():
    assert [padded_rows(count, 12) for count in (1, 2, 3, 5, 8, 9, 12)] == [1, 2, 4, 8, 8, 12, 12]
    lengths = 1, 256, 257, 2048, 2049, 4097
    assert [padded_length(length, 10_000) for length in lengths] == [
        256,
        256,
        512,
        2048,
        2560,
        5120,
    ]
    assert padded_length(299, 300) == 300


@pytest.mark.parametrize("rounds", [1, 3])
def test_answers_in_fixed_shapes_equal_generate(small, rounds):
    requests = [small.request(small.ids(seed, 3 + 5 * seed), max_new_tokens=4 + 7 * seed) for seed in range(6)]
    requests[2] = small.request(small.ids(50, 4), small.picture(1), small.ids(51, 9), max_new_tokens=30)
    engine = small.engine(max_batch_size=4, compile=True)
    for _ in range(rounds):
        assert small.answers(engine, requests) == [small.generated(request) for request in requests]
    assert engine._graphs.replays


def test_fixed_shapes_in_preallocated_storage(small):
    requests = [small.request(small.ids(seed, 20 + seed), max_new_tokens=12) for seed in range(5)]
    engine = small.engine(max_batch_size=3, max_model_len=128, preallocate=True, compile=True)
    assert small.answers(engine, requests) == [small.generated(request) for request in requests]


def test_what_cannot_be_recorded_runs_as_it_is_and_the_log_says_why_once(small, monkeypatch, caplog):
    def refuse(self, rows, length):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    engine = small.engine(max_batch_size=4, compile=True)
    made = GraphedStep.__init__

    def recording(self, step, kv, max_rows, records=True):
        made(self, step, kv, max_rows, records)
        self.records = records  # as on a GPU

    monkeypatch.setattr(GraphedStep, "__init__", recording)
    monkeypatch.setattr(GraphedStep, "_recorded", refuse)
    requests = [small.request(small.ids(seed, 3 + 5 * seed), max_new_tokens=4 + 7 * seed) for seed in range(6)]
    with caplog.at_level("WARNING", "mmtool"):
        assert small.answers(engine, requests) == [small.generated(request) for request in requests]
    (record,) = [record for record in caplog.records if "CUDA graphs" in record.message]
    assert record.message.endswith("could not be recorded: operation not permitted when stream is capturing")


@pytest.mark.gpu
def test_recordings_equal_the_step_on_a_gpu(small):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = small.network().cuda()
    requests = [small.request(small.ids(seed, 3 + 5 * seed), max_new_tokens=4 + 7 * seed) for seed in range(6)]
    plain = small.answers(small.engine(model, max_batch_size=4, compile=False), requests)
    engine = small.engine(model, max_batch_size=4, compile=True)
    assert small.answers(engine, requests) == plain
    assert engine._graphs.records
