"""MegrezOmniConfig: text, vision and audio parts nested, read from the flat ``config.json`` of a release and written
as one again. MegrezInstructConfig is Llama's, written as that release does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import __version__
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig

from mmtool.errors import CheckpointError
from mmtool.models.common.configuration import INTERNAL_KEYS, ReleaseConfig, released_rope
from mmtool.models.common.folders import dump_json, given
from mmtool.models.megrez.tokens import DEFAULT_IDS, token_ids

# Keys of a released config.json that belong to the language model; all others stay with the whole model.
_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "max_sequence_length"),
    *("initializer_range", "rms_norm_eps", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("pretraining_tp", "rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "attention_dropout"),
    *("mlp_bias", "tie_word_embeddings"),
)
# Of these, where null says that there is no such token, or no scaling.
_NULL_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "rope_scaling", "head_dim")
_AUDIO_KEYS = ("n_mels", "n_ctx", "n_state", "n_head", "n_layer", "output_dim", "avg_pool", "add_audio_bos_eos_token")
_VISION_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size"),
    *("patch_size", "hidden_act", "layer_norm_eps", "attention_dropout"),
)


class MegrezAudioConfig(PreTrainedConfig):
    """The audio encoder, by the names of the release, which are those of OpenAI's Whisper.

    Args:
        n_mels: mel bands.
        n_ctx: most positions after the convolutions; the audio tokens of a sound are half of them, and two more.
        n_state: width.
        n_head: attention heads.
        n_layer: layers.
        output_dim: width of the language model.
        avg_pool: average neighbouring positions; always true.
        add_audio_bos_eos_token: a learned vector at both ends; always true.
    """

    model_type = "megrez_audio"
    base_config_key = "audio_config"
    # The names that transformers' Whisper layers, and serving engines, ask for.
    attribute_map: ClassVar = {
        **{"d_model": "n_state", "hidden_size": "n_state", "max_source_positions": "n_ctx"},
        **{"encoder_attention_heads": "n_head", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
    }

    n_mels: int = 128
    n_ctx: int = 1500
    n_state: int = 1280
    n_head: int = 20
    n_layer: int = 32
    output_dim: int = 2560
    avg_pool: bool = True
    add_audio_bos_eos_token: bool = True
    activation_function: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0

    @property
    def encoder_ffn_dim(self) -> int:
        """Width inside the layers' second half."""
        return 4 * self.n_state


