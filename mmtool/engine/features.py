"""Media features: computed once per content, kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmtool.errors import MMToolError

if TYPE_CHECKING:
    from mmtool.template.base import MediaInput

TOWERS = {"image": "get_image_features", "audio": "get_audio_features"}  # methods every family names like this


class FeatureCache:
    """Features by content key, the least recently used ones dropped beyond ``max_bytes``."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def get(self, key: str) -> Tensor | None:
        """Return the ``(tokens, hidden)`` features of ``key`` if they are kept."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: str, features: Tensor) -> None:
        """Keep ``features``, in the place of older ones; what is larger than the whole cache is not kept."""
        self._drop(key)
        size = features.nbytes
        if size > self.max_bytes:
            return
        while self.num_bytes + size > self.max_bytes:
            self._drop(next(iter(self._kept)))
        self._kept[key] = features
        self.num_bytes += size

    def clear(self) -> None:
        """Drop everything."""
        self._kept.clear()
        self.num_bytes = 0

    def _drop(self, key: str) -> None:
        features = self._kept.pop(key, None)
        if features is not None:
            self.num_bytes -= features.nbytes


def compute_features(model: Any, items: Sequence[MediaInput], device: torch.device) -> list[Tensor]:
    """Run the tower of one kind of media over ``items`` in one call.

    Returns:
        One ``(rows, hidden)`` tensor per item, a row for each position that holds a feature.

    Raises:
        MMToolError: when the model has no such tower, or gives another number of positions than the prompt has.
    """
    kind = items[0].kind
    tower = getattr(model, TOWERS[kind], None)
    name = model.__class__.__name__
    if tower is None:
        raise MMToolError(f"{name} has no part that takes {kind} input")
    inputs = {}
    for field in items[0].inputs:
        tensor = torch.cat([item.inputs[field] for item in items]).to(device)
        inputs[field] = tensor.to(model.dtype) if tensor.is_floating_point() else tensor
    features = [rows.reshape(-1, rows.shape[-1]) for rows in tower(**inputs).pooler_output]
    if len(items) == 1:  # some give a tensor per tile
        features = [torch.cat(features)]
    lengths, wanted = [len(rows) for rows in features], [item.num_features for item in items]
    if lengths != wanted:
        raise MMToolError(
            f"{name} gave {lengths} positions for {kind} input, the prompt has {wanted}",
            "The processor and the weights do not belong together.",
        )
    # A copy of its own per item: a view would keep the features of the whole batch alive.
    return [rows.clone() if len(features) > 1 else rows for rows in features]
