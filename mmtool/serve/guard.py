"""What every request passes first: its key, its size, whether the server still takes any; and its line in the log."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmtool.log import get_logger
from mmtool.serve.answers import SlowReader
from mmtool.serve.auth import Keys
from mmtool.serve.chat import ClientGone
from mmtool.serve.errors import ApiError, internal, stopping
from mmtool.serve.service import Service

logger = get_logger(__name__)

ALWAYS_OPEN = ("/health",)
WHILE_DRAINING = ("/health", "/metrics")
_REQUEST_ID = re.compile(r"[\w.:-]{1,100}")


class Guard:
    """Middleware around the routes.

    Args:
        app: what is behind it.
        service: its settings, its counters, and whether it takes requests.
        open_paths: beginnings of paths that need no key; may grow later.
    """

    def __init__(self, app: ASGIApp, service: Service, open_paths: list[str]) -> None:
        self.app = app
        self.service = service
        self.keys = Keys(service.settings.api_keys)
        self.open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif self.is_page(scope["path"]):  # it keeps connections open as long as somebody looks at it
            await _Passage(self, scope, receive, send).run()
        else:
            with self.service.working():
                await _Passage(self, scope, receive, send).run()

    def is_page(self, path: str) -> bool:
        """Tell whether a path belongs to a page that looks after its keys itself."""
        return any(path == base or path.startswith(base + "/") for base in self.open_paths)

    def refusal(self, path: str, headers: Headers) -> ApiError | None:
        """Return why a request is not let through."""
        if self.service.draining and path not in WHILE_DRAINING:
            return stopping()
        if not (path in ALWAYS_OPEN or self.is_page(path)) and not self.keys.accepts(headers.get("authorization")):
            given = "This API key is not known." if "authorization" in headers else "An API key is needed."
            return ApiError(
                401,
                f"{given} Send the header Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self.service.settings.max_body_bytes:
            return self.too_large()
        return None

    def too_large(self) -> ApiError:
        """Return the 413."""
        limit = self.service.settings.max_body_bytes / 2**20
        return ApiError(413, f"The request is larger than the limit of {limit:g} MiB.", code="request_too_large")


class _Passage:
    """One request on its way through."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard = guard
        self.scope = scope
        self.headers = Headers(scope=scope)
        self._receive = receive
        self._send = send
        self.received = 0
        self.status: int | None = None
        self.disconnected = False
        given = self.headers.get("x-request-id", "")
        self.id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = self.id

    async def run(self) -> None:
        started = time.perf_counter()
        try:
            await self._pass()
        except ClientGone:
            pass
        except SlowReader:
            self.guard.service.metrics.slow_readers += 1
        except ApiError as error:
            await self._answer(error)
        except Exception:  # a bug: the log has it all, the client a 500, and the other requests go on
            logger.exception("the request %s failed", self.id)
            await self._answer(internal())
        finally:
            self._record(time.perf_counter() - started)

    async def _pass(self) -> None:
        refusal = self.guard.refusal(self.scope["path"], self.headers)
        if refusal is not None:
            raise refusal
        await self.guard.app(self.scope, self.receive, self.send)

    async def receive(self) -> Message:
        """Receive a part of the body, up to the limit, or the news that the client has gone."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.disconnected = True
        self.received += len(message.get("body", b""))
        if self.received > self.guard.service.settings.max_body_bytes:
            raise self.guard.too_large()
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the answer, its number in the head."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.id
        await self._send(message)

    async def _answer(self, error: ApiError) -> None:
        if self.status is not None:  # too late: without the end of the body the client sees that it is cut
            return
        body = json.dumps(error.body(), ensure_ascii=False).encode("utf-8", "replace")
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        pairs = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body})

    def _record(self, seconds: float) -> None:
        metrics = self.guard.service.metrics
        if self.disconnected:
            metrics.disconnects += 1
        route = self.scope.get("route")
        path = getattr(route, "path", None) or "other"  # a route of a mounted page has no path of ours
        status = self.status or 499
        metrics.requests[path, status] += 1
        if path not in WHILE_DRAINING:
            client = (self.scope.get("client") or ("?",))[0]
            method, shown = self.scope["method"], self.scope["path"][:100]
            level = logging.DEBUG if self.guard.is_page(self.scope["path"]) else logging.INFO  # a page takes dozens
            logger.log(level, "%s %s %r %d %.3f s %s", client, method, shown, status, seconds, self.id)


async def read_body(receive: Receive, seconds: float) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: 408 where it does not arrive in time.
        ClientGone: where the client leaves before its end.
    """
    chunks: list[bytes] = []
    try:
        async with asyncio.timeout(seconds):
            while True:
                message: Any = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunks.append(message.get("body", b""))
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise ApiError(408, f"The request did not arrive within {seconds:g} s.", code="timeout") from None
