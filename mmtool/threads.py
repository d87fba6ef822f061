"""Which of our threads torch computes in with several processors.

OpenMP gives every thread that computes with several a team of its own. While all teams together have no more members
than there are processors, a member looks for its next piece of work for some milliseconds before it sleeps; with more
members it sleeps at once, and every product then waits for the system to wake it. One answer at a time came at 60
tokens per second instead of 90 for that reason (``examples/bench/README.md``). So one thread has a team, the one that
runs the model.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import partial

import torch

OMP_PAUSE_SOFT = 1  # of omp.h


def computing_alone() -> Callable[[], None]:
    """Return what a thread that prepares data calls first, so that it has no team."""
    torch.get_num_threads()  # settles the caller's number, see below
    return partial(compute_with, 1)


def compute_with(threads: int) -> None:
    """Set how many processors the calling thread computes with, whatever others set before or after."""
    torch.get_num_threads()  # when a thread first asks, it takes the number that was set last in any thread
    torch.set_num_threads(threads)


def compute_elsewhere() -> None:
    """End the team of the calling thread, which has loaded a model that another one runs from now on."""
    torch.set_num_threads(1)
    libraries = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libraries is not None and hasattr(libraries, "omp_pause_resource_all"):  # OpenMP 5.0, as torch brings it
        libraries.omp_pause_resource_all(OMP_PAUSE_SOFT)
