"""The story of `mmtool sft`: check the data, load the model, say what trains, train, say what comes next."""

from __future__ import annotations

import math
import os
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from mmtool import __version__, log
from mmtool.args import SftArgs
from mmtool.data.train import TrainingData, load_training_data
from mmtool.errors import MMToolError
from mmtool.finetuned import ADAPTER_CONFIG, SETTINGS, VAL_DATASET, checkpoint_steps
from mmtool.loader import get_template, load_processor, open_folder
from mmtool.models.common.folders import read_json
from mmtool.sft.batches import Collator, Packs, pack_rows
from mmtool.sft.checkpoint import plain_disk_errors, tidy, write_json
from mmtool.sft.network import Network, load_network
from mmtool.sft.parts import format_table
from mmtool.sft.places import find_resumed, make_run_folder, only_run_in
from mmtool.sft.progress import Progress
from mmtool.sft.ranks import Ranks
from mmtool.sft.run import Run
from mmtool.sft.settings import (
    check_scheduler,
    prepare_deepspeed,
    read_deepspeed,
    read_training_args,
    training_arguments,
)
from mmtool.sft.trainer import SavePlan, SftTrainer
from mmtool.spec import ModelSpec
from mmtool.utils import counted, seed_everything

logger = log.get_logger(__name__)


def sft_main(args: SftArgs) -> None:
    """Fine-tune a model; every process of a run comes through here.

    What can be wrong without the weights is found before they load.
    """
    ranks = Ranks()
    disable_progress_bar()  # of transformers, about weights; ours says what matters
    if not ranks.is_main:
        log.setup("error")
    use_cpu = not torch.cuda.is_available() or args.model.device_map == "cpu"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns in each process that loads data
    if use_cpu:  # accelerate loads DeepSpeed where it is installed, which then looks for a device and complains
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    spec, folder = open_folder(args.model.model_type, args.model.model_id_or_path, hub=args.model.hub)
    deepspeed = read_deepspeed(args.devices.deepspeed, use_cpu)
    read_training_args(args.train.training_args)
    check_scheduler(args.train.lr_scheduler_type)
    if args.devices.fsdp and ranks.world_size == 1:
        raise MMToolError(f"--fsdp {args.devices.fsdp} needs several processes", "Add --nproc_per_node 2, or more.")
    if deepspeed is not None:
        prepare_deepspeed(use_cpu)
    with ExitStack() as held:
        held.callback(ranks.disconnect)
        ranks.connect(use_cpu, alone=deepspeed is not None)
        resumed, place = ranks.share(_places(args, spec, held) if ranks.is_main else None)
        with plain_disk_errors(place):
            _train(Run(args, spec, folder, place, resumed, ranks, use_cpu, deepspeed))


def _train(run: Run) -> None:
    args, ranks = run.args, run.ranks
    template = open_template(args, run.spec, run.weights)
    data = _load_data(run, template)
    seed_everything(args.train.seed)
    network = load_network(run, template)
    logger.info("what trains:\n%s", format_table(network.table))
    going_on = "" if run.resumed is None else f", going on from {run.resumed.name}"
    logger.info("run folder: %s%s", run.folder, going_on)
    trainer_args = training_arguments(
        run, model_dtype=network.dtype, find_unused=network.may_skip_parameters, has_eval=data.eval is not None
    )
    order = describe_order(run, data.train.fingerprint)
    if run.resumed is not None:
        compare_order(run.resumed, order)
    settings = describe_run(run, network, data.summary) | {"order": order}
    packs = pack(args, template, data.train, network)
    rows_per_step = args.train.batch_size * ranks.world_size * run.accumulation
    if packs is not None:
        rows_per_step *= len(data.train) / len(packs)
    progress = Progress(run.folder, ranks, rows_per_step=rows_per_step, tensorboard=args.run.tensorboard)
    with watch_signals() as interrupted:
        trainer = SftTrainer(
            network.learner,
            trainer_args,
            train=data.train,
            eval_rows=data.eval,
            collator=Collator(template),
            ranks=ranks,
            plan=SavePlan(run.weights, settings, network.dtype, args.run.save_total_limit),
            on_row_error=args.data.on_row_error,
            interrupted=interrupted,
            group_by_length=args.train.group_by_length,
            packs=packs,
            early_stop=args.train.early_stop,
            callbacks=[progress],
        )
        if ranks.is_main:
            write_json(run.folder / SETTINGS, settings)
            if data.eval is not None:
                data.eval.write_jsonl(run.folder / VAL_DATASET)
        run_trainer(trainer, run.resumed, args)
    finish(trainer, progress, run.folder, ranks)


