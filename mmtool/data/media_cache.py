"""Media given as URLs, downloaded once: to a file that every process and every epoch reads."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from mmtool.errors import MediaError
from mmtool.media import MediaLimits, describe_source
from mmtool.messages import Message, Part, Text
from mmtool.utils import import_object


def cache_folder() -> Path:
    """Return the folder for what can be made or downloaded again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mmtool"


class UrlCache:
    """Files of what URLs hold.

    Args:
        folder: where they are kept; made when the first is.
        limits: what may be downloaded, and how large it may be.
    """

    def __init__(self, folder: Path, limits: MediaLimits) -> None:
        self.folder = folder
        self.limits = limits

    def localized(self, message: Message) -> Message:
        """Return ``message`` with files in place of URLs.

        Raises:
            MediaError: for one that cannot be downloaded.
        """
        if not any(_is_url(part) for part in message.parts):
            return message
        return replace(message, parts=tuple(self._local(part) for part in message.parts))

    def _local(self, part: Part) -> Part:
        return type(part)(self.path(part.source)) if _is_url(part) else part

    def path(self, url: str) -> Path:
        """Return the file that holds what ``url`` does."""
        path = self.folder / hashlib.sha256(url.encode()).hexdigest()[:32]
        if not path.exists():
            fetch = import_object("mmtool.download:fetch")
            try:
                data = fetch(url, timeout=self.limits.timeout, max_bytes=self.limits.max_bytes)
            except MediaError as error:
                raise MediaError(f"cannot open {describe_source(url)}: {error.message}", error.hint) from None
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_bytes(data)
            unfinished.replace(path)  # at once: another process may be reading
        return path


def _is_url(part: Part) -> bool:
    if isinstance(part, Text) or not isinstance(part.source, str):
        return False
    return part.source[:8].lower().startswith(("http://", "https://"))
