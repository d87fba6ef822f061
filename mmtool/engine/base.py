"""What goes into an engine and what comes out; no torch here. Prompts are ready token ids: messages stay outside."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mmtool.errors import MMToolError
from mmtool.utils import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from mmtool.messages import Message
    from mmtool.template.base import MediaInput, Template

MIN_TEMPERATURE = 1e-5  # below, logits divided by it overflow; such requests mean "greedy"
MAX_LOGPROBS = 20  # alternatives beside the chosen token


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when an answer is long enough.

    Attributes:
        max_new_tokens: most tokens of an answer; the context length may allow fewer.
        do_sample: draw at random; otherwise the likeliest token is taken and the next three mean nothing.
        temperature: divides the logits; 0 means the same as ``do_sample=False``.
        top_p: draw only from the likeliest tokens that together hold this probability.
        top_k: draw only from this many likeliest tokens; 0 for all.
        min_p: draw only from tokens at least this many times as likely as the likeliest; 0 for all.
        repetition_penalty: above 1 makes tokens of the answer so far, and of most families' prompts, less likely.
        presence_penalty: taken from the logits of every token that the answer has.
        frequency_penalty: the same, times how often the answer has it.
        logit_bias: added to the logits, by token id. Plus or minus 100 decides, whatever the model says.
        seed: makes the draws of this request repeatable, whatever else runs beside it. None takes a seed from
            torch's global generator.
        stop: texts that end the answer, beside those of the template.
        min_new_tokens: no stop id is chosen and no stop text counts before the answer has so many tokens.
        ignore_eos: go on to ``max_new_tokens``, past the template's stop ids and texts; only ``stop`` counts.
        logprobs: give each token's log-probability, and those of so many likeliest tokens beside it; None for none.
    """

    max_new_tokens: int = 2048
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Raise MMToolError for a value out of range."""
        for name, valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0 and math.isfinite(self.temperature), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty), "above 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number"),
            ("logit_bias", _is_bias(self.logit_bias), "finite numbers by token id"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "from 0 to max_new_tokens"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
        ):
            if not valid:
                raise MMToolError(f"{name} must be {expected}, got {getattr(self, name)}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return not self.do_sample or self.temperature < MIN_TEMPERATURE

    @classmethod
    def from_generation_config(cls, generation_config: Any, **overrides: Any) -> Sampling:
        """Take the release's settings, replaced by ``overrides`` that are not None.

        What neither names keeps the default of this class; in particular a missing ``top_k`` is off (``generate`` of
        transformers puts 50 there). A temperature, ``top_p``, ``top_k`` or ``min_p`` given without ``do_sample`` turns
        sampling on, and a temperature of 0 turns it off.
        """
        overrides = {name: value for name, value in overrides.items() if value is not None}
        if overrides.get("temperature") == 0:
            overrides["do_sample"] = False
        elif overrides.keys() & {"temperature", "top_p", "top_k", "min_p"}:
            overrides.setdefault("do_sample", True)
        known = {}
        for name in _OF_A_RELEASE:
            value = getattr(generation_config, name, None)  # any config object: a name may be missing or None
            if value is not None:
                known[name] = value
        return cls(**{**known, **overrides})


# What a generation config may say; its other fields with names of ours mean something else, or are not for all answers.
_OF_A_RELEASE = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _is_bias(bias: Mapping[int, float]) -> bool:
    return all(type(key) is int and key >= 0 and math.isfinite(value) for key, value in bias.items())


class Grammar(Protocol):
    """What one answer may be; it follows the answer token by token. Each request needs its own."""

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and nothing may follow, not even a stop id: it ends with ``stop``."""

    def allowed(self) -> Tensor | None:
        """Return which tokens may come next; None for all.

        A packed int32 tensor ``(ceil(vocabulary / 32),)`` on the CPU: token t may come where bit ``t % 32`` of entry
        ``t // 32`` is 1. Ids beyond its end may not come. A stop id must be allowed for where the answer may end. It is
        read before the next call, so the same tensor may be filled again.
        """

    def accept(self, token_id: int) -> None:
        """Go on with the token that was chosen, which may be a stop id."""


