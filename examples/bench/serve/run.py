"""Start mmtool and other servers with equally many compute threads, and measure them in turns with the same workloads.

    python examples/bench/serve/run.py [--dtype bfloat16] [--threads 0] [--workloads text chat] [--vllm_env FOLDER]

All servers stay up; each measurement visits them one after the other, several times, and the best of a server counts:
on a shared machine that is the one with the least disturbance. ``transformers serve`` is taken from this environment,
vLLM for CPU from its own (``docs/vllm.md`` says how to make one). What is not installed is left out, and said.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from client import NEW_TOKENS, Figures, closed_loop, conversations
from models import save_picture_model, save_text_model

WORKLOADS = ["text", "picture", "chat"]
SERVERS = ["mmtool", "transformers", "transformers-cb", "vllm", "vllm-eager"]
START_LIMIT = 300.0  # seconds
COMMON_ENV = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
THREAD_ENV = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
VLLM_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@dataclass
class Server:
    """A server under measurement.

    Attributes:
        name: in the tables.
        command: starts it.
        model: what it calls its model.
        extra: further fields of its requests.
    """

    name: str
    command: list[str]
    model: str
    port: int
    env: dict[str, str]
    extra: dict
    process: subprocess.Popen | None = None
    started: float = 0.0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, log: Path) -> None:
        """Start it and wait until it answers; its output goes to ``log``."""
        begin = time.perf_counter()
        with log.open("wb") as stream:
            env = os.environ | COMMON_ENV | self.env
            self.process = subprocess.Popen(self.command, stdout=stream, stderr=subprocess.STDOUT, env=env)
        while not self._answers():
            if self.process.poll() is not None or time.perf_counter() - begin > START_LIMIT:
                tail = log.read_text(errors="replace")[-3000:]
                raise SystemExit(f"{self.name} did not start:\n{tail}")
            time.sleep(0.05)
        self.started = time.perf_counter() - begin

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def memory_mb(self) -> float:
        """Return what it and its children hold in memory now."""
        assert self.process is not None, "it runs"
        pids = [str(self.process.pid), *_children(self.process.pid)]
        return sum(_resident(pid) for pid in pids) / 1e6

    def cpu_seconds(self) -> float:
        """Return what it and its children have computed so far."""
        assert self.process is not None, "it runs"
        pids = [str(self.process.pid), *_children(self.process.pid)]
        return sum(_cpu_seconds(pid) for pid in pids)

    def stop(self) -> None:
        """End it."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def _children(pid: int) -> list[str]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [child, *_children(int(child))]
    return found


def _resident(pid: str) -> int:
    pages = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")  # without files mapped by several


