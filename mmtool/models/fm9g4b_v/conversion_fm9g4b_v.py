"""Weight names: the release's on disk, ours in memory; declared once, used for loading, saving and serving."""

from __future__ import annotations

import re
from collections.abc import Mapping

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from mmtool.models.common.weights import LazyTensor
from mmtool.models.fm9g4b_v.configuration_fm9g4b_v import FM9GVConfig

MODEL_TYPE = FM9GVConfig.model_type
_EMBEDDING, _HEAD = "llm.model.embed_tokens.weight", "llm.lm_head.weight"
# Tables that old checkpoints store; the modules compute them.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids)$")

register_checkpoint_conversion_mapping(
    MODEL_TYPE,
    [
        WeightRenaming(r"^llm\.model\.", r"^model\.language_model\."),
        WeightRenaming(r"^llm\.lm_head\.", r"^lm_head\."),
        WeightRenaming(r"^vpm\.", r"^model\.vision_tower\."),
        WeightRenaming(r"^resampler\.", r"^model\.multi_modal_projector\."),
    ],
    overwrite=True,
)


def released_weights(weights: Mapping[str, LazyTensor], config: FM9GVConfig) -> dict[str, LazyTensor]:
    """Return those of a folder's weights that the network has.

    Files written without shared tensors may hold the tied matrix under the name of the head alone. A tower whose last
    layer is dropped may still have that layer in the file.
    """
    dropped = f"vpm.encoder.layers.{config.num_vision_layers}."
    kept = {
        name: tensor
        for name, tensor in weights.items()
        if not _BUFFERS.search(name) and not (config.drop_vision_last_layer and name.startswith(dropped))
    }
    if config.tie_word_embeddings and _HEAD in kept and _EMBEDDING not in kept:
        kept[_EMBEDDING] = kept.pop(_HEAD)
    return kept
