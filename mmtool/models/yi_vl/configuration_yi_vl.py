"""YiVLConfig: text and vision parts nested, read from the flat ``config.json`` of a release and its vit folder.

On disk it is the release's layout again: ``save_pretrained`` writes the flat file and ``vit/<name>/config.json``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from transformers import __version__
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.llama.configuration_llama import LlamaConfig

from mmtool.errors import CheckpointError
from mmtool.models.common.configuration import INTERNAL_KEYS, ReleaseConfig, released_rope
from mmtool.models.common.folders import given, read_json, vision_folder

DEFAULT_VISION_TOWER = "./vit/clip-vit-H-14-laion2B-s32B-b79K-yi-vl-6B-448"
_PROJECTOR_TYPE = "mlp2x_gelu_Norm"
# Keys of a released config.json that belong to the language model; all others stay with the whole model.
_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range"),
    *("rms_norm_eps", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp"),
    *("rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "attention_dropout", "mlp_bias"),
    "tie_word_embeddings",
)
# Of these, where null says that there is no such token, or no scaling.
_NULL_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "rope_scaling", "head_dim")


class YiVLConfig(ReleaseConfig):
    """Configuration of a Yi-VL model; the ``mm_*`` fields carry the released names and defaults.

    Args:
        text_config: the language model, a ``LlamaConfig`` or its dict.
        vision_config: the vision tower, a ``CLIPVisionConfig`` or its dict.
        image_token_id: id of the placeholder at every image position; a control piece that no text can produce.
        mm_vision_tower: folder of the vision tower inside the model folder.
        mm_hidden_size: width of the vision tower; that of ``vision_config`` if None.
        mm_vision_select_layer: hidden state that is the feature: -2 is the input of the last layer.
        mm_vision_select_feature: ``patch`` drops the class token, ``cls_patch`` keeps it.
        image_aspect_ratio: ``pad`` makes pictures square first; anything else crops the centre.
    """

    model_type = "yi_vl"
    sub_configs: ClassVar = {"text_config": LlamaConfig, "vision_config": CLIPVisionConfig}
    release_files: ClassVar = ("*.json", "vit/*/*.json")

    text_config: dict | LlamaConfig | None = None
    vision_config: dict | CLIPVisionConfig | None = None
    image_token_id: int = 9
    mm_vision_tower: str | None = None
    mm_projector_type: str = _PROJECTOR_TYPE
    mm_hidden_size: int | None = None
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = False
    tune_mm_mlp_adapter: bool = False
    image_aspect_ratio: str = "pad"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Complete what a release may leave out, and refuse what this network is not."""
        for name, config_class in self.sub_configs.items():
            part = getattr(self, name)
            if not isinstance(part, PreTrainedConfig):
                setattr(self, name, config_class(**(part or {})))
        super().__post_init__(**kwargs)
        if self.mm_hidden_size is None:
            self.mm_hidden_size = self.vision_config.hidden_size
        if self.mm_projector_type != _PROJECTOR_TYPE:
            raise CheckpointError(f"mm_projector_type is {self.mm_projector_type!r}, but Yi-VL has {_PROJECTOR_TYPE!r}")
        if self.mm_vision_select_feature not in ("patch", "cls_patch"):
            raise CheckpointError(
                f"mm_vision_select_feature is {self.mm_vision_select_feature!r}, not patch or cls_patch"
            )
        num_layers = self.vision_config.num_hidden_layers
        if not -num_layers - 1 <= self.mm_vision_select_layer <= num_layers:
            raise CheckpointError(
                f"mm_vision_select_layer is {self.mm_vision_select_layer}, but the vision tower has {num_layers} layers"
            )

    @property
    def num_vision_layers(self) -> int:
        """How many layers of the vision tower run: hidden state 0 is the input of the first."""
        select = self.mm_vision_select_layer
        return select if select >= 0 else self.vision_config.num_hidden_layers + 1 + select

    @property
    def num_image_tokens(self) -> int:
        """How many positions one picture takes."""
        vision = self.vision_config
        return (vision.image_size // vision.patch_size) ** 2 + (self.mm_vision_select_feature == "cls_patch")

    @property
    def vision_folder_name(self) -> str:
        """Where the vision tower is written, relative to the model folder: ``vit/<name>``."""
        tower = self.mm_vision_tower or DEFAULT_VISION_TOWER
        return f"vit/{PurePosixPath(tower.replace(os.sep, '/')).name}"

    @classmethod
    def nested(cls, config: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
        """Return the settings of a released ``config.json``, text apart, with the vision part of the vit folder."""
        if "text_config" in config:
            return dict(config)
        if folder is None:
            raise CheckpointError("a released Yi-VL config.json says nothing about its vision tower: load the folder")
        own = cls.own_settings(config, _TEXT_KEYS)
        text = given(config, _TEXT_KEYS, _NULL_KEYS)
        own["tie_word_embeddings"] = config.get("tie_word_embeddings") or False
        return own | {"text_config": text, "vision_config": _vision_settings(config, folder)}

    def to_release_dict(self) -> dict[str, Any]:
        """Return the settings as a release writes them: flat, without the vision tower, unknown keys kept."""
        own = {key: value for key, value in self.to_dict().items() if key not in INTERNAL_KEYS and key[0] != "_"}
        text = self.text_config.to_dict()
        rope = released_rope(text.pop("rope_parameters"))
        flat = own | {key: text[key] for key in _TEXT_KEYS if key in text} | rope
        if flat["head_dim"] * flat["num_attention_heads"] == flat["hidden_size"]:
            del flat["head_dim"]
        if flat["image_token_id"] == type(self).image_token_id:
            del flat["image_token_id"]
        dtype = flat.pop("dtype", None)
        flat |= {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "torch_dtype": dtype or "float32"}
        return flat | {"mm_vision_tower": f"./{self.vision_folder_name}", "transformers_version": __version__}

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write ``config.json`` and ``vit/<name>/config.json``."""
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory) / self.vision_folder_name
        folder.mkdir(parents=True, exist_ok=True)
        vision = copy.deepcopy(self.vision_config)
        vision.architectures, vision.dtype = ["CLIPVisionModel"], self.dtype
        vision.to_json_file(folder / "config.json")


def _vision_settings(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings in the vit folder; its config may be that of the tower alone or of a whole CLIP."""
    path = vision_folder(folder, config.get("mm_vision_tower")) / "config.json"
    settings = read_json(path)
    if "vision_config" in settings or "vision_config_dict" in settings:
        settings = {**(settings.get("vision_config") or {}), **(settings.get("vision_config_dict") or {})}
    drop = ("model_type", "torch_dtype", "dtype", "architectures", "transformers_version", "_name_or_path")
    return {key: value for key, value in settings.items() if key not in drop}
