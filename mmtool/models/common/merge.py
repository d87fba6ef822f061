"""Put media features among text embeddings, and tensors of several media together."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
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


def to_device_of(inputs: Tensor, weight: Tensor) -> Tensor:
    """Return ``inputs`` where ``weight`` lies: a tower may have another device than the text."""
    # Where accelerate brings the weights for the call only, they lie nowhere, and it moves the input as well.
    return inputs if weight.device.type == "meta" else inputs.to(weight.device)


def same_shape(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Pad all dimensions but the first with zeros at their end to the largest."""
    largest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [size - own for size, own in zip(largest, tensor.shape[1:], strict=True)]
        widths = [width for size in reversed(missing) for width in (0, size)]
        padded.append(F.pad(tensor, widths) if any(missing) else tensor)
    return padded
