"""The story of `mmtool export`: open the source, write a whole folder, compare the two, say what came out."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from mmtool import __version__, log
from mmtool.args import ExportArgs
from mmtool.errors import MMToolError
from mmtool.export.bnb import BitsAndBytes
from mmtool.export.card import write_card
from mmtool.export.convert import Plan, plan_weights, write_folder, write_in_memory
from mmtool.export.gguf import file_size, gguf_layout, matrices, write_gguf
from mmtool.export.gguf_check import INSTALL, binding
from mmtool.export.gguf_check import check as check_gguf
from mmtool.export.layout import Release, read_release
from mmtool.export.libraries import PACKAGES, Calibrated, check_library, with_adapters
from mmtool.export.merge_lora import MergedWeights, NotStreamable
from mmtool.export.output import whole_folder, write_settings
from mmtool.export.push import check_push, push
from mmtool.export.quality import ROWS, describe, measure
from mmtool.export.quantise import WeightQuantiser, linear_layers
from mmtool.export.rows import read_rows
from mmtool.export.shards import parse_size
from mmtool.export.source import Source, open_source
from mmtool.export.table import format_rows, written_rows
from mmtool.export.verify import attach_adapters, verify
from mmtool.finetuned import VAL_DATASET
from mmtool.loader import get_template, load_model, load_processor
from mmtool.utils import resolve_dtype

logger = log.get_logger(__name__)

Table = list[tuple[str, str]]


def export_main(args: ExportArgs) -> None:
    """Export a model or a checkpoint.

    What can be wrong without reading the weights is found before anything is written.
    """
    if not args.writes and not args.push.push_to_hub:
        raise MMToolError(
            "nothing to export was asked for",
            "Add --merge_lora true, --to_safetensors true, --dtype bf16, --quant_method or --to_gguf true.",
        )
    disable_progress_bar()  # of transformers, about weights; ours says what matters
    max_bytes = parse_size(args.output.max_shard_size)
    check_push(args.push, args.model.hub)
    if args.quant.quant_method in PACKAGES:
        check_library(args.quant.quant_method)
    source = open_source(args)
    if not args.writes:
        publish(args, source, source.named, [])
        return
    folder = output_folder(args, source)
    table = export_gguf(args, source, folder) if args.output.to_gguf else export_model(args, source, folder, max_bytes)
    logger.info("%s\n%s", f"written: {folder}", format_rows(table))
    if args.push.push_to_hub:
        publish(args, source, folder, table)
    if not args.output.to_gguf:
        logger.info("chat:   mmtool infer --ckpt_dir %s", shlex.quote(str(folder)))


def publish(args: ExportArgs, source: Source, folder: Path, table: Table) -> None:
    """Upload a folder with a model card; a folder that was not written just now stays as it is."""
    name = str(args.push.hub_model_id)
    message = f"mmtool export {source.spec.model_type}"
    with tempfile.TemporaryDirectory(prefix="mmtool-card-") as beside:
        card_folder = folder if table else Path(beside)
        write_card(card_folder, source, table, name)
        url = push(folder, args.push, args.model.hub, message)
        if card_folder is not folder:
            push(card_folder, args.push, args.model.hub, f"{message}: model card")
    logger.info("pushed: %s", url)


def suffix_of(args: ExportArgs) -> str:
    """Return what a folder's name gets for what is asked for."""
    suffix = "-merged" if args.source.merge_lora else ""
    if "dtype" in args.explicit and args.model.dtype != "AUTO":
        suffix += f"-{args.model.dtype}"
    elif args.output.to_safetensors and not suffix:
        suffix += "-safetensors"
    if args.quant.quant_method is not None:
        suffix += f"-{args.quant.quant_method}-int{args.quant.quant_bits}"
    if args.output.to_gguf:
        suffix += "-gguf"
    return suffix


