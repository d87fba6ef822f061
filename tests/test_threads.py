"""One thread of ours computes with several processors; all others alone, whatever they set or ask in between."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mmtool.infer.prefetch import Prefetch
from mmtool.threads import compute_elsewhere, compute_with, computing_alone

TEAMS = """
import os
import threading
import torch
from mmtool.threads import compute_elsewhere, compute_with

def threads():
    return len(os.listdir("/proc/self/task"))

def compute():
    torch.ones(2_000_000).add_(1)

compute_with(3)
compute()
found = [threads()]
compute_elsewhere()
found.append(threads())

def steps():
    compute_with(3)
    compute()
    found.append(threads())

engine = threading.Thread(target=steps)
engine.start()
engine.join()
compute()
print(found[0] - found[1], found[2] - found[1], torch.get_num_threads())
"""


@pytest.fixture(autouse=True)
def number():
    """What torch computes with in the tests' own thread, which they may set."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def in_a_thread(*functions) -> int:
    """Return how many processors a new thread computes with after it has called ``functions``."""
    found = []

    def ask():
        for function in functions:
            function()
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists the threads of a process")
def test_the_thread_that_loads_a_model_leaves_its_team():
    result = subprocess.run([sys.executable, "-c", TEAMS], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["2", "3", "1"]  # its two helpers end; the engine's thread has two; it has none


def test_threads_that_prepare_data_compute_alone():
    assert in_a_thread(computing_alone()) == 1
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(2, initializer=computing_alone()) as pool:
        assert [pool.submit(torch.get_num_threads).result() for _ in range(4)] == [1] * 4
    assert torch.get_num_threads() == 3


def test_the_number_of_a_thread_stays_when_others_set_theirs():
    assert in_a_thread(lambda: compute_with(2), lambda: in_a_thread(computing_alone())) == 2
    assert in_a_thread(lambda: compute_with(2), lambda: in_a_thread(compute_elsewhere)) == 2
    assert torch.get_num_threads() == 3


def test_items_are_prefetched_alone():
    with Prefetch((torch.get_num_threads() for _ in range(3)), 2) as items:
        assert list(items) == [1, 1, 1]
    assert torch.get_num_threads() == 3
