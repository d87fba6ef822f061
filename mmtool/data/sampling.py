"""Orders and choices of rows that take no memory: a permutation is computed where it is asked for, not stored.

Everything here depends on numbers and seeds alone, so every process and every machine gets the same.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

_ROUNDS = 8


def seed_of(*parts: Any) -> int:
    """Return a seed made of numbers and names.

    >>> seed_of(42, "train", 0) == seed_of(42, "train", 0) != seed_of(42, "train", 1)
    True
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


class Permutation:
    """The numbers from 0 to ``size`` - 1 in a random order; any part of it can be asked for.

    >>> order = Permutation(5, seed=1)
    >>> sorted(order[index] for index in range(5))
    [0, 1, 2, 3, 4]

    It is a Feistel network over the next power of four; what falls outside goes through it again.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._half = max((max(size - 1, 1).bit_length() + 1) // 2, 1)
        self._keys = [np.uint64(seed_of(seed, turn)) for turn in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return int(self.block(np.array([index]))[0])

    def block(self, indices: np.ndarray) -> np.ndarray:
        """Return what stands at ``indices``, as int64."""
        values = self._mix(np.asarray(indices, np.uint64))
        outside = values >= self.size
        while outside.any():
            values[outside] = self._mix(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def _mix(self, values: np.ndarray) -> np.ndarray:
        bits, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = values >> bits, values & mask
        for key in self._keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return (left << bits) | right
