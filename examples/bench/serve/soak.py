"""Ten minutes with clients of all kinds: good ones, and ones that leave, send nonsense, or read too slowly.

    python examples/bench/serve/soak.py --seconds 600 --clients 16

Starts a server on the embedded model, whose answers are known. Ends with exit code 0 if every good request got its
right answer, nothing was answered with 500, no place stayed taken, and the server's memory stayed within 5 % (measured
from the end of the first fifth; not with less than five minutes).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx2
import PIL.Image

PICTURES = Path(__file__).parents[2] / "pictures"
CHAT = "/v1/chat/completions"
ALLOWED_GROWTH = 0.05
MEASURED_FROM = 300  # seconds
PLACES = 16
TOO_LARGE = b'{"messages": [{"role": "user", "content": "' + b"y" * 40_000_000 + b'"}]}'


def question(text: str, picture: str | None = None) -> list[dict]:
    """Return a conversation of one question."""
    if picture is None:
        return [{"role": "user", "content": text}]
    url = f"data:image/png;base64,{base64.b64encode((PICTURES / picture).read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


KNOWN = [
    (question("Hello"), "Hello! I am tiny. Show me a picture."),
    (question("How many shapes are there?", "shapes.png"), "There are 3 shapes."),
    (question("How many shapes are there?", "circle.png"), "There is 1 shape."),
    (question("What number is this?", "digits.png"), None),  # learned from the first answer, before the load
    (question("Describe the picture.", "corners.png"), None),
    (question("What does it say?", "word.png"), None),
]


class Soak:
    """The clients, and what became of their requests."""

    def __init__(self, url: str, seed: int) -> None:
        self.url = url
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.known: list[tuple[list[dict], str]] = []
        self.http = httpx2.AsyncClient(base_url=url, timeout=120, limits=httpx2.Limits(max_connections=None))

    async def learn(self) -> None:
        """Ask every question alone."""
        for messages, expected in KNOWN:
            response = await self.http.post(CHAT, json={"messages": messages})
            answer = response.json()["choices"][0]["message"]["content"]
            if expected is not None and answer != expected:
                self.wrong.append(f"expected {expected!r}, got {answer!r}")
            self.known.append((messages, answer))

    async def fill(self, places: int) -> None:
        """Use every place to its last position: the memory for keys and values is there from the start, but unused."""
        body = {"messages": question("Hello"), "max_tokens": 4096, "ignore_eos": True}
        await asyncio.gather(*(self.http.post(CHAT, json=body, timeout=600) for _ in range(places)))

    async def client(self, until: float) -> None:
        """Behave well mostly, and badly in all ways now and then."""
        while time.monotonic() < until:
            action = self.random.choices(
                [self.good, self.good_stream, self.good_turns, self.leave, self.malformed, self.bad_media, self.slow],
                weights=[6, 6, 2, 3, 2, 2, 0.3],
            )[0]
            try:
                await action()
                self.counts[action.__name__] += 1
            except Exception as error:
                self.wrong.append(f"{action.__name__}: {type(error).__name__}: {error}")

    async def good(self) -> None:
        """Ask, and compare the answer."""
        messages, expected = self.random.choice(self.known)
        response = await self.http.post(CHAT, json={"messages": messages})
        if response.status_code == 429:
            self.counts["refused as busy"] += 1
            return
        self.compare(response.json()["choices"][0]["message"]["content"], expected)

    async def good_stream(self) -> None:
        """The same as a stream."""
        messages, expected = self.random.choice(self.known)
        text, ended = "", False
        async with self.http.stream("POST", CHAT, json={"messages": messages, "stream": True}) as response:
            if response.status_code == 429:
                self.counts["refused as busy"] += 1
                return
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                ended = ended or line == "data: [DONE]"
        self.compare(text if ended else "(cut)", expected)

    async def good_turns(self) -> None:
        """Ask twice in one conversation; the second time most is known."""
        messages, expected = self.random.choice(self.known)
        messages = [*messages, {"role": "assistant", "content": expected}, {"role": "user", "content": "Hello"}]
        response = await self.http.post(CHAT, json={"messages": messages, "max_tokens": 8})
        if response.status_code not in (200, 429):
            self.wrong.append(f"second turn: {response.status_code} {response.text[:200]}")

    async def leave(self) -> None:
        """Go away in the middle."""
        messages, _ = self.random.choice(self.known)
        body = {"messages": messages, "stream": self.random.random() < 0.5, "max_tokens": 1500, "ignore_eos": True}
        try:
            async with asyncio.timeout(self.random.uniform(0.0, 0.6)):
                await self.http.post(CHAT, json=body)
        except TimeoutError:
            pass

    async def malformed(self) -> None:
        """Send what is no request."""
        body = self.random.choice(
            [
                b"",
                b"{",
                b'{"messages": 5}',
                b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}',
                bytes(self.random.randrange(256) for _ in range(200)),
                json.dumps({"messages": question("x" * 100_000)}).encode(),
                TOO_LARGE,
            ]
        )
        response = await self.http.post(CHAT, content=body, headers={"content-type": "application/json"})
        if response.status_code not in (400, 413, 429):
            self.wrong.append(f"malformed: {response.status_code} {response.text[:200]}")

    async def bad_media(self) -> None:
        """Send broken pictures, too large ones, and addresses of this machine."""
        file = io.BytesIO()
        PIL.Image.new("1", (9_000, 9_000)).save(file, "PNG")
        good = (PICTURES / "shapes.png").read_bytes()
        url = self.random.choice(
            [
                "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(),
                "data:image/png;base64," + base64.b64encode(good[: len(good) // 2]).decode(),
                "data:image/png;base64," + base64.b64encode(bytes(2_000_000)).decode(),
                "data:image/png;base64,%%%",
                "https://127.0.0.1:1/x.png",
                "file:///etc/passwd",
            ]
        )
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
        response = await self.http.post(CHAT, json={"messages": [{"role": "user", "content": parts}]})
        if response.status_code not in (400, 429):
            self.wrong.append(f"bad media: {response.status_code} {response.text[:200]}")

    async def slow(self) -> None:
        """Ask for much and read almost nothing of it."""
        host, port = re.fullmatch(r"http://([^:]+):(\d+)", self.url).groups()
        body = {"messages": question("Hello"), "stream": True, "logprobs": True, "top_logprobs": 20}
        data = json.dumps(body | {"max_tokens": 1500, "ignore_eos": True}).encode()
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        for _ in range(self.random.randrange(1, 20)):
            await reader.read(100)
            await asyncio.sleep(0.1)
        writer.close()

    def compare(self, text: str, expected: str) -> None:
        """Note an answer that is not the known one."""
        self.counts["answers compared"] += 1
        if text != expected:
            self.wrong.append(f"expected {expected!r}, got {text!r}")


async def run(url: str, pid: int, seconds: float, clients: int, seed: int) -> bool:
    """Run all clients against a server; return whether everything was right."""
    soak = Soak(url, seed)
    await soak.learn()
    if seconds >= MEASURED_FROM:
        await soak.fill(PLACES)
    start = time.monotonic()
    tasks = [asyncio.ensure_future(soak.client(start + seconds)) for _ in range(clients)]
    memory = []
    while not all(task.done() for task in tasks):
        await asyncio.sleep(min(1.0, seconds / 20))
        memory.append((time.monotonic() - start, resident(pid)))
        if len(memory) % 30 == 0:
            print(f"{memory[-1][0]:5.0f} s  {memory[-1][1] / 2**20:6.1f} MiB  {dict(soak.counts)}", flush=True)
    await asyncio.gather(*tasks)
    values = await settled(soak)
    await soak.http.aclose()
    return report(soak, values, memory, seconds)


async def settled(soak: Soak) -> dict[str, float]:
    """Return the server's metrics once it has nothing to do, or after ten seconds."""
    for _ in range(100):
        text = (await soak.http.get("/metrics")).text
        values = {name: float(value) for name, value in re.findall(r"^(mmtool_\S+) (\S+)$", text, re.MULTILINE)}
        if not values["mmtool_requests_running"] and not values["mmtool_requests_waiting"]:
            break
        await asyncio.sleep(0.1)
    return values


