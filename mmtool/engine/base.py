"""What goes into an engine and what comes out; no torch here. Prompts are ready token ids: messages stay outside."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from mmtool.errors import MMToolError

if TYPE_CHECKING:
    from mmtool.messages import Message
    from mmtool.template.base import MediaInput, Template

MIN_TEMPERATURE = 1e-5  # below, logits divided by it overflow; such requests mean "greedy"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when an answer is long enough.

    Attributes:
        max_new_tokens: most tokens of an answer; the context length may allow fewer.
        do_sample: draw at random; otherwise the likeliest token is taken and the next three mean nothing.
        temperature: divides the logits; 0 means the same as ``do_sample=False``.
        top_p: draw only from the likeliest tokens that together hold this probability.
        top_k: draw only from this many likeliest tokens; 0 for all.
        repetition_penalty: above 1 makes tokens of the answer so far, and of most families' prompts, less likely.
        seed: makes the draws of this request repeatable, whatever else runs beside it. None takes a seed from
            torch's global generator.
        stop: texts that end the answer, beside those of the template.
    """

    max_new_tokens: int = 2048
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise MMToolError for a value out of range."""
        for name, valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0 and math.isfinite(self.temperature), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("repetition_penalty", self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty), "above 0"),
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
        transformers puts 50 there). A temperature, ``top_p`` or ``top_k`` given without ``do_sample`` turns sampling
        on, and a temperature of 0 turns it off.
        """
        overrides = {name: value for name, value in overrides.items() if value is not None}
        if overrides.get("temperature") == 0:
            overrides["do_sample"] = False
        elif overrides.keys() & {"temperature", "top_p", "top_k"}:
            overrides.setdefault("do_sample", True)
        known = {}
        for name in (spec.name for spec in fields(cls) if spec.name not in ("seed", "stop")):
            value = getattr(generation_config, name, None)  # any config object: a name may be missing or None
            if value is not None:
                known[name] = value
        return cls(**{**known, **overrides})


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
        skip_special_tokens: leave special tokens out of the text.
        hidden_token_ids: ids to decode the answer without.
        penalize_prompt: the repetition penalty sees the prompt, too.
        id: anything the caller wants to find again in the deltas.
    """

    input_ids: list[int]
    media: list[MediaInput] = field(default_factory=list)
    sampling: Sampling = Sampling()
    stop_words: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    strip: bool = True
    skip_special_tokens: bool = True
    hidden_token_ids: tuple[int, ...] = ()
    penalize_prompt: bool = True
    id: object = None


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What an answer took.

    Attributes:
        prompt_tokens: positions of the prompt, media included.
        completion_tokens: tokens sampled, the stopping one included.
        cached_tokens: positions of the prompt whose keys and values were there already.
        image_features_computed: media that went through a tower.
        time_to_first_token: seconds from the moment the engine took the request.
        seconds: the same up to the end.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    image_features_computed: int
    time_to_first_token: float
    seconds: float


FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one request, after one step.

    Attributes:
        request: whose.
        index: its position in the order given.
        token_ids: what was sampled.
        text: what can be shown now: no half character, no beginning of a stop word.
        finish_reason: ``stop`` (a stop word or id), ``length``, ``error``, or None while it goes on.
        usage: with the last delta; None after an error.
        error: why the request failed; only with ``errors="yield"``.
    """

    request: Request
    index: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        text: cut at the first stop word, and stripped where the request asks for it.
        token_ids: everything sampled, the stopping token included.
        finish_reason: ``stop`` or ``length``; None where the reader stopped early.
        usage: None where the reader stopped early.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


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


class Engine(ABC):
    """Continues prompts; several at a time."""

    stats: Stats
    max_batch_size: int
    max_model_len: int

    @abstractmethod
    def check(self, request: Request) -> None:
        """Raise MMToolError for a request that can never run, such as a prompt over ``max_model_len``."""

    @abstractmethod
    def generate(self, requests: Iterable[Request], *, errors: Literal["raise", "yield"] = "raise") -> Iterator[Delta]:
        """Continue every request, up to ``max_batch_size`` at once, and yield news as they come.

        Requests are pulled from ``requests`` only when there is room, and each leaves as soon as it is done; deltas
        of different requests interleave. Closing the iterator cancels what runs.

        Args:
            requests: may be a generator; what it raises ends the run.
            errors: what a failing request does: ``raise`` ends the run with its exception, ``yield`` gives a last
                delta with ``finish_reason="error"`` and lets the others go on.
        """

    def answer(self, request: Request) -> Answer:
        """Continue one request to its end."""
        text, token_ids = [], []
        delta = None
        for delta in self.generate([request]):
            text.append(delta.text)
            token_ids += delta.token_ids
        assert delta is not None, "an engine yields at least one delta for a request"
        return Answer("".join(text), tuple(token_ids), delta.finish_reason, delta.usage)


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
