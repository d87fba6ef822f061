"""Counters and times, written as Prometheus reads them (text format 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from mmtool.engine.base import Usage
from mmtool.engine.worker import WorkerStats

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Histogram:
    """How many observations were at most so large."""

    def __init__(self, borders: Sequence[float] = _SECONDS) -> None:
        self.borders = borders
        self.counts = [0] * (len(borders) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.borders, value)] += 1
        self.total += value

    def lines(self, name: str) -> Iterator[str]:
        """Give the lines of the text format."""
        running = 0
        for border, count in zip((*map(str, self.borders), "+Inf"), self.counts, strict=True):
            running += count
            yield f'{name}_bucket{{le="{border}"}} {running}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {running}"


class Metrics:
    """What the server counts itself; the engine's own counters are added when they are asked for."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.disconnects = 0
        self.slow_readers = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.first_token = Histogram()
        self.whole = Histogram()
        self.between = Histogram(_TOKEN_SECONDS)

    def ended(self, usage: Usage | None) -> None:
        """Count an answer."""
        if usage is None:
            return
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.completion_tokens += usage.completion_tokens
        self.whole.observe(usage.seconds)
        if usage.completion_tokens:
            self.first_token.observe(usage.time_to_first_token)
        if usage.completion_tokens > 1:
            self.between.observe((usage.seconds - usage.time_to_first_token) / (usage.completion_tokens - 1))

    def text(self, worker: WorkerStats) -> str:
        """Return everything in Prometheus' text format."""
        return "\n".join([*self._lines(worker), ""])

    def _lines(self, worker: WorkerStats) -> Iterator[str]:
        engine = worker.engine
        for name, kind, value, text in (
            ("requests_running", "gauge", worker.running, "Requests in the engine."),
            ("requests_waiting", "gauge", worker.queued, "Requests that wait for a place in the engine."),
            ("requests_running_max", "gauge", worker.max_running, "Places in the engine."),
            ("requests_waiting_max", "gauge", worker.max_queue, "Requests that may wait."),
            ("kv_cache_bytes", "gauge", worker.kv_bytes, "Memory for keys and values."),
            ("requests_rejected_total", "counter", worker.rejected, "Requests that found the queue full."),
            ("disconnects_total", "counter", self.disconnects, "Clients that left before their answer was whole."),
            ("slow_readers_total", "counter", self.slow_readers, "Streams cut because nobody read them."),
            ("prompt_tokens_total", "counter", self.prompt_tokens, "Positions of prompts, media included."),
            ("cached_prompt_tokens_total", "counter", self.cached_tokens, "Of these, not computed again."),
            ("completion_tokens_total", "counter", self.completion_tokens, "Tokens of answers."),
            ("prefill_tokens_total", "counter", engine.prefill_tokens, "Positions of prompts that were computed."),
            ("decode_steps_total", "counter", engine.decode_steps, "Steps that continued answers."),
            ("decode_tokens_total", "counter", engine.decode_tokens, "Tokens made in those steps."),
            ("media_encoded_total", "counter", engine.vision_runs, "Pictures and sounds that went through a tower."),
            ("media_cache_hits_total", "counter", engine.feature_hits, "Pictures and sounds known from before."),
        ):
            yield from (f"# HELP mmtool_{name} {text}", f"# TYPE mmtool_{name} {kind}", f"mmtool_{name} {value}")
        yield "# HELP mmtool_http_requests_total Requests by path and status."
        yield "# TYPE mmtool_http_requests_total counter"
        for (path, status), count in sorted(self.requests.items()):
            yield f'mmtool_http_requests_total{{path="{path}",status="{status}"}} {count}'
        yield "# HELP mmtool_answers_total Answers by what ended them."
        yield "# TYPE mmtool_answers_total counter"
        for reason, count in sorted(worker.finished.items()):
            yield f'mmtool_answers_total{{finish_reason="{reason}"}} {count}'
        for name, histogram, text in (
            ("time_to_first_token_seconds", self.first_token, "From the engine's queue to the first token."),
            ("request_seconds", self.whole, "From the engine's queue to the last token."),
            ("time_per_output_token_seconds", self.between, "Mean time between the tokens of an answer."),
        ):
            yield f"# HELP mmtool_{name} {text}"
            yield f"# TYPE mmtool_{name} histogram"
            yield from histogram.lines(f"mmtool_{name}")
