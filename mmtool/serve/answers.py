"""From the engine's thread to the event loop: the deltas of a request, in a bounded queue, one wake-up for many."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from mmtool.engine.base import Delta, Request
from mmtool.engine.worker import EngineWorker, QueueFull, ShuttingDown, Ticket
from mmtool.errors import MMToolError
from mmtool.serve.errors import ApiError, from_user_error, internal, stopping, too_busy


class SlowReader(Exception):
    """A reader fell so far behind its stream that the stream was cut."""


class Relay:
    """Brings deltas into the event loop; a step of the engine wakes it once, however many requests it advances."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[tuple[Answers, int, Delta]] = deque()
        self._awake = False

    def post(self, answers: Answers, index: int, delta: Delta) -> None:
        """Hand over a delta; called in the engine's thread."""
        self._posted.append((answers, index, delta))
        if not self._awake:
            self._awake = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._awake = False  # first: what is posted from here on wakes the loop again
        while self._posted:
            answers, index, delta = self._posted.popleft()
            answers.put(index, delta)


class Answers:
    """The answers to one request, ``n`` of them at the same time; read them with ``read`` until ``ended``.

    Args:
        relay: brings the deltas.
        limit: how many deltas may wait for the reader; beyond, the request is cancelled.
    """

    def __init__(self, relay: Relay, limit: int) -> None:
        self.relay = relay
        self.limit = limit
        self.requests: list[Request] = []
        self.cancelled = False
        self.overrun = False
        self.on_end: Callable[[], object] | None = None  # called once, when the engine needs the requests no more
        self.on_overrun: Callable[[], object] | None = None  # called once, when the reader is too slow
        self._tickets: list[Ticket] = []
        self._open = 0
        self._waiting: deque[tuple[int, Delta]] = deque()
        self._news = asyncio.Event()

    def submit(self, worker: EngineWorker, requests: Sequence[Request]) -> None:
        """Hand the requests to the engine: all of them, or none.

        Raises:
            ApiError: 400, 429 or 503.
        """
        self.requests = list(requests)
        try:
            for index, request in enumerate(self.requests):
                self._tickets.append(
                    worker.submit(request, lambda delta, index=index: self.relay.post(self, index, delta))
                )
                self._open += 1
        except (MMToolError, QueueFull, ShuttingDown) as error:
            self.cancel()
            raise as_api_error(error) from None

    @property
    def ended(self) -> bool:
        """Whether everything was read."""
        return not self._open and not self._waiting

    def put(self, index: int, delta: Delta) -> None:
        """Take a delta; in the event loop."""
        self._open -= delta.finish_reason is not None
        if not self._open and self.on_end is not None:
            self.on_end()
            self.on_end = None
        if self.overrun:
            return
        self._waiting.append((index, delta))
        if len(self._waiting) > self.limit * len(self.requests):
            self.overrun = True
            self._waiting.clear()
            self.cancel()
            if self.on_overrun is not None:
                self.on_overrun()
        self._news.set()

    async def wait(self, seconds: float) -> None:
        """Wait until there is something to read, or the time is up.

        Raises:
            ApiError: where it is a failure, so that it can still be told by a status.
        """
        await self._wait_for_news(seconds)
        if self._waiting and self._waiting[0][1].error is not None:
            raise as_api_error(self._waiting[0][1].error)

    async def read(self, seconds: float | None = None) -> list[tuple[int, Delta]]:
        """Return the deltas that are there, waiting for one; an empty list where none came in time, or at the end.

        Raises:
            SlowReader: when too many were waiting.
        """
        await self._wait_for_news(seconds)
        if self.overrun:
            raise SlowReader
        found = list(self._waiting)
        self._waiting.clear()
        return found

    async def _wait_for_news(self, seconds: float | None) -> None:
        while not self._waiting and self._open and not self.overrun:
            self._news.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._news.wait()
            except TimeoutError:
                return

    def cancel(self) -> None:
        """Stop all answers before the engine's next step; from the event loop."""
        self.cancelled = True
        for ticket in self._tickets:
            ticket.cancel()


def as_api_error(error: BaseException) -> ApiError:
    """Return what a client is told of a failure."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MMToolError):
        return from_user_error(error)
    if isinstance(error, QueueFull):
        return too_busy("The server is busy: too many requests are waiting.", error.retry_after)
    if isinstance(error, ShuttingDown):
        return stopping()
    return internal()
