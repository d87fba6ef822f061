"""Weight names: the release's on disk, ours in memory; declared once, used for loading, saving and serving."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from mmtool.models.common.weights import LazyTensor

MODEL_TYPE = "internlm_xcomposer2"
# Buffers that old checkpoints store, a norm of CLIP that no release uses, and the projector for the video memory of
# OmniLive, which is another model around this one.
_DROPPED = re.compile(r"(^|\.)(rotary_emb\..+|position_ids|post_layernorm\.(weight|bias))$|^video_mem_proj\.")
_TASK_LORA = re.compile(r"\.lora_(\w+)_[AB]\.weight$")


def renamings() -> list[WeightRenaming]:
    """Return the table, the release's name first, ours second; fresh, as transformers keeps notes in its entries.

    It is applied in both directions, all entries one after the other: a group stands in our pattern and is referred to
    in the release's. The last entry parts a matrix from its low-rank paths, which a release nests in it: so the matrix
    is a plain ``nn.Linear`` under its released name, which adapters, quantisation and serving engines can replace.
    """
    return [
        WeightRenaming(r"^model\.\1\.", r"^model\.language_model\.(tok_embeddings|layers|norm)\."),
        WeightRenaming(r"^output\.", r"^lm_head\."),
        WeightRenaming(r"^vision_proj\.\1\.", r"^model\.multi_modal_projector\.(0|2)\."),
        WeightRenaming(r"^plora_\1_GN", r"^model\.multi_modal_projector\.plora_(glb|sub)_GN"),
        WeightRenaming(r"^vit\.vision_tower\.vision_model\.", r"^model\.vision_tower\."),
        WeightRenaming(r"\.\1\.(?=Plora_|lora_sft_|lora_dpo_|lora_web_)", r"\.(wqkv|wo|w1|w2|w3)_branch\."),
    ]


_RENAMINGS = renamings()
register_checkpoint_conversion_mapping(MODEL_TYPE, renamings(), overwrite=True)


def our_name(released: str) -> str:
    """Return the name in an XComposer2ForConditionalGeneration of the weight that a release calls ``released``."""
    name = released
    for renaming in _RENAMINGS:
        name, _ = renaming.rename_source_key(name)
    return name


def wanted_weights(weights: Mapping[str, LazyTensor], tasks: Collection[str]) -> dict[str, LazyTensor]:
    """Return the weights of a release that the network has; of the task weights, those of ``tasks`` alone."""
    kept = {name: tensor for name, tensor in weights.items() if not _DROPPED.search(name)}
    matches = {name: _TASK_LORA.search(name) for name in kept}
    return {name: kept[name] for name, match in matches.items() if match is None or match[1] in tasks}
