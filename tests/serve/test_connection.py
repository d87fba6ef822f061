"""Connections of all kinds: pipelined, offered for another protocol, broken, slow; none is answered with nonsense."""

import json
import socket
import time

import pytest

CHAT = "/v1/chat/completions"
SAID = b"Hello! I am tiny. Show me a picture."
GOOD = json.dumps({"messages": [{"role": "user", "content": "Hello"}]}).encode()


@pytest.fixture
def connect(server):
    """Open a connection to the server."""
    opened = []

    def make(to=server):
        host, port = to.url.removeprefix("http://").split(":")
        opened.append(socket.create_connection((host, int(port)), timeout=20))
        opened[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return opened[-1]

    yield make
    for sock in opened:
        sock.close()


LENGTH = len(GOOD)


def head(*more, length=LENGTH):
    lines = [f"POST {CHAT} HTTP/1.1", "Host: x", "Content-Type: application/json", *more]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return "\r\n".join([*lines, "", ""]).encode()


def read_all(sock):
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")


@pytest.mark.parametrize("offer", [H2C, ("Connection: upgrade", "Upgrade: websocket")])
def test_a_body_behind_an_offer_of_another_protocol_is_read(connect, offer):
    sock = connect()
    sock.sendall(head(*offer) + GOOD)
    answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 200") and SAID in answer


def test_such_a_body_may_come_in_pieces_and_in_chunks(connect):
    for pieces in (
        [head(*H2C), GOOD[:10], GOOD[10:]],
        [head(*H2C, "Transfer-Encoding: chunked", length=None), b"%x\r\n%s\r\n" % (len(GOOD), GOOD), b"0\r\n\r\n"],
    ):
        sock = connect()
        for piece in pieces:
            sock.sendall(piece)
            time.sleep(0.02)
        assert SAID in read_all(sock)


def test_an_offer_without_a_body_is_answered_too(connect):
    sock = connect()
    sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
    assert read_all(sock).startswith(b"HTTP/1.1 200")


def test_what_follows_such_a_body_is_not_read(connect):
    sock = connect()
    sock.sendall(head(*H2C) + GOOD + b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = read_all(sock)
    assert SAID in answer and answer.count(b"HTTP/1.1") == 1


def test_requests_one_behind_the_other_are_answered_in_their_order(connect):
    sock = connect()
    large = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "user": "x" * 150_000}).encode()
    sock.sendall((head() + GOOD) * 3 + head(length=len(large)) + large + b"GET /health HT")
    time.sleep(0.1)
    sock.sendall(b"TP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = read_all(sock)
    assert answer.count(b"HTTP/1.1 200") == 5 and answer.count(SAID) == 4
    assert answer.endswith(b'{"status":"ok"}')


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x00\xc8 what TLS begins with",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"FOO / HTTP/1.1\r\nHost: x\r\n\r\n",
        head("Content-Length: 5") + GOOD,
        head("Transfer-Encoding: chunked") + b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
        head("Transfer-Encoding: chunked", length=None) + b"zz\r\n",
        head("Transfer-Encoding: chunked", length=None) + b"-5\r\nabcde\r\n",
        head("Transfer-Encoding: chunked", length=None) + b"5\r\nabc\r\n0\r\n",
    ],
)
def test_what_is_no_http_is_refused_in_the_shape_of_all_errors(connect, sent):
    sock = connect()
    sock.sendall(sent)
    first, _, body = read_all(sock).partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["code"] == "invalid_http"


def test_nonsense_behind_a_request_is_not_answered_within_its_stream(connect, server, idle):
    body = json.dumps({**json.loads(GOOD), "stream": True, "max_tokens": 300, "ignore_eos": True}).encode()
    sock = connect()
    sock.sendall(head(length=len(body)) + body)
    answer = sock.recv(400)
    assert answer.startswith(b"HTTP/1.1 200")
    sock.sendall(b"\x00\x01 nonsense\r\n\r\n")
    answer += read_all(sock)
    assert b" 400 " not in answer
    idle(server)


@pytest.mark.parametrize("sent", [b"P", b"\r\n"])
def test_the_second_request_of_a_connection_must_begin_in_time_too(serving, connect, monkeypatch, sent):
    monkeypatch.setattr("mmtool.serve.connection.HEAD_SECONDS", 0.3)
    with serving() as server:
        sock = connect(server)
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200")
        time.sleep(0.05)
        sock.sendall(sent)
        started = time.monotonic()
        assert sock.recv(100) == b""
        assert time.monotonic() - started < 5