def _load_data(run: Run, template: Any) -> TrainingData:
    args, ranks = run.args, run.ranks
    with log.timed("data"):
        data = load_training_data(
            args.data,
            template,
            run.spec,
            system=args.template.system,
            shared=run.folder,
            is_main=ranks.is_local_main,
            barrier=ranks.barrier,
        )
    if args.template.show_prompt and ranks.is_main:
        show_first_row(template, data.train)
    return data


def _places(args: SftArgs, spec: ModelSpec, held: ExitStack) -> tuple[Path | None, Path]:
    """Return the checkpoint to go on from, if any, and the folder of the run, which belongs to it while ``held`` lasts.

    The main process decides for all.
    """
    output_dir = Path(args.run.output_dir).expanduser().resolve()
    asked = args.train.resume_from_checkpoint
    resumed = find_resumed(asked, output_dir, spec.model_type).resolve() if asked else None
    now = time.strftime("%Y%m%d-%H%M%S")
    suffix = args.run.add_output_dir_suffix
    try:
        run = resumed.parent if resumed else make_run_folder(output_dir, spec.model_type, suffix, now)
        held.enter_context(only_run_in(run))
    except OSError as error:
        raise MMToolError(f"cannot make {error.filename}: {error.strerror}", "Name another --output_dir.") from error
    if resumed is None and checkpoint_steps(run):
        raise MMToolError(
            f"--output_dir {run} holds the checkpoints of another run",
            "Go on with it (--resume_from_checkpoint last), or name another folder.",
        )
    tidy(run)
    return resumed, run


def open_template(args: SftArgs, spec: ModelSpec, folder: Path) -> Any:
    """Return what writes conversations; they may be as long as the model takes, unless said."""
    config = read_json(folder / "config.json")
    limit = config.get("text_config", config).get("max_position_embeddings")
    return get_template(
        spec,
        load_processor(spec, folder, processor_kwargs=args.model.processor_kwargs),
        args.template.template_kwargs,
        system=args.template.system,
        max_length=args.template.max_length or limit,
        truncation_strategy=args.template.truncation_strategy,
    )


def show_first_row(template: Any, rows: Any) -> None:
    """Print what the model sees of the first row, and what it learns of it."""
    from rich.console import Console

    Console(stderr=True).print(template.show(rows.conversation(0).messages, train=True), soft_wrap=True)


def pack(args: SftArgs, template: Any, rows: Any, network: Network) -> Packs | None:
    """Return which rows share one under ``--packing true``."""
    if not args.train.packing:
        return None
    if rows.lengths is None:
        raise MMToolError("--packing true needs the lengths of the rows", "Leave --check_dataset off out.")
    if not network.learner.keeps_packed_rows_apart():
        raise MMToolError(
            "--packing true does not work with this model: rows that share one would see each other",
            "Leave it out; rows of like length go into one batch anyway.",
        )
    # Some models stretch their positions for rows beyond what they are made for, going by the whole row.
    limit = min(template.max_length, network.learner.config.max_position_embeddings)
    packs = pack_rows(rows.lengths, limit, args.train.seed)
    logger.info("packing: %d rows in %d of at most %d positions", len(rows), len(packs), limit)
    return packs


def describe_order(run: Run, rows: str) -> dict[str, Any]:
    """Return what decides which rows a step sees."""
    args = run.args
    return {
        "rows": rows,
        "batch_size": args.train.batch_size * run.ranks.world_size,
        "gradient_accumulation_steps": run.accumulation,
        "seed": args.train.seed,
        "group_by_length": args.train.group_by_length,
        "packing": args.train.packing,
    }


def compare_order(resumed: Path, order: dict[str, Any]) -> None:
    """Say where a resumed run will not see the rows that the unbroken one would have seen."""
    saved = read_json(resumed / SETTINGS).get("order", {}) if (resumed / SETTINGS).is_file() else {}
    different = [name for name, value in order.items() if name in saved and saved[name] != value]
    if different:
        logger.warning(
            "%s: not as it was before (%s); the run goes on, but not exactly as it would have",
            resumed.name,
            ", ".join(different),
        )


