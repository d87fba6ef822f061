"""How much memory there is, and whether an error says that there is none left."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

from mmtool.engine.slots import CAPACITY_STEP
from mmtool.errors import MMToolError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT_AT_MOST, TAKEN_AT_ONCE = 128 * 2**20, 16 * 2**20  # bytes that are free, and of one tensor that the system gives
KV_SHARE = 0.5  # of free memory, where nobody says how long a conversation may get; the rest is for activations


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on a device; None where that is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    found = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return found["MemAvailable"] * 1024


def fitting_length(length: int, rows: int, each: int, free: int | None, may_shorten: bool) -> int:
    """Return how long conversations may get: ``length``, or what fits into a share of free memory where that is less.

    Args:
        length: most positions of a conversation.
        rows: conversations at once.
        each: bytes of a position.
        free: bytes there are; None where that is not known.
        may_shorten: whether nobody asked for ``length``.

    Raises:
        MMToolError: where there is not enough memory.
    """
    if free is None:
        return length
    if may_shorten:
        fitting = int(free * KV_SHARE) // (rows * each) // CAPACITY_STEP * CAPACITY_STEP
        length = max(min(length, fitting), 2)
    needed = rows * each * (-(-length // CAPACITY_STEP) * CAPACITY_STEP)
    if needed > free:
        raise MMToolError(
            f"keys and values of {rows} conversations of {length} positions take "
            f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            "Lower max_model_len or the number of requests at once.",
        )
    return length


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is used up; on the CPU torch raises a plain RuntimeError for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def bound_programs(max_batch_size: int) -> None:
    """Bound what oneDNN keeps: it compiles a program for every shape of a product, of 270 KB each.

    By default torch keeps 1024 of them twice, which prompts of all lengths fill. The inner of the two caches alone is
    as fast. Must be called before the first product; what the environment says stays.

    Args:
        max_batch_size: most rows of a decode step; its products, for any number of rows, should find room.
    """
    os.environ.setdefault("LRU_CACHE_CAPACITY", "1")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(128 + 8 * max_batch_size))


def keep_freed_memory() -> None:
    """Let the C library keep memory that the last prompt has freed for the next.

    By default it gives most of it back to the system, and every page that is taken again costs as much as the
    arithmetic on its numbers: a tenth of the time of long prompts. What the environment says stays; other C libraries
    than GNU's are left as they are.
    """
    chosen = any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"))
    if chosen or sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_TRIM_THRESHOLD, KEPT_AT_MOST)
        library.mallopt(M_MMAP_THRESHOLD, TAKEN_AT_ONCE)


def give_back(device: torch.device) -> None:
    """Let go of memory that torch keeps for itself."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
