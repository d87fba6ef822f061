"""What a server is told, as data; no web framework and no torch here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from mmtool.engine.base import Sampling
from mmtool.media import MediaLimits

MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What clients are told about the model.

    Attributes:
        names: what it may be called, the first in answers; requests without a name mean the first.
        adapters: folder by name of every LoRA adapter, to be asked for as if it were a model.
        root: model type or folder, for people.
        modalities: what it takes beside text.
        max_model_len: most positions of prompt and answer.
        vocab_size: ids that a prompt may have are below.
        created: seconds since 1970.
    """

    names: tuple[str, ...]
    root: str
    max_model_len: int
    vocab_size: int
    modalities: tuple[str, ...] = ()
    adapters: Mapping[str, str] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))


# A server opens nothing of its own machine and network, and no scheme that can be read on the way.
SERVER_MEDIA = MediaLimits(
    max_bytes=20 * MEBIBYTE, allow_local=False, allow_private=False, schemes=("https",), max_seconds=600.0
)


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How a server answers, and what it refuses.

    Attributes:
        sampling: how tokens are chosen where a request does not say.
        api_keys: any of these opens the server; none means that everybody may ask.
        media: what may be opened, and how large it may be.
        max_body_bytes: largest request.
        max_media: most pictures and sounds in a request.
        max_media_bytes: bytes of media of all requests, as files while they are prepared, then as tensors until the
            answer ends; beyond, 429.
        max_preparing: requests that wait for their media and tokens; beyond, 429.
        max_answers: largest ``n``.
        media_threads: threads that decode media, and a quarter of those that fetch them.
        media_seconds: for all media of a request together.
        body_seconds: for a request to arrive.
        ping_seconds: how often a stream that waits says that it is alive.
        unread_deltas: how far a reader may fall behind its stream before it is cut.
        write_seconds: how long a stream waits for a reader that takes nothing.
        cors_origins: web pages of these origins may ask; ``*`` for all.
        log_requests: write questions and answers to the log.
    """

    sampling: Sampling = field(default_factory=Sampling)
    api_keys: tuple[str, ...] = ()
    media: MediaLimits = SERVER_MEDIA
    max_body_bytes: int = 32 * MEBIBYTE
    max_media: int = 16
    max_media_bytes: int = 2048 * MEBIBYTE
    max_preparing: int = 64
    max_answers: int = 16
    media_threads: int = 4
    media_seconds: float = 30.0
    body_seconds: float = 60.0
    ping_seconds: float = 15.0
    unread_deltas: int = 1024
    write_seconds: float = 60.0
    cors_origins: tuple[str, ...] = ()
    log_requests: bool = False
