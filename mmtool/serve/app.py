"""The routes of the server, over a ``Service``; what every request passes first is in ``guard``."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from mmtool import __version__
from mmtool.engine.worker import EngineWorker
from mmtool.serve.chat import ChatAnswer
from mmtool.serve.completions import CompletionAnswer
from mmtool.serve.errors import ApiError, bad_request
from mmtool.serve.guard import Guard, read_body
from mmtool.serve.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from mmtool.serve.protocol import read_body as parse_body
from mmtool.serve.service import Opened, Service
from mmtool.serve.settings import ModelCard, ServeSettings
from mmtool.serve.stream import EventStream, watched
from mmtool.template.base import Template

Whole = TypeVar("Whole", bound=BaseModel)

_NOWHERE = "There is nothing at this address. The interface is below /v1, where the base URL of a client ends."
PARSED_AT_ONCE = 64 * 1024  # bytes of a body that the event loop reads itself
HEADERS_AFTER = 5.0  # seconds a stream waits for its first token, so that a failure can still have a status


def create_app(settings: ServeSettings, worker: EngineWorker, template: Template, model_card: ModelCard) -> FastAPI:
    """Return the application; call it in the process, and close ``app.state.service`` after its event loop has ended.

    ``app.state.open_paths`` is a list of beginnings of paths that need no API key; pages that ask for one themselves
    can add theirs.

    Args:
        settings: limits and defaults.
        worker: drives the engine.
        template: writes prompts; its ``media_limits`` should be those of ``settings``.
        model_card: what clients are told.
    """
    app = FastAPI(title="mmtool", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    service = Service(settings, worker, template, model_card)
    app.state.service = service
    app.state.open_paths = []
    app.add_middleware(Guard, service=service, open_paths=app.state.open_paths)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients send some of their own, such as OpenAI's X-Stainless-Lang
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    _add_answers(app, service)
    _add_facts(app, service)
    return app


def _add_answers(app: FastAPI, service: Service) -> None:
    settings = service.settings

    @app.post("/v1/chat/completions", openapi_extra=_body_of(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        body = await _read(request, ChatRequest, settings.body_seconds)
        opened = await service.chat(body)
        answer = ChatAnswer(opened, service.vocabulary, service.metrics, settings.log_requests)
        return await _respond(request, opened, answer, body, settings)

    @app.post("/v1/completions", openapi_extra=_body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue a text."""
        body = await _read(request, CompletionRequest, settings.body_seconds)
        opened = await service.complete(body)
        answer = CompletionAnswer(
            opened, service.vocabulary, service.metrics, settings.log_requests, prompt_alone=body.max_tokens == 0
        )
        return await _respond(request, opened, answer, body, settings)

    @app.post("/v1/tokenize", openapi_extra=_body_of(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """Count the tokens of a text or of a conversation."""
        body = await _read(request, TokenizeRequest, settings.body_seconds)
        service.find_model(body.model)
        ids = await service.count_tokens(body.prompt, body.messages)
        return JSONResponse({"count": len(ids), "max_model_len": service.card.max_model_len, "tokens": ids})


def _add_facts(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """List the model and its adapters."""
        names = (*service.card.names, *service.card.adapters)
        return {"object": "list", "data": [_model(service.card, name) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        """Tell of one model."""
        if not name:
            return await list_models()
        return _model(service.card, service.find_model(name)[0])

    @app.get("/health")
    @app.head("/health", include_in_schema=False)  # some balancers and monitors ask so
    async def health() -> Response:
        """Tell whether the server answers: 200, or 503 while it stops and where its engine does not get on."""
        if service.draining:
            return JSONResponse({"status": "stopping"}, 503)
        if not service.worker.healthy():
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Give counters and times to Prometheus."""
        text = service.metrics.text(service.worker.snapshot())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def _read(request: Request, cls: type[Whole], seconds: float) -> Whole:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        # Not only for order: a web page of somebody else's can send text or forms without asking, JSON it cannot.
        raise bad_request("The header Content-Type must be application/json.", code="invalid_content_type")
    body = await read_body(request.receive, seconds)
    if len(body) <= PARSED_AT_ONCE:
        return parse_body(cls, body)
    return await asyncio.to_thread(parse_body, cls, body)


async def _respond(
    request: Request,
    opened: Opened,
    answer: ChatAnswer | CompletionAnswer,
    body: ChatRequest | CompletionRequest,
    settings: ServeSettings,
) -> Response:
    """Answer whole or as a stream; a client that leaves meanwhile frees its place."""
    answers = opened.answers
    try:
        async with watched(request.receive, answers.cancel):
            if not body.stream:
                return JSONResponse(await answer.whole())
            await answers.wait(HEADERS_AFTER)
    except BaseException:  # raised again; a cancelled task as well must give its place back
        answers.cancel()
        raise
    return EventStream(answer.events(body.include_usage, settings.ping_seconds), answers, settings.write_seconds)


def _model(card: ModelCard, name: str) -> dict[str, Any]:
    adapter = card.adapters.get(name)
    return {
        "id": name,
        "object": "model",
        "created": card.created,
        "owned_by": "mmtool",
        "root": name if adapter else card.root,
        "parent": card.names[0] if adapter else None,
        "max_model_len": card.max_model_len,
        "modalities": ["text", *card.modalities],
    }


def _body_of(cls: type[BaseModel]) -> dict[str, Any]:
    schema = cls.model_json_schema()
    for definition in schema.pop("$defs", {}).values():
        # The few nested models have no names of their own in the document.
        for holder in schema["properties"].values():
            for option in holder.get("anyOf", ()):
                if option.get("$ref", "").endswith(definition["title"]):
                    option.pop("$ref")
                    option.update(definition)
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), "registered for it"
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for it"
    words = {404: _NOWHERE, 405: "This address takes another method."}
    found = ApiError(error.status_code, words.get(error.status_code, str(error.detail)), headers=error.headers)
    return JSONResponse(found.body(), found.status, headers=found.headers)
