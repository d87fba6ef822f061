"""Model types of the FM9G text family, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmtool.spec import AutoClasses, ModelSpec

_NAMES = ("fm9g", "fm9g3", "fm9g7b")  # values of model_type; fm9gv is the model that sees
_VOCAB_2B, _VOCAB_8B = 122753, 119696
_LARGE_HIDDEN_SIZE, _LARGE_NUM_LAYERS = 8192, 80


def is_fm9g(config: Mapping[str, Any]) -> bool:
    """Tell whether a ``config.json`` is that of an FM9G text model."""
    return config.get("model_type") in _NAMES or "FM9GForCausalLM" in (config.get("architectures") or ())


def size_of(config: Mapping[str, Any]) -> str | None:
    """Return the size that a ``config.json`` is closest to, None if it is no FM9G text model.

    The old sizes have vocabularies of their own, and with them a chat format of their own. The name that the 8B goes
    by is not known, so its vocabulary alone tells.
    """
    if "text_config" in config or "vision_config" in config:
        return None
    vocab_size, hidden_size = config.get("vocab_size"), config.get("hidden_size", 0)
    if vocab_size == _VOCAB_8B:
        return "8b"
    if not is_fm9g(config):
        return None
    if vocab_size == _VOCAB_2B:
        return "2b"
    if hidden_size >= _LARGE_HIDDEN_SIZE or config.get("num_hidden_layers", 0) >= _LARGE_NUM_LAYERS:
        return "70b"
    return "7b" if config["model_type"] == "fm9g7b" else "4b"


def _matches(size: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda config: "mmtool_model_type" not in config and size_of(config) == size


_MODEL_CLASS = "mmtool.models.fm9g.modeling_fm9g:FM9GForCausalLM"
_AUTO = AutoClasses(
    model_types=dict.fromkeys(_NAMES, is_fm9g),
    config_class="mmtool.models.fm9g.configuration_fm9g:FM9GConfig",
    base_model_class="mmtool.models.fm9g.modeling_fm9g:FM9GModel",
    model_class=_MODEL_CLASS,
    heads=("AutoModelForCausalLM",),
    processor_class=None,
    image_processor_class=None,
    tokenizer_class="mmtool.models.fm9g.tokenization_fm9g:FM9GTokenizer",
)


def _spec(size: str, description: str, old: bool = False) -> ModelSpec:
    return ModelSpec(
        model_type=f"fm9g-{size}-chat",
        family="fm9g",
        hf_id=None,
        ms_id=None,
        modalities=(),
        media_style="none",
        template_type="fm9g-old" if old else "fm9g",
        model_class=_MODEL_CLASS,
        processor_class="mmtool.models.fm9g.processing_fm9g:FM9GProcessor",
        template_class=f"mmtool.models.fm9g.template:{'FM9GOldTemplate' if old else 'FM9GTemplate'}",
        matches=_matches(size),
        parts={"llm": ("model", "lm_head")},
        # q, k and v of grouped attention, the two steps of each in latent attention, and the way out of both.
        lora_target_modules=(
            r"^model\.layers\.\d+\.self_attn\."
            r"(q_proj|k_proj|v_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)$"
        ),
        gguf="mmtool.models.fm9g.gguf_fm9g:layout",
        auto=_AUTO,
        description=description,
        docs="models/fm9g.md",
    )


SPECS = (
    _spec("4b", "FM9G 4B: Chinese and English text; grouped attention, 32k positions"),
    _spec("7b", "FM9G 7B: Chinese and English text, 32k positions"),
    _spec("70b", "FM9G 70B: Chinese and English text, 32k positions"),
    _spec("2b", "FM9G 2B of 2024: Chinese and English text, 4k positions", old=True),
    _spec("8b", "FM9G 8B of 2024: Chinese and English text, a tokenizer of its own", old=True),
)
