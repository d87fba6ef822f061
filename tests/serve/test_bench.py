"""The scripts of examples/bench/serve: they run, and the load client reads what servers send."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "bench" / "serve"


@pytest.fixture
def client(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return __import__("client")


def run(script: str, *options: str) -> str:
    done = subprocess.run([sys.executable, FOLDER / script, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@asynccontextmanager
async def server(answer: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that sends the same bytes, a few at a time, to everybody."""
    requests = []

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        requests.append(await reader.readexactly(length))
        for start in range(0, len(answer), 7):
            writer.write(answer[start : start + 7])
            await writer.drain()
        writer.close()

    listener = await asyncio.start_server(speak, "127.0.0.1", 0)
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", requests


def stream_of(*texts: str) -> bytes:
    events = [{"choices": [{"delta": {"role": "assistant"}}]}]
    events += [{"choices": [{"delta": {"content": text}}]} for text in texts]
    events += [{"choices": [], "usage": {"completion_tokens": 3}}]
    lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    return lines.encode()


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    sent = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + sent + b"0\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [chunked(stream_of("w1", " w2", " w3"), 10), b"HTTP/1.1 200 OK\r\n\r\n" + stream_of("w1", " w2", " w3")],
    ids=["chunks", "plain"],
)
def test_client_reads_a_stream(client, answer):
    async def ask():
        async with server(answer) as (url, requests):
            return await client.ask(url, "name", [{"role": "user", "content": "w5"}], 3, {"top_k": 1}), requests

    found, requests = asyncio.run(ask())
    assert (found.text, found.tokens, len(found.times)) == ("w1 w2 w3", 3, 3)
    assert found.times == sorted(found.times)
    assert found.usage == {"completion_tokens": 3}
    sent = json.loads(requests[0])
    assert (sent["model"], sent["max_tokens"], sent["stream"], sent["top_k"]) == ("name", 3, True, 1)


def test_client_stops_at_errors_and_at_answers_of_another_length(client):
    async def load(answer: bytes):
        async with server(answer) as (url, _):
            return await client.closed_loop(url, "name", 2, 1, new_tokens=5)

    with pytest.raises(client.ServerError, match=r"503: .*busy"):
        asyncio.run(load(b'HTTP/1.1 503 No\r\n\r\n{"error": "busy"}'))
    with pytest.raises(client.ServerError, match="3 tokens, not 5"):
        asyncio.run(load(chunked(stream_of("w1 w2 w3"), 10)))


def test_questions_and_pictures_differ(client):
    rng = client.random.Random(1)
    one, other = (client.question(rng, 4, with_picture=True)["content"] for _ in range(2))
    assert one[0] != other[0]
    assert one[1] != other[1]
    assert len(one[1]["text"].split()) == 4


@pytest.mark.slow
def test_workload_of_the_megrez_card_runs_on_a_small_model():
    printed = run("megrez_card.py", "--tiny", "--requests", "5", "--at_once", "2", "--new_tokens", "6")
    assert "| 3 |" in printed
    assert "5 requests, 2 at a time" in printed


@pytest.mark.slow
def test_runner_measures_mmtool(tmp_path):
    printed = run(
        "run.py", "--folder", str(tmp_path), "--servers", "mmtool", "--workloads", "picture", "chat",
        "--askers", "1", "2", "--rounds", "1", "--repeats", "1", "--conversations", "1", "--dtype", "bfloat16",
    )  # fmt: skip
    assert "mmtool, from 1 to 2 askers" in printed
    assert "| server | turn 1 | turn 2 | turn 3 |" in printed


@pytest.mark.slow
def test_engine_alone(tmp_path):
    run("models.py", str(tmp_path), "--dtype", "bfloat16")
    printed = run(
        "engine.py", str(tmp_path / "picture"), "--picture", "--concurrency", "2", "--rounds", "1", "--repeats", "1",
        "--new_tokens", "4",
    )  # fmt: skip
    assert "| 2 |" in printed
