"""The released sizes on the meta device: names, shapes and numbers of weights; nothing is allocated."""

from __future__ import annotations

import pytest
import torch

from mmtool.models.common.mla import MLAConfig, MLADecoder
from mmtool.models.fm9g.configuration_fm9g import FM9GConfig
from mmtool.models.fm9g.modeling_fm9g import FM9GForCausalLM

MUP = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
LATENT = {
    **{"q_lora_rank": 768, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64},
    **{"head_dim": 96, "rope_theta": 10000.0, "max_position_embeddings": 32768},
    "rope_scaling": {
        **{"type": "longrope", "original_max_position_embeddings": 32768},
        **{"long_factor": [1.0] * 16, "short_factor": [1.0] * 16},
    },
}


def keys(hidden, inner, layers, heads, kv_heads, vocab, eps, **others):
    """Return what a released config.json says."""
    return {
        **{"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocab},
        **{"num_attention_heads": heads, "num_key_value_heads": kv_heads, "rms_norm_eps": eps, **others},
    }


# Config, and the number of weights, an embedding that is the head counted once.
SIZES = {
    "2b": (keys(2304, 5760, 40, 36, 36, 122753, 1e-5, **MUP), 2_724_880_896),
    "4b": (keys(2560, 6400, 62, 40, 4, 73448, 1e-5, **MUP), 4_129_681_920),
    "4b latent": (keys(2560, 6400, 62, 40, 40, 73448, 1e-5, model_type="fm9g3", **MUP, **LATENT), 4_073_875_968),
    "7b": (keys(3584, 18944, 28, 28, 28, 73448, 1e-6, model_type="fm9g7b", tie_word_embeddings=False), 7_668_831_744),
    "70b": (keys(8192, 29568, 80, 64, 64, 73448, 1e-6, model_type="fm9g7b", tie_word_embeddings=False), 80_814_546_944),
    "8b": (keys(4096, 14336, 32, 32, 32, 119696, 1e-5), 8_765_444_096),
}


def attention_shapes(config):
    """Return the weights of a layer's attention by the tables of the release, made without the network."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if "kv_lora_rank" in config:
        rank, key = config["kv_lora_rank"], config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        value = hidden // heads
        return {
            "q_a_proj.weight": [config["q_lora_rank"], hidden],
            "q_a_layernorm.weight": [config["q_lora_rank"]],
            "q_b_proj.weight": [heads * key, config["q_lora_rank"]],
            "kv_a_proj_with_mqa.weight": [rank + config["qk_rope_head_dim"], hidden],
            "kv_a_layernorm.weight": [rank],
            "kv_b_proj.weight": [heads * (config["qk_nope_head_dim"] + value), rank],
            "o_proj.weight": [hidden, heads * value],
        }
    narrow = config["num_key_value_heads"] * hidden // heads
    weights = {
        **{"q_proj.weight": [hidden, hidden], "o_proj.weight": [hidden, hidden]},
        **{"k_proj.weight": [narrow, hidden], "v_proj.weight": [narrow, hidden]},
    }
    biases = {"q_proj.bias": [hidden], "k_proj.bias": [narrow], "v_proj.bias": [narrow]}
    return weights | (biases if config.get("model_type") == "fm9g7b" else {})


def shapes(config):
    """Return all weights that a release of this configuration holds, a head that is the embedding included."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    found = {"model.embed_tokens.weight": [vocab, hidden], "lm_head.weight": [vocab, hidden]}
    found["model.norm.weight"] = [hidden]
    layer = {
        **{f"self_attn.{name}": shape for name, shape in attention_shapes(config).items()},
        **{"input_layernorm.weight": [hidden], "post_attention_layernorm.weight": [hidden]},
        **{"mlp.gate_proj.weight": [inner, hidden], "mlp.up_proj.weight": [inner, hidden]},
        "mlp.down_proj.weight": [hidden, inner],
    }
    numbers = range(config["num_hidden_layers"])
    return found | {f"model.layers.{index}.{name}": shape for index in numbers for name, shape in layer.items()}


@pytest.mark.parametrize("size", SIZES)
def test_released_sizes_have_the_released_weights(size):
    config, count = SIZES[size]
    with torch.device("meta"):
        model = FM9GForCausalLM(FM9GConfig(**config))
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == shapes(config)
    assert all(weight.is_meta for weight in model.parameters())
    assert model.config.tie_word_embeddings == (size in ("2b", "4b", "4b latent"))
    once = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    head = 0 if model.config.tie_word_embeddings else model.lm_head.weight.numel()
    assert sum(weight.numel() for weight in once.values()) + head == count


def test_the_factors_of_the_4b():
    config = FM9GConfig(**SIZES["4b"][0])
    assert (config.embedding_factor, config.logits_divisor) == (12, 10)
    assert config.residual_factor == pytest.approx(0.17780, abs=1e-5)


def test_the_shared_decoder_is_the_latent_one():
    config = {key: value for key, value in SIZES["4b latent"][0].items() if key != "model_type"}
    with torch.device("meta"):
        decoder = MLADecoder(MLAConfig(**config))
    wanted = {name.removeprefix("model."): shape for name, shape in shapes(config).items() if name != "lm_head.weight"}
    assert {name: list(tensor.shape) for name, tensor in decoder.state_dict().items()} == wanted


def test_what_is_cached_of_latent_attention_is_the_latent(golden):
    from mmtool.models.fm9g.modeling_fm9g import FM9GForCausalLM

    model = FM9GForCausalLM.from_pretrained(golden("fm9g/mla") / "checkpoint")
    cache = model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    layer = cache.layers[0]
    assert (layer.keys.shape, layer.values.shape) == ((1, 1, 3, 24), (1, 1, 3, 8))


def test_an_adapter_on_kv_b_proj_is_not_passed_over(golden):
    """The path for single tokens reads the weight itself, which must not happen where a wrapper stands before it."""

    class Wrapped(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 1.5

    model = FM9GForCausalLM.from_pretrained(golden("fm9g/mla") / "checkpoint").eval()
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.__class__ = Wrapped
    ids = torch.tensor([[1, 901, 406, 5, 300]])
    with torch.no_grad():
        full = model(input_ids=ids).logits[:, -1]
        first = model(input_ids=ids[:, :-1], use_cache=True)
        last = model(input_ids=ids[:, -1:], past_key_values=first.past_key_values, use_cache=True).logits[:, -1]
    torch.testing.assert_close(last, full, atol=5e-5, rtol=0)
