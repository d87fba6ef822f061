"""The media of a request: fetched, opened and made tensors of in threads of their own, never in the event loop.

What was prepared is kept for a while: a client sends the pictures of a conversation again with every turn.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mmtool.errors import MMToolError
from mmtool.media import read_source
from mmtool.messages import Audio, Image, Message
from mmtool.serve.conversation import Conversation
from mmtool.serve.errors import ApiError, bad_request, from_user_error, too_busy
from mmtool.serve.settings import MEBIBYTE, ServeSettings
from mmtool.template.base import MediaInput, Template
from mmtool.threads import computing_alone

KEPT_BYTES = 256 * MEBIBYTE


class PreparedMedia:
    """The media seen last, by the content of their files; bounded in bytes of their tensors."""

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._items: OrderedDict[bytes, MediaInput] = OrderedDict()
        self._size = 0

    def get(self, key: bytes) -> MediaInput | None:
        """Return what was kept under ``key``."""
        with self._lock:
            item = self._items.get(key)
            if item is not None:
                self._items.move_to_end(key)
            return item

    def put(self, key: bytes, item: MediaInput) -> None:
        """Keep an item, and let go of the oldest ones."""
        with self._lock:
            if key in self._items:
                return
            self._items[key] = item
            self._size += _size(item)
            while self._size > self.max_bytes:
                self._size -= _size(self._items.popitem(last=False)[1])


class MediaLoader:
    """Fetches and prepares media in bounded threads, and counts the bytes that are on their way.

    Args:
        template: its ``prepare`` is called from several threads, unless it says ``prepares_alone``.
        settings: what may be opened.
        alone: one thread for what must not run twice at a time.
    """

    def __init__(self, template: Template, settings: ServeSettings, alone: ThreadPoolExecutor) -> None:
        self.template = template
        self.settings = settings
        self.kept = PreparedMedia()
        self.held_bytes = 0
        self._fetching = ThreadPoolExecutor(4 * settings.media_threads, "mmtool-fetch")
        self._opening = alone
        if not template.prepares_alone:
            self._opening = ThreadPoolExecutor(settings.media_threads, "mmtool-media", initializer=computing_alone())

    def close(self) -> None:
        """End the threads as soon as they are idle."""
        self._fetching.shutdown(wait=False, cancel_futures=True)
        self._opening.shutdown(wait=False, cancel_futures=True)

    def hold(self, items: Sequence[MediaInput]) -> Callable[[], None]:
        """Count tensors that a request has in the engine; return what to call at its end."""
        size = sum(map(_size, items))
        self.held_bytes += size

        def let_go() -> None:
            self.held_bytes -= size

        return let_go

    async def prepare(self, conversation: Conversation) -> list[Message]:
        """Return the messages with media that the template knows already.

        Raises:
            ApiError: 400 with the place of a medium that cannot be used, 429 where too much is on its way.
        """
        if not conversation.places:
            return conversation.messages
        if self.held_bytes > self.settings.max_media_bytes:
            raise too_busy("The pictures and sounds of other requests take too much memory at the moment.", 2.0)
        held = [0]
        try:
            async with asyncio.timeout(self.settings.media_seconds):
                tasks = [self._prepared(part, place, held) for part, place in conversation.places]
                parts = await _all(tasks)
        except TimeoutError:
            raise bad_request(
                f"The pictures and sounds took longer than {self.settings.media_seconds:g} s.",
                "messages",
                "media_timeout",
            ) from None
        finally:
            self.held_bytes -= held[0]
        return conversation.with_parts({id(old): new for (old, _), new in zip(conversation.places, parts, strict=True)})

    async def _prepared(self, part: Image | Audio, place: str, held: list[int]) -> Image | Audio:
        kind = "image" if isinstance(part, Image) else "audio"
        limits = self.settings.media
        data = await self._in(self._fetching, place, read_source, part.source, kind, limits)
        held[0] += len(data)
        self.held_bytes += len(data)
        return await self._in(self._opening, place, self._open, type(part), data)

    def _open(self, cls: type[Image | Audio], data: bytes) -> Image | Audio:
        part = cls(data)
        key = hashlib.blake2b(data, digest_size=16, person=cls.__name__.encode()).digest()
        item = self.kept.get(key)
        if item is not None:
            self.template.remember(part, item)
        else:
            self.kept.put(key, self.template.prepare(part))
        return part

    async def _in(self, pool: ThreadPoolExecutor, place: str, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, function, *args)
        except MMToolError as error:
            found = from_user_error(error, place)
            raise ApiError(400, f"{place}: {found.message}", param=place, code="invalid_media") from None


async def _all(coroutines: list[Any]) -> list[Any]:
    """Return the results of all; the first failure ends the others."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _size(item: MediaInput) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in item.inputs.values())
