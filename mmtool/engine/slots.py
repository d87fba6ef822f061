"""Keys and values of conversations, one slot (row) each, and the ``Cache`` through which a model uses them."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from mmtool.engine.pages import ask_huge

if TYPE_CHECKING:
    from mmtool.engine.stepped import Run
    from mmtool.template.base import MediaInput

CAPACITY_STEP = 128  # positions; capacities are multiples of it
HUGE_AT_MOST = 16 * 2**20  # bytes of a tensor that may take memory in large pages: reads faster, but takes more of it


class Slot:
    """One row of the KV storage: which content its positions hold, and who uses it."""

    def __init__(self, row: int) -> None:
        self.row = row
        self.tokens: list[int] = []  # content key of every position whose keys and values are valid
        self.adapter: str | None = None  # which they were computed with
        self.written = 0  # positions that may be other than zero
        self.stretched = False  # the keys are turned for this one length
        self.run: Run | None = None
        self.last_used = 0


class KVSlots:
    """Storage of keys and values: per layer ``(slots, kv_heads, capacity, head_dim)``, allocated as it is needed.

    A layer's shape, format and device are learned from the first keys and values it writes, so that every family and
    every placement fits. Both sizes only grow, and never beyond what ``reserve`` is asked for.

    Positions nobody has written are zero. Attention multiplies them by a weight of zero where a longer row is in the
    batch, which must not become NaN.
    """

    def __init__(self, num_layers: int, spare: int = 0) -> None:
        """``spare`` rows behind the slots belong to nobody."""
        self.num_layers = num_layers
        self.spare = spare
        self._lock = Lock()
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
        """Make room for ``num_slots`` rows of ``capacity`` positions; the first ``used`` of every row are kept.

        Where there is not enough memory all is as before, or, if not even that can be, cleared.
        """
        before = self.num_slots, self.capacity
        try:
            self._resize(max(before[0], num_slots), max(before[1], capacity), used)
        except BaseException:  # Ctrl-C as well: it is raised again, but no layer may differ from the others
            try:
                self._resize(*before, used)
            except BaseException:
                self.clear()
            raise

    def shrink(self, num_slots: int, capacity: int) -> None:
        """Keep the first ``num_slots`` rows and ``capacity`` positions alone."""
        self._resize(min(self.num_slots, num_slots), min(self.capacity, capacity), capacity)

    def _resize(self, num_slots: int, capacity: int, used: int) -> None:
        self.num_slots, self.capacity = num_slots, capacity
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):
                if tensor is not None:
                    # One after the other, so that the old and the new of one layer alone exist at the same time.
                    tensors[layer] = self._resized(tensor, used)

    def layer(self, layer: int, like_keys: Tensor, like_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer, allocated on first use like those about to be written."""
        with self._lock:  # two threads may be the first
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

    def zero(self, slot: int | slice, start: int, end: int) -> None:
        """Set positions ``start`` to ``end - 1`` of a row, or of several, to zero."""
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
        shape = self.num_slots + self.spare, like.shape[1], self.capacity, like.shape[3]
        return untouched_zeros(shape, like.dtype) if like.device.type == "cpu" else like.new_zeros(shape)

    def _resized(self, tensor: Tensor, used: int) -> Tensor:
        if (tensor.shape[0], tensor.shape[2]) == (self.num_slots + self.spare, self.capacity):
            return tensor
        resized = self._empty(tensor)
        rows, used = min(len(tensor), len(resized)) - self.spare, min(used, tensor.shape[2], resized.shape[2])
        resized[:rows, :, :used] = tensor[:rows, :, :used]
        return resized


def untouched_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros on the CPU that take real memory only where something is written.

    Storage for the longest conversations costs nothing then while they are short, and no time at the start.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if not num_bytes or not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        return torch.zeros(shape, dtype=dtype)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {num_bytes / 1e6:.1f} MB of keys or values") from error
    if num_bytes <= HUGE_AT_MOST:
        ask_huge(memory)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


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
