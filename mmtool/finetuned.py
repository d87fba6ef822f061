"""Open what `mmtool sft` left: the options a model was fine-tuned with, its adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mmtool.errors import CheckpointError
from mmtool.log import get_logger
from mmtool.models.common.folders import read_json

logger = get_logger(__name__)

SETTINGS = "sft_args.json"
ADAPTER_CONFIG = "adapter_config.json"
RECORD = "checkpoints.json"
TRAINER_STATE = "trainer_state.json"
VAL_DATASET = "val_dataset.jsonl"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# What an adapter brings; networks have weights of their own that are called lora_something.
_OF_ADAPTER = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.|\.modules_to_save\.")


def checkpoint_steps(run: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints of a run folder with their steps, oldest first."""
    found = ((_CHECKPOINT.fullmatch(path.name), path) for path in run.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


@dataclass(frozen=True)
class FineTuned:
    """A checkpoint of a fine-tuning run.

    Attributes:
        folder: the checkpoint.
        run: the folder of its run.
        options: what the run was told, by option name; only what inference needs.
        is_adapter: whether it holds an adapter, to be put on the base model, or a whole model.
    """

    folder: Path
    run: Path
    options: Mapping[str, Any]
    is_adapter: bool

    @property
    def val_dataset(self) -> Path:
        """The rows that the run kept back to evaluate on; an exported folder has a copy of its own."""
        own = self.folder / VAL_DATASET
        return own if own.is_file() else self.run / VAL_DATASET

    def fill(self, group: Any, explicit: frozenset[str]) -> None:
        """Set the options of ``group`` that the run knows, unless they are given explicitly."""
        for item in fields(group):
            if item.name in self.options and item.name not in explicit:
                setattr(group, item.name, self.options[item.name])


def is_of_adapter(name: str) -> bool:
    """Tell whether a parameter, by its name in a model with adapters, is one of theirs."""
    return _OF_ADAPTER.search(name) is not None


def open_finetuned(ckpt_dir: str | Path, option: str = "--ckpt_dir") -> FineTuned:
    """Return the checkpoint in a folder; of a run folder the best one, or else the last.

    ``option`` is what named it.

    Raises:
        CheckpointError: where the folder is none of these.
    """
    folder = Path(ckpt_dir).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{option} {ckpt_dir}: no such folder", "Give a checkpoint folder of `mmtool sft`.")
    steps = checkpoint_steps(folder)
    if steps:
        best = _chosen(folder)
        folder = best or steps[-1][1]
        logger.info("--ckpt_dir %s: taking %s, the %s one", ckpt_dir, folder.name, "best" if best else "last")
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        raise CheckpointError(f"--ckpt_dir {ckpt_dir}: {folder} has {_missing(folder)}", _hint(folder))
    options = read_json(folder / SETTINGS)["infer"] if (folder / SETTINGS).is_file() else {}
    if not is_adapter:
        options = {**options, "model_id_or_path": str(folder)}
    elif not options:  # of plain peft
        options = {"model_id_or_path": read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")}
    return FineTuned(folder, folder.parent, options, is_adapter)


def _missing(folder: Path) -> str:
    if _CHECKPOINT.fullmatch(folder.name) or not (folder / SETTINGS).is_file():
        return f"neither {ADAPTER_CONFIG} nor config.json"
    return "no checkpoint yet: its run ended before the first was saved"


def _hint(folder: Path) -> str:
    """Say which checkpoint may be meant by a folder that is none: one of its runs', or of their model types'."""
    runs = {path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/checkpoint-*")}
    newest = max(runs, key=lambda run: run.stat().st_mtime, default=None)
    if newest is None or not checkpoint_steps(newest):
        return "Give a checkpoint folder of `mmtool sft`."
    few = "" if len(runs) == 1 else f", the newest of {len(runs)}"
    return f"Give a run in it: --ckpt_dir {newest}{few}."


def _chosen(run: Path) -> Path | None:
    record = read_json(run / RECORD) if (run / RECORD).is_file() else {}
    best = record.get("best")
    return run / best if best and (run / best).is_dir() else None


def attach_adapter(model: Any, folder: Path, *, merge: bool = False) -> Any:
    """Return ``model`` with the adapter of a folder in its layers; ``merge`` folds it into their weights.

    Raises:
        CheckpointError: when the adapter does not fit the model.
    """
    adapted = wrap_adapter(model, folder)
    return adapted.merge_and_unload() if merge else adapted.get_base_model()


def wrap_adapter(model: Any, folder: Path) -> Any:
    """Return the ``PeftModel`` of ``model`` and the adapter of a folder, whose layers it puts into the model.

    Raises:
        CheckpointError: when the adapter does not fit the model.
    """
    from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
    from safetensors import SafetensorError

    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        adapted = PeftModel(model, config, autocast_adapter_dtype=False)
        result = set_peft_model_state_dict(adapted, load_peft_weights(str(folder), device="cpu"))
    except (ValueError, RuntimeError, KeyError, OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the adapter in {folder} does not fit the model: {str(error).splitlines()[0]}",
            "Give the base model it was trained on with --model_id_or_path.",
        ) from error
    lost = [name for name in result.missing_keys if is_of_adapter(name)]
    if lost or result.unexpected_keys:
        raise CheckpointError(
            f"the adapter in {folder} does not fit the model: {[*lost, *result.unexpected_keys][0]}",
            "Give the base model it was trained on with --model_id_or_path.",
        )
    adapted.to(next(model.parameters()).device)
    adapted.eval()
    return adapted
