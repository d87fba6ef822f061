"""Prompts of several requests in one call of the step: as many as fit, and none pays for another."""

import pytest

from mmtool.engine.llama_step import LlamaStep


@pytest.fixture
def calls(monkeypatch) -> list[list[int]]:
    """How many positions each prompt had in each call of ``fill``."""
    seen = []
    fill = LlamaStep.fill

    def recording(self, embeds, chunks, slots):
        seen.append([chunk.end - chunk.start for chunk in chunks])
        return fill(self, embeds, chunks, slots)

    monkeypatch.setattr(LlamaStep, "fill", recording)
    return seen


def test_short_prompts_share_a_call(small, calls):
    requests = [small.request(small.ids(seed, 20 + seed)) for seed in range(4)]
    requests[1] = small.request(small.ids(30, 4), small.picture(3), small.ids(31, 5))
    expected = [small.generated(request) for request in requests]
    assert small.answers(small.engine(max_batch_size=4), requests) == expected
    # The picture goes through its tower when it is next, so the first call ends before it.
    assert calls == [[20], [25, 22, 23]]


def test_only_whole_prompts_join_and_nobody_waits_longer_than_a_chunk(small, calls):
    requests = [small.request(small.ids(seed, length)) for seed, length in enumerate((10, 300, 25, 30))]
    engine = small.engine(max_batch_size=4, prefill_chunk=40)
    assert small.answers(engine, requests) == [small.generated(request) for request in requests]
    assert sum(calls[0]) <= 2048
    long = small.request(small.ids(9, 100))
    running = small.request(small.ids(8, 12), max_new_tokens=40)
    calls.clear()
    deltas = []
    engine.submit(running, deltas.append)
    engine.step()
    engine.submit(long, deltas.append)
    while engine.busy:
        engine.step()
    assert calls == [[12], [40], [40], [20]]


def test_prompts_that_begin_alike_wait_for_each_other(small, calls):
    start = small.ids(1, 60)
    requests = [small.request(start, small.ids(seed, 10)) for seed in (2, 3)]
    engine = small.engine(max_batch_size=2)
    assert small.answers(engine, requests) == [small.generated(request) for request in requests]
    assert calls == [[70], [10]]
    assert engine.stats.cached_tokens == 60


def test_a_prompt_that_fails_fails_alone(small, calls, monkeypatch):
    engine = small.engine(max_batch_size=3)
    requests = [small.request(small.ids(seed, 20)) for seed in range(3)]
    embeds = engine._prompt_embeds

    def failing(run, start, end):
        if run.request is requests[1]:
            raise ValueError("broken")
        return embeds(run, start, end)

    monkeypatch.setattr(engine, "_prompt_embeds", failing)
    found = {}
    for delta in engine.generate(requests, errors="yield"):
        found.setdefault(delta.index, []).append(delta)
    assert str(found[1][-1].error) == "broken"
    for index in (0, 2):
        ids = tuple(token for delta in found[index] for token in delta.token_ids)
        assert ids == small.generated(requests[index])
