"""Model types of the Yi-VL family, as data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from mmtool.models.common.layout import LLM_QKV, PARTS
from mmtool.spec import AutoClasses, ModelSpec

# The 34B release has hidden size 7168 and 60 layers, the 6B one 4096 and 32; anything smaller counts as 6B.
_LARGE_HIDDEN_SIZE, _LARGE_NUM_LAYERS = 7168, 60


def is_yi_vl(config: Mapping[str, Any]) -> bool:
    """Tell whether a ``config.json`` is a Yi-VL release, which says ``model_type: llava`` like unrelated models do.

    The projector with norms decides. Where the key is missing, a vision tower inside the folder does, which LLaVA
    releases do not have.
    """
    if config.get("model_type") == "yi_vl":
        return True
    if "text_config" in config:  # the nested configs of transformers
        return False
    projector = config.get("mm_projector_type")
    if projector is not None:
        return projector.endswith("_Norm")
    if "LlavaLlamaForCausalLM" not in (config.get("architectures") or ()):
        return False
    tower = config.get("mm_vision_tower")
    return tower is None or PurePosixPath(tower).parent.name == "vit"


def _is_large(config: Mapping[str, Any]) -> bool:
    text = config.get("text_config", config)
    hidden_size, num_layers = text.get("hidden_size", 0), text.get("num_hidden_layers", 0)
    return hidden_size >= _LARGE_HIDDEN_SIZE or num_layers >= _LARGE_NUM_LAYERS


def _matches(config: Mapping[str, Any], large: bool) -> bool:
    return "mmtool_model_type" not in config and is_yi_vl(config) and _is_large(config) == large


_MODEL_CLASS = "mmtool.models.yi_vl.modeling_yi_vl:YiVLForConditionalGeneration"
_PROCESSOR_CLASS = "mmtool.models.yi_vl.processing_yi_vl:YiVLProcessor"
_AUTO = AutoClasses(
    model_types={"yi_vl": is_yi_vl, "llava": is_yi_vl},
    config_class="mmtool.models.yi_vl.configuration_yi_vl:YiVLConfig",
    base_model_class="mmtool.models.yi_vl.modeling_yi_vl:YiVLModel",
    model_class=_MODEL_CLASS,
    heads=("AutoModelForImageTextToText", "AutoModelForCausalLM"),
    processor_class=_PROCESSOR_CLASS,
    image_processor_class="mmtool.models.yi_vl.processing_yi_vl:YiVLImageProcessor",
    tokenizer_class="mmtool.models.common.tokenization:SentencePieceTokenizer",
    architectures=("LlavaLlamaForCausalLM",),
)


def _spec(size: str, large: bool) -> ModelSpec:
    return ModelSpec(
        model_type=f"yi-vl-{size.lower()}-chat",
        family="yi_vl",
        hf_id=f"01-ai/Yi-VL-{size}",
        ms_id=f"01ai/Yi-VL-{size}",
        modalities=("image",),
        media_style="round",
        template_type="yi-vl",
        model_class=_MODEL_CLASS,
        processor_class=_PROCESSOR_CLASS,
        template_class="mmtool.models.yi_vl.template:YiVLTemplate",
        matches=lambda config: _matches(config, large),
        parts=PARTS,
        lora_target_modules=LLM_QKV,
        auto=_AUTO,
        description=f"Yi-VL {size}: English and Chinese, pictures at 448 px",
        docs="models/yi-vl.md",
    )


SPECS = (_spec("6B", large=False), _spec("34B", large=True))
