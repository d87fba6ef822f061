"""The story of `mmtool serve`: take the port, load the model, start the engine's thread, answer until told to stop."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from mmtool import log
from mmtool.args import ServeArgs
from mmtool.engine.base import Engine
from mmtool.engine.create import open_engine
from mmtool.engine.worker import EngineWorker
from mmtool.errors import MMToolError
from mmtool.finetuned import FineTuned, open_finetuned
from mmtool.groups.serve import CapacityArgs, RequestMediaArgs
from mmtool.infer.main import open_template, read_sampling
from mmtool.loader import open_folder
from mmtool.media import MediaLimits
from mmtool.serve.app import create_app
from mmtool.serve.auth import read_keys
from mmtool.serve.connection import BoundedProtocol
from mmtool.serve.service import Service
from mmtool.serve.settings import MEBIBYTE, SERVER_MEDIA, ModelCard, ServeSettings
from mmtool.spec import ModelSpec
from mmtool.template.base import Template
from mmtool.threads import compute_elsewhere
from mmtool.utils import collection_paused, import_object

if sys.platform == "linux":
    import resource  # not on Windows

logger = log.get_logger(__name__)

BACKLOG = 1024
WRITING_TIME = 5.0  # seconds for the last bytes of answers to leave
UNREAD_MILLISECONDS = 120_000
M_ARENA_MAX = -8  # of malloc.h
HEAPS_BESIDE = 3  # for all that does not compute steps: the event loop, what encodes prompts, what prepares media
WATCHED_EVERY = 1.0  # seconds between looks at the engine
TRIMMED_EVERY = 10.0  # seconds between returns of memory, while requests come


def serve_main(args: ServeArgs) -> None:
    """Serve until SIGTERM or Ctrl-C.

    What can be wrong without the weights is found before they load.

    Raises:
        SystemExit: with 1, where the engine failed for good.
    """
    share_heaps()
    allow_files()
    if args.server.web_ui and find_spec("gradio") is None:
        raise MMToolError("--web_ui true needs the package gradio", "Run: pip install 'mmtool[ui]'")
    keys = read_keys(args.server.api_key, args.server.api_key_file)
    limits = media_limits(args.media)
    listener = listen(args.server.host, args.server.port)
    try:
        finetuned = _finetuned(args)
        spec, folder = open_folder(args.model.model_type, args.model.model_id_or_path, hub=args.model.hub)
        names = tuple(dict.fromkeys(args.server.served_model_name)) or (_own_name(args, spec),)
        adapters = read_adapters(args.capacity, names)
        template = open_template(
            args.template,
            spec,
            folder,
            args.model.processor_kwargs,
            system=args.template.system,
            media_limits=limits,
        )
        engine, generation_config = _load(args, spec, folder, template, finetuned, adapters)
        card = ModelCard(
            names=names,
            root=_own_name(args, spec),
            max_model_len=engine.max_model_len,
            vocab_size=len(template.tokenizer),
            modalities=tuple(template.modalities),
            adapters={name: str(path) for name, path in adapters.items()},
        )
        settings = ServeSettings(
            sampling=read_sampling(args.generation, generation_config),
            api_keys=keys,
            media=limits,
            max_body_bytes=int(args.capacity.max_request_mib * MEBIBYTE),
            max_media=args.media.max_media_per_request,
            media_threads=min(max(2, (os.cpu_count() or 1) // 2), 8),
            cors_origins=tuple(args.server.cors_origins),
            log_requests=args.server.log_requests,
        )
        max_queue = args.capacity.max_queue
        worker = EngineWorker(engine, max_queue=4 * engine.max_batch_size if max_queue is None else max_queue)
        compute_elsewhere()
        _tell(card, engine, worker)
        failed = run(listener, settings, worker, template, card, args)
    finally:
        listener.close()
    if failed:
        logger.error("the engine has failed; see above")
        raise SystemExit(1)


def run(
    listener: socket.socket,
    settings: ServeSettings,
    worker: EngineWorker,
    template: Template,
    card: ModelCard,
    args: ServeArgs,
) -> bool:
    """Answer requests until told to stop; return whether the engine has failed."""
    app = create_app(settings, worker, template, card)
    if args.server.web_ui:
        import_object("mmtool.serve.ui:mount_ui")(app)  # gradio comes with the extra `ui`
    page = next(iter(app.state.open_paths), None)
    server = Server(app, args.server.shutdown_timeout, lambda: _tell_address(listener, settings.api_keys, page))
    try:
        server.run(sockets=[listener])
    except OSError as error:
        raise _cannot_listen(args.server.host, args.server.port, error) from None
    finally:
        app.state.service.close()
        worker.stop(0.0)
    return server.failed


class Server(uvicorn.Server):
    """uvicorn, but at the end running answers get their time while new requests get a 503.

    Args:
        app: of ``create_app``.
        shutdown_timeout: seconds that running answers get.
        on_started: called when requests can come.
    """

    def __init__(self, app: FastAPI, shutdown_timeout: float, on_started: Callable[[], None] = lambda: None) -> None:
        for name in ("uvicorn", "uvicorn.error", "uvicorn.asgi"):  # what it says of requests, ``guard`` says better
            logging.getLogger(name).setLevel(logging.CRITICAL)
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="on" if app.state.open_paths else "off",  # a page that is mounted starts its tasks with it
                http=BoundedProtocol,
                ws="none",
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=int(WRITING_TIME),
            )
        )
        self.service: Service = app.state.service
        self.shutdown_timeout = shutdown_timeout
        self.on_started = on_started
        self.failed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve, and watch the engine meanwhile."""
        self._loop = asyncio.get_running_loop()
        watching = asyncio.create_task(self._watch())
        try:
            await super().serve(sockets)
        finally:
            watching.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self.on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; a second signal does not wait for anything."""
        if self._ending is not None or self._loop is None:
            self.force_exit = self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self.begin_stop, signal.Signals(sig).name)

    def begin_stop(self, reason: str) -> None:
        """Refuse new requests, and end as soon as the others have; in the event loop."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._stop(reason))

    async def _stop(self, reason: str) -> None:
        service = self.service
        service.draining = True
        logger.info("%s: stopping; %d requests get %g s to end", reason, service.active, self.shutdown_timeout)
        started = time.monotonic()
        if not await service.wait_idle(self.shutdown_timeout):
            logger.info("cutting %d requests", service.active)
        await asyncio.to_thread(service.worker.stop, 0.0)
        await service.wait_idle(WRITING_TIME)
        logger.info("stopped after %.1f s", time.monotonic() - started)
        self.should_exit = True

    async def _watch(self) -> None:
        """End the process where the engine cannot work any more, so that whoever looks after it starts another.

        Also give memory back that requests have left.
        """
        trimmed, seen = time.monotonic(), 0
        while True:
            await asyncio.sleep(WATCHED_EVERY)
            answered = self.service.metrics.requests.total()
            if answered > seen and time.monotonic() - trimmed >= TRIMMED_EVERY:
                await asyncio.to_thread(give_memory_back)
                trimmed, seen = time.monotonic(), answered
            failure = self.service.worker.snapshot().failure
            if failure is not None:
                self.failed = True
                self.shutdown_timeout = WRITING_TIME
                self.begin_stop(failure)
                return