def report(soak: Soak, values: dict[str, float], memory: list[tuple[float, int]], seconds: float) -> bool:
    """Print what was measured; return whether it is right."""
    print(f"requests: {dict(soak.counts)}")
    for name in ("requests_running", "requests_waiting", "disconnects_total", "slow_readers_total"):
        print(f"{name}: {values[f'mmtool_{name}']:.0f}")
    stuck = values["mmtool_requests_running"] + values["mmtool_requests_waiting"]
    failed = sum(value for name, value in values.items() if 'status="500"' in name)
    print(f"answered with 500: {failed:.0f}; wrong: {len(soak.wrong)}")
    for text in soak.wrong[:10]:
        print(f"  {text}")
    grown = 0.0
    if seconds >= MEASURED_FROM:
        early = sorted(size for at, size in memory if 0.2 * seconds <= at < 0.4 * seconds)
        late = sorted(size for at, size in memory if at >= 0.8 * seconds)
        grown = late[len(late) // 2] / early[len(early) // 2] - 1
        sizes = [found[len(found) // 2] / 2**20 for found in (early, late)]
        print(f"memory: {sizes[0]:.1f} MiB early, {sizes[1]:.1f} MiB late, {grown:+.1%}")
    return not soak.wrong and not failed and not stuck and grown <= ALLOWED_GROWTH


def resident(pid: int) -> int:
    """Return the bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    """Start a server and run the clients; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    command = [sys.executable, "-m", "mmtool", "serve", "--port", "0", "--max_num_seqs", str(PLACES)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = next(found[1] for line in server.stderr if (found := re.search(r"serving at (http://\S+)/v1", line)))
        drain = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        ok = asyncio.run(run(url, server.pid, given.seconds, given.clients, given.seed))
        server.terminate()
        ok = ok and server.wait(60) == 0
        drain.wait(10)
    finally:
        server.kill()
        server.stderr.close()
    print("all right" if ok else "NOT right")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
