"""The folder that is written: whole or not at all, with everything beside the weights that a release has."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmtool.errors import MMToolError
from mmtool.finetuned import ADAPTER_CONFIG, RECORD, SETTINGS, TRAINER_STATE, VAL_DATASET
from mmtool.models.common.folders import dump_json, read_json, sync_files

PARTIAL, REPLACED = ".unfinished-", ".replaced-"
_SPARE = 64 << 20  # bytes that stay free beside what is written
# What training leaves in a checkpoint, and what belongs to the page of another model.
_LEFT_OUT = (SETTINGS, ADAPTER_CONFIG, RECORD, TRAINER_STATE, VAL_DATASET, "README.md", "accuracy.json", "latest")
_LEFT_OUT += ("zero_to_fp32.py",)
LEFT_OUT = re.compile("|".join(map(re.escape, _LEFT_OUT)))
_DTYPE_KEYS = ("torch_dtype", "dtype")


@contextlib.contextmanager
def whole_folder(folder: Path, *, overwrite: bool, needed: int) -> Iterator[Path]:
    """Give a sibling to write to, which becomes ``folder`` at the end; nothing is left of it after an error.

    Args:
        folder: the folder to make.
        overwrite: whether one that exists is replaced; it stays as it is until the new one is whole.
        needed: bytes that will be written.

    Raises:
        MMToolError: where it exists, the disk has no room, or writing fails.
    """
    folder = _place(folder, overwrite)
    partial = folder.with_name(f"{PARTIAL}{folder.name}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        check_room(folder.parent, needed)
        partial.mkdir()
    except OSError as error:
        raise MMToolError(f"cannot write to {folder.parent}: {error.strerror}", "Name another --output_dir.") from error
    try:
        yield partial
        sync_files(partial)
        _replace(partial, folder)
    except OSError as error:
        raise MMToolError(
            f"cannot write {folder}: {error.strerror or error}", "Make room, or name another --output_dir."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _place(folder: Path, overwrite: bool) -> Path:
    """Return where a folder really lies.

    Raises:
        MMToolError: where something lies there that is not to be replaced.
    """
    real = folder.resolve()
    _restore(real)
    if not folder.exists() and not folder.is_symlink():
        return real
    if not overwrite:
        raise MMToolError(
            f"--output_dir {folder} exists already", "Name another folder, or replace it with --overwrite true."
        )
    if not real.is_dir():
        raise MMToolError(f"--output_dir {folder} is no folder", "Name another one, or remove it.")
    if Path.cwd().is_relative_to(real):
        raise MMToolError(f"--output_dir {folder} holds the folder you are in", "Name another folder.")
    return real


def _restore(folder: Path) -> None:
    """Put a folder back that a run has moved away, and then was killed before it put the new one there."""
    replaced = folder.with_name(f"{REPLACED}{folder.name}")
    if replaced.is_dir() and not folder.exists():
        with contextlib.suppress(OSError):  # then what is written fails, and says so
            os.replace(replaced, folder)


def check_room(folder: Path, needed: int) -> None:
    """Raise MMToolError where the disk of ``folder`` has no room for ``needed`` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE:
        raise MMToolError(
            f"{folder} has {free / 1e9:.2f} GB left, but {(needed + _SPARE) / 1e9:.2f} GB are needed",
            "Make room, or name a folder on another disk with --output_dir.",
        )


def _replace(partial: Path, folder: Path) -> None:
    replaced = folder.with_name(f"{REPLACED}{folder.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.replace(folder, replaced)
    try:
        os.replace(partial, folder)
    except OSError:
        if replaced.exists():
            os.replace(replaced, folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change ``config.json`` of a folder; its other keys stay as the release has them."""
    path = folder / "config.json"
    config = read_json(path)
    change(config)
    dump_json(path, config)


def set_dtype(config: dict[str, Any], name: str) -> None:
    """Note the number format of the weights (``bfloat16``) wherever a ``config.json`` tells it."""
    for level in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _DTYPE_KEYS:
            if isinstance(level.get(key), str):
                level[key] = name
    if not any(key in config for key in _DTYPE_KEYS):
        config["torch_dtype"] = name


def set_untied(config: dict[str, Any]) -> None:
    """Note that the head is a matrix of its own."""
    config["tie_word_embeddings"] = False
    for level in (value for value in config.values() if isinstance(value, dict)):
        if "tie_word_embeddings" in level:
            level["tie_word_embeddings"] = False


def write_settings(folder: Path, run: Mapping[str, Any] | None, infer: Mapping[str, Any], export: Any) -> None:
    """Write ``sft_args.json``: what the run was told, what inference needs to know, what was exported from what."""
    value = {**(run or {}), "infer": {**((run or {}).get("infer") or {}), **infer}, "export": export}
    dump_json(folder / SETTINGS, value)


def folder_size(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
