"""The processes of a run, as each of them sees the others; on the CPU, beside what trains."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mmtool.errors import MMToolError
from mmtool.utils import free_port


class Ranks:
    """This process among ``world_size``; its talk with the others goes over gloo, also where they have GPUs."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(self.world_size)))
        self._group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and talks."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether it is the first on its machine."""
        return self.local_rank == 0

    def connect(self, use_cpu: bool, *, alone: bool = False, timeout: float = 7200.0) -> None:
        """Meet the others; with one process there is nothing to do, unless ``alone`` wants a group of one."""
        if (self.world_size == 1 and not alone) or dist.is_initialized():
            return
        if self.world_size == 1:
            alone_at = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            for name, value in (alone_at | {"MASTER_PORT": str(free_port())}).items():
                os.environ.setdefault(name, value)
        if not use_cpu:
            if self.local_rank >= torch.cuda.device_count():
                raise MMToolError(
                    f"--nproc_per_node: process {self.local_rank} has no GPU, torch sees {torch.cuda.device_count()}",
                    "Start one process per GPU, or pass --device_map cpu.",
                )
            torch.cuda.set_device(self.local_rank)
        wait = timedelta(seconds=timeout)
        dist.init_process_group("gloo" if use_cpu else "cpu:gloo,cuda:nccl", timeout=wait)
        self._group = dist.new_group(backend="gloo", timeout=wait)

    def barrier(self) -> None:
        """Wait for the others."""
        if self._group is not None:
            dist.barrier(group=self._group)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether it is set in any process; the same everywhere."""
        if self._group is None:
            return flags
        values = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group)
        return tuple(bool(value) for value in values)

    def sum(self, *numbers: float) -> tuple[float, ...]:
        """Return the sum of each number over the processes."""
        if self._group is None:
            return numbers
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, group=self._group)
        return tuple(values.tolist())

    def share(self, value: Any) -> Any:
        """Return what the main process passes."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def disconnect(self) -> None:
        """Leave the others."""
        self._group = None
        if dist.is_initialized():
            deepspeed = sys.modules.get("deepspeed")  # it keeps groups of its own
            theirs = deepspeed is not None and deepspeed.comm.is_initialized()
            (deepspeed.comm if theirs else dist).destroy_process_group()
