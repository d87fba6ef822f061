"""A real server on the embedded model, in a thread of this process: routes, uvicorn, the engine's thread, sockets."""

import base64
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from mmtool.engine.create import create_engine
from mmtool.engine.worker import EngineWorker
from mmtool.groups.prompt import PromptArgs
from mmtool.infer.main import open_template
from mmtool.loader import load_model, open_folder
from mmtool.serve.app import create_app
from mmtool.serve.main import Server, listen
from mmtool.serve.settings import SERVER_MEDIA, ModelCard, ServeSettings

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"


@dataclass
class Tiny:
    """The embedded model, loaded once."""

    network: Any
    template: Callable[..., Any]


@dataclass
class Running:
    """A server that runs.

    Attributes:
        url: without a path.
        app: its application.
        worker: its engine's thread.
        server: uvicorn.
    """

    url: str
    app: Any
    worker: EngineWorker
    server: Server
    thread: threading.Thread

    @property
    def service(self) -> Any:
        return self.app.state.service

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": "any", "max_retries": 0, "http_client": self.http, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    @cached_property
    def http(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=30)  # making one takes longer than most answers

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        return self.http.post(path, json=body, **options)

    def chat(self, text: str, **fields: Any) -> httpx2.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    def stop(self) -> None:
        if "http" in vars(self):
            self.http.close()
        self.server.shutdown_timeout = 0.0
        self.server.service.draining or self.server._loop.call_soon_threadsafe(self.server.begin_stop, "test")
        self.thread.join(30)
        assert not self.thread.is_alive()
        self.app.state.service.close()
        assert self.worker.stop(0.0)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    spec, folder = open_folder()
    media = SERVER_MEDIA

    def template(**settings: Any) -> Any:
        return open_template(PromptArgs(), spec, folder, **{"media_limits": media, **settings})

    network, _ = load_model(spec, folder, processor=template().processor)
    return Tiny(network, template)


@contextmanager
def run_server(
    tiny: Tiny, *, max_num_seqs: int = 4, max_queue: int = 64, send_buffer: int | None = None, **settings: Any
) -> Any:
    settings = ServeSettings(**settings)
    template = tiny.template(media_limits=settings.media)
    engine = create_engine(tiny.network, template.tokenizer, max_batch_size=max_num_seqs)
    worker = EngineWorker(engine, max_queue=max_queue)
    card = ModelCard(
        names=("tiny",),
        root="tiny",
        max_model_len=engine.max_model_len,
        vocab_size=len(template.tokenizer),
        modalities=template.modalities,
    )
    listener = listen("127.0.0.1", 0)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    app = create_app(settings, worker, template, card)
    server = Server(app, 5.0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive()
        time.sleep(0.01)
    running = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", app, worker, server, thread)
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def server(tiny: Tiny) -> Iterator[Running]:
    """A server with default settings."""
    with run_server(tiny) as running:
        yield running


@pytest.fixture(scope="session")
def run_module_server(tiny: Tiny) -> Callable[..., Any]:
    """The same as ``serving``, for fixtures that live longer than a test."""
    return lambda model=tiny, **settings: run_server(model, **settings)


@pytest.fixture
def serving(tiny: Tiny) -> Callable[..., Any]:
    """``with serving(api_keys=("a",)) as server:`` runs one with other settings."""
    return lambda **settings: run_server(tiny, **settings)


@pytest.fixture(scope="session")
def data_uri() -> Callable[[str], str]:
    """``data_uri("shapes")`` is a picture of the examples."""

    def make(name: str) -> str:
        data = (PICTURES / f"{name}.png").read_bytes()
        return f"data:image/png;base64,{base64.b64encode(data).decode()}"

    return make


@pytest.fixture
def idle() -> Callable[[Running], None]:
    """Wait until a server does nothing."""

    def wait(running: Running, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while True:
            stats = running.worker.snapshot()
            if not stats.queued and not stats.running and not running.service.active:
                return
            assert time.monotonic() < deadline, f"still {stats.queued} queued, {stats.running} running"
            time.sleep(0.02)

    return wait
