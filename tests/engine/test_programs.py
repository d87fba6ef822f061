"""What torch's libraries compile for the shapes they meet is bounded: a server gets prompts of all lengths."""

import ctypes
import os
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, random, sys
import torch
from mmtool.engine.base import Request, Sampling
from mmtool.engine.create import create_engine
from mmtool.loader import load_model, open_folder

class Info(ctypes.Structure):  # of malloc.h
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    _fields_ = [(name, ctypes.c_size_t) for name in names]

malloc_info = ctypes.CDLL(None).mallinfo2
malloc_info.restype = Info
torch.set_num_threads(1)
spec, folder = open_folder("tiny", None)
model, processor = load_model(spec, folder)
engine = create_engine(
    model.to(getattr(torch, sys.argv[1])), processor, max_batch_size=4, preallocate=True, pack_weights=True
)

def ask(length, seed):  # the second asks for more behind what is known of the first
    for more in (0, length % 37 + 40):
        ids = torch.randint(10, 200, (length + more,), generator=torch.Generator().manual_seed(seed)).tolist()
        for _ in engine.generate([Request(input_ids=ids, sampling=Sampling(max_new_tokens=1))]):
            pass

lengths = random.Random(0).sample(range(40, 400), 60)
for part in (lengths[:30], lengths[30:]):
    print("in use:", malloc_info().uordblks, flush=True)
    for length in part:
        ask(length, length)
print("in use:", malloc_info().uordblks, flush=True)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs the C library's count of its memory")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompts_of_new_lengths_leave_no_compiled_programs_behind(dtype):
    unset = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, dtype],
        env=environment | {"ONEDNN_VERBOSE": "profile_create"},
        capture_output=True,
        text=True,
        check=True,
    )
    _, _, second, after = found.stdout.split("in use: ")
    compiled = second.count("create:cache_miss")
    assert "create:cache_" in second or dtype == "float32", "oneDNN tells what it compiles"
    assert compiled <= 30, "30 lengths of two parts each; otherwise every length has programs of its own"
    grown = int(after.split()[0]) - int(second.split()[0])
    assert grown < 6e6, "30 lengths take 60 MB in float32 and 100 MB in bfloat16 otherwise"


def test_the_environment_decides_before_us(monkeypatch):
    from mmtool.engine.memory import bound_programs

    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    bound_programs(16)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
    assert os.environ["LRU_CACHE_CAPACITY"] == "1"


FREED = """
import resource
import torch
from mmtool.engine.memory import keep_freed_memory

keep_freed_memory()
for turn in range(5):
    if turn == 2:  # it has found its place
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**20) for _ in range(8)]  # 4 MB each
    while tensors:
        tensors.pop()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs GNU's C library")
def test_memory_of_a_prompt_serves_the_next():
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    environment = {name: value for name, value in os.environ.items() if name not in names}

    def new_pages(**more):
        command = [sys.executable, "-c", FREED]
        found = subprocess.run(command, env=environment | more, capture_output=True, text=True, check=True)
        return int(found.stdout)

    assert new_pages() < 5000
    assert new_pages(MALLOC_TRIM_THRESHOLD_=str(2**20)) > 20000, "three times 32 MB; the environment decides before us"
