"""The short cut for Llama decoders: equal to the long way, and taken only where it is."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from mmtool.engine.llama_step import LlamaStep, Rows, fits, step_for
from mmtool.engine.slots import KVSlots, SlotCache, write_index


def decoder_of(**settings) -> LlamaModel:
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64, "attn_implementation": "sdpa",
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**sizes | settings)).eval()
    for name, weight in model.named_parameters():
        nn.init.normal_(weight, std=0.3) if "norm" not in name else nn.init.uniform_(weight, 0.5, 2)
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 16},
        {"attention_bias": True, "mlp_bias": True},
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 0.1},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e6}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [1, 9, 4]], ids=str)
def test_step_equals_forward(settings, lengths):
    decoder = decoder_of(**settings)
    assert fits(decoder)
    kv = KVSlots(2)
    kv.reserve(4, 16, 0)
    cache = SlotCache(kv)
    ids = torch.arange(4 * 12).view(4, 12) % 40
    for row, length in enumerate(lengths):
        cache.use(row, row + 1, 0)
        decoder(input_ids=ids[row : row + 1, :length], past_key_values=cache, use_cache=True)

    count, longest = len(lengths), max(lengths)
    positions, new = torch.tensor(lengths), torch.arange(count) + 3
    even = min(lengths) == longest
    index = None if even else write_index(positions, kv.keys[0].shape[1], kv.capacity)
    hidden = torch.arange(longest + 1) > positions.unsqueeze(1)
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None, None]
    found = LlamaStep(decoder)(Rows(new, positions, longest, index, None if even else mask), kv)
    written = [tensor.clone() for tensor in (*kv.keys, *kv.values)]

    cache.use(0, count, longest, index)
    expected = decoder(
        input_ids=new.unsqueeze(1), position_ids=positions.unsqueeze(1), past_key_values=cache, use_cache=True,
        attention_mask=None if even else ~hidden,
    ).last_hidden_state[:, 0]  # fmt: skip
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(written, (*kv.keys, *kv.values), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_half_precision_step_is_near_forward():
    decoder = decoder_of().bfloat16()
    kv = KVSlots(2)
    kv.reserve(1, 16, 0)
    cache = SlotCache(kv)
    cache.use(0, 1, 0)
    decoder(input_ids=torch.arange(6).unsqueeze(0), past_key_values=cache, use_cache=True)
    found = LlamaStep(decoder)(Rows(torch.tensor([3]), torch.tensor([6]), 6, None, None), kv)
    cache.use(0, 1, 6)
    expected = decoder(
        input_ids=torch.tensor([[3]]), position_ids=torch.tensor([[6]]), past_key_values=cache, use_cache=True
    ).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)


def with_hook(decoder):
    decoder.layers[0].mlp.register_forward_hook(lambda *_: None)


def with_replaced_forward(decoder):
    decoder.layers[1].self_attn.forward = decoder.layers[1].self_attn.forward


def with_adapter(decoder):
    class LoraLinear(nn.Linear):
        pass

    decoder.layers[0].self_attn.q_proj = LoraLinear(32, 32)


def with_eager_attention(decoder):
    decoder.config._attn_implementation = "eager"


def with_two_formats(decoder):
    decoder.norm.half()


@pytest.mark.parametrize(
    "change", [with_hook, with_replaced_forward, with_adapter, with_eager_attention, with_two_formats]
)
def test_anything_unusual_goes_through_forward(change):
    decoder = decoder_of()
    assert step_for(decoder) is not None
    change(decoder)
    assert step_for(decoder) is None


def test_angles_that_change_with_the_length_go_through_forward():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert not fits(decoder_of(rope_parameters=rope))


def test_subclasses_go_through_forward():
    class Other(LlamaModel):
        pass

    assert not fits(Other(decoder_of().config))


def test_hooks_that_record_outputs_do_not_matter():
    decoder = decoder_of()
    decoder(input_ids=torch.tensor([[1, 2]]), output_hidden_states=True)
    assert fits(decoder)


def test_a_step_is_made_anew_when_weights_move():
    decoder = decoder_of()
    step = step_for(decoder)
    assert step_for(decoder, step) is step
    decoder.double()
    assert step_for(decoder, step) is not step
