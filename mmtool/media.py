"""Open a picture from a path, URL, data URI, bytes or PIL image; what may be opened, and how large, is decided here.

A picture comes back decoded and otherwise as it is: colour mode and EXIF are the business of a family's processor.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
import struct
import urllib.parse
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import PIL.Image

from mmtool.errors import MediaError
from mmtool.utils import import_object

# Decoders that need no other program (EPS would start Ghostscript) and read one file. The common ones are loaded with
# PIL.Image; the others cost some 50 ms, so they are tried second.
COMMON_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM")
OTHER_FORMATS = ("WEBP", "TIFF", "ICO", "AVIF", "JPEG2000", "TGA")

_READABLE = "Use a PNG, JPEG, WebP, GIF, BMP or TIFF file."
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_DATA_URI = re.compile(r"data:(?P<kind>[^,]{0,200}?)(?P<base64>;\s*base64)?,", re.IGNORECASE)

# What PIL's decoders raise for damaged files, seen by damaging some; the last line follows what PIL.Image.open catches.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, OverflowError, EOFError)
_DECODE_ERRORS += (LookupError, TypeError, struct.error, zlib.error)


@dataclass(frozen=True)
class MediaLimits:
    """What may be opened.

    Attributes:
        timeout: seconds for a whole download, from looking up the name to the last byte.
        max_bytes: most bytes of a file, download or data URI.
        max_pixels: most pixels, width times height, checked before decoding.
        allow_local: files of this machine, by path or ``file://``. A server says no.
        allow_private: addresses that are not public: this machine, its network, link-local, multicast. A server says
            no; then the name is looked up once, every address is checked, and the connection goes to a checked one.
    """

    timeout: float = 10.0
    max_bytes: int = 50 * 1024 * 1024
    max_pixels: int = 50_000_000
    allow_local: bool = True
    allow_private: bool = True


DEFAULT_LIMITS = MediaLimits()


def load_image(source: str | Path | bytes | PIL.Image.Image, limits: MediaLimits = DEFAULT_LIMITS) -> PIL.Image.Image:
    """Return the picture, decoded; of an animation the first frame.

    Args:
        source: path (``~`` and ``file://`` allowed), http(s) URL, data URI, encoded bytes, or a PIL image.
        limits: what may be opened.

    Raises:
        MediaError: naming the source, shortened where it is long, and the reason.
    """
    name = describe_source(source)
    if isinstance(source, PIL.Image.Image):
        return _decoded(source, name, limits)
    data = _read_bytes(source, name, limits)
    if not data:
        raise MediaError(f"cannot open image {name}: it is empty", _READABLE)
    return _decoded(_open_header(data, name, limits), name, limits)


def describe_source(source: Any) -> str:
    """Name a source on one short line, for messages."""
    if isinstance(source, PIL.Image.Image):
        return f"(PIL image, {source.width} x {source.height})"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"({len(source)} bytes)"
    text = str(source)
    if text[:5].lower() == "data:":
        return f"'{_printable(text[:40])}...' ({len(text)} characters)" if len(text) > 40 else f"'{_printable(text)}'"
    return f"'{_printable(text)}'" if len(text) <= 160 else f"'{_printable(text[:100])}...{_printable(text[-40:])}'"


# -- bytes -----------------------------------------------------------------------------------------------------------


def _read_bytes(source: str | Path | bytes, name: str, limits: MediaLimits) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        _check_size(len(source), name, limits)
        return bytes(source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _read_data_uri(source, name, limits)
    scheme = _SCHEME.match(source) if isinstance(source, str) else None
    if scheme is None:
        return _read_file(source, name, limits)
    if scheme[1].lower() == "file":
        return _read_file(_file_url_path(source, name), name, limits)
    if scheme[1].lower() in ("http", "https"):
        return _fetch(source, name, limits)
    raise MediaError(f"cannot open image {name}: unknown scheme {scheme[0]}", "Use http://, https:// or a path.")


def _fetch(url: str, name: str, limits: MediaLimits) -> bytes:
    fetch = import_object("mmtool.download:fetch")  # requests takes 0.1 s to import, and most pictures are files
    try:
        return fetch(url, timeout=limits.timeout, max_bytes=limits.max_bytes, allow_private=limits.allow_private)
    except MediaError as error:
        raise MediaError(f"cannot open image {name}: {error.message}", error.hint) from None


def _read_data_uri(uri: str, name: str, limits: MediaLimits) -> bytes:
    match = _DATA_URI.match(uri)
    if match is None:
        raise MediaError(f"cannot open image {name}: no comma ends the head of the data URI", _DATA_HINT)
    payload = uri[match.end() :]
    _check_size(len(payload) * 3 // 4 - 2 if match["base64"] else len(payload) // 3, name, limits)
    try:
        data = urllib.parse.unquote_to_bytes(payload)
        if match["base64"]:
            data = base64.b64decode(b"".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"cannot open image {name}: broken base64 ({error})", _DATA_HINT) from None
    _check_size(len(data), name, limits)
    return data


_DATA_HINT = "Write data:image/png;base64, and then the base64 of the whole file."


def _file_url_path(url: str, name: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise MediaError(
            f"cannot open image {name}: it is on another machine, {parts.netloc}", "Write file:///folder/x.png."
        )
    # A path may hold ? and #; in a file URL they have no other meaning.
    return urllib.request.url2pathname(re.sub(r"(?i)^file://(localhost)?", "", url))


def _read_file(path: str | Path, name: str, limits: MediaLimits) -> bytes:
    if not limits.allow_local:
        raise MediaError(
            f"cannot open image {name}: local files are not allowed here", "Give an http(s) URL or a data URI."
        )
    try:
        with open(os.path.expanduser(path), "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise MediaError(f"cannot open image {name}: not a file", "Check the path.")
            _check_size(status.st_size, name, limits)
            data = file.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise MediaError(f"cannot open image {name}: {_first_lower(reason)}", "Check the path.") from None
    _check_size(len(data), name, limits)
    return data


def _open_without_waiting(path: str, flags: int) -> int:
    # Opening a named pipe for reading waits for a writer otherwise; files are not affected.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_size(size: int, name: str, limits: MediaLimits) -> None:
    if size > limits.max_bytes:
        raise MediaError(
            f"cannot open image {name}: larger than the limit of {_mebibytes(limits.max_bytes)}", "Use a smaller file."
        )


# -- decoding --------------------------------------------------------------------------------------------------------


def _open_header(data: bytes, name: str, limits: MediaLimits) -> PIL.Image.Image:
    """Read the header only; the pixels stay encoded."""
    for formats in (COMMON_FORMATS, OTHER_FORMATS):
        if formats is OTHER_FORMATS:
            PIL.Image.init()
        known = [kind for kind in formats if kind in PIL.Image.OPEN or formats is COMMON_FORMATS]
        try:
            return PIL.Image.open(io.BytesIO(data), formats=known)
        except PIL.UnidentifiedImageError:
            continue
        except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
            _refuse_pixels("more", name, limits)
        except _DECODE_ERRORS as error:
            _refuse_broken(error, name)
    raise MediaError(f"cannot open image {name}: not a picture in a format that can be read", _READABLE)


def _decoded(image: PIL.Image.Image, name: str, limits: MediaLimits) -> PIL.Image.Image:
    pixels = image.width * image.height
    if pixels > limits.max_pixels:
        _refuse_pixels(f"{image.width} x {image.height}", name, limits)
    if not pixels:
        raise MediaError(f"cannot open image {name}: it has no pixels", _READABLE)
    try:
        image.load()
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        _refuse_pixels("more", name, limits)
    except _DECODE_ERRORS as error:
        _refuse_broken(error, name)
    return image


def _refuse_pixels(found: str, name: str, limits: MediaLimits) -> NoReturn:
    raise MediaError(
        f"cannot open image {name}: {found} pixels, over the limit of {limits.max_pixels / 1e6:g} million",
        "Scale the picture down first.",
    ) from None


def _refuse_broken(error: BaseException, name: str) -> NoReturn:
    reason = _printable(str(error).strip() or type(error).__name__)
    raise MediaError(f"cannot open image {name}: broken picture ({_first_lower(reason)})", _READABLE) from None


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.3g} MiB"


def _first_lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)
