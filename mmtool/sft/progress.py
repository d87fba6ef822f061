"""What a run says while it trains, and what it writes down: console, logging.jsonl, TensorBoard, plots."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from mmtool.log import STARTED, get_logger, timings
from mmtool.sft.events import EventFile
from mmtool.sft.plots import plot_curve
from mmtool.sft.ranks import Ranks

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

logger = get_logger(__name__)

LOG_FILE = "logging.jsonl"
RECENT = 20  # steps that the speed is taken from


class Progress(TrainerCallback):
    """Shows a bar on a terminal and lines elsewhere; writes every logged step down.

    Args:
        run: the folder of the run.
        ranks: the processes; only the main one says anything.
        rows_per_step: rows that all of them see in a step.
        tensorboard: also write TensorBoard logs.
    """

    def __init__(
        self,
        run: Path,
        ranks: Ranks,
        *,
        rows_per_step: float,
        tensorboard: bool,
    ) -> None:
        self.run, self.is_main, self.rows_per_step = run, ranks.is_main, rows_per_step
        self.tensorboard = tensorboard
        self.last_loss = self.last_eval = math.nan
        self._ends: deque[float] = deque(maxlen=RECENT + 1)
        self._started = time.perf_counter()
        self._first = 0
        self._events: EventFile | None = None
        self._bar: Bar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock and the bar."""
        self._started, self._first = time.perf_counter(), state.global_step
        self._ends.append(self._started)
        if not self.is_main:
            return
        _drop_after(self.run / LOG_FILE, state.global_step)
        if self.tensorboard:
            self._events = EventFile(self.run / "runs")
        if sys.stderr.isatty():
            self._start_bar(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self._ends.append(time.perf_counter())
        if state.global_step == self._first + 1:
            seconds = self._ends[-1] - STARTED
            logger.debug("first step %.1f s after the command: %s", seconds, time_split())
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step, description=self._text(state))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Write down what was logged."""
        if not self.is_main or logs is None or "train_runtime" in logs:
            return
        self.last_loss, self.last_eval = logs.get("loss", self.last_loss), logs.get("eval_loss", self.last_eval)
        line = {"step": state.global_step, **logs}
        if "loss" in logs:
            line |= {"samples_per_second": round(self.samples_per_second, 3), "memory_gib": round(memory_gib(), 3)}
        with (self.run / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: _finite(value) for name, value in line.items()}) + "\n")
        if self._events is not None:
            names = {name: value for name, value in line.items() if name not in ("step", "epoch")}
            self._events.add(state.global_step, {_tag(name): float(value) for name, value in names.items()})
        if self._bar is None:
            logger.info("step %d of %d: %s", state.global_step, state.max_steps, self._line(logs, state))

    def close(self) -> None:
        """End bar and files, and draw the plots."""
        if self._bar is not None:
            self._bar.stop()
        if self._events is not None:
            self._events.close()
        if self.is_main:
            draw_plots(self.run)

    @property
    def samples_per_second(self) -> float:
        """Rows per second over the last steps, evaluations and savings included."""
        steps = len(self._ends) - 1
        return steps * self.rows_per_step / max(self._ends[-1] - self._ends[0], 1e-9) if steps > 0 else 0.0

    def overall(self, state: Any) -> str:
        """Say how long it took and how fast it was."""
        seconds = time.perf_counter() - self._started
        rows = (state.global_step - self._first) * self.rows_per_step
        return f"{_clock(seconds)}, {rows / max(seconds, 1e-9):.3g} samples/s, at most {memory_gib():.2f} GiB"

    def _line(self, logs: Mapping[str, float], state: Any) -> str:
        shown = []
        for name, form in (("loss", ".4f"), ("eval_loss", ".4f"), ("grad_norm", ".3g"), ("learning_rate", ".3g")):
            if name in logs:
                shown.append(f"{name} {logs[name]:{form}}")
        return ", ".join(shown) if "eval_loss" in logs else f"{', '.join(shown)}, {self._rates(state)}"

    def _text(self, state: Any) -> str:
        evaluated = "" if math.isnan(self.last_eval) else f", eval {self.last_eval:.4f}"
        return f"loss {self.last_loss:.4f}{evaluated}, {self._rates(state)}"

    def _rates(self, state: Any) -> str:
        speed = self.samples_per_second
        left = (state.max_steps - state.global_step) * self.rows_per_step / speed if speed else 0.0
        return f"{speed:.3g} samples/s, {_clock(left)} left, {memory_gib():.2f} GiB"

    def _start_bar(self, state: Any) -> None:
        from rich.console import Console  # only for a terminal
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"))
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._bar.start()
        self._bar.add_task("", total=state.max_steps, completed=state.global_step)


def memory_gib() -> float:
    """Return the most memory taken so far: on the GPU if there is one in use, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def time_split() -> str:
    """Return where the time before the first step went."""
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in timings().items())


def _finite(value: float) -> float | None:
    """Return a number as JSON can say it: null for none."""
    return value if math.isfinite(value) else None


def _tag(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _drop_after(path: Path, step: int) -> None:
    """Take lines out of a log that a resumed run writes again."""
    if not path.is_file():
        return
    kept = [line for line in read_log(path) if line["step"] <= step]
    partial = path.with_name(f"{path.name}.part")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    partial.replace(path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; one cut off by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def draw_plots(run: Path) -> None:
    """Draw loss, learning rate, evaluation loss and gradient norm from the log, to ``images/``."""
    if not (run / LOG_FILE).is_file():
        return
    (run / "images").mkdir(exist_ok=True)
    lines = read_log(run / LOG_FILE)
    for name, title in (
        ("loss", "loss"),
        ("eval_loss", "evaluation loss"),
        ("learning_rate", "learning rate"),
        ("grad_norm", "length of the gradient"),
    ):
        found = [(line["step"], float(line[name])) for line in lines if line.get(name) is not None]
        if found:
            steps, values = zip(*found, strict=True)
            plot_curve(run / "images" / f"{name}.png", title, steps, values, smooth=name == "loss" and len(found) > 20)
