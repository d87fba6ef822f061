"""Open a picture or a sound from a path, URL, data URI or bytes; what may be opened, and how large, is decided here.

A picture comes back decoded and otherwise as it is: colour mode and EXIF are the business of a family's processor. A
sound comes back as one channel at the rate that was asked for.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import re
import stat
import struct
import urllib.parse
import urllib.request
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import PIL.Image

from mmtool.errors import MediaError, MMToolError
from mmtool.utils import import_object, printable

# Decoders that need no other program (EPS would start Ghostscript) and read one file. The common ones are loaded with
# PIL.Image; the others cost some 50 ms, so they are tried second.
COMMON_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM")
OTHER_FORMATS = ("WEBP", "TIFF", "ICO", "AVIF", "JPEG2000", "TGA")

# Every scan of a JPEG goes over all pixels. Ten are usual; thousands, of a few bytes each, would decode for minutes.
MAX_SCANS = 100

# How the files begin that may be handed to the sound library, which knows many more kinds.
_SOUND_BEGINNINGS = re.compile(
    rb"(?:RIFF|RF64|RIFX)....WAVE|fLaC|OggS|FORM....AIF[FC]|ID3|\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff]", re.DOTALL
)
_SOUND_RATES = range(1000, 768_001)  # samples per second
MAX_TAPS = 3_000_000  # of a filter between two rates without a common divisor, 24 MB; all usual ones are far below
_SOUND_BLOCK = 1 << 20  # values decoded at a time, over all channels

_SOUND_ENDINGS = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".m4a", ".aac", ".wma")

_READABLE = "Use a PNG, JPEG, WebP, GIF, BMP or TIFF file."
_READABLE_SOUND = "Use a WAV, FLAC, MP3, OGG or AIFF file."
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
        max_seconds: longest sound.
        max_samples: most samples of a sound, over all channels; a file of a megabyte may hold hundreds of millions.
        allow_local: files of this machine, by path or ``file://``. A server says no.
        allow_private: addresses that are not public: this machine, its network, link-local, multicast. A server says
            no; then the name is looked up once, every address is checked, and the connection goes to a checked one.
        local_root: with ``allow_local``, only files below this folder; where links lead to counts.
        schemes: of URLs that may be fetched, ``http`` and ``https``; also of what they redirect to.
        domains: hosts that may be asked, also by a redirect; ``*.example.com`` is all below ``example.com``. None is
            any host.
    """

    timeout: float = 10.0
    max_bytes: int = 50 * 1024 * 1024
    max_pixels: int = 50_000_000
    max_seconds: float = 600.0
    max_samples: int = 60_000_000
    allow_local: bool = True
    allow_private: bool = True
    local_root: Path | None = None
    schemes: tuple[str, ...] = ("http", "https")
    domains: tuple[str, ...] | None = None


DEFAULT_LIMITS = MediaLimits()


def load_image(source: str | Path | bytes | PIL.Image.Image, limits: MediaLimits = DEFAULT_LIMITS) -> PIL.Image.Image:
    """Return the picture, decoded; of an animation the first frame.

    Args:
        source: path (``~`` and ``file://`` allowed), http(s) URL, data URI, encoded bytes, or a PIL image.
        limits: what may be opened.

    Raises:
        MediaError: naming the source, shortened where it is long, and the reason.
    """
    name = f"image {describe_source(source)}"
    if isinstance(source, PIL.Image.Image):
        return _decoded(source, name, limits)
    data = _read_bytes(source, name, limits)
    if not data:
        raise MediaError(f"cannot open {name}: it is empty", _READABLE)
    return _decoded(_open_header(data, name, limits), name, limits)