def share_heaps() -> None:
    """Let threads share some heaps; with the C library's default, many keep each what the largest picture once took.

    Measured over some minutes of mixed traffic with two heaps: 570 MiB instead of 700. But threads that compute
    together need one each: two of them on the same wait for each other, up to a fifth of their time.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):  # not in musl
        libc.mallopt(M_ARENA_MAX, torch.get_num_threads() + HEAPS_BESIDE)


def allow_files() -> None:
    """Let as many files be open as the system lets us: every connection is one, and most shells allow 1024."""
    if sys.platform == "linux":
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def give_memory_back() -> None:
    """Return free pages of the heaps to the system, those between blocks in use as well, which stay otherwise.

    Takes a millisecond; after a handful of pictures 20 to 40 MB.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "malloc_trim"):  # not in musl
        libc.malloc_trim(0)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that has the port, and does not listen yet.

    Raises:
        MMToolError: where the port is taken, or the address is not of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise MMToolError(f"--host {host}: not an address of this machine ({error})", "Use 127.0.0.1.") from None
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have just ended do not count
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: a client that takes nothing for so long is cut off
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MILLISECONDS)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _cannot_listen(host, port, error) from None
    return sock


def _cannot_listen(host: str, port: int, error: OSError) -> MMToolError:
    reason = (error.strerror or str(error)).lower()
    if error.errno == errno.EADDRNOTAVAIL:
        return MMToolError(f"--host {host}: not an address of this machine ({reason})", "Use 127.0.0.1.")
    hint = "Stop what uses it, or give another --port."
    if error.errno == errno.EACCES:
        hint = "Give a --port from 1024 on."
    return MMToolError(f"--port {port}: cannot listen at {host}:{port} ({reason})", hint)