@dataclass(kw_only=True, eq=False)
class Request:
    """A prompt to continue.

    Attributes:
        input_ids: the prompt; a medium takes as many ids as it has positions.
        media: what stands at those positions, in order.
        sampling: how tokens are chosen.
        stop_words: texts that end the answer and are not part of it, matched across token borders.
        stop_token_ids: ids that end the answer.
        strip: cut whitespace at both ends of the answer.
        continues: the answer goes on with the text of the prompt, and may begin with a blank; else it begins anew.
        skip_special_tokens: leave special tokens out of the text.
        hidden_token_ids: ids to decode the answer without.
        penalize_prompt: the repetition penalty sees the prompt, too.
        prompt_logprobs: give the log-probability of every token of the prompt but the first, and those of so many
            likeliest tokens beside it; None for none. Such a prompt is computed whole, whatever was seen before.
        adapter: name of the engine's LoRA adapter to answer with; None for the model as it is.
        grammar: which tokens may come.
        id: anything the caller wants to find again in the deltas.
    """

    input_ids: list[int]
    media: list[MediaInput] = field(default_factory=list)
    sampling: Sampling = Sampling()
    stop_words: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    strip: bool = True
    continues: bool = False
    skip_special_tokens: bool = True
    hidden_token_ids: tuple[int, ...] = ()
    penalize_prompt: bool = True
    prompt_logprobs: int | None = None
    adapter: str | None = None
    grammar: Grammar | None = None
    id: object = None


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What an answer took.

    Attributes:
        prompt_tokens: positions of the prompt, media included.
        completion_tokens: tokens sampled, the stopping one included.
        cached_tokens: positions of the prompt whose keys and values were there already.
        image_features_computed: media that went through a tower.
        time_to_first_token: seconds from the moment the engine took the request; 0 where no token came.
        seconds: the same up to the end.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    image_features_computed: int
    time_to_first_token: float
    seconds: float