def load_audio(
    source: str | Path | bytes, limits: MediaLimits = DEFAULT_LIMITS, sampling_rate: int = 16_000
) -> np.ndarray:
    """Return a sound as ``(samples,)`` float32 from -1 to 1: one channel, the mean of those in the file.

    Args:
        source: path (``~`` and ``file://`` allowed), http(s) URL, data URI or the bytes of a file.
        limits: what may be opened.
        sampling_rate: samples per second of the result.

    Raises:
        MediaError: naming the source, shortened where it is long, and the reason.
        MMToolError: when the sound library is not installed.
    """
    name = f"audio {describe_source(source)}"
    data = _read_bytes(source, name, limits)
    if not _SOUND_BEGINNINGS.match(data):
        found = "not a sound in a format that can be read" if data else "it is empty"
        raise MediaError(f"cannot open {name}: {found}", _READABLE_SOUND)
    samples, rate = _decoded_sound(data, name, limits, sampling_rate)
    return resample(samples, rate, sampling_rate).astype(np.float32)


def read_source(source: str | Path | bytes, kind: str, limits: MediaLimits = DEFAULT_LIMITS) -> bytes:
    """Return the bytes of a path, URL or data URI, not decoded; ``kind`` names it in errors.

    Raises:
        MediaError: where it cannot be read, or may not be.
    """
    return _read_bytes(source, f"{kind} {describe_source(source)}", limits)


def looks_like_sound(source: str | Path | bytes) -> bool:
    """Tell from the ending of a path or URL, the head of a data URI or the first bytes whether it is a sound."""
    if isinstance(source, bytes | bytearray | memoryview):
        return _SOUND_BEGINNINGS.match(bytes(source[:16])) is not None
    text = str(source)
    if text[:5].lower() == "data:":
        return text[5:11].lower() == "audio/"
    path = urllib.parse.urlsplit(text).path if _SCHEME.match(text) else text
    return Path(path).suffix.lower() in _SOUND_ENDINGS


def describe_source(source: Any) -> str:
    """Name a source on one short line, for messages."""
    if isinstance(source, PIL.Image.Image):
        return f"(PIL image, {source.width} x {source.height})"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"({len(source)} bytes)"
    text = str(source)
    if text[:5].lower() == "data:":
        return f"'{printable(text[:40])}...' ({len(text)} characters)" if len(text) > 40 else f"'{printable(text)}'"
    return f"'{printable(text)}'" if len(text) <= 160 else f"'{printable(text[:100])}...{printable(text[-40:])}'"


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
    raise MediaError(f"cannot open {name}: unknown scheme {scheme[0]}", "Use http://, https:// or a path.")


def _fetch(url: str, name: str, limits: MediaLimits) -> bytes:
    fetch = import_object("mmtool.download:fetch")  # most pictures are files
    try:
        return fetch(
            url,
            timeout=limits.timeout,
            max_bytes=limits.max_bytes,
            allow_private=limits.allow_private,
            schemes=limits.schemes,
            domains=limits.domains,
        )
    except MediaError as error:
        raise MediaError(f"cannot open {name}: {error.message}", error.hint) from None


