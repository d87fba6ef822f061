"""Where the parts of a vision-language model sit among its modules, for families that use the usual names."""

from __future__ import annotations

from collections.abc import Mapping

PARTS: Mapping[str, tuple[str, ...]] = {
    "llm": ("model.language_model", "lm_head"),
    "vision_encoder": ("model.vision_tower",),
    "vision_proj": ("model.multi_modal_projector",),
}

# Anchored to the language model: the vision tower's attention has q_proj, k_proj and v_proj as well.
LLM_QKV = r"^model\.language_model\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)$"
