"""The chat page at ``/ui``: Gradio in front of the service that answers the API, with the same checks and limits."""

from __future__ import annotations

import atexit
import base64
import json
import mimetypes
import os
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, RedirectResponse, Response
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmtool.errors import MMToolError
from mmtool.log import get_logger
from mmtool.serve.auth import Keys
from mmtool.serve.errors import ApiError, internal
from mmtool.serve.service import Service

logger = get_logger(__name__)

PATH = "/ui"
KEPT_SECONDS = 3600  # how long files that people upload stay on disk
REFRESH_SECONDS = 0.05  # the browser draws the whole answer again each time, and would not keep up with a fast model
NOT_ANSWERED = "Not answered"
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_KINDS = {"image": "image_url", "audio": "audio_url"}
_NAMES = {"image": "pictures", "audio": "sounds"}

# Less margin where there is no room for it, pictures that leave room for the answer, and nothing that would send a
# picture to another company, which "Share" does.
_CSS = """
.gradio-container, .gradio-container main { width: 100% !important; }
.gradio-container { max-width: 60rem !important; margin: 0 auto !important; }
.gradio-container [class*="message"] img { max-height: 15rem !important; width: auto !important; margin: 0 auto; }
.gradio-container button[aria-label="Share"], .gradio-container button[title="Share"] { display: none !important; }
@media (max-width: 640px) {
  .gradio-container main { padding: 0.3rem !important; }
  .gradio-container h1 { font-size: 1.1rem !important; margin: 0 !important; }
}
"""


def mount_ui(app: FastAPI) -> FastAPI:
    """Put the chat page into an app of ``create_app``; where that has API keys, the page asks for one first.

    Raises:
        MMToolError: Gradio is not installed.
    """
    upload_folder()
    try:
        import gradio
    except ImportError:
        raise MMToolError("--web_ui true needs the package gradio", "Run: pip install 'mmtool[ui]'") from None

    service: Service = app.state.service
    app.state.open_paths.append(PATH)

    @app.get(PATH, include_in_schema=False)
    async def to_page() -> Response:
        return RedirectResponse(f"{PATH[1:]}/")  # relative, so that it holds behind a proxy with a path of its own

    keys = Keys(service.settings.api_keys)
    return gradio.mount_gradio_app(
        app,
        build_page(service),
        PATH,
        auth=(lambda _, password: keys.accepts(f"Bearer {password}")) if service.settings.api_keys else None,
        auth_message="Any name; the password is an API key of this server.",
        app_kwargs={"middleware": [Middleware(UploadsOnly)]},
        root_path=PATH,
        max_file_size=service.settings.media.max_bytes,
        # Fonts of the reader's machine: the usual ones would be fetched from another company.
        theme=gradio.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        show_error=True,
    )


class UploadsOnly:
    """Middleware of the page: the files that a call names are those that were uploaded.

    In an app that is mounted, Gradio takes any path of the machine, and fetches a URL in the place of one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a call that names another file."""
        is_call = scope["type"] == "http" and scope["method"] not in ("GET", "HEAD")
        # An upload is the only call that comes as a form; a form cannot call a function.
        if not is_call or Headers(scope=scope).get("content-type", "").startswith(_FORMS):
            await self.app(scope, receive, send)
            return
        body = await Request(scope, receive).body()
        try:
            refused = _names_other_file(json.loads(body or b"null"))
        except (ValueError, RecursionError):
            refused = True
        if refused:
            await PlainTextResponse("The files of a question must be uploaded first.", 400)(scope, receive, send)
            return
        await self.app(scope, _Replay(body, receive), send)


