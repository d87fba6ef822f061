"""Where a run is: its folder, and the checkpoint that it goes on from. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmtool.args import SftArgs
from mmtool.errors import CheckpointError, MMToolError
from mmtool.finetuned import SETTINGS, TRAINER_STATE, checkpoint_steps
from mmtool.models.common.folders import read_json
from mmtool.options import options_of

try:
    import fcntl
except ImportError:  # not part of Python on Windows: two runs in one folder are then not told apart
    fcntl = None

LOCK = ".lock"

# What a resumed run does not take over from the one before: where it is, and how it talks.
FREE = {"resume_from_checkpoint", "output_dir", "log_level", "verbose", "show_prompt"}


def run_folder(output_dir: Path, model_type: str, suffix: bool, now: str) -> Path:
    """Return the folder of a new run: ``OUTPUT_DIR/MODEL_TYPE/vN-TIME``; ``output_dir`` itself without ``suffix``."""
    if not suffix:
        return output_dir
    parent = output_dir / model_type
    versions = [int(m[1]) for path in parent.glob("v*") if (m := re.match(r"v(\d+)(-|$)", path.name))]
    return parent / f"v{max(versions, default=-1) + 1}-{now}"


def make_run_folder(output_dir: Path, model_type: str, suffix: bool, now: str) -> Path:
    """Make the folder of a new run, one of its own even where several runs start in the same second."""
    while True:
        run = run_folder(output_dir, model_type, suffix, now)
        try:
            run.mkdir(parents=True, exist_ok=not suffix)
        except FileExistsError:
            if not run.is_dir():
                raise
        else:
            return run


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keep other processes from training in ``folder``; a process that is killed lets go of it.

    Raises:
        MMToolError: where another one does already.
    """
    if fcntl is None:
        yield
        return
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not held on by a data process
        except (BlockingIOError, PermissionError):
            raise MMToolError(
                f"another run is training in {folder}", "Wait until it has ended, or name another --output_dir."
            ) from None
        except OSError:  # a network file system without locks
            pass
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)


def find_resumed(asked: str, output_dir: Path, model_type: str | None) -> Path:
    """Return the checkpoint that ``--resume_from_checkpoint`` means.

    Args:
        asked: ``last``: the newest one of the newest run that has any; or a run or checkpoint folder.
        output_dir: where runs are.
        model_type: whose runs count for ``last``; None for all.
    """
    if asked.lower() in ("last", "true"):
        places = [output_dir, *output_dir.glob(f"{model_type or '*'}/v*")]
        found = [path for place in places for _, path in checkpoint_steps(place)]
        if not found:
            raise CheckpointError(
                f"--resume_from_checkpoint last: no checkpoint in {output_dir}",
                "Name a checkpoint folder, or leave it out to start anew.",
            )
        return max(found, key=lambda path: (path / TRAINER_STATE).stat().st_mtime_ns)
    folder = Path(asked).expanduser()
    steps = checkpoint_steps(folder)
    checkpoint = steps[-1][1] if steps else folder
    if not (checkpoint / TRAINER_STATE).is_file():
        raise CheckpointError(
            f"--resume_from_checkpoint {asked}: {checkpoint} is no checkpoint that can be resumed",
            f"It needs {TRAINER_STATE}, which --save_only_model leaves out.",
        )
    return checkpoint


def with_saved_options(args: SftArgs) -> SftArgs:
    """Return the options of a resumed run: as given now, and otherwise as the run was told before."""
    asked = args.train.resume_from_checkpoint
    if asked is None:
        return args
    checkpoint = find_resumed(asked, Path(args.run.output_dir).expanduser(), args.model.model_type)
    saved = read_json(checkpoint / SETTINGS) if (checkpoint / SETTINGS).is_file() else {}
    groups: dict[str, dict[str, Any]] = {}
    names = set(saved.get("explicit", ()))
    for option in options_of(SftArgs):
        if option.name in names - FREE - args.explicit and option.group is not None:
            groups.setdefault(option.group, {})[option.name] = saved["options"][option.group][option.name]
    changed = {group: replace(getattr(args, group), **values) for group, values in groups.items()}
    train = replace(changed.get("train", args.train), resume_from_checkpoint=str(checkpoint.resolve()))
    return replace(args, **{**changed, "train": train}, explicit=args.explicit | (names - FREE))