def output_folder(args: ExportArgs, source: Source) -> Path:
    """Return the folder to write.

    Raises:
        MMToolError: where it holds what is read.
    """
    asked = args.output.output_dir
    folder = Path(asked).expanduser() if asked else source.default_output(suffix_of(args))
    read = [source.folder, *(adapter.folder for adapter in source.adapters), source.named]
    for path in read:
        if path.resolve() == folder.resolve() or path.resolve().is_relative_to(folder.resolve()):
            raise MMToolError(f"--output_dir {folder} holds what is exported", "Name another folder.")
    return folder


def export_model(args: ExportArgs, source: Source, folder: Path, max_bytes: int) -> Table:
    """Write a folder in the released layout, tensor by tensor: adapters merged, in fewer bits, in another format."""
    chosen = resolve_dtype(args.model.dtype)
    dtype = None if chosen == "auto" else chosen
    release = read_release(source.spec, source.folder, source.model_kwargs)
    stored = stored_dtype(release, dtype)
    quantiser = make_quantiser(args, source, release, stored)
    plan = make_plan(source, release, dtype, quantiser)
    needed = plan.nbytes if plan is not None else release.nbytes
    with whole_folder(folder, overwrite=args.output.overwrite, needed=needed) as partial:
        with log.timed("write"):
            if plan is not None:
                write_folder(partial, release, plan, dtype=dtype, max_bytes=max_bytes, quantiser=quantiser)
            else:
                write_in_memory(partial, source, release, dtype=dtype, max_bytes=max_bytes)
        write_beside(args, source, partial)
        table: Table = [("model", source.spec.model_type), ("source", str(source.named))]
        if plan is not None and source.adapters and not isinstance(quantiser, Calibrated):
            table.append(("merged", f"{plan.changed} of {sum(map(len, plan.entries.values()))} tensors"))
        if quantiser is not None:
            table += quantiser.rows(release.nbytes, plan.nbytes if plan is not None else 0)
        table += written_rows(partial)
        with log.timed("verify"):
            one_format = dtype is not None or len(stored_dtypes(release)) == 1
            table += check(args, source, partial, stored, quantised=quantiser is not None, one_format=one_format)
    return table


def export_gguf(args: ExportArgs, source: Source, folder: Path) -> Table:
    """Write a folder with one .gguf file."""
    kind = args.output.gguf_type
    release = read_release(source.spec, source.folder, source.model_kwargs)
    layout = gguf_layout(source.spec, release.network.config)
    if args.output.verify and binding() is None:
        raise MMToolError("the check of a .gguf file needs llama.cpp", f"{INSTALL}, or --verify false.")
    try:
        merged = MergedWeights(release.network, source.adapters) if source.adapters else None
    except NotStreamable as reason:
        raise whole_first(reason) from reason
    found = matrices(release, layout, merged)
    template = get_template(source.spec, load_processor(source.spec, source.folder))
    with whole_folder(folder, overwrite=args.output.overwrite, needed=file_size(found, kind)) as partial:
        path = partial / f"{source.named.name}-{kind}.gguf"
        write_gguf(path, source.named.name, layout, found, template.processor, template, kind)
        table: Table = [("model", f"{source.spec.model_type}, as {layout.architecture} of llama.cpp")]
        table += [("source", str(source.named)), *written_rows(partial)[:1]]
        verified = "no (--verify false)"
        if args.output.verify:
            with log.timed("verify"):
                verified = check_gguf(path, kind, source, args.model.device_map)
        table.append(("verified", verified))
    return table


def whole_first(reason: NotStreamable) -> MMToolError:
    """Return the error of an adapter that has to be merged before anything else can be done."""
    return MMToolError(
        f"this adapter can only be merged into a whole model: {reason}",
        "Merge it first, and go on with what comes out: --ckpt_dir FOLDER.",
    )


