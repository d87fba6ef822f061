"""The table of models and everything derived from it."""

import re
from pathlib import Path

import pytest

from mmtool.errors import CheckpointError, MMToolError
from mmtool.registry import (
    MODELS,
    TEMPLATES,
    ModelType,
    detect_model_type,
    get_default_template_type,
    get_model_spec,
    get_template_class,
)
from mmtool.utils import import_object

YI_6B = {
    "model_type": "llava",
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_projector_type": "mlp2x_gelu_Norm",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
}


@pytest.mark.parametrize("model_type", MODELS)
def test_every_class_path_resolves(model_type: str) -> None:
    spec = MODELS[model_type]
    for path in (spec.model_class, spec.processor_class, spec.template_class):
        assert isinstance(import_object(path), type)


@pytest.mark.parametrize("model_type", MODELS)
def test_every_entry_is_complete(model_type: str) -> None:
    spec = MODELS[model_type]
    assert spec.model_type == model_type
    assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*", model_type)
    assert spec.description
    assert spec.embedded or spec.hf_id or spec.docs  # without an id, the page says where the weights are
    assert spec.media_style in ("round", "inline", "none")
    assert get_template_class(get_default_template_type(model_type)) == spec.template_class
    re.compile(spec.lora_target_modules)
    folder = Path(__file__).parent.parent / "mmtool" / "models" / spec.family
    assert (folder / "spec.py").is_file()


def test_no_two_families_share_a_type_and_one_template_type_is_one_class() -> None:
    for spec in MODELS.values():
        assert TEMPLATES[spec.template_type] == spec.template_class


def test_model_types_are_attributes() -> None:
    assert ModelType.yi_vl_6b_chat == "yi-vl-6b-chat"
    assert ModelType.tiny == "tiny"
    assert list(ModelType) == list(MODELS)
    assert len(ModelType) == len(MODELS)
    assert "yi-vl-6b-chat" in ModelType
    assert {"yi_vl_6b_chat", "yi_vl_34b_chat", "tiny"} <= set(dir(ModelType))


def test_a_mistyped_attribute_gets_a_suggestion() -> None:
    with pytest.raises(AttributeError, match="did you mean yi_vl_6b_chat"):
        _ = ModelType.yi_vl_6b_caht
    assert not hasattr(ModelType, "zzz")


@pytest.mark.parametrize("word", ["yi_vl_6b_chat", "Yi-VL-6B-Chat", "yi-vl-6b", "yi-vl-6b-chta"])
def test_a_mistyped_model_type_gets_a_suggestion(word: str) -> None:
    with pytest.raises(MMToolError, match=f"unknown model_type '{word}'") as caught:
        get_model_spec(word)
    assert caught.value.hint == "Did you mean yi-vl-6b-chat?"


def test_a_mistyped_template_type_gets_a_suggestion() -> None:
    with pytest.raises(MMToolError, match="unknown template_type 'yi_vl'") as caught:
        get_template_class("yi_vl")
    assert caught.value.hint == "Did you mean yi-vl?"


@pytest.mark.parametrize(
    ("config", "model_type"),
    [
        (YI_6B, "yi-vl-6b-chat"),
        (YI_6B | {"hidden_size": 7168, "num_hidden_layers": 60}, "yi-vl-34b-chat"),
        (YI_6B | {"mmtool_model_type": "tiny"}, "tiny"),
        ({"mmtool_model_type": "tiny"}, "tiny"),
        ({"model_type": "qwen2"}, "auto"),
        (YI_6B | {"mm_projector_type": "mlp2x_gelu"}, "auto"),
        ({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": {}}, "auto"),
    ],
)
def test_the_type_is_told_from_the_config(config: dict, model_type: str) -> None:
    assert detect_model_type(config, "folder") == model_type


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": None},
        {"architectures": ["LlavaForConditionalGeneration"], "text_config": {}},
    ],
)
def test_an_unknown_config_is_an_error_that_shows_what_was_found(config: dict) -> None:
    with pytest.raises(CheckpointError, match="cannot tell which model some/folder holds") as caught:
        detect_model_type(config, "some/folder")
    assert repr(config.get("model_type")) in caught.value.message
    assert "--model_type" in str(caught.value.hint)


def test_an_unknown_name_in_the_config_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="unknown mmtool_model_type 'tinny'") as caught:
        detect_model_type({"mmtool_model_type": "tinny"}, "folder")
    assert caught.value.hint == "Did you mean tiny?"
