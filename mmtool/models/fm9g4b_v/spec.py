"""The model type fm9g4b-v-chat, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmtool.models.common.layout import PARTS
from mmtool.spec import AutoClasses, ModelSpec

# Anchored to the language model: tower and resampler have linear layers of their own. The release's own target names
# (q_proj, k_proj, v_proj) do not exist in latent attention.
LORA_TARGETS = (
    r"^model\.language_model\.layers\.\d+\."
    r"(self_attn\.(q_a_proj|q_b_proj|q_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))$"
)


def is_fm9g4b_v(config: Mapping[str, Any]) -> bool:
    """Tell whether a ``config.json`` is one of this family."""
    if "mmtool_model_type" in config:
        return False
    return config.get("model_type") == "fm9gv" or "FM9GV" in (config.get("architectures") or ())


_FOLDER = "mmtool.models.fm9g4b_v."
_MODEL_CLASS = _FOLDER + "modeling_fm9g4b_v:FM9GVForConditionalGeneration"
_PROCESSOR_CLASS = _FOLDER + "processing_fm9g4b_v:FM9GVProcessor"

SPECS = (
    ModelSpec(
        model_type="fm9g4b-v-chat",
        family="fm9g4b_v",
        hf_id=None,
        ms_id=None,
        modalities=("image",),
        media_style="inline",
        template_type="fm9g4b-v",
        model_class=_MODEL_CLASS,
        processor_class=_PROCESSOR_CLASS,
        template_class=_FOLDER + "template:FM9GVTemplate",
        matches=is_fm9g4b_v,
        parts=PARTS,
        lora_target_modules=LORA_TARGETS,
        auto=AutoClasses(
            model_types={"fm9gv": is_fm9g4b_v},
            config_class=_FOLDER + "configuration_fm9g4b_v:FM9GVConfig",
            base_model_class=_FOLDER + "modeling_fm9g4b_v:FM9GVAutoModel",
            model_class=_MODEL_CLASS,
            heads=("AutoModelForImageTextToText", "AutoModelForCausalLM"),
            processor_class=_PROCESSOR_CLASS,
            image_processor_class=_FOLDER + "processing_fm9g4b_v:FM9GVImageProcessor",
            tokenizer_class=_FOLDER + "tokenization_fm9g4b_v:FM9GVTokenizer",
            architectures=("FM9GV",),
        ),
        description="FM9G4B-V (九格 4B-V): Chinese and English, several pictures, each in up to 10 slices",
        docs="models/fm9g4b-v.md",
    ),
)
