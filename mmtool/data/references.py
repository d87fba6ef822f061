"""What a dataset row may write for a picture or a sound: a path, a URL, a data URI, or the bytes themselves.

Local files are looked for, never opened: whether they can be decoded is seen when they are loaded.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mmtool.errors import DataError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


@dataclass(frozen=True)
class MediaFolders:
    """Where relative paths start: ``media_root`` first, when given, then ``base_dir``, the folder of the data file."""

    base_dir: Path
    media_root: Path | None = None

    def resolve(self, reference: Any, field: str) -> str | Path | bytes:
        """Return the source that ``reference`` stands for; ``field`` names its place in the row.

        >>> MediaFolders(Path("/data")).resolve("https://host/a.png", "images[0]")
        'https://host/a.png'

        Raises:
            DataError: for a local file that is not there, and for anything that is no reference.
        """
        if isinstance(reference, Mapping):
            return self._resolve_mapping(reference, field)
        if is_absent(reference):
            raise DataError(f"{field}: is empty")
        if isinstance(reference, bytes):
            return reference
        if not isinstance(reference, str | Path):
            found = type(reference).__name__
            raise DataError(f"{field}: expected a path, a URL, a data URI or {{path, bytes}}, got {found}")
        return self._resolve_text(str(reference), field)

    def _resolve_mapping(self, reference: Mapping[str, Any], field: str) -> str | Path | bytes:
        content, path = reference.get("bytes"), reference.get("path")
        if isinstance(content, str):
            try:
                return base64.b64decode(content, validate=True)
            except (binascii.Error, ValueError) as error:
                raise DataError(f"{field}.bytes: is not base64 ({error})") from None
        if content is not None:
            return self.resolve(content, f"{field}.bytes")
        if path is None:
            raise DataError(f"{field}: neither 'path' nor 'bytes' has a value")
        return self.resolve(path, f"{field}.path")

    def _resolve_text(self, reference: str, field: str) -> str | Path:
        if reference.startswith("data:"):
            if "," not in reference:
                raise DataError(f"{field}: a data URI needs a comma before its data, as in data:image/png;base64,AAAA")
            return reference
        scheme = _SCHEME.match(reference)
        if scheme is None:
            return self._find(reference, field)
        if scheme[1].lower() in ("http", "https"):
            return reference
        if scheme[1].lower() == "file":
            return self._find(unquote(urlsplit(reference).path), field)
        raise DataError(f"{field}: cannot read {_shorten(reference)}", "Use a path, an http(s) URL or a data URI.")

    def _find(self, path: str, field: str) -> Path:
        folders = [folder for folder in (self.media_root, self.base_dir) if folder is not None]
        places = [Path(path)] if os.path.isabs(path) else [folder / path for folder in folders]
        for place in places:
            if os.path.isfile(place):
                return place
        if os.path.isabs(path):
            hint = "Correct the path; a relative one starts at the data file or at --media_root."
        else:
            looked = " and ".join(str(folder) for folder in dict.fromkeys(folders))
            hint = f"Looked in {looked}; name another with --media_root."
        raise DataError(f"{field}: no such file {_shorten(path)}", hint)


def is_reference(value: Any) -> bool:
    """Tell whether ``value`` has the shape of one reference: text, a path, bytes, or a ``{path, bytes}`` object.

    >>> is_reference({"path": "a.png", "bytes": None}), is_reference(["a.png"])
    (True, False)
    """
    if isinstance(value, Mapping):
        return bool(value) and set(value) <= {"path", "bytes"}
    return isinstance(value, str | bytes | Path)


def is_absent(value: Any) -> bool:
    """Tell whether ``value`` stands for no medium: null, empty text, or a ``{path, bytes}`` object without either."""
    if isinstance(value, Mapping):
        return is_reference(value) and not any(value.values())
    return value is None or (isinstance(value, str | bytes) and not value)


def _shorten(text: str) -> str:
    return repr(text) if len(text) <= 120 else f"{text[:117]!r}..."
