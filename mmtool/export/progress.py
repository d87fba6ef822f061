"""How far a long piece of work is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from mmtool.log import get_logger

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

logger = get_logger(__name__)

LINE_PAUSE = 10.0  # seconds


class Progress:
    """Counts towards a total and shows it on stderr.

    Args:
        title: what is being done.
        total: at what count it is finished.
    """

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, max(total, 1), 0
        self._shown = time.monotonic()
        self._bar: Bar | None = None

    def advance(self, count: int = 1) -> None:
        """Count what was done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done)
        elif time.monotonic() - self._shown >= LINE_PAUSE:
            self._shown = time.monotonic()
            logger.info("%s: %d %%", self.title, 100 * self.done // self.total)

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._bar.add_task(self.title, total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
