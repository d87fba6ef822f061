"""The thread that drives an engine for a server: requests come from any thread, and a bounded number of them waits."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import AcceleratorError

from mmtool.engine.base import Delta, Engine, Handle, Request, Stats
from mmtool.errors import MMToolError
from mmtool.log import get_logger
from mmtool.threads import compute_with

logger = get_logger(__name__)

STALLED_AFTER = 300.0  # seconds of one step; a part of a large model's prompt takes a minute on a slow CPU
JOIN_GRACE = 10.0  # seconds beyond a stop's timeout for the step that is under way
FIRST_GUESS = 5.0  # seconds to wait where nothing was measured yet
LONGEST_WAIT = 120.0
MEASURED = 32  # latest requests that tell how long one takes


class QueueFull(Exception):
    """As many requests wait as may; ``retry_after`` says in how many seconds there should be room."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"too many requests are waiting; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class ShuttingDown(Exception):
    """The worker takes no requests any more: it was stopped, or its engine has failed."""


@dataclass(frozen=True)
class WorkerStats:
    """What a worker is doing, and has done since its start.

    Attributes:
        queued: requests that wait for a place in the engine.
        running: requests in the engine.
        max_queue: most that may wait.
        max_running: most that may run.
        finished: how many ended, by finish reason.
        rejected: how many found the queue full.
        engine: the engine's own counters.
        kv_bytes: the engine's memory for keys and values.
        stopping: whether new requests are refused.
        failure: what ended the engine; None while it works.
    """

    queued: int
    running: int
    max_queue: int
    max_running: int
    finished: Mapping[str, int]
    rejected: int
    engine: Stats
    kv_bytes: int
    stopping: bool
    failure: str | None


class Ticket:
    """A request that a worker took."""

    def __init__(self, worker: EngineWorker, request: Request, emit: Callable[[Delta], None]) -> None:
        self.request = request
        self.finished = False
        self._worker = worker
        self._emit = emit
        self._handle: Handle | None = None  # known to the engine
        self._entered = 0.0

    def cancel(self) -> None:
        """End the request before the next step, from any thread; its last delta says ``cancelled``."""
        self._worker._cancel(self)


