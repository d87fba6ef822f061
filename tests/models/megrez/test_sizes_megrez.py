"""The released sizes, on no device: parameters by part, and every tensor of the release's table."""

import re

import pytest
import torch

from mmtool.models.megrez.configuration_megrez import MegrezInstructConfig, MegrezOmniConfig
from mmtool.models.megrez.conversion_megrez import MODEL_TYPE
from mmtool.models.megrez.modeling_megrez import MegrezInstructForCausalLM, MegrezOmniForConditionalGeneration
from mmtool.registry import get_model_spec

LLAMA = {
    **{"hidden_size": 2560, "intermediate_size": 7168, "num_hidden_layers": 32, "num_attention_heads": 40},
    **{"num_key_value_heads": 10, "vocab_size": 122880, "rope_theta": 5_000_000.0, "rms_norm_eps": 1e-5},
    **{"bos_token_id": None, "eos_token_id": 120005, "tie_word_embeddings": False, "attention_bias": False},
}
VISION = {
    **{"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16},
    **{"image_size": 980, "patch_size": 14},
}


@pytest.fixture(scope="module")
def omni_model() -> MegrezOmniForConditionalGeneration:
    config = {**LLAMA, "max_position_embeddings": 4096, "vision_config": VISION, "audio_config": {}}
    with torch.device("meta"):
        return MegrezOmniForConditionalGeneration(MegrezOmniConfig.from_dict(config))


def test_parameters_by_part(omni_model: MegrezOmniForConditionalGeneration) -> None:
    assert {tensor.device.type for tensor in omni_model.state_dict().values()} == {"meta"}
    sizes = {name: tensor.numel() for name, tensor in omni_model.state_dict().items()}
    parts = get_model_spec("megrez-3b-omni").parts
    found = {
        part: sum(size for name, size in sizes.items() if name.startswith(tuple(f"{prefix}." for prefix in prefixes)))
        for part, prefixes in parts.items()
    }
    assert sum(found.values()) == sum(sizes.values()), "every tensor belongs to one part"
    billions = {part: round(size / 1e9, 3) for part, size in found.items()}
    assert billions == {
        **{"llm": 2.915, "vision_encoder": 0.418, "vision_proj": 0.036, "audio_encoder": 0.637, "audio_proj": 0.003}
    }
    assert round(sum(sizes.values()) / 1e9, 3) == 4.009
    assert sizes["model.language_model.embed_tokens.weight"] == sizes["lm_head.weight"] == 122880 * 2560


def released_shapes() -> dict[str, list[int]]:
    """Return the release's table of tensors."""
    hidden, width, state = 2560, 1152, 1280
    table = {
        "llm.model.embed_tokens.weight": [122880, hidden],
        "llm.lm_head.weight": [122880, hidden],
        "llm.model.norm.weight": [hidden],
    }
    for layer in range(32):
        prefix = f"llm.model.layers.{layer}."
        for name, shape in (
            ("q", [hidden, hidden]),
            ("k", [640, hidden]),
            ("v", [640, hidden]),
            ("o", [hidden, hidden]),
        ):
            table[f"{prefix}self_attn.{name}_proj.weight"] = shape
        for name, shape in (("gate", [7168, hidden]), ("up", [7168, hidden]), ("down", [hidden, 7168])):
            table[f"{prefix}mlp.{name}_proj.weight"] = shape
        table |= {f"{prefix}{name}_layernorm.weight": [hidden] for name in ("input", "post_attention")}

    def with_bias(name: str, shape: list[int]) -> dict[str, list[int]]:
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    vision = "vision.vpm."
    table |= with_bias(f"{vision}embeddings.patch_embedding", [width, 3, 14, 14])
    table[f"{vision}embeddings.position_embedding.weight"] = [4900, width]
    for layer in range(27):
        prefix = f"{vision}encoder.layers.{layer}."
        for name in ("q", "k", "v", "out"):
            table |= with_bias(f"{prefix}self_attn.{name}_proj", [width, width])
        for name in ("layer_norm1", "layer_norm2"):
            table |= with_bias(f"{prefix}{name}", [width])
        table |= with_bias(f"{prefix}mlp.fc1", [4304, width]) | with_bias(f"{prefix}mlp.fc2", [width, 4304])
    table |= with_bias(f"{vision}post_layernorm", [width])

    sampler = "vision.resampler."
    table |= {f"{sampler}query": [64, hidden], f"{sampler}proj": [hidden, hidden]}
    table |= {f"{sampler}kv_proj.weight": [hidden, width], f"{sampler}attn.in_proj_weight": [7680, hidden]}
    table |= {f"{sampler}attn.in_proj_bias": [7680]} | with_bias(f"{sampler}attn.out_proj", [hidden, hidden])
    for name in ("ln_q", "ln_kv", "ln_post"):
        table |= with_bias(f"{sampler}{name}", [hidden])

    audio = "audio.audio."
    table |= with_bias(f"{audio}conv1", [state, 128, 3]) | with_bias(f"{audio}conv2", [state, state, 3])
    table[f"{audio}positional_embedding"] = [1500, state]
    for layer in range(32):
        prefix = f"{audio}blocks.{layer}."
        for name in ("query", "value", "out"):
            table |= with_bias(f"{prefix}attn.{name}", [state, state])
        table[f"{prefix}attn.key.weight"] = [state, state]
        for name in ("attn_ln", "mlp_ln"):
            table |= with_bias(f"{prefix}{name}", [state])
        table |= with_bias(f"{prefix}mlp.0", [5120, state]) | with_bias(f"{prefix}mlp.2", [state, 5120])
    table |= with_bias(f"{audio}ln_post", [state]) | with_bias(f"{audio}proj", [hidden, state])
    table[f"{audio}audio_bos_eos_token.weight"] = [2, hidden]
    return table


def test_every_tensor_of_the_release_has_its_place(omni_model: MegrezOmniForConditionalGeneration) -> None:
    table = released_shapes()
    assert len(table) == 1231
    ours = {name: list(tensor.shape) for name, tensor in omni_model.state_dict().items()}
    assert {type(omni_model).our_name(name): shape for name, shape in table.items()} == ours
    assert omni_model.config.model_type == MODEL_TYPE


def test_lora_sits_on_the_language_model(omni_model: MegrezOmniForConditionalGeneration) -> None:
    pattern = re.compile(get_model_spec("megrez-3b-omni").lora_target_modules)
    found = [name for name, _ in omni_model.named_modules() if pattern.fullmatch(name)]
    assert len(found) == 3 * 32
    assert all(name.startswith("model.language_model.layers.") for name in found)


def test_the_text_model() -> None:
    with torch.device("meta"):
        model = MegrezInstructForCausalLM(MegrezInstructConfig(**LLAMA, max_position_embeddings=32768))
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    assert len(sizes) == 32 * 9 + 3
    assert round(sum(sizes.values()) / 1e9, 3) == 2.915
    spec = get_model_spec("megrez-3b-instruct")
    assert all(name.startswith(("model.", "lm_head.")) for name in sizes)
    assert sum(re.fullmatch(spec.lora_target_modules, name) is not None for name, _ in model.named_modules()) == 96
