"""Folders as releases and training tools leave them: formats, missing and additional keys, sizes, what is written."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mmtool.errors import CheckpointError
from mmtool.loader import get_template, load_model, load_processor, open_folder
from mmtool.models.fm9g import spec as fm9g
from mmtool.models.fm9g.configuration_fm9g import FM9GConfig
from mmtool.models.fm9g.modeling_fm9g import FM9GForCausalLM

IDS = torch.tensor([[1, 901, 406, 5, 300, 41, 900]])
BIN, SAFE = "pytorch_model.bin", "model.safetensors"


def weights_of(folder):
    return torch.load(folder / BIN, weights_only=True)


def logits_of(folder, **kwargs):
    with torch.no_grad():
        return FM9GForCausalLM.from_pretrained(folder, **kwargs).eval()(input_ids=IDS).logits


def edit_config(folder, drop=(), **changes):
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(config | changes))


def write_shards(folder, weights, suffix, save):
    names = sorted(weights)
    halves = {f"part-1{suffix}": names[::2], f"part-2{suffix}": names[1::2]}
    for name, part in halves.items():
        save({key: weights[key].clone() for key in part}, folder / name)
    index = {"weight_map": {key: name for name, part in halves.items() for key in part}}
    (folder / f"{BIN if suffix == '.bin' else SAFE}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "layout", ["wrapped", "bin shards", "safetensors", "safetensors shards", "buffers", "other head"]
)
def test_every_layout_of_the_weights_gives_the_same_network(release, kind, layout):
    wanted, weights = logits_of(release), weights_of(release)
    (release / BIN).unlink()
    if layout == "wrapped":
        torch.save({"state_dict": weights}, release / BIN)
    elif layout == "bin shards":
        write_shards(release, weights, ".bin", torch.save)
    elif layout == "safetensors":
        save_file({name: tensor.clone() for name, tensor in weights.items()}, release / SAFE)
    elif layout == "safetensors shards":
        write_shards(release, weights, ".safetensors", save_file)
    elif layout == "buffers":
        torch.save(weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, release / BIN)
    elif kind == "mha":  # no tying: nothing can be left out or added
        torch.save(weights, release / BIN)
    else:  # a copy of the embedding where the golden folder has none, and the other way round
        head = (
            {}
            if weights.pop("lm_head.weight", None) is not None
            else {"lm_head.weight": weights["model.embed_tokens.weight"]}
        )
        torch.save(weights | head, release / BIN)
    torch.testing.assert_close(logits_of(release), wanted, atol=0, rtol=0)


def test_a_weight_that_is_missing_or_left_over_is_an_error(release, kind):
    weights = weights_of(release)
    torch.save(
        {name: tensor for name, tensor in weights.items() if not name.endswith("1.mlp.up_proj.weight")}, release / BIN
    )
    with pytest.raises(CheckpointError, match=r"missing \(model\.layers\.1\.mlp\.up_proj\.weight"):
        FM9GForCausalLM.from_pretrained(release)
    torch.save(weights | {"model.layers.0.self_attn.w.weight": torch.ones(2)}, release / BIN)
    with pytest.raises(CheckpointError, match=r"unexpected \(model\.layers\.0\.self_attn\.w\.weight"):
        FM9GForCausalLM.from_pretrained(release)
    if kind == "mha":
        torch.save({name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}, release / BIN)
        with pytest.raises(CheckpointError, match=r"missing \(lm_head\.weight"):
            FM9GForCausalLM.from_pretrained(release)


def test_saving_writes_the_release_again(release, tmp_path):
    model = FM9GForCausalLM.from_pretrained(release).eval()
    model.save_pretrained(tmp_path / "saved")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (release, tmp_path / "saved"))
    added = {"tie_word_embeddings", "attention_bias", "rope_scaling"} - before.keys()
    changed = {key for key in after if key not in added and before.get(key, "absent") != after[key]}
    assert changed <= {"transformers_version"} and before.keys() <= after.keys()
    stored, saved = weights_of(release), load_file(tmp_path / "saved" / SAFE)
    if model.config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    torch.testing.assert_close(saved, {name: saved[name] for name in stored}, atol=0, rtol=0)
    torch.testing.assert_close(saved, stored, atol=0, rtol=0)
    torch.testing.assert_close(logits_of(tmp_path / "saved"), logits_of(release), atol=0, rtol=0)
    again = FM9GForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config.model_type == before["model_type"]
    assert sorted(again.generation_config.eos_token_id) == [2, 900]


# -- what the keys decide


@pytest.fixture
def tiny(tmp_path):
    """``tiny(weights=..., **config)`` writes a small Llama with these keys and returns the folder and the Llama."""

    def make(added=(), **config):
        torch.manual_seed(0)
        settings = {
            **{"vocab_size": 908, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "initializer_range": 0.2},
        }
        llama = LlamaForCausalLM(LlamaConfig(**settings, tie_word_embeddings=False)).eval()
        torch.save(llama.state_dict() | dict(added), tmp_path / BIN)
        (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": "fm9g", **config}))
        return SimpleNamespace(folder=tmp_path, llama=llama)

    return make


def llama_logits(llama):
    with torch.no_grad():
        return llama(input_ids=IDS).logits


def test_without_scale_keys_nothing_is_scaled_and_the_head_is_its_own(tiny):
    made = tiny()
    torch.testing.assert_close(logits_of(made.folder), llama_logits(made.llama), atol=1e-5, rtol=0)


def test_fm9g7b_ignores_scale_keys(tiny):
    made = tiny(model_type="fm9g7b", scale_emb=12, scale_depth=-1, dim_model_base=128, tie_word_embeddings=False)
    torch.testing.assert_close(logits_of(made.folder), llama_logits(made.llama), atol=1e-5, rtol=0)


def test_one_missing_scale_counts_as_one():
    config = FM9GConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=4, scale_emb=12)
    assert (config.embedding_factor, config.residual_factor, config.logits_divisor) == (12, 0.5, 64)
    assert config.tie_word_embeddings


def test_the_divisor_is_not_rounded():
    config = FM9GConfig(hidden_size=64, num_attention_heads=4, dim_model_base=24, scale_emb=12, scale_depth=1.4)
    assert config.logits_divisor == 64 / 24


@pytest.mark.parametrize("model_type", ["fm9g", "fm9g7b"])
@pytest.mark.parametrize("with_output_bias", [False, True])
def test_biases_come_from_the_weights(tiny, model_type, with_output_bias):
    sizes = {"q_proj": 32, "k_proj": 16, "v_proj": 16} | ({"o_proj": 32} if with_output_bias else {})
    biases = {
        f"model.layers.{layer}.self_attn.{name}.bias": torch.randn(size)
        for layer in range(3)
        for name, size in sizes.items()
    }
    made = tiny(biases, model_type=model_type)
    model = FM9GForCausalLM.from_pretrained(made.folder)
    assert {name for name, _ in model.named_parameters() if name.endswith(".bias")} == set(biases)
    assert not logits_of(made.folder).equal(llama_logits(made.llama))
    model.save_pretrained(made.folder / "saved")
    torch.testing.assert_close(logits_of(made.folder / "saved"), logits_of(made.folder), atol=0, rtol=0)


def test_fm9g7b_without_biases_in_its_weights_has_none(tiny):
    made = tiny(model_type="fm9g7b", tie_word_embeddings=False)
    torch.testing.assert_close(logits_of(made.folder), llama_logits(made.llama), atol=1e-5, rtol=0)


def test_a_sliding_window_in_use_is_refused(release):
    edit_config(release, use_sliding_window=True, sliding_window=16)
    with pytest.raises(CheckpointError, match="use_sliding_window"):
        FM9GForCausalLM.from_pretrained(release)


def test_an_unused_sliding_window_shortens_nothing(release, kind):
    wanted = logits_of(release)
    edit_config(release, use_sliding_window=False, sliding_window=2)
    model = FM9GForCausalLM.from_pretrained(release).eval()
    with torch.no_grad():
        first = model(input_ids=IDS[:, :-1], use_cache=True)
        last = model(input_ids=IDS[:, -1:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(last[:, -1], wanted[:, -1], atol=5e-5, rtol=0)


# -- positions


def angles(**settings):
    config = FM9GConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=8, **settings)
    return FM9GForCausalLM(config).model.rotary_emb


def test_longrope_takes_the_long_factors_wherever_the_table_is_longer_than_the_original():
    plain = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
    scaling = {"type": "longrope", "short_factor": [1.0, 2, 3, 4], "long_factor": [2.0, 4, 6, 8]}
    for most, factors in ((64, [1.0, 2, 3, 4]), (128, [2.0, 4, 6, 8])):
        scaling |= {"original_max_position_embeddings": 64}
        rotary = angles(max_position_embeddings=most, rope_scaling=dict(scaling))
        torch.testing.assert_close(rotary.inv_freq, plain / torch.tensor(factors))
        factor = math.sqrt(1 + math.log(most / 64) / math.log(64))
        assert rotary.attention_scaling == pytest.approx(factor)
        cos, sin = rotary(torch.tensor([[3]]))  # a short prompt too
        torch.testing.assert_close((cos**2 + sin**2)[0, 0], torch.full((8,), factor**2))


def test_linear_and_dynamic_scaling():
    plain = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
    linear = angles(max_position_embeddings=64, rope_scaling={"type": "linear", "factor": 4.0})
    torch.testing.assert_close(linear.inv_freq, plain / 4)
    dynamic = angles(max_position_embeddings=64, rope_scaling={"type": "dynamic", "factor": 2.0})
    torch.testing.assert_close(dynamic.inv_freq, plain)
    cos, _ = dynamic(torch.arange(96)[None])
    base = 10000 * (2 * 96 / 64 - 1) ** (8 / 6)
    torch.testing.assert_close(cos[0, 5, :4], (5 / base ** (torch.arange(0, 8, 2) / 8)).cos())
    torch.testing.assert_close(dynamic(torch.arange(8)[None])[0][0, 5, :4], (5 * plain).cos())


def test_unknown_scaling_is_refused():
    with pytest.raises(CheckpointError, match="yarn"):
        FM9GConfig(rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64})


# -- which size a folder holds


def config_of(size):
    big = {"hidden_size": 8192, "num_hidden_layers": 80}
    return {
        "2b": {"model_type": "fm9g", "vocab_size": 122753, "hidden_size": 2304, "num_hidden_layers": 40},
        "4b": {"model_type": "fm9g", "vocab_size": 73448, "hidden_size": 2560, "num_hidden_layers": 62},
        "7b": {"model_type": "fm9g7b", "vocab_size": 73448, "hidden_size": 3584, "num_hidden_layers": 28},
        "70b": {"model_type": "fm9g7b", "vocab_size": 73448, **big},
        "8b": {"model_type": "any", "vocab_size": 119696, "hidden_size": 4096, "num_hidden_layers": 32},
    }[size]


@pytest.mark.parametrize("size", ["2b", "4b", "7b", "70b", "8b"])
def test_exactly_one_type_matches_a_released_config(size):
    found = [spec.model_type for spec in fm9g.SPECS if spec.matches(config_of(size))]
    assert found == [f"fm9g-{size}-chat"]


def test_others_are_left_alone():
    others = [
        {"model_type": "fm9gv", "architectures": ["FM9GV"], "vocab_size": 73448, "kv_lora_rank": 256},
        {"model_type": "minicpm", "vocab_size": 122753, "hidden_size": 2304, "num_hidden_layers": 40},
        {"model_type": "llama", "vocab_size": 73448},
        {"model_type": "minicpm3", "vocab_size": 73448},
        {},
    ]
    assert not any(spec.matches(config) for config in others for spec in fm9g.SPECS)


def test_a_folder_is_found_and_loaded_by_its_path_alone(checkpoint, kind):
    spec, folder = open_folder(model_id_or_path=checkpoint)
    assert spec.model_type == {"gqa": "fm9g-4b-chat", "mla": "fm9g-4b-chat", "mha": "fm9g-7b-chat"}[kind]
    model, processor = load_model(spec, folder, attn_impl="sdpa")
    template = get_template(spec, processor)
    ids = template.encode([{"role": "user", "content": "你是谁？"}])["input_ids"]
    assert model(input_ids=torch.tensor([ids])).logits.shape == (1, len(ids), 908)


# -- the sizes of 2024


def llama_folder(folder, **config):
    """Write a small network and its config.json, scaled if ``config`` has the keys."""
    model = FM9GForCausalLM(
        FM9GConfig(
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **config}
        )
    )
    model.save_pretrained(folder)


def test_an_8b_folder_talks(tmp_path):
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "<用户>",
        "<AI>",
        "你好",
        "你",
        " the",
    ]
    words += [f"word{index}" for index in range(119696 - len(words))]
    (tmp_path / "vocab.txt").write_text("".join(json.dumps(word) + "\n" for word in words), "utf-8")
    llama_folder(tmp_path, vocab_size=119696)
    spec, folder = open_folder(model_id_or_path=tmp_path)
    assert spec.model_type == "fm9g-8b-chat"
    model, processor = load_model(spec, folder)
    assert (model.config.is_scaled, model.config.tie_word_embeddings) == (False, False)
    template = get_template(spec, processor)
    encoded = template.encode([{"role": "user", "content": "你好 the?"}])
    assert encoded["input_ids"] == [1, 259, 261, 263, 3 + ord("?"), 260]
    assert template.stop_token_ids == (2,)
    answer = model.generate(input_ids=torch.tensor([encoded["input_ids"]]), max_new_tokens=3, do_sample=False)
    assert template.decode(answer[0, 6:].tolist()) is not None
    assert load_processor(spec, folder).tokenizer.encode("你好") == [1, 261]
