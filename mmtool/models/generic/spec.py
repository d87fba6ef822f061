"""The model type of everything that no family claims: what it really is, its folder says."""

from __future__ import annotations

from mmtool.spec import ModelSpec

# Used until a model is loaded; ``layout`` then finds the real ones. The names are those of most models in transformers.
_PARTS = {
    "llm": ("model.language_model", "model.text_model", "model.layers", "model.embed_tokens", "model.norm", "lm_head"),
    "vision_encoder": ("model.visual", "model.vision_tower", "model.vision_model"),
    "vision_proj": ("model.multi_modal_projector", "model.connector"),
    "audio_encoder": ("model.audio_tower",),
}

SPECS = (
    ModelSpec(
        model_type="auto",
        family="generic",
        hf_id=None,
        ms_id=None,
        modalities=("image", "audio"),
        media_style="inline",
        template_type="auto",
        model_class="mmtool.models.generic.loading:AutoNative",
        processor_class="mmtool.models.generic.loading:AutoNativeProcessor",
        template_class="mmtool.models.generic.template:AutoTemplate",
        matches=lambda config: isinstance(config.get("model_type"), str),
        refine="mmtool.models.generic.loading:refine_spec",
        layout="mmtool.models.generic.layout:find_layout",
        gguf="mmtool.models.generic.gguf:layout",
        parts=_PARTS,
        lora_target_modules=r"(model\.(language_model\.|text_model\.)?layers\..*)_proj",
        description="any model of transformers that answers text, images or sounds, by its own chat template",
        docs="models/auto.md",
    ),
)
