"""What engines of this package share: requests come in, steps advance them, and deltas go out.

There is no thread here: ``generate`` drives ``step``, and so can whoever has ``submit``.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtool.engine.adapters import Adapters
from mmtool.engine.base import MAX_LOGPROBS, Delta, Engine, FinishReason, Request, Stats, TokenLogprob, Usage
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
        self.prompt_logprobs: list[TokenLogprob] = []  # of all its tokens but the first, as far as it is computed
        self.token_ids: list[int] = []
        self.cached_tokens = 0
        self.num_features = 0
        self.started = time.perf_counter()
        self.first_token: float | None = None
        self.finished = False

    def text_from(self, detokenizer: Detokenizer) -> None:
        """Make text with ``detokenizer``."""
        self.detokenizer = detokenizer
        request, sampling = self.request, self.request.sampling
        words = sampling.stop if sampling.ignore_eos else (*request.stop_words, *sampling.stop)
        self.stop_text = StopText(tuple(dict.fromkeys(words)), request.strip)

    def accept(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Add a sampled token; return the text that can be shown and whether this is the end."""
        sampling, grammar = self.request.sampling, self.request.grammar
        if self.first_token is None:
            self.first_token = time.perf_counter()
        self.token_ids.append(token_id)
        stopped = token_id in self.request.stop_token_ids and not sampling.ignore_eos
        text = ""
        if not stopped:
            piece = self.detokenizer.push(token_id)
            early = len(self.token_ids) < sampling.min_new_tokens
            text = self.stop_text.let_through(piece) if early else self.stop_text.push(piece)
        if grammar is not None:
            grammar.accept(token_id)
            stopped = stopped or grammar.finished
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
            time_to_first_token=0.0 if self.first_token is None else self.first_token - self.started,
            seconds=now - self.started,
        )


class SteppedEngine(Engine):
    """An engine that advances its requests step by step.

    Subclasses say in ``step`` what happens to the runs in ``_waiting``, in ``_running`` which others are under way, and
    in ``_release`` how a run gives back what it holds.
    """

    vocab_size: int | None = None  # of the logits, where it is known before there are any
    _adapters: Adapters | None = None

    def __init__(self, model: Any, tokenizer: Any, max_batch_size: int, max_model_len: int) -> None:
        if max_batch_size < 1:
            raise MMToolError(f"max_batch_size must be at least 1, got {max_batch_size}")
        if model is not None:  # else it lives in another package's engine
            model.eval()
        self.model = model  # may be a weak proxy: nothing else here holds the head object; None where others hold it
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size
        self.max_model_len = max_model_len
        self.stats = Stats()
        self._waiting: deque[Run] = deque()

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
        """Raise MMToolError for a request that can never run; see ``Engine.check``."""
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
        self.check_adapter(request)
        if request.prompt_logprobs is not None:
            if request.media:
                raise MMToolError("prompt_logprobs: not for prompts with media, whose positions have no tokens")
            if not 0 <= request.prompt_logprobs <= MAX_LOGPROBS:
                raise MMToolError(f"prompt_logprobs must be from 0 to {MAX_LOGPROBS}, got {request.prompt_logprobs}")
        if self.vocab_size is not None:
            check_tokens(request, self.vocab_size)

    def submit(self, request: Request, emit: Callable[[Delta], None], index: int = 0) -> Run:
        """Queue a request; see ``Engine.submit``."""
        self.check(request)
        self.stats.requests += 1
        max_new_tokens = min(request.sampling.max_new_tokens, self.max_model_len - len(request.input_ids))
        run = Run(request, index, emit, max_new_tokens)
        before = request.input_ids if request.continues else ()
        run.text_from(Detokenizer(self.tokenizer, request.skip_special_tokens, request.hidden_token_ids, before))
        if not self.busy:
            self._starting()
        self._waiting.append(run)
        return run

    def cancel(self, handle: Run) -> None:
        """End a request; see ``Engine.cancel``."""
        if not handle.finished:
            usage = handle.usage()
            self._leave(handle)
            handle.emit(Delta(handle.request, handle.index, finish_reason="cancelled", usage=usage))

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._unfinished())

    # What subclasses use

    def answer_with(self, adapter: str) -> None:
        """Give requests that name no adapter this one."""
        assert self._adapters is not None, "it is one of those loaded"
        self._adapters.default = self._adapters.number(adapter)

    def _load_adapters(self, folders: Mapping[str, Path] | None) -> None:
        """Put LoRA adapters beside the layers of the model."""
        if folders:
            self._adapters = Adapters(self.model, folders)
            self.adapters = self._adapters.names

    def _unfinished(self) -> list[Run]:
        return [*self._waiting, *self._running()]

    def _draw_for(self, run: Run, vocab_size: int, device: torch.device) -> Draw:
        request = run.request
        seen = request.input_ids if request.penalize_prompt else ()
        return Draw(request.sampling, seen, vocab_size, device, request.stop_token_ids, request.grammar)

    def _publish(self, run: Run, token_id: int, logprob: TokenLogprob | None = None) -> None:
        of_prompt = () if run.token_ids else tuple(run.prompt_logprobs)
        if token_id < 0:
            hint = "Load it in another --dtype, or check its weights and the media of the request."
            self._fail(run, MMToolError("the model gave numbers that are not finite", hint))
            return
        try:
            text, finish_reason = run.accept(token_id)
        except Exception as error:  # a tokenizer or a grammar that cannot go on
            self._fail(run, error)
            return
        usage = None
        if finish_reason is not None:
            usage = run.usage()
            self._leave(run)
        logprobs = () if logprob is None else (logprob,)
        run.emit(Delta(run.request, run.index, (token_id,), text, finish_reason, usage, None, logprobs, of_prompt))

    def _fail(self, run: Run, error: BaseException) -> None:
        if not run.finished:
            self._leave(run)
            run.emit(Delta(run.request, run.index, finish_reason="error", error=error))

    def _leave(self, run: Run) -> None:
        run.finished = True
        if run in self._waiting:
            self._waiting.remove(run)
        self._release(run)


def check_tokens(request: Request, vocab_size: int) -> None:
    """Raise MMToolError where a request names a token that the model does not have: a GPU would stop for good."""
    bias, ids = request.sampling.logit_bias, request.input_ids
    if bias and max(bias) >= vocab_size:
        raise MMToolError(f"logit_bias names token {max(bias)}; the model's tokens are 0 to {vocab_size - 1}")
    if min(ids) >= 0 and max(ids) < vocab_size:
        return
    filled: set[int] = set()  # by features; what stands there does not matter
    for item in request.media:
        offsets = range(item.length) if item.feature_index is None else item.feature_index
        filled.update(item.start + offset for offset in offsets)
    for place, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size and place not in filled:
            raise MMToolError(
                f"the prompt has token {token_id} at position {place}; the model's tokens are 0 to {vocab_size - 1}"
            )
