"""Memory of the CPU in large pages, for what every step reads."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import nn

ALIGNMENT, HUGE_PAGE = 64, 2 * 2**20  # bytes


def ask_huge(memory: mmap.mmap) -> None:
    """Ask the system to map memory in pages of 2 MB, where it can: weights and keys are then read faster."""
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)


def move_to_huge_pages(weights: Iterable[nn.Parameter]) -> None:
    """Give weights on the CPU the same numbers in memory of large pages; every product reads all of them.

    Loaded weights are pages of 4 KB of their file, whose addresses cost a tenth of the time of a step. The old memory
    is free at once, weight by weight. Matrices come first, without biases between them: those that follow each other
    can be used as one then.
    """
    distinct = {id(weight): weight for weight in weights}.values()  # tied ones come twice
    moved = [weight for weight in distinct if weight.device.type == "cpu" and weight.is_contiguous()]
    if not moved or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    moved.sort(key=lambda weight: weight.ndim < 2)
    places, end = [], 0
    for weight in moved:
        places.append(end)
        end += -(-weight.nbytes // ALIGNMENT) * ALIGNMENT
    memory = mmap.mmap(-1, end + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ask_huge(memory)
    block = torch.frombuffer(memory, dtype=torch.uint8)
    first = -block.data_ptr() % HUGE_PAGE
    for weight, place in zip(moved, places, strict=True):
        start = first + place
        there = block[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
        weight.data = there.copy_(weight.data)
