"""Folders: the layouts that a release may have, what is refused, saving, adapters, and the released sizes."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import mmtool.auto
from mmtool.errors import CheckpointError
from mmtool.loader import get_template, load_model, open_folder
from mmtool.models.fm9g4b_v.configuration_fm9g4b_v import FM9GVConfig
from mmtool.models.fm9g4b_v.modeling_fm9g4b_v import FM9GVForConditionalGeneration, FM9GVModel
from mmtool.models.fm9g4b_v.spec import SPECS, is_fm9g4b_v
from mmtool.models.fm9g4b_v.tokenization_fm9g4b_v import FM9GVTokenizer
from mmtool.registry import detect_model_type

BIN = "pytorch_model.bin"
LAST_LAYER = "vpm.encoder.layers.1."


def weights_of(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / BIN, weights_only=True)


def change_config(folder, **changes) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}), "utf-8")


def assert_same_weights(found, wanted) -> None:
    found, wanted = found.state_dict(), wanted.state_dict()
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name


def test_the_folder_tells_what_it_is(checkpoint):
    spec, folder = open_folder(None, checkpoint)
    assert (spec.model_type, folder) == ("fm9g4b-v-chat", checkpoint)
    assert detect_model_type({"architectures": ["FM9GV"]}, "x") == "fm9g4b-v-chat"
    assert not is_fm9g4b_v({"model_type": "fm9g", "architectures": ["FM9GForCausalLM"]})
    with pytest.raises(CheckpointError, match="fm9g4b-v-chat"):
        open_folder("yi-vl-6b-chat", checkpoint)


def test_the_loader_opens_it(checkpoint, model):
    spec, folder = open_folder(None, checkpoint)
    loaded, processor = load_model(spec, folder, device_map="cpu")
    assert_same_weights(loaded, model)
    assert get_template(spec, processor).template_type == "fm9g4b-v"


def test_auto_classes_open_it(checkpoint, model):
    mmtool.auto.install()
    assert isinstance(AutoConfig.from_pretrained(checkpoint), FM9GVConfig)
    assert_same_weights(AutoModelForImageTextToText.from_pretrained(checkpoint), model)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert isinstance(tokenizer, FM9GVTokenizer)
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert tokenizer.padding_side == processor.tokenizer.padding_side == "left"
    assert AutoImageProcessor.from_pretrained(checkpoint).scale_resolution == 112


def test_saved_folders_are_releases_again(checkpoint, model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    stored, saved = weights_of(checkpoint), load_file(tmp_path / "model.safetensors")
    assert saved.keys() == stored.keys() - {"llm.lm_head.weight"}  # tied
    assert all(torch.equal(saved[name], stored[name]) for name in saved)
    assert_same_weights(FM9GVForConditionalGeneration.from_pretrained(tmp_path), model)
    found, wanted = (json.loads((folder / "config.json").read_text("utf-8")) for folder in (tmp_path, checkpoint))
    for key in wanted.keys() - {"vision_config", "transformers_version", "_name_or_path"}:
        assert found[key] == wanted[key], key
    assert found["vision_config"].items() >= wanted["vision_config"].items()
    assert "text_config" not in found


def test_the_headless_model_is_saved_with_the_same_names(checkpoint, tmp_path):
    FM9GVModel.from_pretrained(checkpoint).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == weights_of(checkpoint).keys() - {"llm.lm_head.weight"}


@pytest.mark.parametrize("kept", ["llm.lm_head.weight", "llm.model.embed_tokens.weight"])
def test_fine_tuned_folders_store_the_tied_matrix_once(release, model, kept):
    weights = weights_of(release)
    (release / BIN).unlink()
    (release / "preprocessor_config.json").unlink()
    tied = {"llm.lm_head.weight", "llm.model.embed_tokens.weight"}
    kept_weights = {name: weight for name, weight in weights.items() if name not in tied or name == kept}
    save_file(kept_weights, release / "model.safetensors")
    assert_same_weights(FM9GVForConditionalGeneration.from_pretrained(release), model)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_shards(release, model, kind):
    weights = weights_of(release)
    weights.pop("llm.lm_head.weight")
    (release / BIN).unlink()
    names = sorted(weights)
    stem, save = ("pytorch_model", torch.save) if kind == "bin" else ("model", save_file)
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{number:05}-of-00002.{kind}"
        save({name: weights[name].clone() for name in part}, release / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (release / f"{stem}.{kind}.index.json").write_text(json.dumps(index), "utf-8")
    assert_same_weights(FM9GVForConditionalGeneration.from_pretrained(release), model)


def test_stored_tables_are_dropped(release, model):
    weights = weights_of(release)
    for layer in range(3):
        weights[f"llm.model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    weights["vpm.embeddings.position_ids"] = torch.zeros(1, 400, dtype=torch.long)
    torch.save(weights, release / BIN)
    assert_same_weights(FM9GVForConditionalGeneration.from_pretrained(release), model)


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("given", [True, ...])
def test_a_dropped_last_layer_of_the_tower(release, in_file, given):
    """The class default of the key is true; whether the file still has the layer depends on who wrote it."""
    change_config(release, drop_vision_last_layer=given)
    weights = weights_of(release)
    if not in_file:
        torch.save({name: weight for name, weight in weights.items() if not name.startswith(LAST_LAYER)}, release / BIN)
    loaded = FM9GVForConditionalGeneration.from_pretrained(release)
    assert len(loaded.model.vision_tower.encoder.layers) == 1
    assert loaded.config.vision_config.num_hidden_layers == 2
    assert loaded.config.to_release_dict()["vision_config"]["num_hidden_layers"] == 2


def test_a_head_of_its_own(release):
    change_config(release, tie_word_embeddings=False)
    weights = weights_of(release)
    weights["llm.lm_head.weight"] = weights["llm.lm_head.weight"] * 2
    torch.save(weights, release / BIN)
    loaded = FM9GVForConditionalGeneration.from_pretrained(release)
    assert torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight * 2)
    loaded.save_pretrained(release / "again")
    again = FM9GVForConditionalGeneration.from_pretrained(release / "again")
    assert torch.equal(again.lm_head.weight, loaded.lm_head.weight)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_refused_by_name(release, change):
    weights = weights_of(release)
    name = "resampler.attn.in_proj_weight"
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        weights[name := "resampler.kv_proj.weight"] = torch.zeros(64, 144)
    else:
        weights[name] = weights[name][:-1]
    torch.save(weights, release / BIN)
    wanted = "multi_modal_projector.attn.in_proj_weight" if change == "missing" else name
    with pytest.raises(CheckpointError, match=re.escape(wanted)):
        FM9GVForConditionalGeneration.from_pretrained(release)


def test_a_config_without_optional_keys(release, model):
    keys = ("use_image_id", "vision_batch_size", "tie_word_embeddings", "torch_dtype", "auto_map", "use_cache")
    change_config(release, **dict.fromkeys(keys, ...), slice_config={"max_slice_nums": 9, "patch_size": 14})
    config = FM9GVConfig.from_pretrained(release)
    assert (config.scale_resolution, config.max_slices, config.use_image_id) == (448, 9, True)
    assert_same_weights(FM9GVForConditionalGeneration.from_pretrained(release), model)


def test_a_config_of_another_network_is_refused(release):
    change_config(release, query_num=15)
    with pytest.raises(CheckpointError, match="query_num"):
        FM9GVConfig.from_pretrained(release)


def test_adapters_go_to_the_language_model_and_merge(checkpoint, cases):
    peft = pytest.importorskip("peft")
    model = FM9GVForConditionalGeneration.from_pretrained(checkpoint)
    config = peft.LoraConfig(r=2, target_modules=SPECS[0].lora_target_modules, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    targets = {
        name.removeprefix("base_model.model.") for name, part in adapted.named_modules() if hasattr(part, "lora_A")
    }
    assert len(targets) == 3 * 8
    assert all(name.startswith("model.language_model.layers.") for name in targets)
    batch = next(cases("tiny_image")).batch
    adapted.eval()
    with torch.no_grad():
        wanted = adapted(**batch).logits
        found = adapted.merge_and_unload()(**batch).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


# The released sizes, from the table of its files.

RELEASE = {
    "architectures": ["FM9GV"], "model_type": "fm9gv", "vocab_size": 73448, "hidden_size": 2560,
    "intermediate_size": 6400, "num_hidden_layers": 62, "num_attention_heads": 40, "num_key_value_heads": 40,
    "q_lora_rank": 768, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "head_dim": 96, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32768, "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "longrope", "original_max_position_embeddings": 32768,
        "long_factor": [1.0 + index for index in range(16)], "short_factor": [1.0 + index for index in range(16)],
    },
    "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "initializer_range": 0.1, "query_num": 64, "patch_size": 14, "image_size": 448, "slice_mode": True,
    "slice_config": {"max_slice_nums": 9, "patch_size": 14, "model_type": "fm9gv"}, "batch_vision_input": True,
    "drop_vision_last_layer": False, "torch_dtype": "bfloat16", "version": 2.6,
    "vision_config": {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 980, "patch_size": 14, "model_type": "siglip",
    },
}  # fmt: skip


def released_shapes() -> dict[str, list[int]]:
    """Every tensor of the released file, as its table writes them."""
    wide, vision = 2560, 1152
    shapes = {"llm.model.embed_tokens.weight": [73448, wide], "llm.lm_head.weight": [73448, wide]}
    shapes["llm.model.norm.weight"] = [wide]
    for layer in range(62):
        prefix = f"llm.model.layers.{layer}."
        attention = {
            "q_a_proj": [768, wide], "q_a_layernorm": [768], "q_b_proj": [3840, 768],
            "kv_a_proj_with_mqa": [288, wide], "kv_a_layernorm": [256], "kv_b_proj": [5120, 256],
            "o_proj": [wide, wide],
        }  # fmt: skip
        shapes |= {f"{prefix}self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": [6400, wide] for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = [wide, 6400]
        shapes |= {f"{prefix}{name}_layernorm.weight": [wide] for name in ("input", "post_attention")}
    shapes |= {"vpm.embeddings.patch_embedding.weight": [vision, 3, 14, 14]}
    shapes |= {"vpm.embeddings.patch_embedding.bias": [vision]}
    shapes |= {"vpm.embeddings.position_embedding.weight": [4900, vision]}
    both = ("weight", "bias")
    for layer in range(27):
        prefix = f"vpm.encoder.layers.{layer}."
        for name in ("q", "k", "v", "out"):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = [vision, vision]
            shapes[f"{prefix}self_attn.{name}_proj.bias"] = [vision]
        shapes |= {f"{prefix}layer_norm{number}.{kind}": [vision] for number in (1, 2) for kind in both}
        shapes |= {f"{prefix}mlp.fc1.weight": [4304, vision], f"{prefix}mlp.fc1.bias": [4304]}
        shapes |= {f"{prefix}mlp.fc2.weight": [vision, 4304], f"{prefix}mlp.fc2.bias": [vision]}
    shapes |= {f"vpm.post_layernorm.{kind}": [vision] for kind in both}
    shapes |= {f"resampler.{name}": [64, vision] for name in ("query", "pos_embed")}
    for scale in (1, 4):
        shapes[f"resampler.feature_{scale}x_embedding"] = [1, 1, vision]
        shapes[f"resampler.features_{scale}x_projector.weight"] = [vision, vision]
        shapes[f"resampler.features_{scale}x_projector.bias"] = [vision]
    shapes |= {"resampler.attn.in_proj_weight": [3456, vision], "resampler.attn.in_proj_bias": [3456]}
    shapes |= {"resampler.attn.out_proj.weight": [vision, vision], "resampler.attn.out_proj.bias": [vision]}
    shapes |= {f"resampler.ln_{name}.{kind}": [vision] for name in ("q", "kv", "proj", "post") for kind in both}
    shapes |= {"resampler.out_mlp.0.weight": [2304, vision], "resampler.out_mlp.0.bias": [2304]}
    shapes |= {"resampler.out_mlp.2.weight": [wide, 2304], "resampler.out_mlp.2.bias": [wide]}
    return {**shapes, "resampler.proj": [wide, wide]}


@pytest.fixture(scope="module")
def released() -> FM9GVForConditionalGeneration:
    with torch.device("meta"):
        return FM9GVForConditionalGeneration(FM9GVConfig.from_dict(RELEASE))


def test_every_tensor_of_the_release_has_its_place(released):
    stored = released_shapes()
    assert len(stored) == 1209
    found = {released.our_name(name): shape for name, shape in stored.items()}
    assert found == {name: list(weight.shape) for name, weight in released.state_dict().items()}


def test_parts_have_the_numbers_of_parameters_of_the_release(released):
    parts = SPECS[0].parts
    counts = dict.fromkeys(parts, 0)
    released.tie_weights()
    for name, weight in released.named_parameters():
        (part,) = [part for part, prefixes in parts.items() if name.startswith(prefixes)]
        counts[part] += weight.numel()
    stored = released_shapes()
    sizes = {prefix: 0 for prefix in ("llm.model.", "vpm.", "resampler.")}
    for name, shape in stored.items():
        for prefix in sizes:
            sizes[prefix] += torch.Size(shape).numel() * name.startswith(prefix)
    assert list(counts.values()) == list(sizes.values())
    assert sum(counts.values()) == 4_514_907_632


def test_the_released_config_is_written_as_it_was():
    config = FM9GVConfig.from_dict(RELEASE)
    found = config.to_release_dict()
    assert {key: found[key] for key in RELEASE if key != "vision_config"} == {
        key: value for key, value in RELEASE.items() if key != "vision_config"
    }
    text = config.get_text_config()
    assert text is config.text_config is not config.vision_config
    assert (text.head_dim, text.logits_divisor, config.image_token_id) == (96, 10.0, 0)


def test_generate_knows_where_an_answer_ends(checkpoint, model, processor, tmp_path):
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == [end, 2]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text("utf-8"))["eos_token_id"] == [end, 2]


def test_fresh_models_have_finite_weights_and_tables(checkpoint):
    config = FM9GVConfig.from_pretrained(checkpoint)
    with torch.random.fork_rng():
        fresh = FM9GVForConditionalGeneration._from_config(config)
    for name, weight in fresh.named_parameters():
        assert weight.isfinite().all() and weight.abs().max() < 10, name
    loaded = FM9GVForConditionalGeneration.from_pretrained(checkpoint)
    wanted = fresh.model.language_model.rotary_emb.inv_freq
    assert torch.equal(loaded.model.language_model.rotary_emb.inv_freq, wanted)
