"""Put media features among text embeddings."""

from __future__ import annotations

from torch import Tensor


def merge_features(embeds: Tensor, ids: Tensor, features: Tensor, token_id: int) -> Tensor:
    """Put media features at their placeholder positions.

    Args:
        embeds: ``(batch, seq, hidden)`` text embeddings; not modified.
        ids: ``(batch, seq)``; positions equal to ``token_id`` are filled in reading order.
        features: ``(tokens, hidden)``, all media of the batch, one after the other.
        token_id: the placeholder.

    Raises:
        ValueError: when placeholders and features differ in number; both counts are given.
    """
    places = ids == token_id
    num_places = int(places.sum())
    if num_places != len(features):
        raise ValueError(f"the prompt has {num_places} media positions, but the media give {len(features)} features")
    features = features.to(embeds.device, embeds.dtype)
    return embeds.masked_scatter(places.unsqueeze(-1).to(embeds.device), features)