def _read_data_uri(uri: str, name: str, limits: MediaLimits) -> bytes:
    match = _DATA_URI.match(uri)
    if match is None:
        raise MediaError(f"cannot open {name}: no comma ends the head of the data URI", _DATA_HINT)
    payload = uri[match.end() :]
    _check_size(len(payload) * 3 // 4 - 2 if match["base64"] else len(payload) // 3, name, limits)
    try:
        data = urllib.parse.unquote_to_bytes(payload)
        if match["base64"]:
            data = base64.b64decode(b"".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"cannot open {name}: broken base64 ({error})", _DATA_HINT) from None
    _check_size(len(data), name, limits)
    return data


_DATA_HINT = "Write data:image/png;base64, or another type, and then the base64 of the whole file."


def _file_url_path(url: str, name: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise MediaError(f"cannot open {name}: it is on another machine, {parts.netloc}", "Write file:///folder/x.png.")
    # A path may hold ? and #; in a file URL they have no other meaning.
    return urllib.request.url2pathname(re.sub(r"(?i)^file://(localhost)?", "", url))


def _read_file(path: str | Path, name: str, limits: MediaLimits) -> bytes:
    if not limits.allow_local:
        raise MediaError(f"cannot open {name}: local files are not allowed here", "Give an http(s) URL or a data URI.")
    if limits.local_root is not None:
        path = _inside(path, limits.local_root, name)
    try:
        with open(os.path.expanduser(path), "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise MediaError(f"cannot open {name}: not a file", "Check the path.")
            _check_size(status.st_size, name, limits)
            data = file.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise MediaError(f"cannot open {name}: {_first_lower(reason)}", "Check the path.") from None
    _check_size(len(data), name, limits)
    return data


def _inside(path: str | Path, root: Path, name: str) -> Path:
    """Return where ``path`` leads to; one sentence for everything that is not a file below ``root``, so that nobody
    can find out what is there."""
    try:
        found = Path(path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # RuntimeError: links in a circle
        found = None
    if found is None or not found.is_relative_to(root.resolve()):
        raise MediaError(f"cannot open {name}: no such file in the folder that may be read", "Check the path.")
    return found


def _open_without_waiting(path: str, flags: int) -> int:
    # Opening a named pipe for reading waits for a writer otherwise; files are not affected.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_size(size: int, name: str, limits: MediaLimits) -> None:
    if size > limits.max_bytes:
        raise MediaError(
            f"cannot open {name}: larger than the limit of {_mebibytes(limits.max_bytes)}", "Use a smaller file."
        )


# -- decoding --------------------------------------------------------------------------------------------------------


def _open_header(data: bytes, name: str, limits: MediaLimits) -> PIL.Image.Image:
    """Read the header only; the pixels stay encoded."""
    for formats in (COMMON_FORMATS, OTHER_FORMATS):
        if formats is OTHER_FORMATS:
            PIL.Image.init()
        known = [kind for kind in formats if kind in PIL.Image.OPEN or formats is COMMON_FORMATS]
        try:
            image = PIL.Image.open(io.BytesIO(data), formats=known)
            break
        except PIL.UnidentifiedImageError:
            continue
        except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
            _refuse_pixels("too many", name, limits)
        except _DECODE_ERRORS as error:
            _refuse_broken(error, name)
    else:
        raise MediaError(f"cannot open {name}: not a picture in a format that can be read", _READABLE)
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
        raise MediaError(f"cannot open {name}: more than {MAX_SCANS} scans", "Save it again as a usual JPEG.")
    return image


def _decoded(image: PIL.Image.Image, name: str, limits: MediaLimits) -> PIL.Image.Image:
    pixels = image.width * image.height
    if pixels > limits.max_pixels:
        _refuse_pixels(f"{image.width} x {image.height}", name, limits)
    if not pixels:
        raise MediaError(f"cannot open {name}: it has no pixels", _READABLE)
    try:
        image.load()
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        _refuse_pixels("too many", name, limits)
    except _DECODE_ERRORS as error:
        _refuse_broken(error, name)
    return image


def _refuse_pixels(found: str, name: str, limits: MediaLimits) -> NoReturn:
    raise MediaError(
        f"cannot open {name}: {found} pixels, over the limit of {limits.max_pixels / 1e6:g} million",
        "Scale the picture down first.",
    ) from None


def _refuse_broken(error: BaseException, name: str) -> NoReturn:
    reason = printable(str(error).strip() or type(error).__name__)
    raise MediaError(f"cannot open {name}: broken picture ({_first_lower(reason)})", _READABLE) from None


# -- sound -----------------------------------------------------------------------------------------------------------


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Return ``(samples,)`` at another rate, through a windowed sinc filter; float64 unless nothing changes.

    Kaiser window with beta 9, 32 taps at the lower of the two rates, cut off at 97 % of its half: the settings of the
    program that the speech models' own code calls, so that models hear what they were trained with. Beyond its ends
    the sound is mirrored.
    """
    if rate == new_rate or not len(samples):
        return samples
    taps, step = _resampling_filter(rate, new_rate)  # (phases, length)
    phases, length = taps.shape
    result = np.empty(-(-len(samples) * phases // step))
    for start in range(0, len(result), 4096):
        places = np.arange(start, min(start + 4096, len(result))) * step
        first, last = places[0] // phases, places[-1] // phases + length
        windows = np.lib.stride_tricks.sliding_window_view(_mirrored(samples, first, last, length), length)
        result[start : start + 4096] = np.einsum("nk,nk->n", windows[places // phases - first], taps[places % phases])
    return result


def _mirrored(samples: np.ndarray, first: int, last: int, length: int) -> np.ndarray:
    """Return a part of a sound as float64 that is mirrored beyond its ends for windows of ``length``.

    The first sample is not repeated by the mirror at the beginning; the last one is by that at the end. Only the part
    is made: ten minutes of sound would be gigabytes.
    """
    before = (length - 1) // 2
    if len(samples) <= 2 * length:  # mirrors of mirrors
        padded = np.pad(samples.astype(np.float64), (before, 0), mode="reflect" if len(samples) > 1 else "edge")
        return np.pad(padded, (0, length), mode="symmetric")[first:last]
    places = np.abs(np.arange(first - before, last - before))
    return samples[np.where(places < len(samples), places, 2 * len(samples) - 1 - places)].astype(np.float64)


@lru_cache(maxsize=4)
def _resampling_filter(rate: int, new_rate: int) -> tuple[np.ndarray, int]:
    """Return the taps of every place between two samples, ``(phases, length)``, and how many phases an output is on."""
    phases, step, length, width = _filter_shape(rate, new_rate)
    distance = np.arange(length) - (length - 1) // 2 - np.arange(phases)[:, None] / phases
    window = np.i0(9.0 * np.sqrt(np.maximum(1 - (2 * distance / length) ** 2, 0)))
    taps = np.sinc(distance * width) * window
    return taps / taps.sum(axis=1, keepdims=True), step


def _filter_shape(rate: int, new_rate: int) -> tuple[int, int, int, float]:
    """Return phases, the step in them from one sample of the result to the next, taps, and the width of the filter."""
    common = math.gcd(rate, new_rate)
    width = min(0.97 * new_rate / rate, 1.0)
    return new_rate // common, rate // common, 2 * math.ceil(math.ceil(32 / width) / 2), width


def _decoded_sound(data: bytes, name: str, limits: MediaLimits, new_rate: int) -> tuple[np.ndarray, int]:
    """Return the mean of the channels and the sampling rate; decoded block by block, up to the limit."""
    soundfile = _soundfile()
    blocks: list[np.ndarray] = []
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate = file.samplerate
            if rate not in _SOUND_RATES:
                raise MediaError(
                    f"cannot open {name}: {rate} samples per second, not {_SOUND_RATES[0]} to {_SOUND_RATES[-1]}",
                    "Convert it to a usual rate, such as 16000.",
                )
            phases, _, length, _ = _filter_shape(rate, new_rate)
            if rate != new_rate and phases * length > MAX_TAPS:
                raise MediaError(
                    f"cannot open {name}: {rate} samples per second is too unusual a rate",
                    "Convert it to a usual one, such as 16000.",
                )
            left = int(limits.max_seconds * rate)
            values = limits.max_samples
            while True:
                block = file.read(max(_SOUND_BLOCK // file.channels, 1), dtype="float32", always_2d=True)
                left -= len(block)
                values -= block.size
                if left < 0:
                    raise MediaError(
                        f"cannot open {name}: longer than the limit of {limits.max_seconds:g} seconds", "Cut it first."
                    )
                if values < 0:
                    raise MediaError(
                        f"cannot open {name}: more than the limit of {limits.max_samples / 1e6:g} million samples",
                        "Convert it to one channel and a usual rate, such as 16000.",
                    )
                if not len(block):
                    break
                blocks.append(block.mean(axis=1, dtype=np.float64).astype(np.float32))
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError) as error:
        reason = printable(str(error).rpartition(": ")[2].strip() or type(error).__name__)
        raise MediaError(f"cannot open {name}: broken sound ({_first_lower(reason)})", _READABLE_SOUND) from None
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    return np.nan_to_num(samples, nan=0.0, posinf=1.0, neginf=-1.0), rate


def _soundfile() -> Any:
    """Return the sound library, which only the extra ``audio`` installs."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package is there, but its C library is not
        raise MMToolError(f"sounds need the package soundfile: {error}", "pip install 'mmtool[audio]'") from error
    return soundfile


# -- words -----------------------------------------------------------------------------------------------------------


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.3g} MiB"


def _first_lower(text: str) -> str:
    return text[:1].lower() + text[1:]
