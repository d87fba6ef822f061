"""The resampler of FM9G4B-V: each query looks at its own window of a slice, in two scales. It is not MiniCPM-V's.

A slice's features are a map; beside it stands the map four times as large. Both are cut into as many windows as there
are queries, each window is pooled to 3 x 3, and a query attends to the 18 rows of its window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip.modeling_siglip import eager_attention_forward

_HEAD_DIM = 72
_EPS = 1e-6
_SCALES = (1, 4)
_BINS = 3  # per side of a window
# Cells of large maps that are worked on at once: it bounds the memory.
_MAX_CELLS = 1 << 16


class WindowedResampler(nn.Module):
    """Features of slices to ``query_num`` rows each; parameter names are the release's.

    Args:
        query_num: rows per slice, a square number.
        vision_size: width of the tower.
        hidden_size: width of the language model.
        attention_config: names the attention implementation; that of the vision tower.
    """

    def __init__(self, query_num: int, vision_size: int, hidden_size: int, attention_config: Any) -> None:
        super().__init__()
        self.side = math.isqrt(query_num)
        self.query = nn.Parameter(torch.empty(query_num, vision_size))
        self.pos_embed = nn.Parameter(torch.empty(query_num, vision_size))
        self.feature_1x_embedding = nn.Parameter(torch.empty(1, 1, vision_size))
        self.feature_4x_embedding = nn.Parameter(torch.empty(1, 1, vision_size))
        self.features_1x_projector = nn.Linear(vision_size, vision_size)
        self.features_4x_projector = nn.Linear(vision_size, vision_size)
        self.attn = WindowAttention(vision_size, attention_config)
        self.ln_q = nn.LayerNorm(vision_size, eps=_EPS)
        self.ln_kv = nn.LayerNorm(vision_size, eps=_EPS)
        self.ln_proj = nn.LayerNorm(vision_size, eps=_EPS)
        self.ln_post = nn.LayerNorm(vision_size, eps=_EPS)
        self.out_mlp = nn.Sequential(
            nn.Linear(vision_size, 2 * vision_size), nn.GELU(), nn.Linear(2 * vision_size, hidden_size)
        )
        self.proj = nn.Parameter(torch.empty(hidden_size, hidden_size))  # applied as x @ proj

    def forward(self, features: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Return ``(slices, query_num, hidden_size)``.

        Args:
            features: ``(patches, vision_size)``, slice after slice.
            shapes: (rows, columns) of patches of each slice.
        """
        slices = features.split([rows * columns for rows, columns in shapes])
        results: list[Tensor] = [features] * len(slices)  # each is replaced below
        for rows, columns in dict.fromkeys(shapes):
            alike = [index for index, shape in enumerate(shapes) if shape == (rows, columns)]
            step = max(1, _MAX_CELLS // (rows * columns * _SCALES[-1] ** 2))
            for start in range(0, len(alike), step):
                chosen = alike[start : start + step]
                maps = torch.stack([slices[index] for index in chosen]).unflatten(1, (rows, columns))
                for index, result in zip(chosen, self._resample(maps), strict=True):
                    results[index] = result
        return torch.stack(results)

    def _resample(self, maps: Tensor) -> Tensor:
        """Return ``(slices, query_num, hidden_size)`` for ``(slices, rows, columns, vision_size)``."""
        pooled = [self._keys_and_values(maps, scale) for scale in _SCALES]
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*pooled, strict=True))
        queries = self.ln_q(self.query) + self.pos_embed
        states = self.ln_post(self.ln_proj(self.attn(queries, keys, values)))
        return self.out_mlp(states) @ self.proj

    def _keys_and_values(self, maps: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        """Return both as ``(slices, query_num, 9, vision_size)`` for one scale."""
        projector = self.features_1x_projector if scale == 1 else self.features_4x_projector
        embedding = self.feature_1x_embedding if scale == 1 else self.feature_4x_embedding
        size = maps.shape[1] * scale, maps.shape[2] * scale
        # The release projects the enlarged map. Enlarging what is projected is the same for 1/16 of the work: the
        # weights of the interpolation sum to one.
        values = self.ln_kv(_resize(projector(maps), size))
        places = _resize(self.pos_embed.unflatten(0, (self.side, self.side)).unsqueeze(0), size) + embedding
        pooled = self._pool(values)
        # Pooling is linear, so places, alike for all slices, are pooled on their own.
        return (pooled + self._pool(places)).to(maps.dtype), pooled.to(maps.dtype)

    def _pool(self, maps: Tensor) -> Tensor:
        """Cut maps into windows and return their 3 x 3 means, ``(maps, query_num, 9, vision_size)`` in float32."""
        _, height, width, _ = maps.shape
        rounded = maps.dtype == torch.bfloat16
        down, across = (pooling_matrix(size, self.side, rounded).to(maps.device) for size in (height, width))
        pooled = torch.einsum("ay,nyxc->naxc", down, maps.float())
        pooled = torch.einsum("bx,naxc->nabc", across, pooled)  # (maps, 3 * side, 3 * side, vision_size)
        windows = pooled.unflatten(2, (self.side, _BINS)).unflatten(1, (self.side, _BINS))
        return windows.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


class WindowAttention(nn.Module):
    """One query row per window on the rows of the window; the parameters are those of torch's MultiheadAttention."""

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, width: int, config: Any) -> None:
        super().__init__()
        self.config = config
        self.num_heads = width // _HEAD_DIM
        self.scaling = (width // self.num_heads) ** -0.5
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return ``(slices, windows, width)``.

        Args:
            queries: ``(windows, width)``, the same for all slices.
            keys: ``(slices, windows, rows, width)``; ``values`` as well.
            values: see ``keys``.
        """
        num_slices, num_windows = keys.shape[:2]
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = map(nn.functional.linear, (queries, keys, values), weights, biases)
        query = query.view(1, num_windows, 1, -1).expand(num_slices, -1, -1, -1)
        query, key, value = (  # (slices * windows, heads, rows, head width)
            part.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value)
        )
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attention(self, query, key, value, None, is_causal=self.is_causal, scaling=self.scaling)
        return self.out_proj(output.reshape(num_slices, num_windows, -1).contiguous())


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize ``(maps, height, width, channels)`` bilinearly, in float32; the result has the dtype of ``maps``."""
    if maps.shape[1:3] == size:
        return maps
    channels_first = maps.permute(0, 3, 1, 2).float()
    resized = nn.functional.interpolate(channels_first, size=size, mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1).to(maps.dtype)


@lru_cache(maxsize=1024)
@torch.inference_mode(False)  # kept, so it must serve training as well
def pooling_matrix(size: int, num_windows: int, rounded: bool = False) -> Tensor:
    """Return what pools one axis of a map, ``(3 * num_windows, size)`` float32; do not modify it.

    Row ``3 * i + a`` is the mean of the samples of bin ``a`` of window ``i``, as RoIAlign without the half-pixel shift
    takes them: a window is at least one cell long, a sample lies between two cells, and one beyond the map counts as
    zero, which happens on very thin pictures.

    Args:
        size: cells of the map along the axis.
        num_windows: how many windows cut it.
        rounded: round the windows' ends to bfloat16, which the release does when it runs in it.
    """
    begins = torch.arange(num_windows, dtype=torch.float64) * (size / num_windows)
    ends = begins + size / num_windows
    if rounded:
        begins, ends = (part.to(torch.bfloat16).double() for part in (begins, ends))
    matrix = torch.zeros(num_windows * _BINS, size, dtype=torch.float64)
    for window, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
        bin_length = max(end - begin, 1.0) / _BINS
        num_samples = math.ceil(bin_length)
        for part in range(_BINS):
            for sample in range(num_samples):
                place = begin + bin_length * (part + (sample + 0.5) / num_samples)
                if place > size:
                    continue
                low = min(int(place), size - 1)
                rest = place - low if low < size - 1 else 0.0
                matrix[window * _BINS + part, low] += (1 - rest) / num_samples
                if rest:
                    matrix[window * _BINS + part, low + 1] += rest / num_samples
    return matrix.float()
