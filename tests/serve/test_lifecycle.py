"""Clients that leave, do not read, or are too many; and a server that stops."""

import contextlib
import json
import socket
import threading
import time

import httpx2
import openai
import pytest

ENDLESS = {"max_tokens": 1900, "ignore_eos": True}  # a few seconds of work
CHAT = "/v1/chat/completions"


def body_of(**fields):
    return {"messages": [{"role": "user", "content": "Hello"}], **fields}


def send_raw(server, body, receive_buffer=None):
    host, port = server.url.removeprefix("http://").split(":")
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(20)
    sock.connect((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    sock.sendall(head.encode() + data)
    return sock


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place_within_a_step(server, idle, stream):
    sock = send_raw(server, body_of(stream=stream, **ENDLESS))
    wait_for(lambda: server.worker.snapshot().engine.decode_steps and server.worker.snapshot().running == 1)
    before = server.service.metrics.disconnects
    sock.close()
    idle(server, 2.0)
    steps = server.worker.snapshot().engine.decode_steps
    time.sleep(0.1)
    assert server.worker.snapshot().engine.decode_steps == steps
    assert server.worker.snapshot().finished["cancelled"] >= 1
    assert server.service.metrics.disconnects == before + 1


def test_a_client_that_leaves_while_it_waits_is_forgotten(serving, idle):
    with serving(max_num_seqs=1) as server:
        first = send_raw(server, body_of(**ENDLESS))
        wait_for(lambda: server.worker.snapshot().running == 1)
        second = send_raw(server, body_of(**ENDLESS))
        wait_for(lambda: server.worker.snapshot().queued == 1)
        second.close()
        wait_for(lambda: server.worker.snapshot().queued == 0, 2.0)
        assert server.worker.snapshot().running == 1
        first.close()
        idle(server)


def test_a_reader_that_does_not_read_is_cut_and_blocks_nobody(serving, idle):
    with serving(unread_deltas=20, send_buffer=4096) as server:
        fields = {"stream": True, "logprobs": True, "top_logprobs": 20, **ENDLESS}
        sock = send_raw(server, body_of(**fields), receive_buffer=4096)
        wait_for(lambda: server.worker.snapshot().running == 1)
        assert server.chat("Hello").json()["choices"][0]["message"]["content"].startswith("Hello!")
        idle(server, 30.0)
        assert server.worker.snapshot().finished["cancelled"] == 1
        assert server.service.metrics.slow_readers == 1
        sock.close()


def test_a_reader_that_stops_reading_near_the_end_is_cut_too(serving, idle):
    with serving(write_seconds=0.5, send_buffer=4096) as server:
        fields = {"stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 60, "ignore_eos": True}
        sock = send_raw(server, body_of(**fields), receive_buffer=4096)
        wait_for(lambda: server.worker.snapshot().finished.get("length"))
        idle(server)
        assert server.service.metrics.slow_readers == 1
        sock.close()


def test_when_all_places_are_taken_the_answer_is_429(serving, idle):
    with serving(max_num_seqs=1, max_queue=0) as server:
        sock = send_raw(server, body_of(**ENDLESS))
        wait_for(lambda: server.worker.snapshot().running == 1)
        response = server.chat("Hello")
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 120
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        with pytest.raises(openai.RateLimitError):
            server.client().chat.completions.create(model="tiny", **body_of())
        sock.close()
        idle(server)
        assert server.chat("Hello").status_code == 200


def test_several_answers_are_taken_together_or_not_at_all(serving, idle):
    with serving(max_num_seqs=2, max_queue=0) as server:
        assert server.chat("Hello", n=3).status_code == 429
        idle(server)
        assert server.chat("Hello", n=2).status_code == 200


@pytest.mark.parametrize("said", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"])
def test_a_connection_that_does_not_ask_is_closed(serving, monkeypatch, said):
    monkeypatch.setattr("mmtool.serve.connection.HEAD_SECONDS", 0.3)
    with serving() as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            sock.sendall(said)
            assert sock.recv(100) == b""


def test_a_head_without_end_is_not_read(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        sent, answered = 0, b""
        try:
            while sent < 20_000_000:
                sock.sendall(b"X-Header: " + b"x" * 8000 + b"\r\n")
                sent += 8000
        except OSError:
            pass
        assert sent < 10_000_000
        with contextlib.suppress(OSError):
            answered = sock.recv(1000)
        assert answered == b"" or answered.startswith(b"HTTP/1.1 400")
    assert server.http.get("/health", headers={"x-long": "y" * 10_000}).status_code == 200


def test_a_stream_that_waits_says_that_it_is_alive(serving, monkeypatch):
    monkeypatch.setattr("mmtool.serve.app.HEADERS_AFTER", 0.05)
    with serving(max_num_seqs=1, ping_seconds=0.05) as server:
        sock = send_raw(server, body_of(**ENDLESS))
        wait_for(lambda: server.worker.snapshot().running == 1)
        with server.http.stream("POST", CHAT, json=body_of(stream=True)) as response:
            lines = response.iter_lines()
            assert next(lines) == ": ping"
            sock.close()
            said = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in said).startswith("Hello!")


def test_a_server_that_stops_lets_answers_end_and_takes_no_new_ones(serving):
    with serving() as server:
        said = []
        with server.http.stream("POST", CHAT, json=body_of(stream=True, max_tokens=200, ignore_eos=True)) as response:
            lines = response.iter_lines()
            said.append(next(lines))
            server.server._loop.call_soon_threadsafe(server.server.begin_stop, "test")
            wait_for(lambda: server.service.draining)
            other = httpx2.post(f"{server.url}{CHAT}", json=body_of(), timeout=10)
            assert other.status_code == 503 and other.json()["error"]["code"] == "shutting_down"
            assert httpx2.get(f"{server.url}/health").status_code == 503
            said += lines
        assert said[-2] == "data: [DONE]"
        tokens = [json.loads(line[6:]) for line in said if line.startswith("data: {")]
        assert tokens[-1]["choices"][0]["finish_reason"] == "length"
        server.thread.join(10)
        assert not server.thread.is_alive()


@pytest.mark.parametrize("stream", [False, True])
def test_what_takes_longer_than_the_stop_is_cut_with_an_error(serving, stream):
    with serving() as server:
        server.server.shutdown_timeout = 0.2
        answers = []
        fields = body_of(stream=stream, **ENDLESS)
        asking = threading.Thread(target=lambda: answers.append(server.http.post(CHAT, json=fields)))
        asking.start()
        wait_for(lambda: server.worker.snapshot().running == 1)
        server.server._loop.call_soon_threadsafe(server.server.begin_stop, "test")
        asking.join(20)
        if stream:
            events = answers[0].text.split("\n\n")
            assert events[-2] == "data: [DONE]"
            assert json.loads(events[-3][6:])["error"]["code"] == "shutting_down"
        else:
            assert answers[0].status_code == 503


def test_an_engine_that_fails_is_told_and_ends_the_server(serving, monkeypatch):
    with serving() as server:

        def fail():
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(server.worker.engine, "step", fail)
        assert server.chat("Hello").status_code == 500
        server.thread.join(10)
        assert not server.thread.is_alive()
        assert server.server.failed


def test_one_request_that_fails_takes_no_other_with_it(serving, monkeypatch):
    with serving() as server:
        good = server.worker.engine.check

        def check(request):
            if len(request.input_ids) == 5:
                raise RuntimeError("a bug")
            good(request)

        monkeypatch.setattr(server.worker.engine, "check", check)
        bad = server.post("/v1/completions", {"prompt": [100] * 5})
        assert bad.status_code == 500
        assert bad.json()["error"]["code"] == "internal_error"
        assert "a bug" not in bad.text
        assert server.chat("Hello").status_code == 200


def test_metrics_are_what_prometheus_reads(server, idle):
    server.chat("Hello")
    idle(server)
    lines = server.http.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['mmtool_http_requests_total{path="/v1/chat/completions",status="200"}']) >= 1
    assert float(values["mmtool_completion_tokens_total"]) >= 14
    assert float(values['mmtool_answers_total{finish_reason="stop"}']) >= 1
    assert values["mmtool_requests_running"] == "0"
    assert (
        values['mmtool_time_to_first_token_seconds_bucket{le="+Inf"}']
        == (values["mmtool_time_to_first_token_seconds_count"])
    )
    named = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert all(any(name.startswith(known) for known in named) for name in values)


def test_no_text_gets_into_the_log_unless_asked_for(serving, caplog):
    with caplog.at_level("DEBUG", "mmtool"):
        with serving() as server:
            server.chat("Hello")
        assert not any("Hello" in record.getMessage() for record in caplog.records)
        with serving(log_requests=True) as server:
            server.chat("Hello")
            server.chat("Hello", stream=True)
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if text.startswith("asked:") and "Hello" in text]) == 2
    assert len([text for text in said if text.startswith("answered:") and "I am tiny" in text]) == 2


def test_the_service_streams_text_for_the_page(server, data_uri):
    import asyncio

    from mmtool.serve.service import Service

    async def talk():
        service = Service(server.service.settings, server.worker, server.service.template, server.service.card)
        content = [{"type": "image_url", "image_url": {"url": data_uri("shapes")}}]
        content += [{"type": "text", "text": "How many shapes are there?"}]
        pieces = [piece async for piece in service.stream_text([{"role": "user", "content": content}], temperature=0)]
        service.close()
        return pieces

    pieces = asyncio.run(talk())
    assert "".join(pieces) == "There are 3 shapes." and len(pieces) > 1
