"""Run trainings that kill themselves at an exact place, each in a process of its own; started by the tests.

Usage: python killed.py SCENARIOS.json. A scenario is a list: the place, its step, then the words of `mmtool sft`.
Prints a line per scenario: the signal that ended the process, 0 where it came to its end.
"""

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmtool.args import SftArgs
from mmtool.options import read_args
from mmtool.sft import checkpoint as checkpoint_module
from mmtool.sft import trainer as trainer_module
from mmtool.sft.main import sft_main
from mmtool.sft.progress import Progress
from mmtool.sft.trainer import SftTrainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def around(holder: Any, name: str, hook: Callable[..., None], *, after: bool) -> None:
    """Call ``hook`` with the arguments of a function, before it or after it."""
    original = getattr(holder, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        if not after:
            hook(*args, **kwargs)
        result = original(*args, **kwargs)
        if after:
            hook(*args, **kwargs)
        return result

    setattr(holder, name, called)


def set_trap(place: str, step: int) -> None:
    """Make this process kill itself at a place of a step."""
    folder = f"checkpoint-{step}"

    def at_step(progress: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            die()

    def in_pass(trainer: SftTrainer, *rest: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == step:  # steps that are done
            die()

    def half_written(tensors: Any, path: Path) -> None:
        if folder in path.parent.name:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            die()

    def saving(trainer: SftTrainer, output_dir: str, *rest: Any, **kwargs: Any) -> None:
        if folder in output_dir:
            die()

    def renaming(source: Path, *rest: Any) -> None:
        if folder in source.name:
            die()

    def recording(run: Path, last: Path, *rest: Any) -> None:
        if last.name == folder:
            die()

    def logged(progress: Progress, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            with (progress.run / "logging.jsonl").open("a") as file:
                file.write('{"step": 9')
            die()

    def deleting(path: Path, **kwargs: Any) -> None:
        if folder in path.name and path.is_dir():
            (path / "adapter_model.safetensors").unlink()
            die()

    traps: dict[str, tuple[Any, str, Callable[..., None], bool]] = {
        "after a step": (Progress, "on_step_end", at_step, True),
        "in the backward pass": (SftTrainer, "compute_loss", in_pass, True),
        "half the weights": (checkpoint_module, "save_file", half_written, True),
        "before the optimizer": (SftTrainer, "_save_optimizer_and_scheduler", saving, False),
        "before the name": (checkpoint_module, "sync_files", renaming, True),
        "before the record": (trainer_module, "record", recording, False),
        "deleting the old": (checkpoint_module.shutil, "rmtree", deleting, False),
        "half a line": (Progress, "on_log", logged, True),
    }
    holder, name, hook, after = traps[place]
    around(holder, name, hook, after=after)


def main() -> None:
    warnings.simplefilter("ignore")
    scenarios = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for place, step, *words in scenarios:
        child = os.fork()
        if child == 0:
            set_trap(place, step)
            sft_main(read_args(SftArgs, words, "mmtool sft"))
            os._exit(0)
        print(os.waitpid(child, 0)[1] & 0x7F, flush=True)


if __name__ == "__main__":
    main()
