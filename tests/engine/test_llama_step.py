"""The short cut for Llama decoders: equal to the long way, and taken only where it is."""

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from mmtool.engine.adapters import LowRankPairs
from mmtool.engine.llama_step import Chunk, LlamaStep, Rows, fits, step_for
from mmtool.engine.slots import KVSlots, SlotCache, write_index
from mmtool.models.common.mla import MLAConfig, MLADecoder
from mmtool.models.fm9g.configuration_fm9g import FM9GConfig
from mmtool.models.fm9g.modeling_fm9g import FM9GModel
from mmtool.models.internlm_xcomposer2.configuration_internlm_xcomposer2 import XComposer2TextConfig
from mmtool.models.internlm_xcomposer2.modeling_internlm2 import XComposer2TextModel

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama": (LlamaModel, LlamaConfig, {"tie_word_embeddings": False}),
    "qwen2": (Qwen2Model, Qwen2Config, {"use_sliding_window": False}),
    "qwen3": (Qwen3Model, Qwen3Config, {"head_dim": 16}),
    "mistral": (MistralModel, MistralConfig, {"head_dim": 8, "sliding_window": None}),
    "fm9g": (
        FM9GModel,
        FM9GConfig,
        {"kv_lora_rank": None, "attention_bias": True, "scale_emb": 3.0, "scale_depth": 1.4, "dim_model_base": 8},
    ),
    "fm9g-mla": (
        FM9GModel,
        FM9GConfig,
        {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "scale_depth": 1.4},
    ),
    "mla": (
        MLADecoder,
        MLAConfig,
        {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "attention_bias": True},
    ),
    "xcomposer2": (XComposer2TextModel, XComposer2TextConfig, {"attention_bias": True}),
}


def decoder_of(family: str = "llama", **settings) -> nn.Module:
    model_class, config_class, own = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(**SIZES | own | settings)
    config._attn_implementation = "sdpa"
    model = model_class(config).eval()
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
    assert_step_is_forward(decoder, LlamaStep(decoder), lengths)


@pytest.mark.parametrize("pack", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("lengths", [[7], [1, 9, 4], list(range(1, 13))], ids=["1", "3", "12"])
@pytest.mark.parametrize("family", FAMILIES)
def test_step_of_every_family_equals_forward(family, lengths, pack):
    decoder = decoder_of(family)
    assert_step_is_forward(decoder, LlamaStep(decoder, pack=pack), lengths)


def assert_step_is_forward(decoder, step, lengths):
    assert fits(decoder)
    kv = KVSlots(2)
    kv.reserve(len(lengths) + 1, 16, 0)
    cache = SlotCache(kv)
    ids = torch.arange(len(lengths) * 12).view(-1, 12) % 40
    for row, length in enumerate(lengths):
        cache.use(row, row + 1, 0)
        decoder(input_ids=ids[row : row + 1, :length], past_key_values=cache, use_cache=True)

    count, longest = len(lengths), max(lengths)
    positions, new = torch.tensor(lengths), (torch.arange(count) + 3) % 40
    even = min(lengths) == longest
    index = None if even else write_index(positions, kv.keys[0].shape[1], kv.capacity)
    hidden = torch.arange(longest + 1) > positions.unsqueeze(1)
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None, None]
    found = step(Rows(new, positions, longest, index, None if even else mask), kv)
    written = [tensor.clone() for tensor in (*kv.keys, *kv.values)]

    cache.use(0, count, longest, index)
    expected = decoder(
        input_ids=new.unsqueeze(1), position_ids=positions.unsqueeze(1), past_key_values=cache, use_cache=True,
        attention_mask=None if even else ~hidden,
    ).last_hidden_state[:, 0]  # fmt: skip
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(written, (*kv.keys, *kv.values), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pack", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "xcomposer2"])
def test_prompts_together_equal_each_alone(family, pack):
    """Two whole prompts, one of a single position, and one that goes on behind seven."""
    decoder = decoder_of(family)
    step = LlamaStep(decoder, pack=pack)
    kv, alone = KVSlots(2), KVSlots(2)
    for storage in (kv, alone):
        storage.reserve(5, 16, 0)
    cache = SlotCache(alone)
    ids = torch.arange(5 * 12).view(5, 12) % 40
    embeds = decoder.get_input_embeddings()(ids)
    step.fill(embeds[3, :7], [Chunk(3, 0, 7)], kv)
    chunks = [Chunk(1, 0, 9), Chunk(3, 7, 12), Chunk(0, 0, 1), Chunk(2, 0, 12)]
    found = step.fill(torch.cat([embeds[row, start:end] for row, start, end in chunks]), chunks, kv)
    for (row, _, end), states in zip(chunks, found, strict=True):
        cache.use(row, row + 1, 0)
        expected = decoder(
            inputs_embeds=embeds[row : row + 1, :end], past_key_values=cache, use_cache=True,
        ).last_hidden_state[0, -1]  # fmt: skip
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip((*kv.keys, *kv.values), (*alone.keys, *alone.values), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_pictures_of_xcomposer2_go_through_forward():
    assert not LlamaStep(decoder_of("xcomposer2")).takes_prompts


def test_latents_with_an_adapter_go_through_forward():
    decoder = decoder_of("mla")
    hook = LowRankPairs.__new__(LowRankPairs)
    decoder.layers[1].self_attn.kv_b_proj.register_forward_hook(hook)
    assert not fits(decoder)


def test_head_makes_the_logits():
    decoder, head = decoder_of(), nn.Linear(32, 40, bias=False)
    states = torch.randn(3, 32)
    for pack in (False, True):
        step = step_for(decoder, None, head, pack)
        torch.testing.assert_close(step.logits(states), head(states))
    head.register_forward_hook(lambda *_: None)
    assert step_for(decoder, None, head).head is None


def test_packed_weights_are_counted_and_made_anew_after_a_change():
    decoder = decoder_of()
    assert LlamaStep(decoder).packed_bytes == 0
    step = step_for(decoder, None, pack=True)
    matrices = [weight for name, weight in decoder.layers.named_parameters() if weight.ndim == 2]
    assert step.packed_bytes == sum(weight.nbytes for weight in matrices)
    with torch.no_grad():
        decoder.layers[0].mlp.up_proj.weight.mul_(2)
    assert step_for(decoder, step, pack=True) is not step


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("family", ["llama", "fm9g", "qwen3", "fm9g-mla"])
def test_half_precision_of_several_rows_is_near_forward(family, count):
    decoder = decoder_of(family).bfloat16()
    step, kv = LlamaStep(decoder), KVSlots(2)
    kv.reserve(count, 16, 0)
    ids = torch.arange(count * 7).view(count, 7) % 40
    embeds = decoder.get_input_embeddings()(ids)
    step.fill(embeds[:, :6].flatten(0, 1), [Chunk(row, 0, 6) for row in range(count)], kv)
    found = step(Rows(ids[:, 6], torch.full((count,), 6), 6, None, None), kv)
    expected = decoder(input_ids=ids).last_hidden_state[:, -1]
    torch.testing.assert_close(found, expected, atol=0.15, rtol=0.05)


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
    decoder = decoder_of("llama")
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
