"""Model types of the InternLM-XComposer2 family, as data: 2.0 at 224 and 490 px, 4KHD, and 2.5."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mmtool.models.common.layout import PARTS
from mmtool.spec import AutoClasses, ModelSpec

_COMPOSER = "InternLMXComposer2ForCausalLM"
_VL_IMAGE_SIZE = 490  # the 7b chat release has 224


def is_xcomposer2(config: Mapping[str, Any]) -> bool:
    """Tell whether a ``config.json`` is of this family.

    4KHD names the network of plain InternLM2; then the code that the folder would load tells, or the hard limit
    ``max_length``, which a plain InternLM2 does not have.
    """
    if config.get("model_type") in ("internlm_xcomposer2", "internlmxcomposer2"):
        return True
    architectures = config.get("architectures") or ()
    if _COMPOSER in architectures:
        return True
    if config.get("model_type") != "internlm2" or "InternLM2ForCausalLM" not in architectures:
        return False
    code = json.dumps(config.get("auto_map") or {}).lower()
    return "xcomposer2" in code if code != "{}" else "max_length" in config


def variant_of(config: Mapping[str, Any]) -> str:
    """Return ``2.0``, ``4khd`` or ``2.5`` for a ``config.json`` of this family.

    A fine-tuned 4KHD that was saved under the name of the composer class looks like 2.5 here, unless the file still
    says what it was made from. Its weights tell the two apart, and the template then says which type to pass.
    """
    if config.get("model_type") == "internlm_xcomposer2":
        return config.get("variant", "2.0")
    if config.get("model_type") == "internlmxcomposer2" or config.get("img_size") is not None:
        return "2.0"
    origin = str(config.get("_name_or_path") or "").lower()
    if "4khd" in origin or _COMPOSER not in (config.get("architectures") or ()):
        return "4khd"
    return "2.5"


def _image_size(config: Mapping[str, Any]) -> int:
    vision = config.get("vision_config") or {}
    return config.get("img_size") or vision.get("image_size") or 0


def _matches(config: Mapping[str, Any], variant: str, vl: bool) -> bool:
    if "mmtool_model_type" in config or not is_xcomposer2(config) or variant_of(config) != variant:
        return False
    return variant != "2.0" or (_image_size(config) >= _VL_IMAGE_SIZE) == vl


_PACKAGE = "mmtool.models.internlm_xcomposer2"
_MODEL_CLASS = f"{_PACKAGE}.modeling_internlm_xcomposer2:XComposer2ForConditionalGeneration"
_PROCESSOR_CLASS = f"{_PACKAGE}.processing_internlm_xcomposer2:XComposer2Processor"
# The base matrices alone: the low-rank paths beside them (`wqkv_branch` and so on) must stay as they are.
_LORA_TARGETS = r"^model\.language_model\.layers\.\d+\.(attention\.(wqkv|wo)|feed_forward\.(w1|w2|w3))$"
_AUTO = AutoClasses(
    model_types={name: is_xcomposer2 for name in ("internlm_xcomposer2", "internlmxcomposer2", "internlm2")},
    config_class=f"{_PACKAGE}.configuration_internlm_xcomposer2:XComposer2Config",
    base_model_class=f"{_PACKAGE}.modeling_internlm_xcomposer2:XComposer2Model",
    model_class=_MODEL_CLASS,
    heads=("AutoModelForImageTextToText", "AutoModelForCausalLM"),
    processor_class=_PROCESSOR_CLASS,
    image_processor_class=f"{_PACKAGE}.processing_internlm_xcomposer2:XComposer2ImageProcessor",
    tokenizer_class=f"{_PACKAGE}.tokenization_internlm_xcomposer2:InternLM2Tokenizer",
    architectures=(_COMPOSER,),
)


VARIANT_OF_TYPE: Mapping[str, str] = {
    "internlm-xcomposer2-7b-chat": "2.0",
    "internlm-xcomposer2-vl-7b-chat": "2.0",
    "internlm-xcomposer2-4khd-7b-chat": "4khd",
    "internlm-xcomposer2_5-7b-chat": "2.5",
}


def _spec(model_type: str, repository: str, template: str, description: str, vl: bool = False) -> ModelSpec:
    variant = VARIANT_OF_TYPE[model_type]
    return ModelSpec(
        model_type=model_type,
        family="internlm_xcomposer2",
        hf_id=f"internlm/{repository}",
        ms_id=f"Shanghai_AI_Laboratory/{repository}",
        modalities=("image",),
        media_style="inline",
        template_type=model_type.removesuffix("-7b-chat"),
        model_class=_MODEL_CLASS,
        processor_class=_PROCESSOR_CLASS,
        template_class=f"{_PACKAGE}.template:{template}",
        matches=lambda config: _matches(config, variant, vl),
        refine=f"{_PACKAGE}.configuration_internlm_xcomposer2:refine",
        parts=PARTS,
        lora_target_modules=_LORA_TARGETS,
        auto=_AUTO,
        description=description,
        docs="models/internlm-xcomposer2_5.md" if variant == "2.5" else "models/internlm-xcomposer2.md",
    )


SPECS = (
    _spec(
        "internlm-xcomposer2-7b-chat",
        "internlm-xcomposer2-7b",
        "XComposer2Template",
        "InternLM-XComposer2 7B: English and Chinese, pictures at 224 px anywhere in the text",
    ),
    _spec(
        "internlm-xcomposer2-vl-7b-chat",
        "internlm-xcomposer2-vl-7b",
        "XComposer2VLTemplate",
        "InternLM-XComposer2-VL 7B: the same at 490 px",
        vl=True,
    ),
    _spec(
        "internlm-xcomposer2-4khd-7b-chat",
        "internlm-xcomposer2-4khd-7b",
        "XComposer24KHDTemplate",
        "InternLM-XComposer2-4KHD 7B: a picture in up to 25 tiles of 336 px",
    ),
    _spec(
        "internlm-xcomposer2_5-7b-chat",
        "internlm-xcomposer2d5-7b",
        "XComposer25Template",
        "InternLM-XComposer2.5 7B: a picture in up to 24 tiles of 560 px, several in up to 6",
    ),
)
