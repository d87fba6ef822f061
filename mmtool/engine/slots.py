"""Keys and values of conversations, one slot (row) each, and the ``Cache`` through which a model uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

if TYPE_CHECKING:
    from mmtool.template.base import MediaInput

CAPACITY_STEP = 128  # positions; capacities are multiples of it


class KVSlots:
    """Storage of keys and values: per layer ``(slots, kv_heads, capacity, head_dim)``, allocated as it is needed.

    A layer's shape, format and device are learned from the first keys and values it writes, so that every family and
    every placement fits. Both sizes only grow, and never beyond what ``reserve`` is asked for.

    Positions nobody has written are zero. Attention multiplies them by a weight of zero where a longer row is in the
    batch, which must not become NaN.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.clear()

    def clear(self) -> None:
        """Give the memory back."""
        self.keys: list[Tensor | None] = [None] * self.num_layers
        self.values: list[Tensor | None] = [None] * self.num_layers
        self.num_slots = self.capacity = 0

    @property
    def num_bytes(self) -> int:
        """What the tensors take."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values) if tensor is not None)

    def reserve(self, num_slots: int, capacity: int, used: int) -> None:
        """Make room for ``num_slots`` rows of ``capacity`` positions; the first ``used`` of every row are kept."""
        self.num_slots = max(self.num_slots, num_slots)
        self.capacity = max(self.capacity, capacity)
        for layer, keys in enumerate(self.keys):
            if keys is not None:
                # One layer after the other, so that the old and the new of one layer alone exist at the same time.
                self.keys[layer] = self._grown(keys, used)
                self.values[layer] = self._grown(self.values[layer], used)

    def layer(self, layer: int, like_keys: Tensor, like_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer, allocated on first use like those about to be written."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            keys, values = self._empty(like_keys), self._empty(like_values)
            self.keys[layer], self.values[layer] = keys, values
        return keys, values

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of one row to another."""
        for tensor in (*self.keys, *self.values):
            if tensor is not None:
                tensor[target, :, :length] = tensor[source, :, :length]

    def zero(self, slot: int, start: int, end: int) -> None:
        """Set positions ``start`` to ``end - 1`` of a row to zero."""
        for tensor in (*self.keys, *self.values):
            if tensor is not None and start < end:
                tensor[slot, :, start:end] = 0

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first ``length`` positions of two rows."""
        for tensor in (*self.keys, *self.values):
            if tensor is not None:
                kept = tensor[one, :, :length].clone()
                tensor[one, :, :length] = tensor[other, :, :length]
                tensor[other, :, :length] = kept

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.num_slots, like.shape[1], self.capacity, like.shape[3])

    def _grown(self, tensor: Tensor, used: int) -> Tensor:
        slots, _, capacity, _ = tensor.shape
        if slots == self.num_slots and capacity == self.capacity:
            return tensor
        grown = self._empty(tensor)
        grown[:slots, :, :used] = tensor[:, :, :used]
        return grown


class SlotCache(Cache):
    """What the decoder of a model sees as its cache during one call: one row to fill, or rows 0 to B-1 to continue."""

    def __init__(self, slots: KVSlots) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.first = self.last = 0  # rows [first, last) take part
        self.start = 0  # where new positions go, if that is the same in all rows
        self.index: Tensor | None = None  # else where, see ``write_index``

    def use(self, first: int, last: int, start: int, index: Tensor | None = None) -> None:
        """Let the next call write positions from ``start`` on into rows ``first`` to ``last - 1``.

        With ``index``, each row writes one position of its own, and ``start`` is the last of them.
        """
        self.first, self.last, self.start, self.index = first, last, start, index

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write ``(rows, kv_heads, new, head_dim)`` and return all positions of those rows."""
        keys, values = self.slots.layer(layer_idx, key_states, value_states)
        end = self.start + key_states.shape[2]
        if self.index is None:
            rows = slice(self.first, self.last)
            keys[rows, :, self.start : end] = key_states
            values[rows, :, self.start : end] = value_states
        else:
            index = self.index.to(keys.device)  # layers may lie on several devices
            keys.view(-1, keys.shape[3]).index_copy_(0, index, key_states.flatten(0, 2))
            values.view(-1, values.shape[3]).index_copy_(0, index, value_states.flatten(0, 2))
        return keys[self.first : self.last, :, :end], values[self.first : self.last, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many positions there are before the new ones."""
        return self.start

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the number of keys and the position of the first."""
        return self.start + query_length, 0


def write_index(positions: Tensor, kv_heads: int, capacity: int) -> Tensor:
    """Return where row b writes position ``positions[b]`` in a layer seen as ``(slots * kv_heads * capacity, d)``."""
    heads = torch.arange(len(positions) * kv_heads, device=positions.device).view(-1, kv_heads)
    return (heads * capacity + positions.unsqueeze(1)).flatten()


def content_keys(input_ids: Sequence[int], media: Sequence[MediaInput]) -> list[int]:
    """Return what identifies each position: the token id, or the content of the medium there as a negative number."""
    keys = list(input_ids)
    for item in media:
        keys[item.start : item.start + item.length] = [~int(item.key, 16)] * item.length
    return keys


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many positions two sequences share from their start."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # comparing slices is fast, so search where they part
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
