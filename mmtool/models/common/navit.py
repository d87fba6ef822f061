"""The SigLIP tower of releases that see slices of any shape ("NaViT"), and the patch rows that it takes.

A picture is a run of rows, one per patch and slice after slice. So nothing is padded, and what a picture becomes does
not depend on its neighbours: ``pixel_values`` is ``(patches, channels * patch * patch)``, and ``patch_info``
``(patches, 3)`` says slice number within the picture (0 is the overview), row and column of each patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipPreTrainedModel

# Slices of one shape go through the layers together, but no more than this many: it bounds the memory.
_MAX_SLICES_AT_ONCE = 16
# How many values torch.arange computes from one float32 start, on every x86 processor.
_LANES = 8


class NaViTSiglip(SiglipPreTrainedModel):
    """SigLIP without pooling head, on slices of any shape; the weights have the releases' names.

    Args:
        config: sizes; ``num_hidden_layers`` is how many layers run, ``image_size`` the side of the position table.
    """

    config: SiglipVisionConfig
    config_class = SiglipVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = PatchEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the layer that takes the pixels."""
        return self.embeddings.patch_embedding

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PatchProjection):
            init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            init.zeros_(module.bias)

    def forward(self, pixel_values: Tensor, patch_info: Tensor) -> Tensor:
        """Return the features of all patches, ``(patches, width)``; attention stays within a slice."""
        shapes = split_slices(patch_info)
        lengths = [rows * columns for rows, columns in shapes]
        slices = self.embeddings(pixel_values, shapes).split(lengths)
        features: list[Tensor] = [slices[0]] * len(slices)  # each is replaced below
        for shape in dict.fromkeys(shapes):
            alike = [index for index, other in enumerate(shapes) if other == shape]
            for start in range(0, len(alike), _MAX_SLICES_AT_ONCE):
                chosen = alike[start : start + _MAX_SLICES_AT_ONCE]
                hidden = self.encoder(torch.stack([slices[index] for index in chosen])).last_hidden_state
                for index, rows in zip(chosen, self.post_layernorm(hidden), strict=True):
                    features[index] = rows
        return torch.cat(features)


class PatchEmbeddings(nn.Module):
    """Patches to vectors, with the position of the nearest place in a square table of positions."""

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        self.num_positions_per_side = config.image_size // config.patch_size
        self.patch_embedding = PatchProjection(config)
        self.position_embedding = nn.Embedding(self.num_positions_per_side**2, config.hidden_size)

    def forward(self, pixel_values: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Return ``(patches, width)`` for slices of ``shapes``, one after the other."""
        ids = torch.cat([position_ids(rows, columns, self.num_positions_per_side) for rows, columns in shapes])
        return self.patch_embedding(pixel_values) + self.position_embedding(ids.to(pixel_values.device))


class PatchProjection(nn.Module):
    """What a convolution over whole patches does, on patches that are cut out already; its weights have its shapes.

    A convolution of single patches would be ten times slower on a CPU.
    """

    def __init__(self, config: SiglipVisionConfig) -> None:
        super().__init__()
        side = config.patch_size
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.num_channels, side, side))
        self.bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return ``(patches, width)`` for ``(patches, channels * patch * patch)``."""
        return nn.functional.linear(pixel_values.to(self.weight.dtype), self.weight.flatten(1), self.bias)


def position_ids(num_rows: int, num_columns: int, num_positions: int) -> Tensor:
    """Return the index in a table of ``num_positions`` squared of each patch of a slice, row by row."""
    rows, columns = bucket_positions(num_rows, num_positions), bucket_positions(num_columns, num_positions)
    return (rows.unsqueeze(1) * num_positions + columns).flatten()


@lru_cache(maxsize=4096)
@torch.inference_mode(False)  # kept, so it must serve training as well
def bucket_positions(num_patches: int, num_positions: int) -> Tensor:
    """Return for each of ``num_patches`` along one side the place among ``num_positions``; do not modify it.

    It is not ``floor(num_positions * k / num_patches)``: the releases compare float32 numbers, and their roundings
    decide wherever both counts share a factor. The rounding of ``torch.arange`` depends on how many values a processor
    computes at once, so it is spelled out here: the result is that of x86 processors everywhere.
    """
    boundaries = _arange(1 / num_positions, 1, 1 / num_positions)
    coordinates = _arange(0, 1 - 1e-6, float(np.float32(1 / num_patches)))
    return torch.from_numpy(np.searchsorted(boundaries, coordinates, side="right"))


def _arange(start: float, end: float, step: float) -> np.ndarray:
    """Return ``torch.arange(start, end, step, dtype=torch.float32)``, bit for bit as x86 processors compute it."""
    size = math.ceil((end - start) / step)
    index = np.arange(size)
    in_lanes = index < size - size % _LANES
    first = np.where(in_lanes, index - index % _LANES, index)
    base = (start + step * first).astype(np.float32).astype(np.float64)
    return (base + step * (index - first)).astype(np.float32)


def patch_rows(pixels: np.ndarray, slice_number: int, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ``pixel_values`` and ``patch_info`` of one slice, patches row by row.

    Args:
        pixels: ``(channels, height, width)``, both sides whole patches.
        slice_number: 0 for the overview, then 1, 2, ... for the tiles of the same picture.
        patch_size: side of a patch in pixels.
    """
    channels, height, width = pixels.shape
    num_rows, num_columns = height // patch_size, width // patch_size
    cut = pixels.reshape(channels, num_rows, patch_size, num_columns, patch_size)
    rows = cut.transpose(1, 3, 0, 2, 4).reshape(num_rows * num_columns, channels * patch_size**2)
    row, column = np.divmod(np.arange(len(rows)), num_columns)
    return np.ascontiguousarray(rows), np.stack([np.full(len(rows), slice_number), row, column], axis=1)


def split_slices(patch_info: Tensor) -> list[tuple[int, int]]:
    """Return the (rows, columns) of patches of every slice, in order.

    Raises:
        ValueError: when ``patch_info`` is not whole slices.
    """
    info = patch_info.cpu()  # once: the counts are needed as numbers
    starts = _starts(info)
    ends = [*starts[1:], len(info)]
    shapes = [(row + 1, column + 1) for row, column in info[[end - 1 for end in ends], 1:].tolist()]
    if any(rows * columns != end - start for (rows, columns), start, end in zip(shapes, starts, ends, strict=True)):
        raise ValueError(f"patch_info holds {len(info)} patches, which are not whole slices")
    return shapes


def slices_per_image(patch_info: Tensor) -> list[int]:
    """Return how many slices each picture has; a slice numbered 0 opens a picture."""
    info = patch_info.cpu()
    numbers = info[_starts(info), 0].tolist()
    opens = [index for index, number in enumerate(numbers) if number == 0]
    return [end - start for start, end in zip(opens, [*opens[1:], len(numbers)], strict=True)]


def _starts(info: Tensor) -> list[int]:
    """Return the first patch of every slice."""
    starts = ((info[:, 1] == 0) & (info[:, 2] == 0)).nonzero().flatten().tolist()
    if not starts or starts[0] != 0:
        raise ValueError("patch_info does not begin with the first patch of a slice")
    return starts