def _cpu_seconds(pid: str) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """Return a port that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def servers_for(
    folder: Path, names: list[str], vllm_env: Path | None, max_num_seqs: int, dtype: str, threads: int = 1
) -> list[Server]:
    """Return those that are installed, for the model in ``folder``; ``threads`` 0 is what each takes by itself."""
    env = dict.fromkeys(THREAD_ENV, str(threads)) if threads else {}
    bin_folder, found = Path(sys.executable).parent, []
    for name in names:
        port = free_port()
        if name == "mmtool":
            command = [sys.executable, "-m", "mmtool", "serve", "--model_type", "auto", "--model_id_or_path"]
            command += [str(folder), "--port", str(port), "--served_model_name", "bench"]
            command += ["--max_num_seqs", str(max_num_seqs), "--max_model_len", "1024"]
            found.append(Server(name, command, "bench", port, env, {}))
        elif name in ("transformers", "transformers-cb"):
            program = shutil.which("transformers", path=str(bin_folder))
            if program is None:
                print(f"{name}: not installed, left out")
                continue
            command = [program, "serve", str(folder), "--port", str(port), "--device", "cpu"]
            if name == "transformers-cb":
                command += ["--continuous-batching", "--cb-max-memory-percent", "0.1"]
            found.append(Server(name, command, str(folder), port, env, {}))
        else:
            program = vllm_env / "bin" / "vllm" if vllm_env else None
            if program is None or not program.exists():
                print(f"{name}: not installed, left out (--vllm_env FOLDER)")
                continue
            command = [str(program), "serve", str(folder), "--port", str(port), "--served-model-name", "bench"]
            command += ["--max-model-len", "1024", "--max-num-seqs", str(max_num_seqs)]
            command += ["--dtype", dtype]  # its default is bfloat16, whatever the folder holds
            command += ["--model-impl", "transformers"]  # as fast as its own classes, and needs no torchvision
            command += ["--enforce-eager"] if name == "vllm-eager" else []
            extra = {"ignore_eos": True}
            if threads:  # else it binds one thread to each processor but those it keeps for itself
                env = env | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            found.append(Server(name, command, "bench", port, VLLM_ENV | env, extra))
    return found


@dataclass(frozen=True)
class Result:
    """What one server did, and how many tokens it made per second of CPU time, all its processes together."""

    figures: Figures
    per_cpu_second: float

    def __str__(self) -> str:
        """Return a cell of a table."""
        speed, first, between = vars(self.figures).values()
        return f"{speed:.1f} ({first:.0f}, {between:.1f}; {self.per_cpu_second:.1f})"


def measure(servers: list[Server], workload: str, askers: int, rounds: int, repeats: int) -> dict[str, Result]:
    """Visit the servers in turns; return the best of each."""
    best: dict[str, Result] = {}
    for repeat in range(repeats):
        for server in servers if repeat % 2 == 0 else reversed(servers):
            # Who answers one at a time would take minutes for what it computes no faster.
            number = 1 if server.name == "transformers" and askers > 1 else rounds
            before = server.cpu_seconds()
            figures = asyncio.run(
                closed_loop(
                    server.url, server.model, askers, number, with_picture=workload == "picture", extra=server.extra
                )
            )
            per_cpu_second = askers * number * NEW_TOKENS / (server.cpu_seconds() - before)
            known = best.get(server.name)
            if known is not None:
                per_cpu_second = max(per_cpu_second, known.per_cpu_second)
                figures = max(figures, known.figures, key=lambda found: found.tokens_per_second)
            best[server.name] = Result(figures, per_cpu_second)
    return best


def print_table(workload: str, results: dict[int, dict[str, Result]], servers: list[Server]) -> None:
    """Print output tokens/s, and the ratio of the first server to the others."""
    counts = list(results)
    print(
        f"\n{workload}: output tokens/s (median ms to first token, between tokens; tokens per CPU second) by askers\n"
    )
    print(
        "| server | "
        + " | ".join(map(str, counts))
        + " | start s | memory MB |\n|---"
        + "|---" * (len(counts) + 2)
        + "|"
    )
    for server in servers:
        cells = [str(found) for found in (results[count][server.name] for count in counts)]
        print(f"| {server.name} | {' | '.join(cells)} | {server.started:.1f} | {server.memory_mb():.0f} |")
    first = servers[0].name
    for server in servers[1:]:
        pairs = [(results[count][first], results[count][server.name]) for count in counts]
        ratios = [one.figures.tokens_per_second / other.figures.tokens_per_second for one, other in pairs]
        by_cpu = [one.per_cpu_second / other.per_cpu_second for one, other in pairs]
        cells = [f"**{ratio:.2f} x** ({cpu:.2f} x)" for ratio, cpu in zip(ratios, by_cpu, strict=True)]
        print(f"| {first} / {server.name} (per CPU second) | {' | '.join(cells)} | | |")
    if len(counts) > 1:
        least, most = (results[counts[index]][first].figures.tokens_per_second for index in (0, -1))
        print(f"\n{first}, from {counts[0]} to {counts[-1]} askers: {most / least:.1f} x", flush=True)


def run_workload(workload: str, folder: Path, args: argparse.Namespace) -> None:
    """Start the servers for one workload, measure, print, stop them."""
    # Answering pictures one request after another is all that its continuous batching does.
    names = [name for name in args.servers if workload == "text" or name != "transformers-cb"]
    servers = servers_for(folder, names, args.vllm_env, max(args.askers), args.dtype, args.threads)
    try:
        for server in servers:
            server.start(folder.parent / f"{server.name}-{workload}.log")
            asyncio.run(
                closed_loop(server.url, server.model, 1, 2, with_picture=workload != "text", extra=server.extra)
            )
            print(f"{server.name}: answers after {server.started:.1f} s", flush=True)
        if workload == "chat":
            print("\nthree turns, a picture in the first: median time to first token, ms\n")
            print("| server | turn 1 | turn 2 | turn 3 | turn 2 / turn 1 |\n|---|---|---|---|---|")
            for server in servers:
                turns = asyncio.run(conversations(server.url, server.model, args.conversations, extra=server.extra))
                cells = " | ".join(f"{turn:.0f}" for turn in turns)
                print(f"| {server.name} | {cells} | {turns[1] / turns[0]:.2f} |", flush=True)
            return
        results = {askers: measure(servers, workload, askers, args.rounds, args.repeats) for askers in args.askers}
        print_table(workload, results, servers)
    finally:
        for server in servers:
            server.stop()


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="Where the models are, or will be written; else a temporary one.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--workloads", nargs="+", choices=("text", "picture", "chat"), default=["text", "picture", "chat"]
    )
    parser.add_argument("--servers", nargs="+", default=["mmtool", "transformers", "vllm"],
                        choices=("mmtool", "transformers", "transformers-cb", "vllm", "vllm-eager"))  # fmt: skip
    parser.add_argument("--vllm_env", type=Path, help="Environment that has the command vllm.")
    parser.add_argument("--threads", type=int, default=1,
                        help="Compute threads of each server; 0: as many as each takes by itself.")  # fmt: skip
    parser.add_argument("--askers", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=2, help="Questions per asker.")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--conversations", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)) / args.dtype
        for name, save in (("text", save_text_model), ("picture", save_picture_model)):
            if not (folder / name / "config.json").exists():
                save(folder / name, getattr(torch, args.dtype))
        for workload in args.workloads:
            run_workload(workload, folder / ("text" if workload == "text" else "picture"), args)


if __name__ == "__main__":
    main()
