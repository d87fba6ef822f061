"""Server-sent events: an answer is sent while it comes, and given up as soon as the client leaves or stops reading."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mmtool.serve.answers import Answers, SlowReader

# Compact, as OpenAI writes it: a stream repeats its frame with every token.
to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"  # a comment, for proxies and clients that give up after some silence


class EventStream(Response):
    """Sends the events of an iterator.

    Args:
        events: complete events, as bytes; several may come in one piece.
        answers: where they come from; cancelled at once when the client has gone.
        patience: seconds for a reader to take anything; then the connection is cut.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], answers: Answers, patience: float) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events = events
        self.answers = answers
        self.patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, unless the reader falls too far behind."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        writer = asyncio.current_task()
        assert writer is not None, "responses are sent by a task"
        self.answers.on_overrun = writer.cancel  # it may wait for a reader that never reads
        try:
            async with watched(receive, self.answers.cancel), aclosing(self.events) as events:
                async for piece in events:
                    async with asyncio.timeout(self.patience):
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
        except asyncio.CancelledError:
            if not self.answers.overrun:
                raise
            writer.uncancel()
            raise SlowReader from None  # without the end of the body, so that the connection is cut
        except TimeoutError:
            raise SlowReader from None
        finally:
            self.answers.on_overrun = None
            self.answers.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def watched(receive: Receive, leave: Callable[[], None]) -> AsyncIterator[None]:
    """While this context lasts, call ``leave`` when the client goes; the request must have been read."""
    task = asyncio.ensure_future(_wait_for_end(receive, leave))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _wait_for_end(receive: Receive, leave: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    leave()
