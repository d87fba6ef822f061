"""What engines of this package share: requests come in, steps advance them, and deltas go out.

There is no thread here: ``generate`` drives ``step``, and so can whoever has ``submit``.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from mmtool.engine.base import Delta, Engine, FinishReason, Request, Stats, Usage
from mmtool.engine.sampling import Draw
from mmtool.engine.slots import content_keys
from mmtool.engine.text import Detokenizer, StopText
from mmtool.errors import MMToolError, TooLongError


class Run:
    """A request on its way: waiting, then in a slot until its prompt is computed, then answering."""

    def __init__(self, request: Request, index: int, emit: Callable[[Delta], None], max_new_tokens: int) -> None:
        self.request = request
        self.index = index
        self.emit = emit
        self.max_new_tokens = max_new_tokens
        self.prompt = content_keys(request.input_ids, request.media)
        self.slot: Any = None  # what holds its keys and values
        self.features: dict[int, Any] = {}  # by the position where the medium starts
        self.positions: Tensor | None = None  # of the prompt, (axes, length), if they are not simply 0, 1, 2, ...
        self.draw: Draw | None = None
        self.token_ids: list[int] = []
        self.cached_tokens = 0
        self.num_features = 0
        self.started = time.perf_counter()
        self.first_token = 0.0
        self.finished = False

    def text_from(self, detokenizer: Detokenizer) -> None:
        """Make text with ``detokenizer``."""
        self.detokenizer = detokenizer
        words = (*self.request.stop_words, *self.request.sampling.stop)
        self.stop_text = StopText(tuple(dict.fromkeys(words)), self.request.strip)

    def accept(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Add a sampled token; return the text that can be shown and whether this is the end."""
        if not self.token_ids:
            self.first_token = time.perf_counter()
        self.token_ids.append(token_id)
        stopped = token_id in self.request.stop_token_ids
        text = "" if stopped else self.stop_text.push(self.detokenizer.push(token_id))
        at_end = stopped or len(self.token_ids) >= self.max_new_tokens
        if at_end and not self.stop_text.stopped:
            text += self.stop_text.push(self.detokenizer.flush())
        if at_end and not self.stop_text.stopped:
            text += self.stop_text.flush()
        if stopped or self.stop_text.stopped:
            return text, "stop"
        return text, "length" if at_end else None

    def usage(self) -> Usage:
        """Return what it took."""
        now = time.perf_counter()
        return Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.token_ids),
            cached_tokens=self.cached_tokens,
            image_features_computed=self.num_features,
            time_to_first_token=self.first_token - self.started,
            seconds=now - self.started,
        )


class SteppedEngine(Engine):
    """An engine that advances its requests step by step.

    Subclasses say in ``step`` what happens to the runs in ``_waiting``, in ``_running`` which others are under way, and
    in ``_release`` how a run gives back what it holds.
    """

    def __init__(self, model: Any, tokenizer: Any, max_batch_size: int, max_model_len: int) -> None:
        if max_batch_size < 1:
            raise MMToolError(f"max_batch_size must be at least 1, got {max_batch_size}")
        model.eval()
        self.model = model  # may be a weak proxy: nothing else here holds the head object
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size
        self.max_model_len = max_model_len
        self.stats = Stats()
        self._waiting: deque[Run] = deque()

    @abstractmethod
    def step(self) -> None:
        """Advance every run; a run that answers gets one token."""

    @abstractmethod
    def _running(self) -> list[Run]:
        """Return the runs that are not waiting any more."""

    @abstractmethod
    def _release(self, run: Run) -> None:
        """Give back what a run holds; it has ended."""

    def _starting(self) -> None:
        """Look at the model again: nothing is under way, so it may have changed."""

    # What callers use

    def check(self, request: Request) -> None:
        """Raise MMToolError for a request that can never run."""
        length = len(request.input_ids)
        if length == 0:
            raise MMToolError("the prompt is empty")
        if length >= self.max_model_len:
            raise TooLongError(
                f"the prompt has {length} positions, but the model takes {self.max_model_len}, answer included",
                "Shorten the question or start a new conversation.",
                length=length,
                limit=self.max_model_len,
            )

    def generate(self, requests: Iterable[Request], *, errors: Literal["raise", "yield"] = "raise") -> Iterator[Delta]:
        """Continue every request; see ``Engine.generate``. Several of these iterators may be open at the same time."""
        deltas: deque[Delta] = deque()
        runs: list[Run] = []
        source = enumerate(requests)
        exhausted = False
        try:
            while True:
                while not exhausted and len(runs) < self.max_batch_size:
                    index, request = next(source, (-1, None))
                    exhausted = request is None
                    if not exhausted:
                        runs.append(self.submit(request, deltas.append, index))
                if not runs:
                    return
                if not deltas:
                    self.step()
                while deltas:
                    delta = deltas.popleft()
                    if delta.error is not None and errors == "raise":
                        raise delta.error
                    yield delta
                runs = [run for run in runs if not run.finished]
        finally:
            self.cancel(runs)

    def submit(self, request: Request, emit: Callable[[Delta], None], index: int = 0) -> Run:
        """Queue a request; ``emit`` gets its deltas during later steps (or an error at once)."""
        self.stats.requests += 1
        max_new_tokens = min(request.sampling.max_new_tokens, self.max_model_len - len(request.input_ids))
        run = Run(request, index, emit, max_new_tokens)
        try:
            self.check(request)
        except MMToolError as error:
            self._fail(run, error)
            return run
        run.text_from(Detokenizer(self.tokenizer, request.skip_special_tokens, request.hidden_token_ids))
        if not self.busy:
            self._starting()
        self._waiting.append(run)
        return run

    def cancel(self, runs: Iterable[Run]) -> None:
        """Stop runs without another delta; what they have computed stays of use."""
        for run in runs:
            if not run.finished:
                self._leave(run)

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._unfinished())

    # What subclasses use

    def _unfinished(self) -> list[Run]:
        return [*self._waiting, *self._running()]

    def _draw_for(self, run: Run, vocab_size: int, device: torch.device) -> Draw:
        seen = run.request.input_ids if run.request.penalize_prompt else ()
        return Draw(run.request.sampling, seen, vocab_size, device)

    def _publish(self, run: Run, token_id: int) -> None:
        text, finish_reason = run.accept(token_id)
        usage = None
        if finish_reason is not None:
            usage = run.usage()
            self._leave(run)
        run.emit(Delta(run.request, run.index, (token_id,), text, finish_reason, usage))

    def _fail(self, run: Run, error: BaseException) -> None:
        self._leave(run)
        run.emit(Delta(run.request, run.index, finish_reason="error", error=error))

    def _leave(self, run: Run) -> None:
        run.finished = True
        if run in self._waiting:
            self._waiting.remove(run)
        self._release(run)
