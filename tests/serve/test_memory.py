"""What a server takes of the system: memory, which goes back while it has work, and open files."""

import ctypes
import os
import resource
import sys
import threading
from pathlib import Path

import pytest

from mmtool.serve import main

BLOCK, COUNT = 40_000, 1000  # bytes; below what the C library takes from the system one by one


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library")
def test_free_memory_between_blocks_in_use_is_given_back():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    blocks = []
    for _ in range(2 * COUNT):
        blocks.append(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(BLOCK))))
        libc.memset(blocks[-1], 1, ctypes.c_size_t(BLOCK))
    for block in blocks[::2]:
        libc.free(block)
    before = resident()
    main.give_memory_back()
    assert before - resident() > COUNT * BLOCK // 2
    for block in blocks[1::2]:
        libc.free(block)


def test_it_is_done_now_and_then_while_requests_come(serving, monkeypatch):
    done = threading.Semaphore(0)
    monkeypatch.setattr(main, "WATCHED_EVERY", 0.02)
    monkeypatch.setattr(main, "TRIMMED_EVERY", 0.0)
    monkeypatch.setattr(main, "give_memory_back", done.release)
    with serving() as server:
        assert server.http.get("/health").status_code == 200
        assert done.acquire(timeout=10)
        assert not done.acquire(timeout=0.3), "once is enough where nothing has come since"
        assert server.http.get("/health").status_code == 200
        assert done.acquire(timeout=10)


@pytest.mark.skipif(sys.platform != "linux", reason="only there")
def test_as_many_connections_may_be_open_as_the_system_allows():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1] - 1, before[1]))
        main.allow_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
