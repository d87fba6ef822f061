"""FM9GVConfig: text and vision parts nested, read from the flat ``config.json`` of a release, written flat again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import __version__
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig

from mmtool.errors import CheckpointError
from mmtool.models.common.configuration import INTERNAL_KEYS, ReleaseConfig, released_rope
from mmtool.models.common.folders import given
from mmtool.models.common.mla import MLAConfig

DEFAULT_SCALE_RESOLUTION, DEFAULT_MAX_SLICES = 448, 9
# The tower of the release, for a config.json without vision_config.
_DEFAULT_VISION = {
    **{"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16},
    **{"image_size": 980, "patch_size": 14},
}
# Keys of a released config.json that belong to the language model; all others stay with the whole model.
_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range"),
    *("rms_norm_eps", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp"),
    *("rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "attention_dropout", "mlp_bias"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("scale_emb", "scale_depth", "dim_model_base", "tie_word_embeddings"),
)
# Of these, what a file leaves out where it says nothing.
_OPTIONAL_TEXT_KEYS = ("pad_token_id", "mlp_bias", "v_head_dim", "rope_parameters")
_INTERNAL_KEYS = (*INTERNAL_KEYS, "dtype")


class FM9GVTextConfig(MLAConfig):
    """Configuration of the decoder; the fields stand in ``MLAConfig``, the defaults are the release's."""

    model_type = "fm9gv_text"
    base_config_key = "text_config"

    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True


class FM9GVConfig(ReleaseConfig):
    """Configuration of an FM9G4B-V model; the other fields carry the released names and defaults.

    Args:
        text_config: the language model, an ``FM9GVTextConfig`` or its dict.
        vision_config: the vision tower as released, a ``SiglipVisionConfig`` or its dict.
        image_token_id: id at every position of a feature: that of ``<unk>``, which no text gives.
        query_num: positions that a slice takes, a square number.
        drop_vision_last_layer: the last layer of the tower does not exist.
        slice_mode: cut large pictures into tiles.
        slice_config: ``max_slice_nums``, ``scale_resolution`` and ``patch_size`` of the tiles.
        use_image_id: number the pictures of a conversation.
    """

    model_type = "fm9gv"
    tokenizer_class: ClassVar = "FM9GVTokenizer"  # for a folder whose files name none
    sub_configs: ClassVar = {"text_config": FM9GVTextConfig, "vision_config": SiglipVisionConfig}
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    text_config: dict | FM9GVTextConfig | None = None
    vision_config: dict | SiglipVisionConfig | None = None
    image_token_id: int = 0
    query_num: int = 64
    patch_size: int = 14
    image_size: int = 448
    drop_vision_last_layer: bool = True
    batch_vision_input: bool = True
    vision_batch_size: int = 16
    slice_mode: bool = True
    slice_config: dict | None = None
    use_image_id: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Complete what a release may leave out, and refuse what this network is not."""
        if self.vision_config is None:
            self.vision_config = _DEFAULT_VISION
        for name, config_class in self.sub_configs.items():
            part = getattr(self, name)
            if not isinstance(part, PreTrainedConfig):
                setattr(self, name, config_class(**(part or {})))
        super().__post_init__(**kwargs)
        if math.isqrt(self.query_num) ** 2 != self.query_num:
            raise CheckpointError(f"query_num is {self.query_num}, but the queries stand in a square")
        if self.text_config.kv_lora_rank is None:
            raise CheckpointError("config.json has no kv_lora_rank, but FM9G4B-V has latent attention")

    @property
    def num_vision_layers(self) -> int:
        """How many layers the vision tower has."""
        return self.vision_config.num_hidden_layers - bool(self.drop_vision_last_layer)

    @property
    def max_slices(self) -> int:
        """The most tiles of a picture."""
        return (self.slice_config or {}).get("max_slice_nums", DEFAULT_MAX_SLICES)

    @property
    def scale_resolution(self) -> int:
        """The side of a square with as many pixels as a slice has."""
        return (self.slice_config or {}).get("scale_resolution", DEFAULT_SCALE_RESOLUTION)

    @classmethod
    def nested(cls, config: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
        """Return the settings of a released ``config.json``, text part apart; nested ones pass through."""
        if "text_config" in config:
            return dict(config)
        own = cls.own_settings(config, _TEXT_KEYS)
        text = given(config, _TEXT_KEYS, ("q_lora_rank",))  # without a rank, queries have one plain projection
        text["tie_word_embeddings"] = own["tie_word_embeddings"] = text.get("tie_word_embeddings", True)
        vision = own.get("vision_config")
        if isinstance(vision, Mapping):
            own["vision_config"] = {key: value for key, value in vision.items() if key in _vision_keys()}
        return own | {"text_config": text}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from nested settings, or from a released ``config.json``, which needs no other file."""
        return super().from_dict(cls.nested(config_dict, None), **kwargs)

    def to_release_dict(self) -> dict[str, Any]:
        """Return the settings as a release writes them: flat but for the vision tower, unknown keys kept."""
        settings = self.to_dict()
        own = {key: value for key, value in settings.items() if key not in _INTERNAL_KEYS and key[0] != "_"}
        text = self.text_config.to_dict()
        text |= released_rope(text["rope_parameters"]) | {"rope_parameters": None}
        flat = own | {
            key: text[key]
            for key in _TEXT_KEYS
            if key in text and not (key in _OPTIONAL_TEXT_KEYS and text[key] in (None, False))
        }
        for key in ("image_token_id", "tie_word_embeddings"):
            if flat[key] == type(self).__dataclass_fields__[key].default:
                del flat[key]
        vision = {key: value for key, value in settings["vision_config"].items() if key in _vision_keys()}
        return flat | {
            "architectures": ["FM9GV"],
            "model_type": self.model_type,
            "vision_config": {**vision, "model_type": "siglip"},
            "torch_dtype": settings.get("dtype") or "float32",
            "transformers_version": __version__,
        }


def _vision_keys() -> tuple[str, ...]:
    """Return the settings of a tower that a release may write."""
    inherited = PreTrainedConfig.__dataclass_fields__
    return tuple(
        name for name in SiglipVisionConfig.__dataclass_fields__ if name not in inherited and name != "vision_use_head"
    )
