"""Weight names: the release's on disk, ours in memory; declared once, used for loading, saving and serving.

A release stores the vision tower twice: in ``vit/<name>/``, which counts, and as a copy in the main shards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from mmtool.errors import CheckpointError
from mmtool.models.common.folders import vision_folder
from mmtool.models.common.weights import LazyTensor, read_weights

MODEL_TYPE = "yi_vl"
TOWER_IN_SHARDS = "model.vision_tower.vision_tower.vision_model."
# Buffers that old checkpoints store; the modules compute them.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")
# The vit file may hold a whole CLIP; transformers 5 writes a tower without the prefix.
_TOWER_NAME = re.compile(r"^(?:.*\.)?vision_model\.(.+)|^((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)")


# The release's name first, ours second. Applied in both directions: a group stands in our pattern and is referred to in
# the release's.
register_checkpoint_conversion_mapping(
    MODEL_TYPE,
    [
        WeightRenaming(r"^model\.\1\.", r"^model\.language_model\.(embed_tokens|layers|norm)\."),
        WeightRenaming(r"^model\.mm_projector\.", r"^model\.multi_modal_projector\."),
        WeightRenaming(rf"^{re.escape(TOWER_IN_SHARDS)}", r"^model\.vision_tower\."),
    ],
    overwrite=True,
)


def read_release(folder: Path, mm_vision_tower: str | None) -> dict[str, LazyTensor]:
    """Return the weights of a release by the names of its main shards, the vision tower's from its own folder.

    The copy of the tower in the main shards is used only where the vit folder has no weights. Empty where the folder
    has no weights at all.
    """
    weights = _without_buffers(read_weights(folder))
    if not weights:
        return {}
    tower_folder = vision_folder(folder, mm_vision_tower)
    tower = _without_buffers(read_weights(tower_folder))
    if tower:
        main = {name: tensor for name, tensor in weights.items() if not name.startswith("model.vision_tower.")}
        return main | _tower_names(tower)
    if not any(name.startswith(TOWER_IN_SHARDS) for name in weights):
        raise CheckpointError(
            f"{tower_folder} has no weights, and the main shards hold no copy of the vision tower",
            "Download the vit folder of the release again.",
        )
    return weights


def _without_buffers(weights: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    return {name: tensor for name, tensor in weights.items() if not _BUFFERS.search(name)}


def _tower_names(tower: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    matches = {name: _TOWER_NAME.match(name) for name in tower}
    return {TOWER_IN_SHARDS + (m[1] or m[2]): tower[name] for name, m in matches.items() if m is not None}
