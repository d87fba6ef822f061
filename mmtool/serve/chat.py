"""Answers of ``/v1/chat/completions``: whole, or as a stream of chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmtool.engine.base import Delta, TokenLogprob, Usage
from mmtool.log import get_logger
from mmtool.messages import ToolCall
from mmtool.serve.answers import Answers, as_api_error
from mmtool.serve.errors import ApiError
from mmtool.serve.metrics import Metrics
from mmtool.serve.service import Opened
from mmtool.serve.stream import DONE, PING, to_json
from mmtool.serve.tools import as_openai
from mmtool.serve.vocabulary import Vocabulary
from mmtool.template.tools import CallReader

logger = get_logger(__name__)


class ClientGone(Exception):
    """The client left, or was too slow; nobody is there to be answered."""


@dataclass
class Choice:
    """One of the ``n`` answers while it comes."""

    reader: CallReader | None = None
    text: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage | None = None

    def take(self, delta: Delta) -> tuple[str, list[ToolCall]]:
        """Return the text and the calls that a delta brings."""
        text, calls = delta.text, list[ToolCall]()
        if self.reader is not None:
            text, calls = self.reader.push(text)
        if delta.finish_reason is not None:
            if self.reader is not None:
                more, found = self.reader.flush()
                text, calls = text + more, calls + found
            self.usage = delta.usage
            self.finish_reason = "tool_calls" if self.reader is not None and self.reader.calls else delta.finish_reason
        return text, calls


class ChatAnswer:
    """Writes the answers to a chat request."""

    def __init__(self, opened: Opened, vocabulary: Vocabulary, metrics: Metrics, log_answers: bool = False) -> None:
        self.opened = opened
        self.vocabulary = vocabulary
        self.metrics = metrics
        self.log_answers = log_answers
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        use = opened.tools if opened.tools and opened.tools.schemas else None
        self._prefix = to_json(self._head())[:-1] + ',"choices":['
        self.choices = [Choice(use.reader() if use else None) for _ in opened.answers.requests]

    async def whole(self) -> dict[str, Any]:
        """Return the body of an answer that is not streamed.

        Raises:
            ApiError: where the engine failed.
            ClientGone: where the request was cancelled.
        """
        async for batch in read_all(self.opened.answers, self.metrics):
            for index, delta in batch:
                choice = self.choices[index]
                text, calls = choice.take(delta)
                choice.text.append(text)
                choice.calls += [as_openai(call, _arguments(call)) for call in calls]
                choice.logprobs += self._logprobs(delta)
        self._log()
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.opened.model,
            "choices": [self._choice(index, choice) for index, choice in enumerate(self.choices)],
            "usage": usage_of(self.choices),
        }

    async def events(self, include_usage: bool, ping: float) -> AsyncGenerator[bytes, None]:
        """Give the chunks of a streamed answer as server-sent events, the last one ``[DONE]``."""
        null_usage = ',"usage":null' if include_usage else ""
        started = [False] * len(self.choices)
        try:
            async for batch in read_all(self.opened.answers, self.metrics, ping):
                pieces: list[str] = []
                for index, delta in batch:
                    if not started[index]:
                        started[index] = True
                        pieces.append(self._chunk(index, {"role": "assistant", "content": ""}, None, (), null_usage))
                    pieces += self._chunks(index, delta, null_usage)
                if pieces or not batch:
                    yield "".join(pieces).encode("utf-8", "replace") or PING
        except ApiError as error:
            yield f"data: {to_json(error.body())}\n\n".encode("utf-8", "replace") + DONE
            return
        self._log()
        if include_usage:
            last = self._head() | {"choices": [], "usage": usage_of(self.choices)}
            yield f"data: {to_json(last)}\n\n".encode()
        yield DONE

    def _chunks(self, index: int, delta: Delta, null_usage: str) -> list[str]:
        choice = self.choices[index]
        text, calls = choice.take(delta)
        logprobs = self._logprobs(delta)
        found = []
        if self.log_answers:
            choice.text.append(text)
        # The last piece has its text and its reason in one chunk, and always text: not every client expects none.
        ends = delta.finish_reason is not None and not choice.calls and not calls
        if text or logprobs or ends:
            reason = choice.finish_reason if ends else None
            found.append(self._chunk(index, {"content": text}, reason, logprobs, null_usage))
        for call in calls:
            choice.calls.append(as_openai(call, _arguments(call), len(choice.calls)))
            found.append(self._chunk(index, {"tool_calls": choice.calls[-1:]}, None, (), null_usage))
        if delta.finish_reason is not None and not ends:
            found.append(self._chunk(index, {}, choice.finish_reason, (), null_usage))
        return found

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None, logprobs: Sequence[dict[str, Any]], usage: str
    ) -> str:
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": reason}
        if logprobs:
            choice["logprobs"] = {"content": logprobs, "refusal": None}
        return f"data: {self._prefix}{to_json(choice)}]{usage}}}\n\n"

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.opened.model}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if choice.calls else "")}
        if choice.calls:
            message["tool_calls"] = choice.calls
        found: dict[str, Any] = {"index": index, "message": message, "finish_reason": choice.finish_reason}
        if self.opened.answers.requests[index].sampling.logprobs is not None:
            found["logprobs"] = {"content": choice.logprobs, "refusal": None}
        return found

    def _logprobs(self, delta: Delta) -> list[dict[str, Any]]:
        stops = delta.request.stop_token_ids if delta.finish_reason == "stop" else ()
        return [self._logprob(item) for item in delta.logprobs if item.token_id not in stops]

    def _logprob(self, item: TokenLogprob) -> dict[str, Any]:
        top = [self._token(index, logprob) for index, logprob in item.top]
        return self._token(item.token_id, item.logprob) | {"top_logprobs": top}

    def _token(self, index: int, logprob: float) -> dict[str, Any]:
        text, data = self.vocabulary.token(index)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}

    def _log(self) -> None:
        if self.log_answers:
            for choice in self.choices:
                said = "".join(choice.text)
                logger.info("answered: %s", to_json([said, *choice.calls] if choice.calls else said))


async def read_all(
    answers: Answers, metrics: Metrics, ping: float | None = None
) -> AsyncGenerator[list[tuple[int, Delta]], None]:
    """Give the deltas of all answers, and nothing every ``ping`` seconds; ending the reading early cancels them.

    Raises:
        ApiError: where the engine failed on one; the others are cancelled.
        ClientGone: where the request was cancelled.
    """
    try:
        while not answers.ended:
            batch = await answers.read(ping)
            for _, delta in batch:
                if delta.finish_reason is not None:
                    metrics.ended(delta.usage)
                if delta.error is not None:
                    raise as_api_error(delta.error)
                if delta.finish_reason == "cancelled":
                    raise ClientGone
            yield batch
    finally:
        answers.cancel()


def usage_of(choices: Sequence[Any], per_prompt: int | None = None) -> dict[str, Any]:
    """Return what the answers took together; a prompt counts once, however many answers it has."""
    usages = [choice.usage for choice in choices]
    prompts = usages[:: per_prompt or len(usages)]
    prompt, cached = sum(usage.prompt_tokens for usage in prompts), sum(usage.cached_tokens for usage in prompts)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _arguments(call: ToolCall) -> str:
    return json.dumps(dict(call.arguments), ensure_ascii=False)