class MegrezOmniConfig(ReleaseConfig):
    """Configuration of Megrez-3B-Omni; defaults are those of the release.

    Args:
        text_config: the language model, a ``LlamaConfig`` or its dict.
        vision_config: the vision tower, a ``SiglipVisionConfig`` or its dict.
        audio_config: the audio encoder, a ``MegrezAudioConfig`` or its dict.
        query_num: positions that a slice of a picture takes.
        drop_vision_last_layer: the last layer of the vision tower does not exist.
        patch_size: side of a patch in pixels.
        special_token_ids: ids of the tokens around media and of ``feature``, which stands where their features go.
        image_token_id: the token that serving engines put at positions of a picture.
        audio_token_id: the same for sounds.
    """

    model_type = "megrezo"
    tokenizer_class: ClassVar = "MegrezTokenizer"  # for a folder whose files name none
    sub_configs: ClassVar = {
        "text_config": LlamaConfig,
        "vision_config": SiglipVisionConfig,
        "audio_config": MegrezAudioConfig,
    }

    text_config: dict | LlamaConfig | None = None
    vision_config: dict | SiglipVisionConfig | None = None
    audio_config: dict | MegrezAudioConfig | None = None
    query_num: int = 64
    drop_vision_last_layer: bool = False
    patch_size: int = 14
    special_token_ids: dict | None = None
    image_token_id: int | None = None
    audio_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Complete what a release may leave out, and refuse what this network is not."""
        for name, config_class in self.sub_configs.items():
            part = getattr(self, name)
            if part is None and name == "vision_config":
                part = {"patch_size": self.patch_size}
            elif part is None and name == "audio_config":
                part = {"output_dim": self.text_config.hidden_size}
            if not isinstance(part, PreTrainedConfig):
                setattr(self, name, config_class(**(part or {})))
        super().__post_init__(**kwargs)
        ids = self.special_token_ids = dict(DEFAULT_IDS if self.special_token_ids is None else self.special_token_ids)
        if self.image_token_id is None:
            self.image_token_id = ids.get("image", ids["feature"])
        if self.audio_token_id is None:
            self.audio_token_id = ids.get("audio", ids["feature"])
        audio, hidden_size = self.audio_config, self.text_config.hidden_size
        if not (audio.avg_pool and audio.add_audio_bos_eos_token):
            raise CheckpointError("audio_config: avg_pool and add_audio_bos_eos_token are true in every Megrez model")
        if audio.output_dim != hidden_size:
            raise CheckpointError(f"audio_config.output_dim is {audio.output_dim}, but hidden_size is {hidden_size}")
        if self.patch_size != self.vision_config.patch_size:
            raise CheckpointError(
                f"patch_size is {self.patch_size}, but vision_config.patch_size is {self.vision_config.patch_size}"
            )

    @classmethod
    def nested(cls, config: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
        """Return the settings of a released ``config.json`` with the parts apart and the token ids of the folder."""
        ids = token_ids(folder) if folder is not None else None
        known = {} if ids is None else {"special_token_ids": ids, "image_token_id": None, "audio_token_id": None}
        if "text_config" in config:
            return dict(config) | known
        own = cls.own_settings(config, (*_TEXT_KEYS, "vision_config", "audio_config", "audio"))
        text = given(config, _TEXT_KEYS, _NULL_KEYS)
        vision = {key: value for key, value in (config.get("vision_config") or {}).items() if key in _VISION_KEYS}
        audio = config.get("audio_config") or config.get("audio") or {}  # `audio` before the release
        audio = {key: value for key, value in audio.items() if key in _AUDIO_KEYS}
        audio.setdefault("output_dim", config.get("hidden_size", MegrezAudioConfig.output_dim))
        own["tie_word_embeddings"] = config.get("tie_word_embeddings") or False
        return own | {"text_config": text, "vision_config": vision, "audio_config": audio} | known

    def to_release_dict(self) -> dict[str, Any]:
        """Return the settings as a release writes them: flat, unknown keys kept."""
        own = {key: value for key, value in self.to_dict().items() if key not in INTERNAL_KEYS and key[0] != "_"}
        dtype = own.pop("dtype", None) or self.text_config.dtype
        audio, vision = self.audio_config.to_dict(), self.vision_config.to_dict()
        return {
            **own,
            **_released_llama(self.text_config),
            "audio_config": {key: audio[key] for key in _AUDIO_KEYS},
            "vision_config": {"model_type": "siglip_vision_model"} | {key: vision[key] for key in _VISION_KEYS},
            "architectures": ["MegrezO"],
            "model_type": self.model_type,
            "torch_dtype": _name(dtype),
            "transformers_version": __version__,
        }


class MegrezInstructConfig(LlamaConfig):
    """Configuration of Megrez-3B-Instruct: Llama's."""

    model_type = "llama"

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write ``config.json`` with the keys of the release; ``use_diff`` is transformers' and changes nothing."""
        drop = (*INTERNAL_KEYS, *_TEXT_KEYS, "dtype")
        own = {key: value for key, value in self.to_dict().items() if key not in drop and key[0] != "_"}
        release = own | _released_llama(self) | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        release |= {"torch_dtype": _name(self.dtype), "transformers_version": __version__}
        dump_json(json_file_path, release, sort_keys=True)


def _released_llama(config: LlamaConfig) -> dict[str, Any]:
    """Return the settings of a language model by the names that releases of its time use."""
    text = config.to_dict()
    rope = released_rope(text.pop("rope_parameters"))
    flat = {key: text[key] for key in _TEXT_KEYS if key in text} | rope
    if flat["head_dim"] * flat["num_attention_heads"] == flat["hidden_size"]:
        del flat["head_dim"]
    return flat


def _name(dtype: Any) -> str:
    return "float32" if dtype is None else str(dtype).removeprefix("torch.")
