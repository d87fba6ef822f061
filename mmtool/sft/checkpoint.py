"""Checkpoints on disk: written beside, then renamed, so that a folder `checkpoint-N` is always whole."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmtool.errors import CheckpointError, MMToolError
from mmtool.finetuned import RECORD, SETTINGS, checkpoint_steps, is_of_adapter
from mmtool.log import get_logger
from mmtool.models.common.folders import copy_beside_weights, sync_files
from mmtool.sft.learner import Learner
from mmtool.sft.lora import as_plain_lora

logger = get_logger(__name__)

ADAPTER = "adapter_model.safetensors"
MASTER_WEIGHTS = "trainable.safetensors"  # to go on with, where what is saved for inference is not the same
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_UNFINISHED, _DISCARDED = ".unfinished-", ".discarded-"
_LEFT_OUT = re.compile(r".*\.py|README.*")  # of the model's folder: code that nobody runs, a page of another model


@contextmanager
def whole_or_not(folder: Path, is_main: bool, barrier: Any) -> Iterator[Path]:
    """Give a folder to write to, which becomes ``folder`` when everything is on disk; all ranks take part.

    Raises:
        MMToolError: when the disk is full or cannot be written; nothing is left then.
    """
    partial = folder.with_name(f"{_UNFINISHED}{folder.name}")
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    try:
        yield partial
        barrier()
        if is_main:
            sync_files(partial)
            _sync_folder(partial)
            if folder.exists():  # saved again after a run was resumed from an earlier step
                discard(folder)
            os.replace(partial, folder)
            _sync_folder(folder.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _disk_reason(error, folder.parent)
        if reason is None:
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise _no_room(f"cannot save {folder}: {reason}", folder.parent) from error
    barrier()


@contextmanager
def plain_disk_errors(run: Path) -> Iterator[None]:
    """Make a plain error of a disk that is full or broken, whatever was being written to the folder of a run."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise _no_room(f"cannot write to {run}: {error.strerror}", run) from error


def _no_room(message: str, run: Path) -> MMToolError:
    last = checkpoint_steps(run)
    kept = f"{last[-1][1]} is intact; go on from it" if last else "no checkpoint was written before"
    return MMToolError(message, f"Make room ({kept}).")


def _disk_reason(error: Exception, folder: Path) -> str | None:
    """Return what the disk says, None for an error that is none of its."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error).lower()
    signs = ("no space left", "disk quota", "file write failed", "enforce fail at inline_container", "i/o error")
    if any(sign in text for sign in (*signs, "unexpected pos", "iostream")):
        full = shutil.disk_usage(folder).free < 2**20
        return "No space left on device" if full else str(error).splitlines()[0]
    return None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def discard(folder: Path) -> None:
    """Delete a checkpoint; under another name first, so that half a checkpoint is never taken for one."""
    gone = folder.with_name(f"{_DISCARDED}{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def tidy(run: Path) -> None:
    """Remove what a killed run left half done."""
    for path in (*run.glob(f"{_UNFINISHED}*"), *run.glob(f"{_DISCARDED}*")):
        shutil.rmtree(path, ignore_errors=True)


def rotate(run: Path, keep: int, best: Path | None) -> None:
    """Delete the oldest checkpoints beyond ``keep`` (0: none); the best one stays beside them."""
    steps = [path for _, path in checkpoint_steps(run)]
    for path in steps[:-keep] if keep else []:
        if best is None or path.name != best.name:
            discard(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(f"{path.name}.part")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def record(run: Path, last: Path, best: Path | None, metric: float | None) -> None:
    """Note the last and the best checkpoint of a run."""
    names = {"last": last.name, "best": best.name if best is not None else None, "best_eval_loss": metric}
    write_json(run / RECORD, names)


# Weights --------------------------------------------------------------------------------------------------------------


def save_model(
    learner: Learner,
    folder: Path,
    base_folder: Path,
    settings: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    state: Mapping[str, Tensor] | None = None,
    with_master: bool = False,
) -> None:
    """Write what inference needs: an adapter that plain peft reads, or a folder in the released layout.

    Args:
        learner: what was trained.
        folder: where to.
        base_folder: the model's folder, whose other files (tokenizer, ...) go beside full weights.
        settings: content of ``sft_args.json``.
        state: the weights by ``Learner`` names where they are not in the module (gathered from other ranks).
        dtype: of full weights on disk.
        with_master: also keep the trained weights as they are, where ``dtype`` would round them.
    """
    plain = None if state is None else {name.removeprefix("model."): tensor for name, tensor in state.items()}
    if learner.model is not learner.head:
        weights = get_peft_model_state_dict(learner.model, state_dict=plain, save_embedding_layers=False)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        config = copy.copy(learner.model.peft_config["default"])
        if getattr(learner.model, "drawn_adapter", None) is not None:
            save_file(weights, folder / MASTER_WEIGHTS)
            weights, config = as_plain_lora(learner.model, weights)
        save_file(weights, folder / ADAPTER)
        config.inference_mode = True
        config.save_pretrained(folder)
    else:
        weights = dict(learner.head.state_dict()) if plain is None else plain
        rounded = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
        learner.head.save_pretrained(folder, state_dict={name: _on_its_own(t) for name, t in rounded.items()})
        copy_beside_weights(base_folder, folder, _LEFT_OUT)
        if with_master and dtype != torch.float32:
            trained = {name: p.detach().cpu().contiguous() for name, p in trained_parameters(learner.head)}
            save_file(trained, folder / MASTER_WEIGHTS)
    write_json(folder / SETTINGS, settings)


def _on_its_own(tensor: Tensor) -> Tensor:
    """Return a tensor that is no piece of a larger one: DeepSpeed lays parameters side by side in one."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.detach().to("cpu", copy=True).contiguous()


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that train, by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def load_trained(learner: Learner, checkpoint: Path) -> None:
    """Put the weights of a checkpoint back where they were trained: adapters, or what full weights had rounded off."""
    if learner.model is not learner.head:
        path = checkpoint / MASTER_WEIGHTS
        path = path if path.is_file() else checkpoint / ADAPTER
        result = set_peft_model_state_dict(learner.model, _read(path))
        lost = [name for name in result.missing_keys if is_of_adapter(name)]
        if lost or result.unexpected_keys:
            wrong = [*lost, *result.unexpected_keys]
            raise CheckpointError(
                f"{path} does not fit the options of this run: {wrong[0]}", "Resume with the options of the run."
            )
    elif (checkpoint / MASTER_WEIGHTS).is_file():
        kept = _read(checkpoint / MASTER_WEIGHTS)
        with torch.no_grad():
            for name, parameter in trained_parameters(learner.head):
                if name not in kept:
                    raise CheckpointError(
                        f"{checkpoint} has no trained {name}", "Resume with the --tune_ options of the run."
                    )
                parameter.copy_(kept[name])


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", "Resume from another checkpoint.") from error
