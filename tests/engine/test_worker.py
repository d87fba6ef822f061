"""The thread around an engine: what comes from several threads is answered, bounded, cancelled and stopped."""

import queue
import threading
import time

import pytest
import torch

from mmtool.engine.base import Delta
from mmtool.engine.worker import EngineWorker, QueueFull, ShuttingDown
from mmtool.errors import MMToolError, TooLongError

PATIENCE = 60.0  # seconds; only a test that fails waits so long


class Reader:
    """Takes the deltas of one request, and can be waited for."""

    def __init__(self):
        self.deltas = []
        self.threads = set()
        self.begun = threading.Event()
        self.ended = threading.Event()

    def __call__(self, delta: Delta) -> None:
        self.deltas.append(delta)
        self.threads.add(threading.current_thread().name)
        self.begun.set()
        if delta.finish_reason is not None:
            self.ended.set()

    @property
    def last(self) -> Delta:
        assert self.ended.wait(PATIENCE)
        return self.deltas[-1]

    @property
    def ids(self):
        assert self.last.finish_reason is not None
        return sum((delta.token_ids for delta in self.deltas), ())


class Gate:
    """Stops the engine before a step until it is opened."""

    def __init__(self, engine):
        self.open = threading.Event()
        self.reached = threading.Event()
        step = engine.step

        def wait():
            self.reached.set()
            assert self.open.wait(PATIENCE)
            step()

        engine.step = wait


@pytest.fixture
def started():
    workers = []

    def start(engine, **options):
        workers.append(EngineWorker(engine, **{"max_queue": 100, **options}))
        return workers[-1]

    yield start
    for worker in workers:
        assert worker.stop(0)


def test_requests_of_many_threads_get_their_own_answers(small, started):
    worker = started(small.engine(max_batch_size=4))
    requests = [small.request(small.ids(seed, 3 + seed), max_new_tokens=4 + seed % 5) for seed in range(24)]
    readers = [Reader() for _ in requests]

    def client(first):
        for request, reader in zip(requests[first::4], readers[first::4], strict=True):
            worker.submit(request, reader)

    clients = [threading.Thread(target=client, args=(first,)) for first in range(4)]
    for thread in clients:
        thread.start()
    assert [reader.ids for reader in readers] == [small.generated(request) for request in requests]
    assert {name for reader in readers for name in reader.threads} == {"engine"}
    for thread in clients:
        thread.join()
    stats = worker.snapshot()
    assert (stats.queued, stats.finished, stats.engine.requests) == (0, {"length": 24}, 24)
    assert stats.kv_bytes == worker.engine.kv_bytes > 0
    assert worker.healthy()


def test_full_queue_says_when_to_come_again(small, started):
    engine = small.engine(max_batch_size=2)
    gate = Gate(engine)
    worker = started(engine, max_queue=3)
    asked = small.request(small.ids(1, 5), max_new_tokens=2)
    readers = [Reader() for _ in range(5)]
    for reader in readers:
        worker.submit(asked, reader)
    with pytest.raises(QueueFull) as caught:
        worker.submit(asked, Reader())
    assert 1 <= caught.value.retry_after <= 120
    assert worker.snapshot().rejected == 1
    gate.open.set()
    assert all(reader.last.finish_reason == "length" for reader in readers)
    late = Reader()
    worker.submit(asked, late)
    assert late.ids == small.generated(asked)


def test_retry_after_follows_the_measured_rate(small, started):
    engine = small.engine(max_batch_size=2)
    worker = started(engine, max_queue=0)
    worker._durations.extend([40.0] * 8)
    gate = Gate(engine)
    asked = small.request(small.ids(1, 5), max_new_tokens=2)
    with worker._changed:  # both are there before the worker looks
        for _ in range(2):
            worker.submit(asked, Reader())
    assert gate.reached.wait(PATIENCE)
    with pytest.raises(QueueFull) as caught:
        worker.submit(asked, Reader())
    assert caught.value.retry_after == 20  # two at a time, 40 seconds each
    gate.open.set()


def test_bad_requests_are_refused_in_the_callers_thread(small, started):
    worker = started(small.engine())
    with pytest.raises(TooLongError):
        worker.submit(small.request(small.ids(1, small.max_model_len)), Reader())
    with pytest.raises(MMToolError, match="max_queue"):
        EngineWorker(small.engine(), max_queue=-1)


@pytest.mark.parametrize("state", ["queued", "running"])
def test_cancel_from_another_thread(small, started, state):
    worker = started(small.engine(), max_queue=5)
    long = small.request(small.ids(1, 5), max_new_tokens=400)
    first, second = Reader(), Reader()
    ticket = worker.submit(long, first)
    assert first.begun.wait(PATIENCE)
    other = worker.submit(long, second)
    victim = other if state == "queued" else ticket
    victim.cancel()
    victim.cancel()
    reader = second if state == "queued" else first
    assert reader.last.finish_reason == "cancelled"
    assert len([delta for delta in reader.deltas if delta.finish_reason]) == 1
    rest = first if state == "queued" else second
    assert rest.ids == small.generated(long)
    assert worker.snapshot().finished == {"cancelled": 1, "length": 1}