def describe_run(run: Run, network: Network, data: dict[str, Any]) -> dict[str, Any]:
    """Return the content of ``sft_args.json``: what inference needs to know, and what was done."""
    args, spec = run.args, run.spec
    embedded = spec.embedded is not None and args.model.model_id_or_path is None
    infer = {
        "model_type": spec.model_type,
        "model_id_or_path": None if embedded else str(run.weights.resolve()),
        "dtype": args.model.dtype,
        "model_kwargs": args.model.model_kwargs,
        "processor_kwargs": args.model.processor_kwargs,
        "system": args.template.system,
        "template_kwargs": args.template.template_kwargs,
    }
    options = asdict(args)
    explicit = sorted(options.pop("explicit"))
    return {
        "mmtool": __version__,
        "sft_type": args.tuner.sft_type,
        "infer": infer,
        "explicit": explicit,
        "options": options,
        "parts": network.summary,
        "data": data,
    }


@contextmanager
def watch_signals() -> Iterator[Any]:
    """Give a function that tells whether Ctrl-C was pressed or the process is asked to end; a second time ends it."""
    seen: list[int] = []

    def note(number: int, _: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        logger.warning("stopping after this step, with a checkpoint; once more ends at once")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_trainer(trainer: SftTrainer, resumed: Path | None, args: SftArgs) -> None:
    """Train, and make plain errors of what the machine refuses."""
    try:
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        last = trainer.state.global_step
        if not (Path(trainer.args.output_dir) / f"checkpoint-{last}").is_dir() and last:
            trainer.save_now()
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, args) from error
    except RuntimeError as error:
        text = str(error)
        if "DefaultCPUAllocator" in text or "can't allocate memory" in text:
            raise out_of_memory(error, args) from error
        if "DataLoader worker" in text:
            raise trainer.worker_died(error) from error
        raise


def out_of_memory(error: Exception, args: SftArgs) -> MMToolError:
    """Return the error of a batch that does not fit, with what to change."""
    hints = []
    if args.train.batch_size > 1:
        hints.append(f"--batch_size {max(1, args.train.batch_size // 2)} with more --gradient_accumulation_steps")
    if args.train.gradient_checkpointing is False:
        hints.append("--gradient_checkpointing true")
    if args.tuner.sft_type == "full":
        hints.append("--sft_type lora")
    if args.devices.deepspeed is None:
        hints.append("--deepspeed default-zero3 on several GPUs")
    hints.append("a smaller --max_length")
    first = " ".join(str(error).split())[:160]
    return MMToolError(f"out of memory: {first}", f"Try {', '.join(hints)}.")


def finish(trainer: SftTrainer, progress: Progress, run: Path, ranks: Ranks) -> None:
    """Say what came out and what to type next.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
        MMToolError: where a row stopped the run.
    """
    progress.close()
    outcome, state = trainer.outcome, trainer.state
    if ranks.is_main:
        logger.info("%s", summary(trainer, progress, run))
    if outcome.stopped_by == "interrupt":
        raise KeyboardInterrupt
    if outcome.error is not None and state.global_step < state.max_steps:
        raise outcome.error


def summary(trainer: SftTrainer, progress: Progress, run: Path) -> str:
    """Return the lines at the end: what was reached, where it is, what to type next."""
    outcome, state = trainer.outcome, trainer.state
    last = outcome.saved[-1] if outcome.saved else None
    ended = "stopped" if outcome.stopped_by else "done"
    lines = [f"{ended} at step {state.global_step} of {state.max_steps}: {progress.overall(state)}"]
    evaluated = "" if math.isnan(progress.last_eval) else f", evaluation loss {progress.last_eval:.4f}"
    lines.append(f"loss {progress.last_loss:.4f}{evaluated}")
    for count, noun in ((outcome.row_errors, "row"), (outcome.bad_steps, "step")):
        if count:
            lines.append(f"left out: {counted(count, noun)}")
    if outcome.best is not None and outcome.best[0] != last:
        lines.append(f"best: {outcome.best[0]} (evaluation loss {outcome.best[1]:.4f})")
    if last is None:
        return "\n".join(lines)
    lines.append(f"last: {last}")
    if outcome.stopped_by in ("interrupt", "row"):
        lines.append(f"go on:  the same command with --resume_from_checkpoint {shlex.quote(str(last))}")
    lines.append(f"chat:   mmtool infer --ckpt_dir {shlex.quote(str(last))}")
    if (run / VAL_DATASET).is_file():
        lines.append(f"answer: mmtool infer --ckpt_dir {shlex.quote(str(last))} --load_dataset_config true")
    if (last / ADAPTER_CONFIG).is_file():
        lines.append(f"merge:  mmtool export --ckpt_dir {shlex.quote(str(last))} --merge_lora true")
    return "\n".join(lines)
