"""Lines in, answers out: line editing and a history file on a terminal, plain text everywhere else.

Answers go to stdout, everything said about them to stderr. What the lines mean is up to the chat.
"""

from __future__ import annotations

import contextlib
import glob
import io
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType

from mmtool.log import get_logger

try:
    import readline
except ImportError:  # not part of Python on Windows: lines then have only the editing of the console
    readline = None

HISTORY_LINES = 1000
CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")}, "\ufffd")

logger = get_logger(__name__)


class Terminal:
    """Where the chat reads its lines and writes its answers.

    Args:
        history: the file that keeps typed lines between chats; the default lies in the XDG state folder.
    """

    def __init__(self, history: Path | None = None) -> None:
        self.typed = sys.stdin is not None and sys.stdin.isatty()  # None: closed by who started the process
        self.interactive = self.typed and sys.stdout.isatty()
        self.history = history or history_path()
        if self.interactive and readline is not None:
            self._open_history()

    def ask(self, prompt: str) -> str | None:
        """Return the next line without its end, or ``None`` where the input ends.

        Raises:
            KeyboardInterrupt: on Ctrl-C; what was typed is dropped.
        """
        if self.interactive:
            try:
                return input(prompt)
            except EOFError:
                print(flush=True)
                return None
        if self.typed:  # stdout is a file or a pipe: keep the prompts out of it
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline() if sys.stdin is not None else ""
        return line.rstrip("\r\n") if line else None

    def write(self, text: str) -> None:
        """Write a piece of an answer to stdout at once."""
        write_answer(text)

    def say(self, text: str) -> None:
        """Write a line about the chat to stderr."""
        sys.stdout.flush()
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Keep the typed lines for the next chat."""
        if not self.interactive or readline is None:
            return
        try:
            self.history.parent.mkdir(parents=True, exist_ok=True)
            self.history.touch(mode=0o600)
            readline.set_history_length(HISTORY_LINES)
            readline.write_history_file(self.history)
        except OSError as error:
            logger.debug("the typed lines are not kept: %s", error)

    def _open_history(self) -> None:
        readline.clear_history()
        with contextlib.suppress(OSError):  # absent, unreadable or not a history file: start with an empty one
            readline.read_history_file(self.history)
        readline.set_completer_delims("\t\n>")
        readline.set_completer(complete_path)
        libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
        if not libedit:  # in a C locale, bytes above 127 would be keys with Meta
            for setting in ("input-meta on", "output-meta on", "convert-meta off"):
                readline.parse_and_bind(f"set {setting}")
            if os.environ.get("TERM", "dumb") != "dumb":  # several pasted lines are one question
                readline.parse_and_bind("set enable-bracketed-paste on")


class StopOnInterrupt:
    """While this context lasts, the first Ctrl-C sets ``requested``; the second one raises ``KeyboardInterrupt``.

    A model is not stopped in the middle of a step, so its caches stay whole. Outside the main thread, where Python
    delivers no signals, the context changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: object = None

    def __enter__(self) -> StopOnInterrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def accept_any_text() -> None:
    """Let no byte that comes in and no character that goes out raise an error, whatever the locale."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def write_answer(text: str) -> None:
    """Write a piece of an answer to stdout at once; a terminal gets no control characters, which could do anything."""
    sys.stdout.write(text.translate(CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def history_path() -> Path:
    """Return ``mmtool/history`` in the XDG state folder."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state, "mmtool", "history")


def complete_path(text: str, state: int) -> str | None:
    """Offer file names for Tab, also after ``<img>``; the signature is readline's."""
    names = sorted(glob.glob(glob.escape(os.path.expanduser(text)) + "*"))
    if state >= len(names):
        return None
    return names[state] + "/" * os.path.isdir(names[state])
