"""FM9GConfig: the keys of a released ``config.json``; they decide what the network is, not the name of a size."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from transformers import __version__

from mmtool.errors import CheckpointError
from mmtool.models.common.folders import dump_json, local_folder, read_json
from mmtool.models.common.mla import MLAConfig

BIASED_TYPE = "fm9g7b"  # the 7B and 70B: Qwen2's layout, q, k and v with biases, nothing scaled
MUP_TYPES = ("fm9g", "fm9g3", "fm9gv")
_SCALES = ("scale_emb", "scale_depth", "dim_model_base")
# Bookkeeping that has no place in a released config.json.
_INTERNAL_KEYS = (
    *("return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder"),
    *("id2label", "label2id", "num_labels", "problem_type", "rope_parameters", "dtype", "output_bias", "mlp_bias"),
)
# Keys that a release without such a part does not have.
_OPTIONAL_KEYS = (
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", *_SCALES),
    *("pad_token_id", "sliding_window", "use_sliding_window", "pretraining_tp"),
)


class FM9GConfig(MLAConfig):
    """Configuration of an FM9G text model; further fields stand in ``MLAConfig``.

    ``kv_lora_rank`` makes the attention a latent one. The MuP factors apply to the model types of ``MUP_TYPES`` where
    at least one of their keys is given; a single missing one counts as 1, the default of the release's class.

    Args:
        attention_bias: biases of the first projections. None is for ``fm9g7b`` true; what the weights have wins.
        tie_word_embeddings: None is true where the MuP factors apply, else false unless the weights have no head.
        sliding_window: kept for the file; no release uses it.
        use_sliding_window: must be false.
    """

    model_type = "fm9g"
    tokenizer_class: ClassVar = "FM9GTokenizer"  # for a folder whose files name none
    base_model_tp_plan: ClassVar = {
        **MLAConfig.base_model_tp_plan,
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
    }

    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    scale_emb: float | None = None
    scale_depth: float | None = None
    dim_model_base: float | None = None
    tie_word_embeddings: bool | None = None
    sliding_window: int | None = None
    use_sliding_window: bool | None = None
    pretraining_tp: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Complete what a release leaves out."""
        self.model_type = kwargs.pop("model_type", None) or type(self).model_type
        if self.use_sliding_window:
            raise CheckpointError("use_sliding_window is true, but FM9G models attend to all positions")
        # Unused, and caches would take its presence for a sliding window.
        self._sliding_window, self.sliding_window = self.sliding_window, None
        self._tie_is_known = self.tie_word_embeddings is not None or self.is_scaled
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = self.is_scaled
        if self.attention_bias is None:
            self.attention_bias = self.model_type == BIASED_TYPE
        if self.output_bias is None:
            self.output_bias = self.attention_bias and self.model_type != BIASED_TYPE
        if self.kv_lora_rank is not None and None in (self.qk_nope_head_dim, self.qk_rope_head_dim):
            raise CheckpointError("config.json has kv_lora_rank, but not qk_nope_head_dim and qk_rope_head_dim")
        super().__post_init__(**kwargs)

    @property
    def tie_is_known(self) -> bool:
        """Whether ``config.json`` tells if the head is the embedding; else the weights do."""
        return self._tie_is_known

    @property
    def is_scaled(self) -> bool:
        """Whether the MuP factors apply."""
        return self.model_type in MUP_TYPES and any(getattr(self, name) is not None for name in _SCALES)

    @property
    def embedding_factor(self) -> float:
        """Factor of text embeddings."""
        return float(self._scale("scale_emb")) if self.is_scaled else 1.0

    @property
    def residual_factor(self) -> float:
        """Factor of what attention and MLP add to the state."""
        return self._scale("scale_depth") / self.num_hidden_layers**0.5 if self.is_scaled else 1.0

    @property
    def logits_divisor(self) -> float:
        """What the last state is divided by; not rounded to an integer."""
        return self.hidden_size / self._scale("dim_model_base") if self.is_scaled else 1.0

    def _scale(self, name: str) -> float:
        value = getattr(self, name)
        return 1.0 if value is None else value

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Read a folder or hub id; any of the family's ``model_type`` values is kept as it is."""
        folder, kwargs = local_folder(pretrained_model_name_or_path, kwargs, ["*.json"])
        return cls.from_dict(read_json(folder / "config.json"), **{"name_or_path": str(folder), **kwargs})

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, with the ``model_type`` of the release."""
        return {**super().to_dict(), "model_type": self.model_type}

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write the keys of a released ``config.json``; ``use_diff`` is transformers' and changes nothing."""
        dump_json(json_file_path, self.to_release_dict(), sort_keys=True)

    def to_release_dict(self) -> dict[str, Any]:
        """Return the settings under the names of a release; keys that are not known here are kept."""
        own = self.to_dict()
        rope = {key: value for key, value in own["rope_parameters"].items() if key not in ("rope_theta", "rope_type")}
        rope_type, dtype = own["rope_parameters"]["rope_type"], own.get("dtype")
        result = {
            key: value
            for key, value in own.items()
            if key not in _INTERNAL_KEYS and key[0] != "_" and not (key in _OPTIONAL_KEYS and value is None)
        }
        if self.kv_lora_rank is None:
            del result["head_dim"]
        if self.model_type == BIASED_TYPE and self.attention_bias:
            del result["attention_bias"]
        if self._sliding_window is not None:
            result["sliding_window"] = self._sliding_window
        return result | {
            "architectures": ["FM9GForCausalLM"],
            "rope_scaling": None if rope_type == "default" else {"type": rope_type, **rope},
            "rope_theta": own["rope_parameters"]["rope_theta"],
            "torch_dtype": dtype or "float32",
            "transformers_version": __version__,
        }
