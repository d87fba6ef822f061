"""One logger, to stderr; stdout carries only answers."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

ROOT = "mmtool"
STARTED = time.perf_counter()  # near the start of the process; "total" in a time split counts from here
LEVELS = ("error", "warning", "info", "debug")

# Where these are installed, transformers imports them, and they report kernels for machines that this one is not.
_TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree")

_timings: dict[str, float] = {}


class _StderrHandler(logging.Handler):
    """Write to the ``sys.stderr`` of the moment, so that redirections (tests, progress bars) are honoured."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as a plain line."""
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):  # stderr is closed: nobody is left to tell
            self.handleError(record)


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Return ``mmtool: text``, with the level named unless it is info."""
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"{ROOT}: {level}{text}"


def get_logger(name: str = ROOT) -> logging.Logger:
    """Return the logger ``name`` below ``mmtool`` (``__name__`` of a module of this package fits)."""
    return logging.getLogger(name if name == ROOT or name.startswith(f"{ROOT}.") else f"{ROOT}.{name}")


def setup(level: str = "info", verbose: bool = False) -> None:
    """Send mmtool's messages of ``level`` (error, warning, info, debug) and above to stderr; may be called again.

    Args:
        level: the least important level that is shown.
        verbose: also show the messages of transformers and the hub, and Python warnings, which are hidden otherwise.
            Call this before transformers is imported: it reads its level once.
    """
    if level not in LEVELS:
        raise ValueError(f"level {level!r} is none of {', '.join(LEVELS)}")
    root = logging.getLogger(ROOT)
    root.setLevel(level.upper())
    root.propagate = False
    if not any(isinstance(handler, _StderrHandler) for handler in root.handlers):
        handler = _StderrHandler()
        handler.setFormatter(_PlainFormatter())
        root.addHandler(handler)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if verbose else "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "info" if verbose else "error")
    if not verbose:
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        if not sys.warnoptions:
            warnings.simplefilter("ignore")


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Add the seconds of the block to ``timings()[name]``; at level debug, print them."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        _timings[name] = _timings.get(name, 0.0) + seconds
        get_logger().debug("%s: %.3f s", name, seconds)


def timings() -> dict[str, float]:
    """Return the seconds recorded by ``timed`` so far, by name, in the order of first use."""
    return dict(_timings)