def media_limits(given: RequestMediaArgs) -> MediaLimits:
    """Return what requests may have opened."""
    root = given.allowed_local_media_path
    if root is not None and not Path(root).expanduser().is_dir():
        raise MMToolError(f"--allowed_local_media_path {root}: no such folder", "Give a folder, or leave it out.")
    return replace(
        SERVER_MEDIA,
        timeout=given.media_timeout,
        max_bytes=int(given.max_media_mib * MEBIBYTE),
        max_pixels=given.max_pixels,
        schemes=tuple(given.allowed_media_schemes),
        domains=tuple(given.allowed_media_domains) or None,
        allow_private=given.allow_private_media,
        allow_local=root is not None,
        local_root=None if root is None else Path(root).expanduser(),
    )


def read_adapters(given: CapacityArgs, served: Sequence[str]) -> dict[str, Path]:
    """Return the folders of the adapters by name, which is none of ``served``; of a run folder its best checkpoint."""
    found = {}
    for module in given.lora_modules:
        name, _, path = module.partition("=")
        try:
            checkpoint = open_finetuned(path)
        except MMToolError as error:
            reason = error.message.removeprefix(f"--ckpt_dir {path}: ")
            raise MMToolError(f"--lora_modules {module}: {reason}", error.hint) from None
        if not checkpoint.is_adapter:
            raise MMToolError(f"--lora_modules {module}: holds a whole model", "Give it to --ckpt_dir.")
        if name in served:
            raise MMToolError(f"--lora_modules {module}: {name} is the name of the model", "Take another name.")
        found[name] = checkpoint.folder
    return found


def _finetuned(args: ServeArgs) -> FineTuned | None:
    """Return the checkpoint of ``--ckpt_dir``, and set the options that it knows and the user did not give."""
    if args.checkpoint.ckpt_dir is None:
        return None
    finetuned = open_finetuned(args.checkpoint.ckpt_dir)
    finetuned.fill(args.model, args.explicit)
    finetuned.fill(args.template, args.explicit)
    return finetuned


def _own_name(args: ServeArgs, spec: ModelSpec) -> str:
    """Return the type of a model of ours, and the folder's name of any other."""
    given = args.model.model_id_or_path
    return spec.model_type if spec.auto is not None or given is None else Path(given).name


def _load(
    args: ServeArgs,
    spec: ModelSpec,
    folder: Path,
    template: Template,
    finetuned: FineTuned | None,
    adapters: dict[str, Path],
) -> tuple[Engine, Any]:
    with log.timed("load"), collection_paused(freeze=True):
        return open_engine(
            args.infer_backend,
            args.model,
            args.vllm,
            spec,
            folder,
            template,
            finetuned,
            merge_lora=args.checkpoint.merge_lora,
            max_batch_size=args.capacity.max_num_seqs,
            max_model_len=args.capacity.max_model_len,
            adapters=adapters,
            preallocate=True,
            pack_weights=args.capacity.pack_weights,
            compile=args.capacity.compile,
            prompts_beside=args.capacity.prompts_beside,
        )


def _tell(card: ModelCard, engine: Engine, worker: EngineWorker) -> None:
    logger.info(
        "%s: %d answers at once, %d positions each; %d more may wait",
        ", ".join((*card.names, *card.adapters)),
        engine.max_batch_size,
        engine.max_model_len,
        worker.max_queue,
    )


def _tell_address(listener: socket.socket, keys: tuple[str, ...], page: str | None) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if not keys and not host.startswith("127.") and host != "::1":
        logger.warning("everybody who reaches %s can use this server: there is no --api_key", shown)
    logger.info("serving at http://%s:%d/v1 after %.1f s", shown, port, time.perf_counter() - log.STARTED)
    if page is not None:
        logger.info("chat page at http://%s:%d%s", shown, port, page)
