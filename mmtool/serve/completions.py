"""Answers of ``/v1/completions``: texts that go on, whole or as a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any

from mmtool.engine.base import Delta, Usage
from mmtool.log import get_logger
from mmtool.serve.chat import read_all, usage_of
from mmtool.serve.errors import ApiError
from mmtool.serve.metrics import Metrics
from mmtool.serve.service import Opened
from mmtool.serve.stream import DONE, PING, to_json
from mmtool.serve.vocabulary import Vocabulary

logger = get_logger(__name__)

LEAST = -9999.0  # what stands for minus infinity, which JSON cannot say


@dataclass
class Text:
    """One text while it comes; ``offset`` counts the characters of its tokens, those of an echoed prompt included."""

    text: list[str] = field(default_factory=list)
    logprobs: dict[str, list[Any]] | None = None
    begun: bool = False
    offset: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None


class CompletionAnswer:
    """Writes the answers to a request for texts to continue.

    Args:
        opened: the request, under way.
        vocabulary: of its model.
        metrics: of the server.
        log_answers: log what was answered.
        prompt_alone: show nothing of the answer, whose one token nobody asked for.
    """

    def __init__(
        self,
        opened: Opened,
        vocabulary: Vocabulary,
        metrics: Metrics,
        log_answers: bool = False,
        prompt_alone: bool = False,
    ) -> None:
        self.opened = opened
        self.prompt_alone = prompt_alone
        self.vocabulary = vocabulary
        self.metrics = metrics
        self.log_answers = log_answers
        self.id = f"cmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.choices = [Text() for _ in opened.answers.requests]

    async def whole(self) -> dict[str, Any]:
        """Return the body of an answer that is not streamed; errors as in ``ChatAnswer.whole``."""
        async for batch in read_all(self.opened.answers, self.metrics):
            for index, delta in batch:
                choice, text, found = self._take(index, delta)
                choice.text.append(text)
                if found is not None:
                    choice.logprobs = _joined(choice.logprobs, found)
        self._log()
        choices = [
            self._choice(index, "".join(choice.text), choice.logprobs, choice.finish_reason)
            for index, choice in enumerate(self.choices)
        ]
        return self._head() | {"choices": choices, "usage": usage_of(self.choices, self.opened.per_prompt)}

    async def events(self, include_usage: bool, ping: float) -> AsyncGenerator[bytes, None]:
        """Give the parts of a streamed answer as server-sent events, the last one ``[DONE]``."""
        null_usage = {"usage": None} if include_usage else {}
        try:
            async for batch in read_all(self.opened.answers, self.metrics, ping):
                pieces: list[str] = []
                for index, delta in batch:
                    choice, text, logprobs = self._take(index, delta)
                    if self.log_answers:
                        choice.text.append(text)
                    if text or logprobs or delta.finish_reason:
                        part = self._choice(index, text, logprobs, choice.finish_reason)
                        body = self._head() | {"choices": [part]} | null_usage
                        pieces.append(f"data: {to_json(body)}\n\n")
                if pieces or not batch:
                    yield "".join(pieces).encode("utf-8", "replace") or PING
        except ApiError as error:
            yield f"data: {to_json(error.body())}\n\n".encode("utf-8", "replace") + DONE
            return
        self._log()
        if include_usage:
            last = self._head() | {"choices": [], "usage": usage_of(self.choices, self.opened.per_prompt)}
            yield f"data: {to_json(last)}\n\n".encode()
        yield DONE

    def _echo(self, index: int) -> str:
        return self.opened.prompts[index // self.opened.per_prompt] if self.opened.prompts else ""

    def _take(self, index: int, delta: Delta) -> tuple[Text, str, dict[str, list[Any]] | None]:
        choice = self.choices[index]
        begins, choice.begun = not choice.begun, True
        if delta.finish_reason is not None:
            choice.finish_reason, choice.usage = delta.finish_reason, delta.usage
            if self.prompt_alone and delta.usage is not None:
                choice.finish_reason, choice.usage = "length", replace(delta.usage, completion_tokens=0)
        text = (self._echo(index) if begins else "") + ("" if self.prompt_alone else delta.text)
        if delta.request.sampling.logprobs is None:
            return choice, text, None
        stops = delta.request.stop_token_ids if delta.finish_reason == "stop" else ()
        items = [item for item in delta.logprobs if item.token_id not in stops and not self.prompt_alone]
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if begins and delta.request.prompt_logprobs is not None:
            self._add(choice, found, delta.request.input_ids[0], None, None)  # nothing says how likely it is
            items = [*delta.prompt_logprobs, *items]
        for item in items:
            top = {self.vocabulary.token(i)[0]: max(p, LEAST) for i, p in item.top}
            self._add(choice, found, item.token_id, max(item.logprob, LEAST), top)
        return choice, text, found

    def _add(
        self,
        choice: Text,
        found: dict[str, list[Any]],
        token_id: int,
        logprob: float | None,
        top: dict[str, float] | None,
    ) -> None:
        text = self.vocabulary.token(token_id)[0]
        found["tokens"].append(text)
        found["token_logprobs"].append(logprob)
        found["top_logprobs"].append(top)
        found["text_offset"].append(choice.offset)
        choice.offset += len(text)

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.opened.model}

    @staticmethod
    def _choice(index: int, text: str, logprobs: dict[str, list[Any]] | None, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _log(self) -> None:
        if self.log_answers:
            for choice in self.choices:
                logger.info("answered: %s", to_json("".join(choice.text)))


def _joined(before: dict[str, list[Any]] | None, found: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return found if before is None else {name: before[name] + found[name] for name in found}
