"""API keys: where they come from, and how a request shows one."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from mmtool.errors import MMToolError

ENVIRONMENT = "MMTOOL_API_KEY"  # where --api_key comes from as well


class Keys:
    """The keys that open the server; without any, everybody may ask."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def accepts(self, authorization: str | None) -> bool:
        """Tell whether the value of an Authorization header has one of the keys.

        Takes the same time for all wrong keys of a length, and looks at every key that there is.
        """
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(given, digest)
        return found and scheme.lower() == "bearer"


def read_keys(keys: Sequence[str], key_file: str | None) -> tuple[str, ...]:
    """Return the keys given directly and those of a file, one per line; lines with # are comments.

    Raises:
        MMToolError: for a file or an environment variable without keys, and for keys that a header cannot hold.
    """
    found = list(keys)
    if key_file is not None:
        try:
            lines = Path(key_file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise MMToolError(f"cannot read --api_key_file {key_file}: {error}", "Give a text file of keys.") from None
        in_file = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not in_file:  # an empty file must not open the server to everybody
            raise MMToolError(f"--api_key_file {key_file} has no keys", "Write one key on each line.")
        found += in_file
    if not found and ENVIRONMENT in os.environ:  # a variable that was meant to hold one
        raise MMToolError(f"{ENVIRONMENT} is set, but has no keys", "Unset it to let everybody in.")
    for key in found:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise MMToolError("--api_key: a key is empty, or has blanks or special characters", "Use letters.")
    return tuple(dict.fromkeys(found))


def _digest(key: str) -> bytes:
    # Equal lengths, so that comparing tells nothing about the length of a key either.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
