"""A second thread for an engine: prompts are computed there while answers go on in the first."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mmtool.engine.slots import Slot
from mmtool.threads import compute_with

SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"  # the processors of one core
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of computing, and within how many


def has_spare_cores() -> bool:
    """Return whether torch leaves this process as many cores as it computes with; what Linux tells, elsewhere False.

    With fewer, the second thread would hold its half of the prompts up. Two processors that are threads of one core
    count as one: together they do little more than each alone.
    """
    if not hasattr(os, "sched_getaffinity"):
        return False
    cores = set()
    for number in os.sched_getaffinity(0):
        try:
            cores.add(Path(SIBLINGS.format(number)).read_text())
        except OSError:
            return False
    allowed = float(len(cores))
    with suppress(OSError, ValueError):  # no such file, or "max" in it
        share, period = QUOTA.read_text().split()
        allowed = min(allowed, int(share) / int(period))
    return allowed >= 2 * torch.get_num_threads()


class Beside:
    """Does one piece of work at a time in a thread of its own; all methods are called by the engine's thread.

    The slots of a piece of work are its own until its result is taken: nobody else may write to them, move them or
    give them to a request.

    Attributes:
        slots: those of the work under way.
    """

    def __init__(self) -> None:
        self.slots: Sequence[Slot] = ()
        self._pool: ThreadPoolExecutor | None = None
        self._future: Future[Any] | None = None

    @property
    def at_work(self) -> bool:
        """Whether there is work whose result was not taken."""
        return self._future is not None

    @property
    def done(self) -> bool:
        """Whether there is a result to take."""
        return self._future is not None and self._future.done()

    def start(self, work: Callable[[], Any], slots: Sequence[Slot]) -> None:
        """Begin to compute ``work()``, which writes to ``slots``."""
        assert self._future is None, "one at a time"
        if self._pool is None:  # its thread ends with this object
            self._pool = ThreadPoolExecutor(1, "engine-prompts", compute_with, (torch.get_num_threads(),))
        self.slots = slots
        self._future = self._pool.submit(_inferred, work)

    def wait(self) -> None:
        """Wait until nothing is written any more; the result can still be taken."""
        if self._future is not None:
            wait([self._future])

    def result(self) -> Any:
        """Wait, and return what the work gave or raise what it raised."""
        self.wait()
        assert self._future is not None, "asked only where there is one"
        future, self._future, self.slots = self._future, None, ()
        return future.result()

    def drop(self) -> None:
        """Wait, and forget the result."""
        self.wait()
        self._future, self.slots = None, ()


def _inferred(work: Callable[[], Any]) -> Any:
    with torch.inference_mode():  # a setting of each thread
        return work()