def test_reader_that_fails_is_cancelled_and_nobody_else(small, started):
    worker = started(small.engine(max_batch_size=2))
    good = small.request(small.ids(1, 5), max_new_tokens=30)

    def gone(delta):
        raise RuntimeError("the event loop is closed")

    worker.submit(small.request(small.ids(2, 5), max_new_tokens=400), gone)
    reader = Reader()
    worker.submit(good, reader)
    assert reader.ids == small.generated(good)
    while worker.snapshot().running:
        time.sleep(0.01)
    assert worker.snapshot().finished == {"length": 1, "cancelled": 1}


def test_stop_lets_requests_end(small):
    worker = EngineWorker(small.engine(), max_queue=10)
    requests = [small.request(small.ids(seed, 5), max_new_tokens=30) for seed in range(3)]
    readers = [Reader() for _ in requests]
    for request, reader in zip(requests, readers, strict=True):
        worker.submit(request, reader)
    assert worker.stop(PATIENCE)
    assert [reader.ids for reader in readers] == [small.generated(request) for request in requests]
    with pytest.raises(ShuttingDown):
        worker.submit(requests[0], Reader())
    assert not worker.healthy()
    assert worker.stop(0)


def test_stop_cuts_off_what_takes_too_long(small):
    worker = EngineWorker(small.engine(), max_queue=10)
    readers = [Reader(), Reader()]
    for reader in readers:
        worker.submit(small.request(small.ids(1, 5), max_new_tokens=480), reader)
    assert readers[0].begun.wait(PATIENCE)
    assert worker.stop(0)
    for reader in readers:
        assert reader.last.finish_reason == "error" and isinstance(reader.last.error, ShuttingDown)
    assert worker.snapshot().stopping


@pytest.mark.parametrize("error", [RuntimeError("a bug"), SystemExit(1)])
def test_fatal_error_fails_all_and_is_told(small, error, caplog):
    engine = small.engine()
    step = engine.step

    def fail():
        if reader.deltas and asked.is_set():
            raise error
        step()

    engine.step = fail
    asked = threading.Event()
    reader, waiting = Reader(), Reader()
    worker = EngineWorker(engine, max_queue=10)
    for each in (reader, waiting):
        worker.submit(small.request(small.ids(1, 5), max_new_tokens=400), each)
    asked.set()
    for each in (reader, waiting):
        assert each.last.finish_reason == "error" and each.last.error is error
    assert worker.stop(PATIENCE)
    assert not worker.healthy()
    assert type(error).__name__ in worker.snapshot().failure
    with pytest.raises(ShuttingDown, match="failed"):
        worker.submit(small.request(small.ids(1, 5)), Reader())


def test_broken_device_ends_the_worker(small):
    """A GPU that reports an error answers nothing any more, whoever asks."""
    engine = small.engine()

    def fail(*_):
        raise torch.AcceleratorError("device-side assert", 710)

    engine._prompt_embeds = fail
    worker = EngineWorker(engine, max_queue=10)
    reader = Reader()
    worker.submit(small.request(small.ids(1, 5)), reader)
    assert isinstance(reader.last.error, torch.AcceleratorError)
    assert worker.stop(PATIENCE)
    assert "device-side" in worker.snapshot().failure


def test_failing_request_takes_nobody_with_it(small, started):
    worker = started(small.engine(max_batch_size=2))
    picture = small.picture(1)
    picture.inputs["pixel_values"] = torch.zeros(1, 3, 40, 40)
    bad, good = Reader(), Reader()
    asked = small.request(small.ids(2, 5), max_new_tokens=20)
    worker.submit(small.request(picture, small.ids(1, 3)), bad)
    worker.submit(asked, good)
    assert bad.last.error is not None
    assert good.ids == small.generated(asked)
    assert worker.healthy()


def test_a_step_that_hangs_is_not_healthy(small, started):
    engine = small.engine()
    gate = Gate(engine)
    worker = started(engine, stalled_after=0.05)
    assert worker.healthy()
    reader = Reader()
    worker.submit(small.request(small.ids(1, 5), max_new_tokens=3), reader)
    assert gate.reached.wait(PATIENCE)
    until = time.monotonic() + PATIENCE
    while worker.healthy() and time.monotonic() < until:
        time.sleep(0.01)
    assert not worker.healthy()
    gate.open.set()
    assert reader.last.finish_reason == "length"
    assert worker.healthy()


def test_nothing_is_left_of_requests_that_ended(small, started):
    worker = started(small.engine(max_batch_size=3))
    done = queue.Queue()
    for seed in range(30):
        ticket = worker.submit(
            small.request(small.ids(seed, 5), max_new_tokens=5), lambda delta: delta.finish_reason and done.put(delta)
        )
        if seed % 3 == 0:
            ticket.cancel()
    for _ in range(30):
        done.get(timeout=PATIENCE)
    while worker.snapshot().running:
        time.sleep(0.01)
    assert not (worker._queue or worker._running or worker._cancelled)
    assert not worker.engine.busy


def test_steps_compute_with_as_many_processors_as_the_thread_that_made_the_worker(small):
    before, seen = torch.get_num_threads(), []
    engine = small.engine(small.network(), max_batch_size=1)
    step = engine.step

    def watched():
        seen.append(torch.get_num_threads())
        step()

    engine.step = watched
    torch.set_num_threads(3)
    worker = EngineWorker(engine, max_queue=1)
    try:
        torch.set_num_threads(1)  # as the event loop's thread does behind it
        reader = Reader()
        worker.submit(small.request(small.ids(1, 9), max_new_tokens=4), reader)
        assert reader.last.finish_reason == "length"
    finally:
        worker.stop(PATIENCE)
        torch.set_num_threads(before)
    assert set(seen) == {3}
