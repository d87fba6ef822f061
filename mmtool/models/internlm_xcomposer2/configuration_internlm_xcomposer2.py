"""XComposer2Config: text and vision parts nested, read from the flat ``config.json`` of a release and its weights.

A release says nothing about its vision tower and its low-rank weights, so their sizes are read from the shapes in the
weight files. On disk it is the release's flat file again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar

from transformers import __version__
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.llama.configuration_llama import LlamaConfig

from mmtool.errors import CheckpointError
from mmtool.models.common.configuration import INTERNAL_KEYS, ReleaseConfig, released_rope
from mmtool.models.common.folders import given, read_json
from mmtool.models.common.weights import LazyTensor, read_weights
from mmtool.models.internlm_xcomposer2.spec import SPECS, VARIANT_OF_TYPE, is_xcomposer2, variant_of
from mmtool.spec import ModelSpec

# The five matrices of a decoder layer. Each has a low-rank path for image positions beside it (PLoRA), and in 2.5 one
# for each task.
MATRICES = ("wqkv", "wo", "w1", "w2", "w3")
TASKS = ("sft", "dpo", "web")
# Which of the task weights are added, at all positions, in each mode of 2.5.
TASK_MODES: Mapping[str, tuple[str, ...]] = {"base": (), "write": ("sft", "dpo"), "web": ("web",)}

PATCH_SIZE = 14
# Image side of the releases, for a folder that has no weights to tell.
_IMAGE_SIZES = {"2.0": 224, "4khd": 336, "2.5": 560}
_MAX_LENGTHS = {"2.0": 4096, "4khd": 16384, "2.5": 16384}

# Keys of a released config.json that belong to the language model; all others stay with the whole model.
_REQUIRED_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
)
_TEXT_KEYS = (
    *_REQUIRED_TEXT_KEYS,
    *("hidden_act", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters"),
)
_INTERNAL_KEYS = (*INTERNAL_KEYS, "variant")


class XComposer2TextConfig(LlamaConfig):
    """Configuration of the language model, InternLM2 with low-rank paths beside its matrices.

    Args:
        max_sequence_length: most positions the release takes, answer included; beyond ``max_position_embeddings`` the
            rotary base grows. A release calls it ``max_length``.
        plora_ranks: rank of the path for image positions, by matrix.
        plora_scales: what its output is multiplied by, by matrix.
        plora_dropout: on its input, in training.
        task_lora_ranks: rank of the paths of each task; empty where the weights have none.
        task_mode: which of them are added: ``base`` (none), ``write`` or ``web``.
    """

    model_type = "internlm_xcomposer2_text"
    base_config_key = "text_config"
    base_model_tp_plan = None  # see tensor_parallel_plan of the network
    base_model_pp_plan = None

    vocab_size: int = 92544
    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    pad_token_id: int | None = 2
    max_sequence_length: int = 4096
    plora_ranks: dict[str, int] | None = None
    plora_scales: dict[str, float] | None = None
    plora_dropout: float = 0.05
    task_lora_ranks: dict[str, int] | None = None
    task_mode: str = "base"

    def __post_init__(self, **kwargs: Any) -> None:
        """Complete what is left out, and refuse what this network is not."""
        kwargs.setdefault("rope_theta", 1e6)
        super().__post_init__(**kwargs)
        self.plora_ranks = dict.fromkeys(MATRICES, 256) | (self.plora_ranks or {})
        self.plora_scales = dict.fromkeys(MATRICES, 1.0) | (self.plora_scales or {})
        self.task_lora_ranks = dict(self.task_lora_ranks or {})
        self.check_task_mode(self.task_mode)
        rope_type = self.rope_parameters["rope_type"]
        if rope_type not in ("default", "dynamic"):
            raise CheckpointError(f"rope_scaling is of type {rope_type!r}, but InternLM-XComposer2 has dynamic or none")

    def check_task_mode(self, mode: str) -> None:
        """Raise CheckpointError for a mode that does not exist, or whose weights this model lacks."""
        if mode not in TASK_MODES:
            raise CheckpointError(f"task_mode is {mode!r}, not one of {', '.join(TASK_MODES)}")
        missing = [task for task in TASK_MODES[mode] if task not in self.task_lora_ranks]
        if missing:
            raise CheckpointError(
                f"task_mode is {mode!r}, but the model has no lora_{missing[0]} weights",
                "Only the 2.5 release has them; OmniLive and the earlier ones do not.",
            )


class XComposer2Config(ReleaseConfig):
    """Configuration of an InternLM-XComposer2 or 2.5 model.

    Args:
        text_config: the language model, an ``XComposer2TextConfig`` or its dict.
        vision_config: the vision tower, a ``CLIPVisionConfig`` or its dict.
        variant: ``2.0`` (one square view), ``4khd`` or ``2.5`` (a global view, and tiles of the picture).
        image_token_id: id of the placeholder at every image position; see ``processing_internlm_xcomposer2``.
    """

    model_type = "internlm_xcomposer2"
    tokenizer_class: ClassVar = "InternLM2Tokenizer"  # for a folder whose files name none
    sub_configs: ClassVar = {"text_config": XComposer2TextConfig, "vision_config": CLIPVisionConfig}

    text_config: dict | XComposer2TextConfig | None = None
    vision_config: dict | CLIPVisionConfig | None = None
    variant: str = "2.0"
    image_token_id: int = 258
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Complete what may be left out, and refuse what this network is not."""
        if self.variant not in _IMAGE_SIZES:
            raise CheckpointError(f"variant is {self.variant!r}, not one of {', '.join(_IMAGE_SIZES)}")
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = XComposer2TextConfig(**(self.text_config or {}))
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = CLIPVisionConfig(
                **(clip_large(_IMAGE_SIZES[self.variant]) | (self.vision_config or {}))
            )
        super().__post_init__(**kwargs)

    @property
    def tiled(self) -> bool:
        """Whether a picture is seen as a whole and in tiles."""
        return self.variant != "2.0"

    @property
    def task_mode(self) -> str:
        """Which of the task weights of 2.5 are added; ``from_pretrained(folder, task_mode="write")`` sets it."""
        return self.text_config.task_mode

    @task_mode.setter
    def task_mode(self, mode: str) -> None:
        self.text_config.check_task_mode(mode)
        self.text_config.task_mode = mode

    @property
    def task_loras(self) -> bool:
        """Whether the task weights are kept in memory; ``from_pretrained(folder, task_loras=False)`` leaves them."""
        return bool(self.text_config.task_lora_ranks)

    @task_loras.setter
    def task_loras(self, keep: bool) -> None:
        if not keep:
            self.text_config.task_lora_ranks = {}
            self.text_config.check_task_mode(self.text_config.task_mode)

    @classmethod
    def nested(cls, config: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
        """Return the settings of a released ``config.json``, text and vision apart, completed from the weights."""
        if "text_config" in config:
            return dict(config)
        if folder is None:
            raise CheckpointError("a released config.json does not say how large the vision tower is: load the folder")
        if not is_xcomposer2(config):
            raise CheckpointError(f"{folder} holds no InternLM-XComposer2 model: config.json does not name its network")
        missing = [key for key in _REQUIRED_TEXT_KEYS if config.get(key) is None]
        if config.get("rope_theta") is None and config.get("rope_parameters") is None:
            missing.append("rope_theta")
        if missing:  # the defaults of the release's own code are those of another model
            raise CheckpointError(
                f"config.json in {folder} lacks {', '.join(missing)}", "Take config.json from the release."
            )
        weights = read_weights(folder)
        variant = variant_in(weights) or variant_of(config)
        text = given(config, _TEXT_KEYS)
        text |= _low_rank_settings(weights, variant)
        text["max_sequence_length"] = config.get("max_length") or _MAX_LENGTHS[variant]
        bias = config.get("bias")
        text["attention_bias"] = _WQKV + ".bias" in weights if bias is None else bias
        moved = (*_TEXT_KEYS, "max_length", "bias", "use_cache", "img_size")
        # The release's own choice of an attention kernel is no setting of transformers.
        own = cls.own_settings(config, (*moved, "attn_implementation"))
        own["tie_word_embeddings"] = config.get("tie_word_embeddings") or False
        vision = _vision_settings(weights, config.get("img_size"), folder)
        return own | {"variant": variant, "text_config": text, "vision_config": vision}

    def to_release_dict(self) -> dict[str, Any]:
        """Return the settings as a release writes them: flat, without what the weights tell, unknown keys kept."""
        own = {key: value for key, value in self.to_dict().items() if key not in _INTERNAL_KEYS and key[0] != "_"}
        text = self.text_config.to_dict()
        rope = released_rope(text.pop("rope_parameters"))
        flat = own | {key: text[key] for key in _TEXT_KEYS if key in text} | rope
        flat |= {"bias": text["attention_bias"], "max_length": text["max_sequence_length"], "use_cache": True}
        if flat["image_token_id"] == type(self).image_token_id:
            del flat["image_token_id"]
        if not self.tiled:
            flat["img_size"] = self.vision_config.image_size
        dtype = flat.pop("dtype", None)
        network = "InternLM2ForCausalLM" if self.variant == "4khd" else "InternLMXComposer2ForCausalLM"
        model_type = "internlm2" if self.tiled else "internlmxcomposer2"
        flat |= {"architectures": [network], "model_type": model_type, "torch_dtype": dtype or "float32"}
        return flat | {"transformers_version": __version__}


def clip_large(image_size: int) -> dict[str, Any]:
    """Return the settings of the tower of every release, CLIP ViT-L/14, for views of ``image_size`` pixels."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return sizes | {"image_size": image_size, "patch_size": PATCH_SIZE, "hidden_act": "quick_gelu"}


_WQKV = "model.layers.0.attention.wqkv"
_TOWER = "vit.vision_tower.vision_model."
_GLOBAL_SIDE_4KHD = 336


def variant_in(weights: Mapping[str, LazyTensor]) -> str | None:
    """Return the variant that released weights are of; None where they do not tell."""
    positions = weights.get(_TOWER + "embeddings.position_embedding.weight")
    if positions is None:
        return None
    if "plora_glb_GN" not in weights:
        return "2.0"
    return "4khd" if isqrt(positions.shape[0] - 1) * PATCH_SIZE == _GLOBAL_SIDE_4KHD else "2.5"


def refine(spec: ModelSpec, folder: Path) -> ModelSpec:
    """Return the entry of the type that ``folder`` holds; ``config.json`` alone led to ``spec``, or the user did.

    Raises:
        CheckpointError: when the user named another type than the folder holds.
    """
    config = read_json(folder / "config.json")
    said = variant_of(config)
    variant = variant_in(read_weights(folder)) or said
    if variant == VARIANT_OF_TYPE[spec.model_type]:
        return spec
    candidates = [other for other in SPECS if VARIANT_OF_TYPE[other.model_type] == variant]
    found = next((other for other in candidates if other.matches(config)), candidates[0])
    if said == VARIANT_OF_TYPE[spec.model_type]:  # only the weights tell
        return found
    raise CheckpointError(
        f"--model_type {spec.model_type}, but {folder} holds a {found.model_type} model",
        f"Pass --model_type {found.model_type}, or leave it out.",
    )


def _low_rank_settings(weights: Mapping[str, LazyTensor], variant: str) -> dict[str, Any]:
    """Return ranks and scales of the low-rank paths; those of the releases where there are no weights."""
    places = {
        name: f"model.layers.0.{'attention' if name in ('wqkv', 'wo') else 'feed_forward'}.{name}" for name in MATRICES
    }
    ranks = {name: 8 if (variant, name) == ("4khd", "wqkv") else 256 for name in MATRICES}
    found = {name: weights.get(f"{place}.Plora_A.weight") for name, place in places.items()}
    ranks |= {name: tensor.shape[0] for name, tensor in found.items() if tensor is not None}
    tasks = {task: weights.get(f"{_WQKV}.lora_{task}_A.weight") for task in TASKS}
    task_ranks = {task: tensor.shape[0] for task, tensor in tasks.items() if tensor is not None}
    if variant == "2.5" and not weights:
        task_ranks = {"sft": 256, "dpo": 256, "web": 512}
    # No file says the scale, alpha / rank: it is 16 / 8 for wqkv in 4KHD, and 256 / 256 everywhere else.
    scales = {"wqkv": 2.0} if variant == "4khd" else {}
    return {"plora_ranks": ranks, "plora_scales": scales, "task_lora_ranks": task_ranks}


def _vision_settings(weights: Mapping[str, LazyTensor], img_size: int | None, folder: Path) -> dict[str, Any]:
    """Return the settings of the vision tower as the shapes of its weights say; ``img_size`` must agree."""
    shapes = {name.removeprefix(_TOWER): weight.shape for name, weight in weights.items() if name.startswith(_TOWER)}
    try:
        width, _, _, patch_size = shapes["embeddings.patch_embedding.weight"]
        num_positions, _ = shapes["embeddings.position_embedding.weight"]
        mlp, _ = shapes["encoder.layers.0.mlp.fc1.weight"]
    except KeyError:  # no weights here, or not all of them, which loading them will tell
        return clip_large(img_size) if img_size else {}
    layers = {int(match[1]) for name in shapes if (match := re.match(r"encoder\.layers\.(\d+)\.", name))}
    image_size = isqrt(num_positions - 1) * patch_size
    if img_size is not None and img_size != image_size:
        raise CheckpointError(
            f"img_size in {folder}/config.json is {img_size}, but the position table is made for {image_size} pixels",
            "Take config.json and the weights from the same release.",
        )
    # All heads of CLIP have 64 channels.
    sizes = {"hidden_size": width, "num_attention_heads": max(width // 64, 1), "intermediate_size": mlp}
    return clip_large(image_size) | sizes | {"num_hidden_layers": max(layers) + 1, "patch_size": patch_size}