class _Replay:
    """Gives a body that was read already."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


def _names_other_file(value: Any) -> bool:
    if isinstance(value, dict):
        path = value.get("path")
        return (path is not None and not _is_uploaded(path)) or any(map(_names_other_file, value.values()))
    return isinstance(value, list) and any(map(_names_other_file, value))


def _is_uploaded(path: object) -> bool:
    return isinstance(path, str) and "\0" not in path and upload_folder() in Path(path).resolve().parents


def upload_folder() -> Path:
    """Return the folder for uploads: of this process alone, and gone when it ends."""
    # Gradio reads the place from the environment. Its own, /tmp/gradio, is everybody's, and nobody cleans it.
    if "GRADIO_TEMP_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="mmtool-ui-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["GRADIO_TEMP_DIR"] = folder
    return Path(os.environ["GRADIO_TEMP_DIR"]).resolve()


def build_page(service: Service) -> Any:
    """Return the page as Gradio blocks."""
    import gradio

    card = service.card

    async def respond(
        message: Mapping[str, Any],
        history: Sequence[Mapping[str, Any]],
        system: str,
        temperature: float,
        top_p: float,
        max_tokens: float,
    ) -> AsyncIterator[Any]:
        fields = {"temperature": temperature, "top_p": top_p, "max_tokens": int(max_tokens)}
        async with aclosing(answer(service, message, history, system, fields)) as pieces:
            async for shown in pieces:
                yield shown

    takes = [kind for kind in _KINDS if kind in card.modalities]
    named = " and ".join(_NAMES[kind] for kind in takes)
    settings = gradio.Accordion("System prompt and sampling", open=False, render=False)
    chat = gradio.ChatInterface(
        respond,
        multimodal=True,
        title=card.names[0],
        chatbot=gradio.Chatbot(
            scale=1,
            show_label=False,
            buttons=["copy", "copy_all"],
            placeholder=f"Ask a question{f', with {named} if you like' if named else ''}.",
            allow_tags=False,
        ),
        textbox=gradio.MultimodalTextbox(
            file_types=takes or ["text"],
            file_count="multiple",
            sources=[*(["upload"] if takes else []), *(["microphone"] if "audio" in takes else [])],
            placeholder="Your question",
            show_label=False,
            stop_btn=True,  # while an answer comes
            max_plain_text_length=100_000,
        ),
        additional_inputs=_fields(service),
        additional_inputs_accordion=settings,
        concurrency_limit=None,  # the engine has the limits
        fill_height=True,
        flagging_mode="never",
        analytics_enabled=False,
        api_visibility="private",  # programs have the API
        delete_cache=(KEPT_SECONDS, KEPT_SECONDS),
    )
    return chat


async def answer(
    service: Service,
    message: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    system: str,
    fields: Mapping[str, float],
) -> AsyncGenerator[str | dict[str, Any], None]:
    """Give the answer so far, again and again; and at the end, where there is none, a turn that says why.

    Nothing is raised: after an exception, the page takes no other question.
    """
    text, shown, at = "", "", 0.0
    try:
        async with aclosing(service.stream_text(conversation(message, history, system), **fields)) as pieces:
            async for piece in pieces:
                text += piece
                if time.monotonic() - at >= REFRESH_SECONDS:
                    shown, at = text, time.monotonic()
                    yield shown
        if text != shown:
            yield text
    except Exception as error:  # a bug as well: the log has it all
        if not isinstance(error, ApiError):
            logger.exception("a question on the page failed")
            error = internal()
        said = error.message.removeprefix(f"{error.param}: ")  # a person has not written messages[1].content[0]
        said = said[:1].upper() + said[1:]
        yield {"content": f"{text}\n\n{said}".strip(), "metadata": {"title": NOT_ANSWERED}}


def _fields(service: Service) -> list[Any]:
    """Return what can be set for the next question: system prompt and sampling."""
    import gradio

    sampling, longest = service.settings.sampling, service.card.max_model_len
    return [
        gradio.Textbox(service.template.system or "", label="System prompt", lines=2, render=False),
        gradio.Slider(0, 2, 0 if sampling.greedy else sampling.temperature, step=0.05, label="Temperature"),
        gradio.Slider(0.05, 1, sampling.top_p, step=0.05, label="Top p"),
        gradio.Slider(1, longest, min(sampling.max_new_tokens, longest), step=1, label="Most new tokens"),
    ]


def conversation(message: Mapping[str, Any], history: Sequence[Mapping[str, Any]], system: str) -> list[dict[str, Any]]:
    """Return what the page holds as ``messages`` of the API, files as data URIs.

    Args:
        message: ``text`` and ``files``, paths of uploads.
        history: the turns before, as Gradio gives them.
        system: empty for the model's own.
    """
    files = [{"type": "file", "file": {"path": path}} for path in message.get("files") or ()]
    question = {"role": "user", "content": [*files, {"type": "text", "text": message.get("text") or ""}]}
    turns: list[dict[str, Any]] = []
    for turn in (*history, question):
        if (turn.get("metadata") or {}).get("title") == NOT_ANSWERED:
            turns.pop()  # with its question, which would be refused again
        elif turns and turns[-1]["role"] == turn["role"]:  # files are turns of their own; or nothing was answered
            turns[-1]["content"] += _parts(turn["content"])
        else:
            turns.append({"role": turn["role"], "content": [*_parts(turn["content"])]})
    messages = [{"role": "system", "content": system}] if system.strip() else []
    return [*messages, *({**turn, "content": [_part(part) for part in turn["content"]]} for turn in turns)]


def _parts(content: Any) -> Sequence[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    path = Path(part["file"]["path"])
    media_type = mimetypes.guess_type(path.name)[0] or ""
    kind = _KINDS.get(media_type.partition("/")[0])
    if kind is None:
        raise ApiError(400, f"{path.name} is neither a picture nor a sound.")
    if not _is_uploaded(str(path)):
        raise ApiError(400, f"{path.name} was not uploaded.")
    try:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
    except FileNotFoundError:
        raise ApiError(400, f"{path.name} is no longer there. Clear the conversation, and upload it again.") from None
    return {"type": kind, kind: {"url": f"data:{media_type};base64,{data}"}}
