"""Connections whose requests begin in time, with heads of bounded size; uvicorn itself waits and reads for ever.

Nor does it read the body of a request that offers to go on in another protocol, as Java's client does with every one.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mmtool.serve.errors import bad_request

HEAD_SECONDS = 30.0  # for the head of a request to arrive
MAX_HEAD = 64 * 1024  # bytes of address and headers; what comes in one piece with something else does not count


class BoundedProtocol(HttpToolsProtocol):
    """HTTP of a server that does not trust its clients; arguments as uvicorn gives them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._begun = 0  # requests
        self._in_head = True
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; those of a head are counted, and their time is."""
        begun = self._begun
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("The request is not valid HTTP.")
        if self.transport.is_closing():
            return
        among_others = self._begun != begun and self._begun > 1  # bytes of earlier requests are in this piece
        if self._in_head and not among_others:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self.send_400_response("The headers of the request are too large.")
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._start_timer()  # uvicorn waits for ever once the first byte of a further request is there

    def on_message_begin(self) -> None:
        """A request begins."""
        self._begun += 1
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its head has arrived."""
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, and close; an answer that is being written is not mixed with the refusal."""
        done = self.cycle is None or self.cycle.response_complete
        if not self.pipeline and (done or not self.cycle.response_started):
            body = json.dumps(bad_request(msg, code="invalid_http").body()).encode()
            head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The parser takes the rest for the other protocol. The offer is not accepted, so it is the request's body.
            self.cycle.keep_alive = False
            framing = [(name, value) for name, value in self.headers if name in _FRAMING]
            if framing:
                self.cycle.more_body = True
                self.parser = httptools.HttpRequestParser(_BodyAlone(self))
                lines = b"".join(b"%s: %s\r\n" % header for header in framing)
                self.parser.feed_data(b"POST / HTTP/1.1\r\n" + lines + b"\r\n" + data[upgrade.args[0] :])

    def _start_timer(self) -> None:
        self._head_timer = asyncio.get_running_loop().call_later(HEAD_SECONDS, self._give_up)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


_FRAMING = (b"content-length", b"transfer-encoding")


class _BodyAlone:
    """Hands on the body of one message, and nothing behind it."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        self._protocol = protocol
        self._ended = False

    def on_body(self, body: bytes) -> None:
        if not self._ended:
            self._protocol.on_body(body)

    def on_message_complete(self) -> None:
        if not self._ended:
            self._ended = True
            self._protocol.on_message_complete()
