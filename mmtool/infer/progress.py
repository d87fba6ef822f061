"""How far a dataset run is: a bar on a terminal, a line of text now and then in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from mmtool.log import get_logger
from mmtool.utils import counted

BAR_PAUSE, LINE_PAUSE, MAX_LINE_PAUSE = 0.1, 5.0, 60.0  # seconds

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

logger = get_logger(__name__)


class Progress:
    """Counts rows and tokens and shows them on stderr.

    Args:
        total: how many rows there are, if that is known.
        done: how many of them an earlier run has answered.
    """

    def __init__(self, total: int | None, done: int = 0) -> None:
        self.total = total
        self.done = done
        self.rows = 0
        self.tokens = 0
        self._start = self._shown = time.monotonic()
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            from rich.console import Console  # only for a terminal
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)

    def summary(self, failed: int) -> str:
        """Say what was done, as a line for the end."""
        seconds = time.monotonic() - self._start
        return f"{counted(self.rows, 'row')} ({failed} failed) in {seconds:.1f} s, {self._rates(seconds)}"

    def advance(self, rows: int, tokens: int) -> None:
        """Count what was finished."""
        self.rows += rows
        self.tokens += tokens
        now = time.monotonic()
        if now - self._shown >= self._pause(now):
            self._shown = now
            self._show()

    def _pause(self, now: float) -> float:
        """Return how long what is shown may stay; lines of a long run become rare."""
        return BAR_PAUSE if self._bar is not None else min(max(LINE_PAUSE, (now - self._start) / 10), MAX_LINE_PAUSE)

    def _show(self) -> None:
        if self._bar is not None:
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=self.done + self.rows, description=self._rates_and_rest())
        else:
            of_total = "" if self.total is None else f" of {self.total}"
            logger.info("%d%s rows, %s", self.done + self.rows, of_total, self._rates_and_rest())

    def __enter__(self) -> Progress:
        self._start = self._shown = time.monotonic()
        if self._bar is not None:
            self._bar.start()
            self._bar.add_task("", total=self.total, completed=self.done)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _rates(self, seconds: float) -> str:
        rows, seconds = self.rows, max(seconds, 1e-3)
        rate = f"{rows / seconds:.0f}" if rows >= 100 * seconds else f"{rows / seconds:.3g}"
        return f"{rate} rows/s, {self.tokens / seconds:.0f} tokens/s"

    def _rates_and_rest(self) -> str:
        seconds = time.monotonic() - self._start
        text = self._rates(seconds)
        if self.total is None or not self.rows:
            return text
        left = round((self.total - self.done - self.rows) * seconds / self.rows)
        return f"{text}, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
