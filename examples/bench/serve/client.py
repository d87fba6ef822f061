"""An asyncio load client for OpenAI-compatible servers: streams, a closed loop, nothing but the standard library.

Each asker sends its next request when the last answer is complete. Every prompt and every picture is new, so that a
server computes all of them. Tokens are counted by the words of the answer: with the models of ``models.py`` a word is a
token, whatever a server says of its own usage.

    python examples/bench/serve/client.py http://127.0.0.1:8000 --model NAME [--workload text|picture|chat]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import random
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from PIL import Image

NUM_WORDS = 7993  # of the vocabulary of models.py
PICTURE_SIZE = 224
NEW_TOKENS = 64
_seeds = itertools.count(int(time.time() * 1000))  # no two runs of this program send the same


@dataclass
class Answer:
    """What came for one request; times in seconds after it was sent."""

    times: list[float] = field(default_factory=list)  # of each piece of text
    text: str = ""
    usage: dict = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """How many tokens the text has."""
        return len(self.text.split())


@dataclass(frozen=True)
class Figures:
    """Of one workload: output tokens per second of all askers, and medians in milliseconds."""

    tokens_per_second: float
    first_token_ms: float
    between_tokens_ms: float


class ServerError(RuntimeError):
    """A server said no; the benchmark stops."""


def words(rng: random.Random, count: int) -> str:
    """Return a text of so many tokens."""
    return " ".join(f"w{rng.randrange(NUM_WORDS)}" for _ in range(count))


def picture_url(rng: random.Random) -> str:
    """Return a picture unlike any other as a data URL: coarse noise, so that it is small."""
    noise = Image.frombytes("RGB", (16, 16), rng.randbytes(16 * 16 * 3))
    stream = io.BytesIO()
    noise.resize((PICTURE_SIZE, PICTURE_SIZE)).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def question(rng: random.Random, num_words: int, with_picture: bool) -> dict:
    """Return the message of a user."""
    text = words(rng, num_words)
    if not with_picture:
        return {"role": "user", "content": text}
    picture = {"type": "image_url", "image_url": {"url": picture_url(rng)}}
    return {"role": "user", "content": [picture, {"type": "text", "text": text}]}


async def post(url: str, path: str, body: dict) -> AsyncIterator[bytes]:
    """Send a request and yield the lines of the answer's body as they come."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=2**24)
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload)
    try:
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        headers = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip().lower()
        chunks = _chunks(reader) if headers.get("transfer-encoding") == "chunked" else _blocks(reader)
        rest = b""
        async for chunk in chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if status != 200:
                    raise ServerError(f"{status}: {line[:500].decode(errors='replace')}")
                yield line.strip()
        if status != 200:
            raise ServerError(f"{status}: {rest[:500].decode(errors='replace')}")
        if rest:
            yield rest.strip()
    finally:
        writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readline()


async def _blocks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while block := await reader.read(65536):
        yield block


async def ask(url: str, model: str, messages: list[dict], new_tokens: int, extra: dict) -> Answer:
    """Stream one answer."""
    body = {"model": model, "messages": messages, "max_tokens": new_tokens, "temperature": 0, "stream": True} | extra
    answer, start = Answer(), time.perf_counter()
    async for line in post(url, "/v1/chat/completions", body):
        if not line.startswith(b"data:") or line == b"data: [DONE]":
            continue
        event = json.loads(line[5:])
        if "error" in event:
            raise ServerError(str(event["error"]))
        answer.usage = event.get("usage") or answer.usage
        text = "".join((choice["delta"].get("content") or "") for choice in event.get("choices", ()))
        if text:
            answer.times.append(time.perf_counter() - start)
            answer.text += text
    return answer


async def closed_loop(
    url: str,
    model: str,
    askers: int,
    rounds: int,
    *,
    num_words: int = 115,
    new_tokens: int = NEW_TOKENS,
    with_picture: bool = False,
    extra: dict | None = None,
) -> Figures:
    """Let ``askers`` ask ``rounds`` questions each, one after the other."""
    rng = random.Random(next(_seeds))
    asked = [[[question(rng, num_words, with_picture)] for _ in range(rounds)] for _ in range(askers)]

    async def one(own: list[list[dict]]) -> list[Answer]:
        return [await ask(url, model, messages, new_tokens, extra or {}) for messages in own]

    start = time.perf_counter()
    answers = [answer for own in await asyncio.gather(*map(one, asked)) for answer in own]
    seconds = time.perf_counter() - start
    for answer in answers:
        if answer.tokens != new_tokens:
            raise ServerError(f"an answer has {answer.tokens} tokens, not {new_tokens}")
    spans = [(answer.times[-1] - answer.times[0]) / (new_tokens - 1) for answer in answers]
    return Figures(
        len(answers) * new_tokens / seconds,
        1000 * statistics.median(answer.times[0] for answer in answers),
        1000 * statistics.median(spans),
    )


async def conversations(
    url: str, model: str, count: int, *, turns: int = 3, num_words: int = 40, new_tokens: int = 16, extra: dict
) -> list[float]:
    """Have conversations one after the other, a picture in their first turns.

    Returns:
        The median time to the first token of each turn, in milliseconds.
    """
    rng = random.Random(next(_seeds))
    first: list[list[float]] = [[] for _ in range(turns)]
    for _ in range(count):
        messages: list[dict] = []
        for turn in range(turns):
            messages.append(question(rng, num_words, with_picture=turn == 0))
            answer = await ask(url, model, messages, new_tokens, extra)
            messages.append({"role": "assistant", "content": answer.text})
            first[turn].append(1000 * answer.times[0])
    return [statistics.median(times) for times in first]


def main() -> None:
    """Measure one server that runs already."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", choices=("text", "picture", "chat"), default="text")
    parser.add_argument("--askers", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    if args.workload == "chat":
        print(asyncio.run(conversations(args.url, args.model, 5, extra={})))
        return
    for askers in args.askers:
        picture = args.workload == "picture"
        print(askers, asyncio.run(closed_loop(args.url, args.model, askers, args.rounds, with_picture=picture)))


if __name__ == "__main__":
    main()
