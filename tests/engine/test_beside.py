"""Prompts computed in a second thread while answers go on: nobody's answer changes, and nobody's slot is touched."""

import dataclasses
import random
import threading

import pytest
import torch

from mmtool.engine.beside import Beside, has_spare_cores
from mmtool.engine.llama_step import LlamaStep


@pytest.fixture
def threads(monkeypatch) -> list[str]:
    """The names of the threads that computed prompts."""
    seen = []
    fill = LlamaStep.fill

    def recording(self, embeds, chunks, slots):
        seen.append(threading.current_thread().name.split("_")[0])
        return fill(self, embeds, chunks, slots)

    monkeypatch.setattr(LlamaStep, "fill", recording)
    return seen


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """The second thread computes only while this is set."""
    event = threading.Event()
    start = Beside.start

    def gated(self, work, slots):
        def waiting():
            assert event.wait(30)
            return work()

        start(self, waiting, slots)

    monkeypatch.setattr(Beside, "start", gated)
    return event


def submitted(engine, requests):
    """Submit requests; return their runs and the deltas of each."""
    deltas = [[] for _ in requests]
    return [engine.submit(one, own.append) for one, own in zip(requests, deltas, strict=True)], deltas


def ids_of(deltas):
    return sum((delta.token_ids for delta in deltas), ())


def finish(engine):
    while engine.busy:
        engine.step()


@pytest.mark.parametrize("pictures", [False, True])
def test_who_comes_later_is_computed_beside_and_answers_like_generate(small, threads, pictures):
    parts = [[small.ids(seed, 12 + 3 * seed)] for seed in range(6)]
    if pictures:
        parts = [[*some, small.picture(seed), small.ids(40 + seed, 5)] for seed, some in enumerate(parts)]
    requests = [small.request(*some, max_new_tokens=20 + 9 * seed) for seed, some in enumerate(parts)]
    engine = small.engine(max_batch_size=3, prefill_chunk=16, prompts_beside=True)
    assert small.answers(engine, requests) == [small.generated(request) for request in requests]
    assert set(threads) == {"MainThread", "engine-prompts"}
    assert engine.stats.vision_runs == (6 if pictures else 0)


def test_answers_go_on_while_a_prompt_is_computed(small, gate):
    engine = small.engine(max_batch_size=2, prompts_beside=True)
    requests = [small.request(small.ids(1, 10), max_new_tokens=30), small.request(small.ids(2, 40))]
    (first,), (early,) = submitted(engine, requests[:1])
    engine.step()
    (second,), (late,) = submitted(engine, requests[1:])
    for _ in range(10):
        engine.step()
    assert len(first.token_ids) > 8 and not second.token_ids
    gate.set()
    finish(engine)
    assert [ids_of(early), ids_of(late)] == [small.generated(request) for request in requests]


def test_this_thread_lends_a_hand_while_the_other_computes(small, gate, monkeypatch):
    engine = small.engine(max_batch_size=4, prompts_beside=True)
    requests = [small.request(small.ids(seed, 30), max_new_tokens=12) for seed in range(4)]
    runs, deltas = submitted(engine, requests)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_swap", lambda *_: pytest.fail("its answers are in the rows that come first"))
        engine.step()
        assert engine._work.runs == runs[2:]  # short ones go together
        assert runs[0].token_ids and runs[1].token_ids
        engine.step()
        assert len(runs[0].token_ids) > 1 and not runs[2].token_ids
    gate.set()
    finish(engine)
    assert [ids_of(own) for own in deltas] == [small.generated(request) for request in requests]


def test_what_a_prompt_has_in_common_with_one_computed_beside_is_waited_for(small, gate):
    engine = small.engine(max_batch_size=3, prompts_beside=True)
    common = small.ids(1, 30)
    requests = [small.request(common, small.ids(seed, 5), max_new_tokens=30) for seed in range(2, 4)]
    requests.insert(0, small.request(small.ids(9, 10), max_new_tokens=40))
    _, (first,) = submitted(engine, requests[:1])
    engine.step()
    runs, deltas = submitted(engine, requests[1:])
    for _ in range(3):
        engine.step()
    assert engine._work.runs == runs[:1] and not runs[1].token_ids
    gate.set()
    finish(engine)
    assert deltas[1][-1].usage.cached_tokens == 30
    assert [ids_of(own) for own in (first, *deltas)] == [small.generated(request) for request in requests]


