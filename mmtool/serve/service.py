"""Requests to answers: what is checked, prepared and handed to the engine; the routes and the web page share it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from mmtool.engine.base import Grammar, Request, Sampling, request_from
from mmtool.engine.worker import EngineWorker
from mmtool.errors import MMToolError
from mmtool.log import get_logger
from mmtool.serve.answers import Answers, Relay, as_api_error
from mmtool.serve.conversation import read_conversation
from mmtool.serve.errors import ApiError, bad_request, from_user_error, too_busy
from mmtool.serve.grammar import GrammarCompiler
from mmtool.serve.media import MediaLoader
from mmtool.serve.metrics import Metrics
from mmtool.serve.protocol import ChatRequest, CompletionRequest, SamplingFields, check_fields
from mmtool.serve.settings import ModelCard, ServeSettings
from mmtool.serve.stream import to_json
from mmtool.serve.tools import ToolUse, read_tools
from mmtool.serve.vocabulary import Vocabulary
from mmtool.template.base import Template
from mmtool.threads import computing_alone

logger = get_logger(__name__)

COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions


@dataclass
class Opened:
    """A request that the engine works on.

    Attributes:
        model: the name to give in the answer.
        answers: what comes.
        tools: the functions that may be called, where the request gives some.
        prompts: the prompts as text, where the request wants them back.
        per_prompt: answers to each prompt.
    """

    model: str
    answers: Answers
    tools: ToolUse | None = None
    prompts: Sequence[str] = ()
    per_prompt: int = 1


class Service:
    """Answers requests with one engine; made and used in the event loop.

    Args:
        settings: limits and defaults.
        worker: the engine's thread.
        template: writes prompts.
        card: what the model is called, and can.
    """

    def __init__(self, settings: ServeSettings, worker: EngineWorker, template: Template, card: ModelCard) -> None:
        self.settings = settings
        self.worker = worker
        self.template = template
        self.card = card
        self.metrics = Metrics()
        self.draining = False
        self.active = 0
        self._preparing = 0
        # Tokenizers are not safe in two threads at a time, and one keeps up with any engine.
        self._encoding = ThreadPoolExecutor(1, "mmtool-encode", initializer=computing_alone())
        self.vocabulary = Vocabulary(template.tokenizer, card.vocab_size, template.stop_token_ids)
        self.grammars = GrammarCompiler(self.vocabulary)
        self.media = MediaLoader(template, settings, self._encoding)
        self._relay: Relay | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def close(self) -> None:
        """End the threads; the worker is its owner's."""
        self.media.close()
        self._encoding.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def working(self) -> Any:
        """Count a request as under way; ``wait_idle`` waits for it."""
        self.active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.active -= 1
            if not self.active:
                self._idle.set()

    async def wait_idle(self, seconds: float) -> bool:
        """Wait until nothing is under way; False where it still is after ``seconds``."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    # -- what is asked -----------------------------------------------------------------------------------------------

    def find_model(self, name: str | None) -> tuple[str, str | None]:
        """Return the name to answer with, and the adapter that it means.

        Raises:
            ApiError: 404.
        """
        if not name:
            return self.card.names[0], None
        if name in self.card.names:
            return name, None
        if name in self.card.adapters:
            return name, name
        known = ", ".join((*self.card.names, *self.card.adapters))
        raise ApiError(
            404, f"The model {name[:80]!r} does not exist. There is: {known}", param="model", code="model_not_found"
        )

    async def chat(self, body: ChatRequest) -> Opened:
        """Check a chat request, prepare it, and hand it to the engine.

        Raises:
            ApiError: for whatever is wrong with it, before anything is sent.
        """
        model, adapter = self.find_model(body.model)
        sampling = self._sampling(body, body.max_completion_tokens or body.max_tokens, body.num_logprobs)
        count = self._count(body)
        conversation = read_conversation(body.messages, self.card.modalities, self.settings.max_media)
        tools = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls, self.template, conversation.messages)
        with self._room():
            template = tools.template if tools else self.template
            messages = await self.media.prepare(conversation)
            request = await self._encoded(request_from, template, messages, sampling, param="messages")
            grammar = await self._grammar(body.response_format, tools)
            await self._warm(sampling)
        if self.settings.log_requests:
            logger.info("asked: %s", to_json(_without_media(body.messages)))
        request = replace(
            request,
            adapter=adapter,
            stop_token_ids=(*request.stop_token_ids, *self._stop_ids(body)),
            skip_special_tokens=request.skip_special_tokens and not (tools and tools.format.special),
        )
        return Opened(model, self._submit([request], count, grammar), tools, per_prompt=count)

    async def complete(self, body: CompletionRequest) -> Opened:
        """Check a request for texts to continue, and hand it to the engine; see ``chat``."""
        model, adapter = self.find_model(body.model)
        most = COMPLETION_TOKENS if body.max_tokens is None else max(body.max_tokens, 1)  # of 0, nothing is shown
        sampling = self._sampling(body, most, body.logprobs)
        count = self._count(body, len(body.prompts))
        with self._room():
            all_ids = await self._encoded(self._prompt_ids, body.prompts)
            await self._warm(sampling)
        template = self.template
        requests = [
            Request(
                input_ids=ids,
                sampling=sampling,
                stop_token_ids=(*template.stop_token_ids, *self._stop_ids(body)),
                strip=False,
                continues=True,
                hidden_token_ids=template.hidden_token_ids,
                penalize_prompt=template.penalize_prompt,
                prompt_logprobs=body.logprobs if body.echo else None,
                adapter=adapter,
            )
            for ids in all_ids
        ]
        if self.settings.log_requests:
            logger.info("asked: %s", to_json(body.prompt))
        shown = await self._encoded(self._texts, body.prompts) if body.echo else ()
        return Opened(model, self._submit(requests, count, None), prompts=shown, per_prompt=count)

    async def count_tokens(self, prompt: str | None, messages: Sequence[Mapping[str, Any]] | None) -> list[int]:
        """Return the ids of a text, or of a conversation's prompt."""
        with self._room():
            if prompt is not None:
                return (await self._encoded(self._prompt_ids, [prompt]))[0]
            conversation = read_conversation(messages or (), self.card.modalities, self.settings.max_media)
            prepared = await self.media.prepare(conversation)
            return (await self._encoded(self.template.encode, prepared, param="messages"))["input_ids"]

    async def stream_text(self, messages: Sequence[Mapping[str, Any]], **fields: Any) -> AsyncGenerator[str, None]:
        """Give the pieces of the answer to a conversation as they come, with all checks of ``/v1/chat/completions``.

        Closing the iterator cancels the request.

        Args:
            messages: as in the interface.
            fields: any other field of a chat request, such as ``temperature``.

        Raises:
            ApiError: for what the interface would answer with an error.
        """
        with self.working():
            opened = await self.chat(check_fields(ChatRequest, {"messages": list(messages), **fields}))
            try:
                while not opened.answers.ended:
                    for _, delta in await opened.answers.read():
                        if delta.finish_reason is not None:
                            self.metrics.ended(delta.usage)
                        if delta.error is not None:
                            raise as_api_error(delta.error)
                        if delta.text:
                            yield delta.text
            finally:
                opened.answers.cancel()

    # -- steps -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _room(self) -> Any:
        stats = self.worker.snapshot()
        if self._preparing >= self.settings.max_preparing or (
            stats.queued >= stats.max_queue + stats.max_running - stats.running
        ):
            raise too_busy("The server is busy: too many requests are waiting.", 2.0)
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1

    def _count(self, body: SamplingFields, prompts: int = 1) -> int:
        count = body.n or 1
        if count > self.settings.max_answers:
            raise bad_request(f"n: {count}, more than the {self.settings.max_answers} that are allowed", "n")
        if count * prompts > 8 * self.settings.max_answers:
            raise bad_request(f"{count * prompts} answers at once are too many", "prompt")
        return count

    def _sampling(self, body: SamplingFields, max_tokens: int | None, logprobs: int | None) -> Sampling:
        base = self.settings.sampling
        given: dict[str, Any] = {
            "max_new_tokens": max_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": None if body.top_k is None else max(body.top_k, 0),
            "min_p": body.min_p,
            "repetition_penalty": body.repetition_penalty,
            "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty,
            "seed": body.torch_seed,
            "min_new_tokens": body.min_tokens,
            "ignore_eos": body.ignore_eos,
            "logprobs": logprobs,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if body.temperature == 0:
            given["do_sample"] = False
        elif given.keys() & {"temperature", "top_p", "top_k", "min_p"}:
            given["do_sample"] = True
        try:
            return replace(base, stop=(*base.stop, *body.stop_texts), logit_bias=self._bias(body), **given)
        except MMToolError as error:
            raise from_user_error(error) from None

    def _bias(self, body: SamplingFields) -> dict[int, float]:
        found = {}
        for key, value in (body.logit_bias or {}).items():
            if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < self.card.vocab_size):
                raise bad_request(
                    f"logit_bias: {key[:40]!r} is not a token id below {self.card.vocab_size}", "logit_bias"
                )
            found[int(key)] = value
        return found

    def _stop_ids(self, body: SamplingFields) -> list[int]:
        return self._checked_ids(body.stop_token_ids or [], "stop_token_ids")

    def _checked_ids(self, ids: list[int], param: str) -> list[int]:
        for index in ids:
            if not 0 <= index < self.card.vocab_size:
                raise bad_request(f"{param}: {index} is not a token id below {self.card.vocab_size}", param)
        return ids

    async def _encoded(self, function: Callable[..., Any], *args: Any, param: str | None = None) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoding, function, *args)
        except MMToolError as error:
            raise from_user_error(error, param) from None

    def _prompt_ids(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        found = []
        for prompt in prompts:
            ids = prompt if isinstance(prompt, list) else self.template.tokenizer(prompt)["input_ids"]
            found.append(self._checked_ids(list(ids), "prompt"))
            if not ids:
                raise bad_request("prompt: is empty", "prompt")
        return found

    def _texts(self, prompts: Sequence[str | list[int]]) -> list[str]:
        return [text if isinstance(text, str) else self.template.tokenizer.decode(text) for text in prompts]

    async def _warm(self, sampling: Sampling) -> None:
        """Let the bytes of the tokens be made outside of the event loop."""
        if sampling.logprobs is not None:
            await self._encoded(lambda: self.vocabulary.trie, param="logprobs")

    async def _grammar(self, response_format: Mapping[str, Any] | None, tools: ToolUse | None) -> Any:
        """Return what makes a grammar for each answer, or None."""
        loop = asyncio.get_running_loop()
        wanted = tools.grammar() if tools else None
        if wanted is not None:
            return await loop.run_in_executor(self._encoding, self.grammars.from_lark, wanted, "tool_choice")
        return await loop.run_in_executor(self._encoding, self.grammars.from_response_format, response_format)

    def _submit(self, requests: Sequence[Request], count: int, grammar: Callable[[], Grammar] | None) -> Answers:
        copies = []
        for request in requests:
            for number in range(count):
                seed = request.sampling.seed
                sampling = request.sampling if seed is None else replace(request.sampling, seed=(seed + number) % 2**63)
                copies.append(replace(request, sampling=sampling, grammar=grammar() if grammar else None))
        if self._relay is None:
            self._relay = Relay(asyncio.get_running_loop())
        answers = Answers(self._relay, self.settings.unread_deltas)
        answers.on_end = self.media.hold([item for request in requests for item in request.media])
        try:
            answers.submit(self.worker, copies)
        except ApiError:
            if answers.on_end is not None:
                answers.on_end()
                answers.on_end = None
            raise
        return answers


def _without_media(value: Any) -> Any:
    """Return messages for the log, with long texts of media cut."""
    if isinstance(value, dict):
        return {
            key: f"({len(item)} characters)"
            if key in ("url", "data") and isinstance(item, str) and len(item) > 200
            else _without_media(item)
            for key, item in value.items()
        }
    return [_without_media(item) for item in value] if isinstance(value, list) else value