def check(
    args: ExportArgs,
    source: Source,
    folder: Path,
    stored: torch.dtype,
    *,
    quantised: bool,
    one_format: bool = False,
) -> Table:
    """Compare what was written with its source; ``one_format``: all weights are stored as ``stored``."""
    if not args.output.verify:
        return [("verified", "no (--verify false)")]
    if not quantised:
        return [("verified", str(verify(source, folder, stored, args.model.device_map, one_format=one_format)))]
    rows = read_rows(args, source, ROWS)
    measured = []
    for title, place, adapters in (("before", source.folder, source.adapters), ("after", folder, ())):
        model, _ = load_model(
            source.spec,
            place,
            device_map=args.model.device_map,
            model_kwargs=source.model_kwargs,
            processor=rows.template.processor,
        )
        if adapters:
            model = attach_adapters(model, adapters)
        measured.append(measure(model, rows, f"answering {title}", *measured))
        del model
    return describe(*measured, rows.origin, int(args.quant.quant_bits))


def make_quantiser(args: ExportArgs, source: Source, release: Release, stored: torch.dtype) -> WeightQuantiser | None:
    """Return what rounds weights to a few bits, None where that was not asked for."""
    given = args.quant
    if given.quant_method is None:
        return None
    layers = linear_layers(release.network, source.spec, given.quant_parts, given.quant_modules_to_not_convert)
    if given.quant_method == "bnb":
        return BitsAndBytes(release, layers, given, stored)
    scales = torch.float32 if given.quant_bits == "8" else stored  # next to a whole row they take no room
    if given.quant_method == "torchao":
        return WeightQuantiser(layers, given, scales)
    quantiser = Calibrated(layers, given, torch.float32)
    rows = read_rows(args, source, given.quant_n_samples, given.quant_seqlen)
    model, _ = load_model(
        source.spec,
        source.folder,
        dtype="fp32",
        device_map=args.model.device_map,
        model_kwargs=source.model_kwargs,
        processor=rows.template.processor,
    )
    quantiser.calibrate(with_adapters(model, source.adapters), given.quant_method, layers, rows)
    return quantiser


def make_plan(
    source: Source, release: Release, dtype: torch.dtype | None, quantiser: WeightQuantiser | None
) -> Plan | None:
    """Return what to write tensor by tensor, None where only a whole model can be merged."""
    try:
        if isinstance(quantiser, Calibrated):
            return plan_weights(release, quantiser, dtype, quantiser)
        merged = MergedWeights(release.network, source.adapters) if source.adapters else None
        return plan_weights(release, merged, dtype, quantiser)
    except NotStreamable as reason:
        if quantiser is not None:
            raise whole_first(reason) from reason
        logger.info("merging in memory, which takes the whole model in float32: %s", reason)
        return None


def stored_dtype(release: Release, dtype: torch.dtype | None) -> torch.dtype:
    """Return the coarsest number format among the written weights."""
    if dtype is not None:
        return dtype
    found = stored_dtypes(release)
    return next(kind for kind in (torch.bfloat16, torch.float16, torch.float32, torch.float64) if kind in found)


def stored_dtypes(release: Release) -> set[torch.dtype]:
    """Return the number formats of a folder's weights."""
    return {item.tensor.stored_dtype for item in release.tensors if item.tensor.stored_dtype.is_floating_point}


def write_beside(args: ExportArgs, source: Source, folder: Path) -> None:
    """Write what `mmtool infer` and people want to know of a folder, and the rows kept to evaluate on."""
    infer: dict[str, Any] = {"model_type": source.spec.model_type, "model_id_or_path": None}
    if "dtype" in args.explicit or not source.settings:
        infer["dtype"] = "AUTO"
    export = {
        "mmtool": __version__,
        "base": str(source.folder),
        "adapters": [{"folder": str(adapter.folder), "weight": adapter.weight} for adapter in source.adapters],
    }
    write_settings(folder, source.settings, infer, export)
    if source.finetuned is not None and source.finetuned.val_dataset.is_file():
        with contextlib.suppress(shutil.SameFileError):
            shutil.copyfile(source.finetuned.val_dataset, folder / VAL_DATASET)
