"""Weights in large pages: the same numbers in other memory."""

from functools import partial

import pytest
import torch
from torch import nn

from mmtool.engine.pages import move_to_huge_pages
from mmtool.engine.products import MOST_COPIED, Product, joined, product_kind


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


def test_neighbours_are_one_matrix_without_a_copy():
    layers = nn.ModuleList(nn.Linear(32, 16 * count) for count in (1, 2, 3)).requires_grad_(False)
    apart = Product(layers)
    assert [weight.shape for weight, _ in apart.parts] == [(16, 32), (32, 32), (48, 32)]
    move_to_huge_pages(layers.parameters())
    ((weight, bias),) = Product(layers).parts
    assert (weight.data_ptr(), bias.data_ptr()) == (layers[0].weight.data_ptr(), layers[0].bias.data_ptr())
    assert torch.equal(weight, torch.cat([layer.weight for layer in layers]))
    assert torch.equal(bias, torch.cat([layer.bias for layer in layers]))
    assert joined([layers[0].weight, layers[2].weight]) is None
    assert joined([layers[1].weight, layers[0].weight]) is None
    assert joined([layers[0].weight.t()]) is None


@pytest.mark.parametrize("moved", [False, True], ids=["apart", "neighbours"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pack", [False, True], ids=["not packed", "packed"])
def test_products_are_those_of_the_layers(dtype, bias, moved, pack):
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(64, n, bias=bias) for n in (64, 32, 32)).to(dtype).requires_grad_(False)
    if moved:
        move_to_huge_pages(layers.parameters())
    product, single = (product_kind(layers[0].weight, pack)(chosen) for chosen in (layers, layers[:1]))
    close = partial(torch.testing.assert_close, **({"atol": 0.02, "rtol": 0.02} if dtype == torch.bfloat16 else {}))
    for rows in (1, 2, 20, MOST_COPIED, MOST_COPIED + 32):
        states = torch.randn(rows, 64).to(dtype)
        expected = [layer(states) for layer in layers]
        for x in (states, states.t().contiguous().t()):
            for found, right in zip(product(x), expected, strict=True):
                close(found, right)
            together = product.together(x)
            close(together, torch.cat(expected, 1))
            assert together.is_contiguous()
            close(single.add(x, x, 0.5), x + 0.5 * expected[0])


def test_a_server_answers_as_before(small):
    requests = [small.request(small.ids(seed, 9 + seed), max_new_tokens=6) for seed in range(3)]
    model = small.network()
    engine = small.engine(model, max_batch_size=2, max_model_len=64, preallocate=True, pack_weights=None)
    assert engine.pack_weights
    assert small.answers(engine, requests) == [small.generated(request) for request in requests]
    assert engine._step.packed_bytes > 0