FinishReason = Literal["stop", "length", "error", "cancelled"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was.

    Log-probabilities are those of the model's own distribution: before temperature, penalties, bias and grammar.

    Attributes:
        token_id: what was chosen.
        logprob: its natural log-probability.
        top: the likeliest tokens of the vocabulary with theirs, likeliest first, as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one request, after one step. Every request gets exactly one with a ``finish_reason``, its last.

    Attributes:
        request: whose.
        index: its position in the order given.
        token_ids: what was sampled.
        text: what can be shown now: no half character, no beginning of a stop word.
        finish_reason: ``stop`` (a stop word or id, or the end of the grammar), ``length``, ``error``, ``cancelled``, or
            None while it goes on.
        usage: with the last delta; None after an error.
        error: why the request failed; only with ``errors="yield"``.
        logprobs: one for each of ``token_ids`` where the request asks for them, else empty.
        prompt_logprobs: with the first token, where the request asks for them: one for each token of the prompt but the
            first.
    """

    request: Request
    index: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: BaseException | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        text: cut at the first stop word, and stripped where the request asks for it.
        token_ids: everything sampled, the stopping token included.
        finish_reason: ``stop`` or ``length``; None where the reader stopped early.
        usage: None where the reader stopped early.
        logprobs: one for each of ``token_ids`` where the request asks for them.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass
class Stats:
    """Counters of an engine since its start.

    Attributes:
        requests: requests taken.
        vision_calls: times a tower ran.
        vision_runs: media (pictures, sounds) that went through a tower.
        feature_hits: media whose features were kept from before.
        prefill_tokens: prompt positions computed.
        cached_tokens: prompt positions not computed, because their keys and values were there.
        decode_steps: steps that continued answers, of one or more requests at once.
        decode_tokens: tokens sampled in those steps.
    """

    requests: int = 0
    vision_calls: int = 0
    vision_runs: int = 0
    feature_hits: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0


class Handle(Protocol):
    """A request that an engine took, as ``submit`` returns it."""

    finished: bool


class Engine(ABC):
    """Continues prompts; several at a time. One thread calls it.

    Attributes:
        stats: counters.
        max_batch_size: most requests under way at once; further ones wait.
        max_model_len: most positions of a prompt and its answer.
        kv_bytes: memory for keys and values, as it is allocated now.
        adapters: names of the LoRA adapters that requests can choose.
    """

    stats: Stats
    max_batch_size: int
    max_model_len: int
    kv_bytes: int
    adapters: tuple[str, ...] = ()

    @abstractmethod
    def check(self, request: Request) -> None:
        """Raise MMToolError for a request that can never run.

        Such as a prompt of ``max_model_len`` or more (TooLongError), or an unknown adapter. Any thread may call it.
        """

    @abstractmethod
    def submit(self, request: Request, emit: Callable[[Delta], None], index: int = 0) -> Handle:
        """Queue a request, without waiting for anything.

        Args:
            request: what to continue.
            emit: gets its deltas, within later calls of ``step`` and ``cancel``.
            index: put into the deltas.

        Raises:
            MMToolError: as ``check`` does; ``emit`` is not called then.
        """

    @abstractmethod
    def cancel(self, handle: Handle) -> None:
        """End a request with a last delta, ``finish_reason="cancelled"``; nothing happens to one that has ended.

        What it holds is free before the next step, and what it has computed stays of use.
        """

    @abstractmethod
    def step(self) -> None:
        """Advance every request; one that answers gets a token. What fails ends the guilty request alone."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether a step has something to do."""

    def generate(self, requests: Iterable[Request], *, errors: Literal["raise", "yield"] = "raise") -> Iterator[Delta]:
        """Continue every request, up to ``max_batch_size`` at once, and yield news as they come.

        Requests are pulled from ``requests`` only when there is room, and each leaves as soon as it is done; deltas
        of different requests interleave. Closing the iterator cancels what runs. Several may be open at the same time.

        Args:
            requests: may be a generator; what it raises ends the run.
            errors: what a failing request does: ``raise`` ends the run with its exception, ``yield`` gives a last
                delta with ``finish_reason="error"`` and lets the others go on.
        """
        deltas: deque[Delta] = deque()
        running: list[Handle] = []
        source = enumerate(requests)
        exhausted = False
        try:
            while True:
                while not exhausted and len(running) < self.max_batch_size:
                    index, request = next(source, (-1, None))
                    exhausted = request is None
                    if request is None:
                        break
                    try:
                        running.append(self.submit(request, deltas.append, index))
                    except MMToolError as error:
                        deltas.append(Delta(request, index, finish_reason="error", error=error))
                        break
                if not deltas and not running:
                    return
                if not deltas:
                    self.step()
                while deltas:
                    delta = deltas.popleft()
                    if delta.error is not None and errors == "raise":
                        raise delta.error
                    yield delta
                running = [handle for handle in running if not handle.finished]
        finally:
            for handle in running:
                self.cancel(handle)

    def answer(self, request: Request) -> Answer:
        """Continue one request to its end."""
        text, token_ids, logprobs = [], [], []
        delta = None
        for delta in self.generate([request]):
            text.append(delta.text)
            token_ids += delta.token_ids
            logprobs += delta.logprobs
        assert delta is not None, "an engine yields at least one delta for a request"
        return Answer("".join(text), tuple(token_ids), delta.finish_reason, delta.usage, tuple(logprobs))

    def check_adapter(self, request: Request) -> None:
        """Raise MMToolError where the request names an adapter that the engine does not have."""
        if request.adapter is not None and request.adapter not in self.adapters:
            raise MMToolError(f"unknown adapter {request.adapter!r}", did_you_mean(request.adapter, self.adapters))


def request_from(
    template: Template,
    messages: Sequence[Message | Mapping[str, Any]],
    sampling: Sampling | None = None,
    id: object = None,
) -> Request:
    """Encode a conversation as the request for its next answer."""
    encoded = template.encode(messages)
    sampling = sampling or Sampling()
    return Request(
        input_ids=encoded["input_ids"],
        media=encoded["media"],
        sampling=sampling,
        stop_words=tuple(dict.fromkeys((*template.stop_words, *sampling.stop))),
        stop_token_ids=template.stop_token_ids,
        strip=template.strip_answer,
        skip_special_tokens=template.skip_special_tokens,
        hidden_token_ids=template.hidden_token_ids,
        penalize_prompt=template.penalize_prompt,
        id=id,
    )