@pytest.mark.parametrize(
    ("siblings", "threads", "quota", "spare"),
    [
        (["0", "1"], 1, "max 100000", True),
        (["0", "1"], 2, "max 100000", False),
        (["0", "1", "2"], 2, "max 100000", False),
        (["0", "1", "2", "3"], 2, "max 100000", True),
        (["0-1", "0-1"], 1, "max 100000", False),  # two threads of one core
        (["0-1", "0-1", "2-3", "2-3"], 1, "max 100000", True),
        (["0", "1"], 1, "150000 100000", False),  # a container that may compute on one and a half
        (["0", "1"], 1, None, True),
        (["0"], 1, None, False),
        ([], 1, None, False),  # a system that does not say
    ],
)
def test_cores_are_spare_where_torch_uses_half_of_them(monkeypatch, tmp_path, siblings, threads, quota, spare):
    for number, text in enumerate(siblings):
        (tmp_path / str(number)).write_text(text)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr("mmtool.engine.beside.SIBLINGS", f"{tmp_path}/{{}}")
    monkeypatch.setattr("mmtool.engine.beside.QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(max(1, len(siblings)))), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert has_spare_cores() is spare


def test_nobody_gets_the_slot_of_a_cancelled_prompt_while_it_is_written(small, gate):
    engine = small.engine(max_batch_size=2, prompts_beside=True)
    requests = [small.request(small.ids(seed, 30), max_new_tokens=40) for seed in range(3)]
    (first,), (answer,) = submitted(engine, requests[:1])
    engine.step()
    (second,), _ = submitted(engine, requests[1:2])
    engine.step()
    held = second.slot
    engine.cancel(second)
    (third,), (late,) = submitted(engine, requests[2:])
    for _ in range(3):
        engine.step()
    assert held.run is None and third.slot is None and len(first.token_ids) > 3
    gate.set()
    finish(engine)
    assert [ids_of(answer), ids_of(late)] == [small.generated(requests[0]), small.generated(requests[2])]
    again = small.request(small.ids(1, 30), max_new_tokens=5)  # if its positions are known, they are right
    assert engine.answer(again).token_ids == small.generated(again)


def test_clearing_waits_for_what_is_written(small, gate):
    engine = small.engine(max_batch_size=2, prompts_beside=True)
    submitted(engine, [small.request(small.ids(1, 10), max_new_tokens=40)])
    engine.step()
    submitted(engine, [small.request(small.ids(2, 40))])
    engine.step()
    threading.Timer(0.05, gate.set).start()
    engine.clear()
    assert not engine.busy and not engine.kv.num_bytes
    request = small.request(small.ids(3, 20))
    assert engine.answer(request).token_ids == small.generated(request)


def test_storage_that_grows_keeps_what_is_written_beside(small, monkeypatch):
    monkeypatch.setattr("mmtool.engine.slotted.ROOM_AHEAD", 4)
    monkeypatch.setattr("mmtool.engine.slotted.CAPACITY_STEP", 8)
    lengths = (8, 30, 45, 20, 60)
    requests = [small.request(small.ids(seed, length), max_new_tokens=60) for seed, length in enumerate(lengths)]
    engine = small.engine(max_batch_size=3, prefill_chunk=16, prompts_beside=True)
    assert small.answers(engine, requests) == [small.generated(request) for request in requests]


@pytest.mark.parametrize("part", ["prompt", "picture"])
def test_what_fails_beside_fails_alone(small, monkeypatch, part):
    engine = small.engine(max_batch_size=4, prompts_beside=True)
    requests = [small.request(small.ids(seed, 20), max_new_tokens=30) for seed in range(4)]
    if part == "picture":
        bad = dataclasses.replace(small.picture(1), inputs={"pixel_values": torch.zeros(1, 3, 8, 8)}, key="bad0")
        requests[2] = small.request(small.ids(2, 5), bad)
    else:
        embeds = engine._prompt_embeds

        def failing(run, start, end):
            if run.request is requests[2]:
                raise ValueError("broken")
            return embeds(run, start, end)

        monkeypatch.setattr(engine, "_prompt_embeds", failing)
    _, (first,) = submitted(engine, requests[:1])
    engine.step()
    _, others = submitted(engine, requests[1:])
    finish(engine)
    assert others[1][-1].finish_reason == "error"
    for deltas, request in ((first, requests[0]), (others[0], requests[1]), (others[2], requests[3])):
        assert ids_of(deltas) == small.generated(request)


def test_memory_that_ends_beside_is_freed_and_the_prompt_tried_again(small, monkeypatch):
    engine = small.engine(max_batch_size=3, prompts_beside=True)
    requests = [small.request(small.ids(seed, 20), max_new_tokens=30) for seed in range(2)]
    fill, failed = LlamaStep.fill, []

    def failing(self, embeds, chunks, slots):
        if threading.current_thread() is not threading.main_thread() and not failed:
            failed.append(chunks)
            raise MemoryError
        return fill(self, embeds, chunks, slots)

    monkeypatch.setattr(LlamaStep, "fill", failing)
    _, (first,) = submitted(engine, requests[:1])
    engine.step()
    _, (second,) = submitted(engine, requests[1:])
    finish(engine)
    assert failed
    assert [ids_of(first), ids_of(second)] == [small.generated(request) for request in requests]


@pytest.mark.parametrize("seed", range(8))
def test_random_traffic_with_results_that_come_late(small, monkeypatch, seed):
    monkeypatch.setattr("mmtool.engine.slotted.ROOM_AHEAD", 8)
    choose = random.Random(seed)
    ready = Beside.done.fget
    monkeypatch.setattr(Beside, "done", property(lambda self: choose.random() < 0.4 and ready(self)))
    prompts = []
    for number in range(10):
        parts = [small.ids(100 + number % 3, 20), *[small.picture(number % 4)] * (number % 2), small.ids(number, 9)]
        prompts.append((parts, small.generated(small.request(*parts, max_new_tokens=20))))
    engine = small.engine(
        max_batch_size=choose.choice([2, 3, 5]),
        prefill_chunk=choose.choice([5, 512]),
        preallocate=seed % 2 == 0,
        compile=seed % 3 == 0,
        prompts_beside=True,
    )
    running, finished = [], 0
    for _ in range(150):
        action = choose.random()
        if action < 0.25 and len(running) < 10:
            parts, answer = choose.choice(prompts)
            length = choose.randrange(1, 21)
            (run,), (deltas,) = submitted(engine, [small.request(*parts, max_new_tokens=length)])
            running.append((run, deltas, answer[:length]))
        elif action < 0.35 and running:
            run, deltas, answer = running.pop(choose.randrange(len(running)))
            engine.cancel(run)
            assert ids_of(deltas) == answer[: len(ids_of(deltas))]
        else:
            engine.step()
        for _, deltas, answer in [entry for entry in running if entry[0].finished]:
            assert ids_of(deltas) == answer
            finished += 1
        running = [entry for entry in running if not entry[0].finished]
    assert finished
