"""Weights in large pages: the same numbers in other memory."""

import torch
from torch import nn

from mmtool.engine.pages import move_to_huge_pages


def test_weights_keep_their_numbers_and_ties():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 300), nn.Linear(300, 7), nn.Linear(300, 10, bias=False)).requires_grad_(
        False
    )
    model[1].bfloat16()
    model[2].weight = model[0].weight
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = [weight.data_ptr() for weight in model.parameters()]
    move_to_huge_pages([*model.parameters(), model[2].weight])
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}
    assert model[2].weight is model[0].weight
    moved = [weight.data_ptr() for weight in model.parameters()]
    assert not set(places) & set(moved)
    assert all(place % 64 == 0 for place in moved)


def test_what_cannot_be_moved_stays():
    weight = nn.Parameter(torch.randn(4, 6).t(), requires_grad=False)
    place = weight.data_ptr()
    move_to_huge_pages([weight])
    move_to_huge_pages([])
    assert weight.data_ptr() == place


def test_a_server_answers_as_before(small):
    requests = [small.request(small.ids(seed, 9 + seed), max_new_tokens=6) for seed in range(3)]
    model = small.network()
    engine = small.engine(model, max_batch_size=2, max_model_len=64, preallocate=True, pack_weights=None)
    assert engine.pack_weights
    assert small.answers(engine, requests) == [small.generated(request) for request in requests]
    assert engine._step.packed_bytes > 0
