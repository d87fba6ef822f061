"""Small things that many files need: seeds, class paths, near misses, names of number formats, a free port."""

from __future__ import annotations

import difflib
import gc
import random
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from mmtool.errors import MMToolError

if TYPE_CHECKING:
    import torch

DTYPES = ("AUTO", "fp32", "bf16", "fp16")

_DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def import_object(path: str) -> Any:
    """Return the object that ``"package.module:Name"`` names, importing its module."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"{path!r} is not of the form 'package.module:Name'")
    return getattr(import_module(module), name)


def suggest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice nearest to ``word``, or None where none is near; case, ``-``, ``_`` and ``.`` do not count."""
    folded = {_fold(choice): choice for choice in choices}
    key = _fold(word)
    if not key:
        return None
    near = difflib.get_close_matches(key, folded, n=1, cutoff=0.6)
    if near:
        return folded[near[0]]
    longer = [choice for fold, choice in folded.items() if len(key) >= 3 and fold.startswith(key)]
    return longer[0] if longer else None


def _fold(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "").replace(".", "")


def did_you_mean(word: str, choices: Iterable[str], otherwise: str | None = None) -> str | None:
    """Return the hint line for a mistyped ``word``; ``otherwise`` is the hint where nothing is near."""
    near = suggest(word, choices)
    return f"Did you mean {near}?" if near else otherwise


def counted(number: int, noun: str) -> str:
    """Return ``1 row``, ``2 rows``, ``2 entries``."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun[:-1]}ies" if noun.endswith("y") else f"{number} {noun}s"


def printable(text: str) -> str:
    """Return ``text`` with blanks in place of what a terminal would act on."""
    return "".join(char if char.isprintable() else " " for char in text)


@contextmanager
def collection_paused(freeze: bool = False) -> Iterator[None]:
    """Do not look for garbage cycles in the block; may be nested.

    Importing torch and transformers makes a million objects that stay; looking through them again and again took
    0.45 of 2.9 seconds of a first answer.

    Args:
        freeze: leave out later, too, what is alive at the end of the block; for commands, not for a library.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if freeze:
            gc.freeze()
        if enabled:
            gc.enable()


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def seed_everything(seed: int, deterministic: bool = False) -> int:
    """Seed Python, NumPy and torch (all devices) and return ``seed``.

    Args:
        seed: any integer; NumPy, which takes 32 bits, gets it modulo 2**32.
        deterministic: also make torch choose deterministic algorithms, which may be slower.
    """
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return seed


def resolve_dtype(name: str) -> torch.dtype | Literal["auto"]:
    """Return the torch dtype of ``AUTO|fp32|bf16|fp16`` (or of torch's own names); AUTO gives ``"auto"``."""
    if name.lower() == "auto":
        return "auto"
    full = _DTYPE_NAMES.get(name.lower(), name.lower())
    if full not in _DTYPE_NAMES.values():
        raise MMToolError(f"unknown dtype {name!r}", did_you_mean(name, DTYPES, f"Choose from {', '.join(DTYPES)}."))
    import torch

    return getattr(torch, full)