class EngineWorker:
    """Owns the thread that calls an engine, from construction to ``stop``.

    Every request that ``submit`` takes gets exactly one delta with a ``finish_reason``, whatever happens. Deltas are
    handed out in the worker's thread, so what takes them must be quick and must not block.

    Args:
        engine: nothing else may call it any more, but ``check``.
        max_queue: most requests that wait beside those that run; 0 refuses what cannot start at once.
        stalled_after: seconds without the end of a step, while there is work, after which ``healthy`` says no.
    """

    def __init__(self, engine: Engine, *, max_queue: int, stalled_after: float = STALLED_AFTER) -> None:
        if max_queue < 0:
            raise MMToolError(f"max_queue must be 0 or more, got {max_queue}")
        self.engine = engine
        self.max_queue = max_queue
        self.stalled_after = stalled_after
        self._changed = threading.Condition()
        self._queue: deque[Ticket] = deque()  # this, and all below, only with the lock
        self._running: list[Ticket] = []
        self._cancelled: list[Ticket] = []
        self._deadline: float | None = None  # of a stop
        self._failure: BaseException | None = None
        self._finished: Counter[str] = Counter()
        self._rejected = 0
        self._durations: deque[float] = deque(maxlen=MEASURED)
        self._progress = time.monotonic()  # end of the last step, or the moment when work came
        self._compute_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # From any thread

    def submit(self, request: Request, emit: Callable[[Delta], None]) -> Ticket:
        """Take a request; its deltas go to ``emit``.

        Raises:
            QueueFull: when as many wait as may.
            ShuttingDown: after ``stop``, or when the engine has failed.
            MMToolError: for a request that can never run (see ``Engine.check``).
        """
        self.engine.check(request)
        ticket = Ticket(self, request, emit)
        with self._changed:
            if self._failure is not None:
                raise ShuttingDown(f"the engine has failed: {_describe(self._failure)}")
            if self._deadline is not None:
                raise ShuttingDown("the server is shutting down")
            if len(self._queue) >= self.max_queue + self.engine.max_batch_size - len(self._running):
                self._rejected += 1
                raise QueueFull(self._retry_after())
            if not self._queue and not self._running:
                self._progress = time.monotonic()
            self._queue.append(ticket)
            self._changed.notify()
        return ticket

    def stop(self, timeout: float) -> bool:
        """Refuse new requests, let the others end within ``timeout`` seconds, cut off the rest, and end the thread.

        What is cut off gets an error delta (ShuttingDown). Further calls may shorten the time that is left.

        Returns:
            Whether the thread has ended; False where a step hangs.
        """
        deadline = time.monotonic() + max(timeout, 0.0)
        with self._changed:
            self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
            self._changed.notify()
        self._thread.join(max(deadline - time.monotonic(), 0.0) + JOIN_GRACE)
        return not self._thread.is_alive()

    def healthy(self) -> bool:
        """Whether the thread lives and gets on: a step has ended lately, or there is nothing to do."""
        with self._changed:
            if self._failure is not None or not self._thread.is_alive():
                return False
            idle = not self._queue and not self._running
            return idle or time.monotonic() - self._progress < self.stalled_after

    def snapshot(self) -> WorkerStats:
        """Return what the worker is doing."""
        with self._changed:
            return WorkerStats(
                queued=len(self._queue),
                running=len(self._running),
                max_queue=self.max_queue,
                max_running=self.engine.max_batch_size,
                finished=dict(self._finished),
                rejected=self._rejected,
                engine=replace(self.engine.stats),
                kv_bytes=self.engine.kv_bytes,
                stopping=self._deadline is not None,
                failure=None if self._failure is None else _describe(self._failure),
            )

    def _cancel(self, ticket: Ticket) -> None:
        with self._changed:
            if not ticket.finished:
                self._cancelled.append(ticket)
                self._changed.notify()

    def _retry_after(self) -> float:
        """Return the seconds until a place in the queue should be free, from how long requests took of late."""
        if not self._durations:
            return FIRST_GUESS
        each = sum(self._durations) / len(self._durations) / self.engine.max_batch_size
        return float(math.ceil(min(max(each * (len(self._queue) + 1), 1.0), LONGEST_WAIT)))

    # In the worker's thread

    def _run(self) -> None:
        compute_with(self._compute_threads)
        try:
            while self._turn():
                pass
        except BaseException as error:  # the loop must not die in silence, with requests waiting for it
            logger.exception("the engine has failed")
            self._end_all(error)
        else:
            self._end_all(ShuttingDown("the server is shutting down"))

    def _turn(self) -> bool:
        """Take what has come, do a step; False at the end."""
        with self._changed:
            while not (self._queue or self._running or self._cancelled or self._deadline is not None):
                self._changed.wait()
            if self._deadline is not None and (
                time.monotonic() >= self._deadline or not (self._queue or self._running)
            ):
                return False
            cancelled, self._cancelled = self._cancelled, []
            queued = [ticket for ticket in cancelled if ticket in self._queue]
            for ticket in queued:
                if ticket in self._queue:  # cancelled twice
                    self._queue.remove(ticket)
        for ticket in cancelled:
            self._end_early(ticket)
        with self._changed:
            room = self.engine.max_batch_size - len(self._running)
            entering = [self._queue.popleft() for _ in range(min(room, len(self._queue)))]
            self._running += entering
        for ticket in entering:
            self._enter(ticket)
        if self.engine.busy:
            self.engine.step()
        with self._changed:
            self._progress = time.monotonic()
            self._running = [ticket for ticket in self._running if not ticket.finished]
            failure = self._failure
        if failure is not None:
            raise failure
        return True

    def _enter(self, ticket: Ticket) -> None:
        ticket._entered = time.perf_counter()
        try:
            ticket._handle = self.engine.submit(ticket.request, lambda delta: self._hand_out(ticket, delta))
        except MMToolError as error:
            self._hand_out(ticket, Delta(ticket.request, 0, finish_reason="error", error=error))

    def _end_early(self, ticket: Ticket) -> None:
        if ticket.finished:
            return
        if ticket._handle is not None:
            self.engine.cancel(ticket._handle)
        else:
            self._hand_out(ticket, Delta(ticket.request, 0, finish_reason="cancelled"))
        with self._changed:
            self._running = [other for other in self._running if not other.finished]

    def _hand_out(self, ticket: Ticket, delta: Delta) -> None:
        if ticket.finished:
            return
        if delta.finish_reason is not None:
            with self._changed:
                ticket.finished = True
                self._finished[delta.finish_reason] += 1
                if ticket._handle is not None:
                    self._durations.append(time.perf_counter() - ticket._entered)
                if isinstance(delta.error, AcceleratorError):  # nothing can be computed on that device any more
                    self._failure = delta.error
            if delta.error is not None and not isinstance(delta.error, MMToolError | ShuttingDown):
                logger.error("a request has failed: %s", _describe(delta.error))
        try:
            ticket._emit(delta)
        except Exception as error:  # whoever asked is gone, or has a bug: the others go on
            logger.debug("the reader of a request has failed: %s", _describe(error))
            self._cancel(ticket)

    def _end_all(self, error: BaseException) -> None:
        """Give every request that is left its last delta; nothing may come after it."""
        with self._changed:
            if not isinstance(error, ShuttingDown):
                self._failure = error
            self._deadline = self._deadline or time.monotonic()
            left: Iterable[Ticket] = [*self._running, *self._queue]
            self._queue.clear()
            self._running = []
        for ticket in left:
            self._hand_out(ticket, Delta(ticket.request, 0, finish_reason="error", error=error))
            if ticket._handle is not None and isinstance(error, ShuttingDown):
                self.engine.cancel(ticket._handle)


def _describe(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
