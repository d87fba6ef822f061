"""Random traffic: whoever comes, goes or shares a beginning, every answer is that of ``generate``."""

import random

import pytest


@pytest.fixture(scope="module")
def prompts(small):
    """Prompts that begin alike in groups, with and without pictures; beside each, its answer of 30 tokens."""
    found = []
    for number in range(14):
        parts = [small.ids(100 + number % 3, 20 + 5 * (number % 3))]
        parts += [small.picture(number % 4)] * (number % 2)
        parts += [small.ids(200 + number % 5, 3 + 4 * (number % 5))]
        parts += [small.picture(5)] * (number % 5 == 0)
        parts += [small.ids(number, 1 + 3 * number)] * (number % 3 == 0)
        found.append((parts, small.generated(small.request(*parts, max_new_tokens=30))))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic(small, prompts, monkeypatch, seed):
    monkeypatch.setattr("mmtool.engine.pt.ROOM_AHEAD", 8)
    monkeypatch.setattr("mmtool.engine.pt.CAPACITY_STEP", 16)
    choose = random.Random(seed)
    engine = small.engine(
        max_batch_size=choose.choice([1, 2, 3, 5, 8]),
        prefill_tokens=choose.choice([3, 11, 2048]),
        feature_cache_bytes=choose.choice([0, 10_000, 10**8]),
    )
    running = []
    finished = 0
    for _ in range(150):
        action = choose.random()
        if action < 0.25 and len(running) < 12:
            parts, answer = choose.choice(prompts)
            length = choose.randrange(1, 31)
            deltas = []
            run = engine.submit(small.request(*parts, max_new_tokens=length), deltas.append)
            running.append((run, deltas, answer[:length]))
        elif action < 0.32 and running:
            run, deltas, answer = running.pop(choose.randrange(len(running)))
            engine.cancel([run])
            ids = sum((delta.token_ids for delta in deltas), ())
            assert ids == answer[: len(ids)]
        else:
            engine.step()
        for _, deltas, answer in [entry for entry in running if entry[0].finished]:
            assert sum((delta.token_ids for delta in deltas), ()) == answer
            finished += 1
        running = [entry for entry in running if not entry[0].finished]
        assert_consistent(engine)
    assert finished


def assert_consistent(engine):
    """Every slot knows its row and what may be written in it; the rest of the storage is zero."""
    for row, slot in enumerate(engine.slots):
        assert slot.row == row
        assert slot.written >= len(slot.tokens)
        for tensor in (*engine.kv.keys, *engine.kv.values):
            assert tensor is None or not tensor[row : row + 1, :, slot.written :].any()
