"""Memory is bounded: taken at the start or grown, given up where there is none left, flat while requests pass."""

import gc
import random

import pytest
import torch

from mmtool.engine.slots import KVSlots
from mmtool.errors import MMToolError

EACH = 3 * 2 * 2 * 16 * 4  # bytes of a position of the small model: layers, keys and values, heads, width, float32


@pytest.fixture
def scarce(monkeypatch):
    """Let storage for keys and values fail beyond a number of bytes, per tensor."""

    def limit(num_bytes):
        empty = KVSlots._empty

        def checked(kv, like):
            if kv.num_slots * kv.capacity * like.shape[1] * like.shape[3] * 4 > num_bytes:
                raise torch.OutOfMemoryError("no memory, says the test")
            return empty(kv, like)

        monkeypatch.setattr(KVSlots, "_empty", checked)

    return limit


def test_all_memory_is_taken_at_the_start(small, caplog):
    caplog.set_level("INFO", "mmtool")
    engine = small.engine(max_batch_size=3, max_model_len=200, preallocate=True)
    assert engine.kv_bytes == 3 * 256 * EACH  # 200 positions, rounded up
    assert "KV memory: 0.6 MB, for 3 conversations of 200 positions" in caplog.text
    addresses = [tensor.data_ptr() for tensor in (*engine.kv.keys, *engine.kv.values)]
    requests = [small.request(small.ids(seed, 10 * seed), max_new_tokens=40) for seed in range(1, 9)]
    assert small.answers(engine, requests) == [small.generated(request) for request in requests]
    engine.clear()
    assert small.answers(engine, requests[:2]) == [small.generated(request) for request in requests[:2]]
    assert [tensor.data_ptr() for tensor in (*engine.kv.keys, *engine.kv.values)] == addresses


def test_length_follows_free_memory_unless_it_is_given(small, monkeypatch):
    monkeypatch.setattr("mmtool.engine.pt.free_memory", lambda device: 2 * 4 * 256 * EACH)
    engine = small.engine(max_batch_size=4, preallocate=True)
    assert engine.max_model_len == 256
    assert small.engine(max_batch_size=4, preallocate=True, max_model_len=500).max_model_len == 500
    with pytest.raises(MMToolError, match=r"conversations of 500 positions take 0\.0 GB"):
        small.engine(max_batch_size=9, preallocate=True, max_model_len=500)


def test_kept_conversations_make_room(small, scarce):
    engine = small.engine(max_batch_size=4)
    for seed in range(4):
        engine.answer(small.request(small.ids(seed, 60), max_new_tokens=30))
    assert engine.kv.num_slots == 4
    scarce(2 * 512 * 2 * 16 * 4)
    asked = small.request(small.ids(9, 400), max_new_tokens=30)
    assert engine.answer(asked).token_ids == small.generated(asked)
    assert engine.kv.num_slots <= 2


def test_requests_that_find_no_memory_fail_and_the_others_go_on(small, scarce):
    engine = small.engine(max_batch_size=3)
    running = small.request(small.ids(1, 30), max_new_tokens=60)
    deltas, failed = [], []
    engine.submit(running, deltas.append)
    engine.step()
    scarce(engine.kv.keys[0].nbytes)
    for seed in (2, 3):
        engine.submit(small.request(small.ids(seed, 100)), failed.append)
    while engine.busy:
        engine.step()
    assert [type(delta.error) for delta in failed] == [torch.OutOfMemoryError] * 2
    assert sum((delta.token_ids for delta in deltas), ()) == small.generated(running)


def test_answer_that_finds_no_more_room_ends_alone(small, scarce, monkeypatch):
    monkeypatch.setattr("mmtool.engine.slotted.ROOM_AHEAD", 4)
    engine = small.engine(max_batch_size=2)
    requests = [small.request(small.ids(seed, length), max_new_tokens=60) for seed, length in ((1, 100), (2, 20))]
    scarce(2 * 128 * 2 * 16 * 4)
    last = {}
    ids = {0: (), 1: ()}
    for delta in engine.generate(requests, errors="yield"):
        ids[delta.index] += delta.token_ids
        last[delta.index] = delta
    assert isinstance(last[0].error, torch.OutOfMemoryError)
    assert ids[0] == small.generated(requests[0])[: len(ids[0])] and 25 < len(ids[0]) < 60
    assert ids[1] == small.generated(requests[1])


@pytest.mark.parametrize("moment", ["prompt", "answer"])
def test_what_is_kept_is_dropped_when_a_step_runs_out_of_memory(small, moment, caplog):
    model = small.network()
    engine = small.engine(model, max_batch_size=2)
    engine.answer(small.request(small.picture(1), small.ids(1, 5)))
    asked = small.request(small.ids(2, 20), max_new_tokens=8)

    def fail(module, args):
        positions = args[0].shape[1] if args[0].ndim == 3 else 1
        if len(engine.features) and (positions > 1) == (moment == "prompt"):
            raise torch.OutOfMemoryError("no memory, says the test")

    model.model.language_model.norm.register_forward_pre_hook(fail)
    assert engine.answer(asked).token_ids == small.generated(asked)
    assert len(engine.features) == 0
    assert "out of memory" in caplog.text


def test_storage_that_cannot_grow_is_as_before(scarce):
    kv = KVSlots(2)
    kv.reserve(2, 4, 0)
    for layer in range(2):
        keys, values = kv.layer(layer, torch.empty(1, 3, 1, 5), torch.empty(1, 3, 1, 2))
        keys.copy_(torch.arange(keys.numel()).view_as(keys))
        values.fill_(layer)
    before = [tensor.clone() for tensor in (*kv.keys, *kv.values)]
    scarce(2 * 8 * 3 * 2 * 4)  # room for the values alone, which come after the keys
    with pytest.raises(torch.OutOfMemoryError):
        kv.reserve(2, 8, 4)
    assert (kv.num_slots, kv.capacity) == (2, 4)
    for old, new in zip(before, (*kv.keys, *kv.values), strict=True):
        assert torch.equal(old, new)
    kv.shrink(1, 3)
    assert torch.equal(kv.keys[1], before[1][:1, :, :3])


def tensor_bytes():
    gc.collect()
    kept = {item.untyped_storage() for item in gc.get_objects() if type(item) is torch.Tensor}
    return sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())


def test_nothing_grows_with_the_number_of_requests(small):
    """Pictures all differ, requests of every kind come, go and fail."""
    choose = random.Random(0)
    engine = small.engine(
        max_batch_size=4, max_model_len=256, preallocate=True, feature_cache_bytes=5 * 16 * 64 * 4, prefill_chunk=32
    )

    def traffic(first):
        running = []
        for seed in range(first, first + 60):
            parts = [small.ids(seed % 5, 12), small.picture(seed % 256), small.ids(seed, choose.randrange(1, 30))]
            request = small.request(*parts, max_new_tokens=choose.randrange(1, 12))
            if seed % 9 == 0:
                request.media[0].inputs["pixel_values"] = torch.zeros(1, 3, 40, 40)
            running.append(engine.submit(request, lambda delta: None))
            for _ in range(choose.randrange(4)):
                engine.step()
            if seed % 4 == 0:
                engine.cancel(choose.choice(running))
        while engine.busy:
            engine.step()

    traffic(0)
    before, kv_bytes = tensor_bytes(), engine.kv_bytes
    for round_ in range(1, 4):
        traffic(60 * round_)
    assert engine.kv_bytes == kv_bytes
    assert engine.features.num_bytes <= engine.features.max_bytes
    assert tensor_bytes() <= before + 16 * 64 * 4
    assert not (engine._waiting or engine._filling or engine._running())
