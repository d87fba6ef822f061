"""What is exported: a model folder, and the adapters that belong on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtool.args import ExportArgs
from mmtool.errors import CheckpointError, MMToolError
from mmtool.export.merge_lora import Adapter
from mmtool.finetuned import SETTINGS, FineTuned, open_finetuned
from mmtool.loader import open_folder
from mmtool.log import get_logger
from mmtool.models.common.folders import read_json
from mmtool.models.common.quantised import CONFIG_KEY
from mmtool.spec import ModelSpec

logger = get_logger(__name__)

_OUTPUT = Path("output")


@dataclass(frozen=True)
class Source:
    """A model, and what was trained on it.

    Attributes:
        spec: its type.
        folder: its weights.
        adapters: put on it, each with how much it counts; none for a model as it is.
        finetuned: the checkpoint that was named, None for a model as it is.
        settings: content of its ``sft_args.json``.
        system: system text that it was trained with; None for the template's own.
        model_kwargs: keywords for loading the model.
        processor_kwargs: settings of the processor.
    """

    spec: ModelSpec
    folder: Path
    adapters: tuple[Adapter, ...] = ()
    finetuned: FineTuned | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    model_kwargs: Mapping[str, Any] | None = None
    processor_kwargs: Mapping[str, Any] | None = None

    @property
    def named(self) -> Path:
        """The folder that the user named, or would have."""
        return self.folder if self.finetuned is None else self.finetuned.folder

    def default_output(self, suffix: str) -> Path:
        """Return the folder to write where none is named: beside the source, if that is not inside a package."""
        if self.finetuned is None and (self.spec.embedded or _is_in_cache(self.folder)):
            return _OUTPUT / f"{self.spec.model_type}{suffix}"
        return self.named.parent / f"{self.named.name}{suffix}"


def open_source(args: ExportArgs) -> Source:
    """Return what the options name; sets the options that a checkpoint knows and the user did not give.

    Raises:
        CheckpointError: for a folder that does not fit.
        MMToolError: for options that do not fit the checkpoint.
    """
    given = args.source
    parsed = [parse_adapter(text) for text in given.adapters]
    opened = [open_finetuned(folder, "--adapters") for folder, _ in parsed]
    if given.ckpt_dir is not None:
        opened, parsed = [open_finetuned(given.ckpt_dir)], [(given.ckpt_dir, 1.0)]
    for finetuned in opened:
        if given.merge_lora and not finetuned.is_adapter:
            raise CheckpointError(
                f"--merge_lora true needs a LoRA checkpoint, but {finetuned.folder} has no adapter_config.json",
                "Pass the checkpoint folder of a `mmtool sft --sft_type lora` run.",
            )
    finetuned = opened[0] if opened else None
    _same_base(opened)
    dtype = args.model.dtype  # of what is written; that of the run says how it was trained
    if finetuned is not None:
        finetuned.fill(args.model, args.explicit)
        if finetuned.is_adapter and not given.merge_lora and _needs_whole_model(args):
            raise MMToolError(f"{finetuned.folder} holds an adapter, no whole model", "Add --merge_lora true.")
    args.model.dtype = dtype
    spec, folder = open_folder(args.model.model_type, args.model.model_id_or_path, hub=args.model.hub)
    _not_quantised(folder, args)
    adapters = [
        Adapter(each.folder, weight) for each, (_, weight) in zip(opened, parsed, strict=True) if each.is_adapter
    ]
    return Source(
        spec,
        folder,
        tuple(adapters),
        finetuned,
        _settings(finetuned),
        None if finetuned is None else finetuned.options.get("system"),
        args.model.model_kwargs,
        args.model.processor_kwargs,
    )


def parse_adapter(text: str) -> tuple[str, float]:
    """Return folder and weight of ``FOLDER:0.7``; without a number it counts whole.

    Raises:
        MMToolError: where what stands behind a folder is no number.
    """
    folder, separator, number = text.rpartition(":")
    if not separator or Path(text).expanduser().exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) and Path(folder).expanduser().exists():
        raise MMToolError(f"--adapters {text}: {number!r} is no weight", f"Write it like {folder}:0.7.")
    return (folder, weight) if math.isfinite(weight) else (text, 1.0)


def _needs_whole_model(args: ExportArgs) -> bool:
    return bool(
        args.quant.quant_method or args.output.to_gguf or args.output.to_safetensors or "dtype" in args.explicit
    )


def _same_base(opened: list[FineTuned]) -> None:
    bases = {finetuned.folder: finetuned.options.get("model_id_or_path") for finetuned in opened}
    if len(set(bases.values())) > 1:
        logger.warning("these adapters were trained on different models: %s", ", ".join(map(str, bases.values())))


def _not_quantised(folder: Path, args: ExportArgs) -> None:
    config = read_json(folder / "config.json")
    writes = args.source.merge_lora or _needs_whole_model(args)
    if writes and (config.get("quantization_config") or config.get(CONFIG_KEY)):
        raise CheckpointError(
            f"{folder} holds quantised weights, which cannot be merged, converted or quantised again",
            "Give the folder of the original weights with --model_id_or_path.",
        )


def _settings(finetuned: FineTuned | None) -> Mapping[str, Any]:
    if finetuned is None or not (finetuned.folder / SETTINGS).is_file():
        return {}
    return read_json(finetuned.folder / SETTINGS)


def _is_in_cache(folder: Path) -> bool:
    return any(part == "snapshots" or part in ("huggingface", "modelscope") for part in folder.resolve().parts)
