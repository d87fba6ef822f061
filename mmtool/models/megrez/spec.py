"""Model types of the Megrez family, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmtool.models.common.layout import LLM_QKV
from mmtool.spec import AutoClasses, ModelSpec

_ROPE_THETA, _VOCAB_SIZE = 5_000_000, 122_880


def is_megrez_omni(config: Mapping[str, Any]) -> bool:
    """Tell whether a ``config.json`` is that of Megrez-3B-Omni; before the release its ``model_type`` was ``llama``."""
    return "MegrezO" in (config.get("architectures") or ()) or config.get("model_type") == "megrezo"


def is_megrez_instruct(config: Mapping[str, Any]) -> bool:
    """Tell whether a ``config.json`` is that of Megrez-3B-Instruct, which calls itself a Llama like many others.

    Its vocabulary has a size of its own. So has no other Llama both a ``max_sequence_length`` and no token to begin
    with, at this base of the rotary angles.
    """
    if config.get("model_type") != "llama" or "LlamaForCausalLM" not in (config.get("architectures") or ()):
        return False
    return config.get("vocab_size") == _VOCAB_SIZE or (
        "max_sequence_length" in config
        and config.get("bos_token_id") is None
        and config.get("rope_theta") == _ROPE_THETA
    )


_FOLDER = "mmtool.models.megrez"
_OMNI_CLASS = f"{_FOLDER}.modeling_megrez:MegrezOmniForConditionalGeneration"
_OMNI_PROCESSOR = f"{_FOLDER}.processing_megrez:MegrezOProcessor"

SPECS = (
    ModelSpec(
        model_type="megrez-3b-omni",
        family="megrez",
        hf_id="Infinigence/Megrez-3B-Omni",
        ms_id="InfiniAI/Megrez-3B-Omni",
        modalities=("image", "audio"),
        media_style="round",
        template_type="megrez-omni",
        model_class=_OMNI_CLASS,
        processor_class=_OMNI_PROCESSOR,
        template_class=f"{_FOLDER}.template:MegrezOmniTemplate",
        matches=lambda config: "mmtool_model_type" not in config and is_megrez_omni(config),
        parts={
            "llm": ("model.language_model", "lm_head"),
            "vision_encoder": ("model.vision_tower",),
            "vision_proj": ("model.resampler",),
            "audio_encoder": ("model.audio_tower",),
            "audio_proj": ("model.audio_projector",),
        },
        lora_target_modules=LLM_QKV,
        auto=AutoClasses(
            model_types={"megrezo": is_megrez_omni},
            config_class=f"{_FOLDER}.configuration_megrez:MegrezOmniConfig",
            base_model_class=f"{_FOLDER}.modeling_megrez:MegrezOmniModel",
            model_class=_OMNI_CLASS,
            heads=("AutoModelForImageTextToText", "AutoModelForCausalLM"),
            tokenizer_class=f"{_FOLDER}.processing_megrez:MegrezTokenizer",
            architectures=("MegrezO",),
            processor_class=_OMNI_PROCESSOR,
            image_processor_class=f"{_FOLDER}.processing_megrez:MegrezOImageProcessor",
            feature_extractor_class=f"{_FOLDER}.processing_megrez:MegrezFeatureExtractor",
        ),
        description="Megrez-3B-Omni: Chinese and English; pictures in slices, up to 30 seconds of sound",
        docs="models/megrez-3b-omni.md",
    ),
    ModelSpec(
        model_type="megrez-3b-instruct",
        family="megrez",
        hf_id="Infinigence/Megrez-3B-Instruct",
        ms_id="InfiniAI/Megrez-3b-Instruct",
        modalities=(),
        media_style="none",
        template_type="megrez",
        model_class=f"{_FOLDER}.modeling_megrez:MegrezInstructForCausalLM",
        processor_class=f"{_FOLDER}.processing_megrez:MegrezInstructProcessor",
        template_class=f"{_FOLDER}.template:MegrezTemplate",
        matches=lambda config: "mmtool_model_type" not in config and is_megrez_instruct(config),
        parts={"llm": ("model", "lm_head")},
        lora_target_modules=r"^model\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)$",
        gguf="mmtool.models.common.gguf:llama",
        description="Megrez-3B-Instruct: Chinese and English text, 32k positions",
        docs="models/megrez-3b-instruct.md",
    ),
)
