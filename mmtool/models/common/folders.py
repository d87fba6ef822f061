"""Files of a model folder: find the folder of a hub id, read and write JSON, find the vision tower, copy the rest."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mmtool.errors import CheckpointError
from mmtool.log import get_logger

logger = get_logger(__name__)

_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|msgpack|h5|gguf|onnx|tflite|index\.json)")
_DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
# What transformers' Auto classes pass along and a folder has no use for.
_AUTO_OPTIONS = (
    *("_from_auto", "_from_pipeline", "_commit_hash", "proxies", "subfolder", "trust_remote_code", "code_revision"),
    *("use_fast", "user_agent", "adapter_kwargs", "gguf_file", "use_auth_token"),
)


def local_folder(
    name: str | os.PathLike, options: Mapping[str, Any], allow_patterns: Sequence[str] | None = None
) -> tuple[Path, dict[str, Any]]:
    """Return the folder that ``name`` means, and ``options`` without those that concern downloads.

    Args:
        name: an existing folder, or the id of a Hugging Face repository, which is downloaded or taken from the cache.
        options: keyword arguments of a ``from_pretrained``.
        allow_patterns: files to download; all if None.
    """
    rest = {key: value for key, value in options.items() if key not in _DOWNLOAD_OPTIONS + _AUTO_OPTIONS}
    if options.get("trust_remote_code"):
        _say_unneeded()
    if Path(name).is_dir():
        return Path(name), rest
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    download = {key: options[key] for key in _DOWNLOAD_OPTIONS if options.get(key) is not None}
    try:
        return Path(snapshot_download(str(name), allow_patterns=allow_patterns, **download)), rest
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{str(name)!r} is neither a folder nor a model that can be downloaded: {error}",
            "Give the path of a downloaded folder.",
        ) from error


@functools.cache  # once: a model, its configuration and its processor ask for the same folder
def _say_unneeded() -> None:
    logger.info("trust_remote_code=True is not needed, and no code of a folder is run: the models are part of mmtool")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; CheckpointError where the file is missing or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}", "Download the file.") from error
    except (OSError, ValueError) as error:  # ValueError: broken JSON, broken UTF-8
        raise CheckpointError(f"cannot read {path}: {error}", "Download the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object", "Download the file again.")
    return value


def dump_json(path: str | os.PathLike, value: Mapping[str, Any], *, sort_keys: bool = False) -> None:
    """Write a JSON file as releases have them: indented, letters as they are, a newline at the end."""
    text = json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def copy_beside_weights(source: Path, target: Path, without: re.Pattern[str]) -> None:
    """Copy what a model folder has beside weights (configuration, tokenizer, processors); what is there already stays.

    Hidden files and checkpoints of training are left out, and files whose name ``without`` matches.
    """
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        hidden = any(part.startswith((".", "global_step", "checkpoint-")) for part in inner.parts)
        unwanted = hidden or _WEIGHTS.fullmatch(path.name) or without.fullmatch(path.name)
        if path.is_file() and not unwanted and not (target / inner).exists():
            (target / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / inner)


def sync_files(folder: Path) -> None:
    """Have the files of a folder on disk before anything relies on them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def given(config: Mapping[str, Any], keys: Sequence[str], nullable: Sequence[str] = ()) -> dict[str, Any]:
    """Return those of ``keys`` that a ``config.json`` gives: null is the default, unless it means something itself."""
    return {key: config[key] for key in keys if config.get(key) is not None or (key in nullable and key in config)}


def vision_folder(folder: Path, mm_vision_tower: str | None) -> Path:
    """Return the folder of the vision tower inside a release folder.

    ``mm_vision_tower`` is ``./vit/<name>`` in a release, but fine-tuned copies hold the absolute path of another
    machine: its last two components count. The fallback is the only sub-folder of ``vit/``.
    """
    if mm_vision_tower is not None:
        named = folder / Path(*PurePosixPath(mm_vision_tower.replace("\\", "/")).parts[-2:])
        if named.is_dir():
            return named
    found = sorted(path for path in (folder / "vit").glob("*") if path.is_dir())
    if len(found) == 1:
        return found[0]
    raise CheckpointError(
        f"{folder} has no vision tower: mm_vision_tower is {mm_vision_tower!r}, and vit/ has {len(found)} folders",
        "Copy the vit folder of the release into the model folder.",
    )
