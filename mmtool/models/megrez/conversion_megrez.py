"""Weight names of Megrez-3B-Omni: the release's on disk, ours in memory; declared once, used for both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from mmtool.models.common.weights import LazyTensor

MODEL_TYPE = "megrezo"
# Tables that a checkpoint may carry along; the modules compute them. The audio encoder's position table is no such one.
_COMPUTED = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids)$|^vision\.resampler\.pos_embed$"
)
_VISION_LAYER = re.compile(r"^vision\.vpm\.encoder\.layers\.(\d+)\.")

_BLOCK = r"^audio\.audio\.blocks\.(\d+)\."
_LAYER = r"^model\.audio_tower\.layers\.(\d+)\."
_AUDIO_LAYER_NAMES = {
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
    "attn_ln": "self_attn_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "mlp_ln": "final_layer_norm",
}


def _renamings() -> list[WeightRenaming]:
    """Return the table, the release's name first, ours second.

    It is applied in both directions: a group stands in our pattern and is referred to in the release's.
    """
    layers = [
        WeightRenaming(rf"^audio\.audio\.blocks\.\1\.{re.escape(theirs)}\.", rf"{_LAYER}{re.escape(ours)}\.")
        for theirs, ours in _AUDIO_LAYER_NAMES.items()
    ]
    return [
        *layers,
        WeightRenaming(r"^llm\.lm_head\.", r"^lm_head\."),
        WeightRenaming(r"^llm\.model\.", r"^model\.language_model\."),
        WeightRenaming(r"^vision\.vpm\.", r"^model\.vision_tower\."),
        WeightRenaming(r"^vision\.resampler\.", r"^model\.resampler\."),
        WeightRenaming(r"^audio\.audio\.\1", r"^model\.audio_projector\.(proj|audio_bos_eos_token)"),
        WeightRenaming(r"^audio\.audio\.\1", r"^model\.audio_tower\.(conv1|conv2|positional_embedding|ln_post)"),
    ]


register_checkpoint_conversion_mapping(MODEL_TYPE, _renamings(), overwrite=True)


def without_leftovers(weights: Mapping[str, LazyTensor], num_vision_layers: int) -> dict[str, LazyTensor]:
    """Return the weights of a release without tables that are computed and layers that never run."""
    return {
        name: tensor
        for name, tensor in weights.items()
        if not _COMPUTED.search(name)
        and not ((layer := _VISION_LAYER.match(name)) and int(layer[1]) >= num_vision_layers)
    }
