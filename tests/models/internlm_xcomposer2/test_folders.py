"""Folders of InternLM-XComposer2: which type they are, other file formats and sizes, and what must be refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

import mmtool  # noqa: F401 - makes the Auto classes know the family
from mmtool.errors import CheckpointError
from mmtool.loader import open_folder
from mmtool.models.internlm_xcomposer2.configuration_internlm_xcomposer2 import XComposer2Config
from mmtool.models.internlm_xcomposer2.modeling_internlm_xcomposer2 import (
    XComposer2ForConditionalGeneration,
    XComposer2Model,
)
from mmtool.models.internlm_xcomposer2.tokenization_internlm_xcomposer2 import InternLM2Tokenizer
from mmtool.registry import MODELS, detect_model_type

Model = XComposer2ForConditionalGeneration
TYPES = {
    "internlm-xcomposer2": "internlm-xcomposer2-7b-chat",
    "internlm-xcomposer2/variant_4khd": "internlm-xcomposer2-4khd-7b-chat",
    "internlm-xcomposer2_5": "internlm-xcomposer2_5-7b-chat",
}
Release = Callable[[Any], Path]


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    files = [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    read = load_file if files[0].suffix == ".safetensors" else torch.load
    return {name: tensor for file in files for name, tensor in read(file).items()}


def rewrite(folder: Path, weights: dict[str, torch.Tensor], kind: str = "safetensors") -> None:
    """Replace the weight files by a single one."""
    for file in [*folder.glob("*.safetensors*"), *folder.glob("pytorch_model*")]:
        file.unlink()
    if kind == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    else:
        torch.save(weights, folder / "pytorch_model.bin")


def edit_config(folder: Path, **changes: Any) -> dict:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    config = {key: value for key, value in config.items() if value != "remove"}
    path.write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("family", TYPES)
def test_config_json_tells_the_type(family: str, xcomposer: Any) -> None:
    config = json.loads((xcomposer(family).checkpoint / "config.json").read_text())
    assert detect_model_type(config, "x") == TYPES[family]
    assert [name for name, spec in MODELS.items() if spec.matches(config)] == [TYPES[family], "auto"]
    assert open_folder(None, xcomposer(family).checkpoint)[0].model_type == TYPES[family]


def test_the_image_side_tells_vl_from_7b(plain: Any) -> None:
    config = json.loads((plain.checkpoint / "config.json").read_text())
    assert detect_model_type(config | {"img_size": 490}, "x") == "internlm-xcomposer2-vl-7b-chat"
    assert detect_model_type({**config, "auto_map": None}, "x") == "internlm-xcomposer2-7b-chat"


def test_plain_internlm2_is_another_model(hd: Any, release: Release) -> None:
    config = json.loads((hd.checkpoint / "config.json").read_text())
    code = {"AutoConfig": "configuration_internlm2.InternLM2Config"}
    for other in (
        config | {"auto_map": code},
        {k: v for k, v in config.items() if k not in ("auto_map", "max_length")},
    ):
        assert not any(spec.matches(other) for spec in MODELS.values() if spec.family == "internlm_xcomposer2")
    bare = {key: value for key, value in config.items() if key != "auto_map"}
    assert detect_model_type(bare, "x") == "internlm-xcomposer2-4khd-7b-chat"
    folder = release(hd)
    edit_config(folder, auto_map=code)
    with pytest.raises(CheckpointError, match="holds no InternLM-XComposer2"):
        XComposer2Config.from_pretrained(folder)


def test_the_weights_decide_where_config_json_cannot(hd: Any, release: Release) -> None:
    folder = release(hd)
    config = edit_config(folder, architectures=["InternLMXComposer2ForCausalLM"])  # as a fine-tuned copy is saved
    assert detect_model_type(config, folder) == "internlm-xcomposer2_5-7b-chat"
    assert open_folder(None, folder)[0].model_type == "internlm-xcomposer2-4khd-7b-chat"
    assert XComposer2Config.from_pretrained(folder).variant == "4khd"
    config |= {"_name_or_path": "internlm/internlm-xcomposer2-4khd-7b"}
    assert detect_model_type(config, folder) == "internlm-xcomposer2-4khd-7b-chat"


def test_another_type_than_the_folder_holds_is_refused(plain: Any, tiled: Any) -> None:
    with pytest.raises(CheckpointError, match=r"--model_type internlm-xcomposer2_5.* holds a internlm-xcomposer2-7b"):
        open_folder("internlm-xcomposer2_5-7b-chat", plain.checkpoint)
    with pytest.raises(CheckpointError, match=r"holds a internlm-xcomposer2_5-7b-chat"):
        open_folder("internlm-xcomposer2-4khd-7b-chat", tiled.checkpoint)
    assert open_folder("internlm-xcomposer2_5-7b-chat", tiled.checkpoint)[0].model_type.startswith(
        "internlm-xcomposer2_5"
    )


@pytest.mark.parametrize("family", TYPES)
def test_saved_and_loaded_again_it_is_the_release(family: str, xcomposer: Any, tmp_path: Path) -> None:
    golden = xcomposer(family)
    golden.model.save_pretrained(tmp_path)
    golden.processor.save_pretrained(tmp_path)
    written, released = weights_in(tmp_path), weights_in(golden.checkpoint)
    assert written.keys() == released.keys()
    assert all(torch.equal(written[name], released[name]) for name in released)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (golden.checkpoint, tmp_path))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed <= {"transformers_version", "use_cache", "attn_implementation"}, "false in the release"
    again = Model.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), golden.model.state_dict().values(), strict=True)
    )
    assert open_folder(None, tmp_path)[0].model_type == TYPES[family]
    headless = XComposer2Model.from_pretrained(tmp_path)
    headless.save_pretrained(tmp_path / "headless")
    assert weights_in(tmp_path / "headless").keys() == released.keys() - {"output.weight"}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_one_file_with_what_old_checkpoints_store_beside_the_weights(plain: Any, release: Release, kind: str) -> None:
    folder, weights = release(plain), weights_in(plain.checkpoint)
    tower = "vit.vision_tower.vision_model."
    weights |= {
        f"{tower}post_layernorm.weight": torch.ones(128), f"{tower}post_layernorm.bias": torch.zeros(128),
        f"{tower}embeddings.position_ids": torch.arange(257),
        "model.layers.0.attention.rotary_emb.inv_freq": torch.ones(8),
        "video_mem_proj.0.weight": torch.ones(4, 4), "video_mem_proj.2.bias": torch.ones(4),
    }  # fmt: skip
    rewrite(folder, weights, kind)
    loaded = Model.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in plain.model.state_dict().items())


def test_a_checkpoint_without_task_weights_is_like_omnilive(tiled: Any, release: Release) -> None:
    folder = release(tiled)
    rewrite(folder, {name: tensor for name, tensor in weights_in(folder).items() if ".lora_" not in name})
    model = Model.from_pretrained(folder)
    assert not model.config.task_loras
    assert torch.equal(
        model.model.multi_modal_projector.plora_glb_GN, tiled.model.model.multi_modal_projector.plora_glb_GN
    )


def test_other_sizes_are_read_from_the_shapes(release: Release, plain: Any, tmp_path: Path) -> None:
    text = {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 1179, "attention_bias": True,
        "plora_ranks": {"wqkv": 4, "wo": 6, "w1": 6, "w2": 6, "w3": 10},
    }  # fmt: skip
    vision = {
        "hidden_size": 192, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 3,
        "image_size": 70, "patch_size": 14,
    }  # fmt: skip
    config = XComposer2Config(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = Model(config).eval()
    model.save_pretrained(tmp_path / "other")
    read = XComposer2Config.from_pretrained(tmp_path / "other")
    assert read.text_config.plora_ranks == text["plora_ranks"]
    assert read.text_config.attention_bias
    assert {key: getattr(read.vision_config, key) for key in vision} == vision
    again = Model.from_pretrained(tmp_path / "other")
    ids, pixels = torch.tensor([[1, *[258] * 25, 400]]), torch.randn(1, 3, 70, 70)
    with torch.no_grad():
        assert torch.equal(again(ids, pixels).logits, model(ids, pixels).logits)


def test_rope_without_scaling(plain: Any, release: Release) -> None:
    folder = release(plain)
    edit_config(folder, rope_scaling=None)
    assert not Model.from_pretrained(folder).model.language_model.rotary.dynamic
    edit_config(folder, rope_scaling={"type": "yarn", "factor": 2.0})
    with pytest.raises((CheckpointError, KeyError, ValueError)):
        Model.from_pretrained(folder)


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "num_key_value_heads", "max_position_embeddings"])
def test_settings_whose_defaults_are_another_models_must_be_there(plain: Any, release: Release, key: str) -> None:
    folder = release(plain)
    edit_config(folder, **{key: "remove"})
    with pytest.raises(CheckpointError, match=f"lacks {key}"):
        XComposer2Config.from_pretrained(folder)


def test_settings_that_weights_or_releases_tell_may_be_missing(plain: Any, release: Release) -> None:
    folder = release(plain)
    edit_config(
        folder, **dict.fromkeys(("bias", "img_size", "max_length", "hidden_act", "tie_word_embeddings"), "remove")
    )
    config = XComposer2Config.from_pretrained(folder)
    assert (config.vision_config.image_size, config.text_config.max_sequence_length) == (224, 4096)
    assert not config.text_config.attention_bias


def test_an_image_side_that_the_weights_do_not_have_is_refused(plain: Any, release: Release) -> None:
    folder = release(plain)
    edit_config(folder, img_size=490)
    with pytest.raises(CheckpointError, match="490, but the position table is made for 224"):
        Model.from_pretrained(folder)


def test_missing_and_unknown_weights_are_named(plain: Any, release: Release) -> None:
    folder, weights = release(plain), weights_in(plain.checkpoint)
    missing = {name: tensor for name, tensor in weights.items() if "layers.1.feed_forward.w3.Plora_B" not in name}
    rewrite(folder, missing | {"surprise.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"missing .*w3_branch.Plora_B.*unexpected \(surprise.weight\)"):
        Model.from_pretrained(folder)


def test_a_tied_head_needs_no_copy(plain: Any, release: Release) -> None:
    folder, weights = release(plain), weights_in(plain.checkpoint)
    rewrite(folder, {name: tensor for name, tensor in weights.items() if name != "output.weight"})
    edit_config(folder, tie_word_embeddings=True)
    model = Model.from_pretrained(folder)
    assert model.lm_head.weight is model.model.language_model.tok_embeddings.weight


def test_the_auto_classes_know_the_folder(hd: Any, tiled: Any) -> None:
    config = AutoConfig.from_pretrained(hd.checkpoint)
    assert isinstance(config, XComposer2Config)
    assert isinstance(AutoModelForCausalLM.from_pretrained(hd.checkpoint), Model)
    for folder in (hd.checkpoint, tiled.checkpoint):  # they name their tokenizer differently
        assert isinstance(AutoTokenizer.from_pretrained(folder), InternLM2Tokenizer)
    processor = AutoProcessor.from_pretrained(hd.checkpoint)
    assert (processor.variant, processor.image_processor.hd_num) == ("4khd", 25)
