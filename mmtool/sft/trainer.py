"""transformers' Trainer for a ``Learner``: our batches, whole checkpoints, and an answer to whatever goes wrong."""

from __future__ import annotations

import math
import random
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from mmtool.errors import DataError, MMToolError
from mmtool.finetuned import TRAINER_STATE, checkpoint_steps
from mmtool.log import get_logger
from mmtool.sft.batches import IGNORED, Collator, Packs, RowDataset, StepBatches, split_batch
from mmtool.sft.checkpoint import record, rotate, save_model, whole_or_not
from mmtool.sft.features import SeenRows
from mmtool.sft.learner import Learner
from mmtool.sft.ranks import Ranks

logger = get_logger(__name__)

MOST_BAD_STEPS = 5  # steps in a row whose loss or gradient is not finite, before the run stops
REPORTED_ERRORS = 5
# On a CPU a batch runs in pieces of so many positions: what an operation writes is still in the cache for the next one.
POSITIONS_AT_ONCE = 1024


@dataclass
class SavePlan:
    """How checkpoints are written.

    ``base_folder``: the model's folder. ``settings``: content of ``sft_args.json``. ``dtype``: of full weights on
    disk. ``keep``: how many checkpoints stay, 0 for all.
    """

    base_folder: Path
    settings: Mapping[str, Any]
    dtype: torch.dtype
    keep: int


@dataclass
class Outcome:
    """What happened beside training: why it stopped early, rows left out, bad steps."""

    stopped_by: str | None = None  # "interrupt", "row", "nan", "early_stop"
    error: MMToolError | None = None
    row_errors: int = 0
    bad_steps: int = 0
    best: tuple[Path, float] | None = None  # the best checkpoint and its evaluation loss
    saved: list[Path] = field(default_factory=list)


class SftTrainer(Trainer):
    """Trains a ``Learner``.

    Args:
        learner: the network.
        args: as ``settings.training_arguments`` makes them.
        train: encoded rows; ``eval_rows`` those to evaluate on.
        collator: makes batches of them.
        ranks: the processes.
        plan: how checkpoints are written.
        on_row_error: ``skip`` or ``stop``.
        interrupted: tells whether the user wants the run to stop.
        group_by_length: put rows of like length together.
        packs: which rows share one.
        early_stop: stop after so many evaluations that were no better.
    """

    def __init__(
        self,
        learner: Learner,
        args: TrainingArguments,
        *,
        train: Any,
        eval_rows: Any,
        collator: Collator,
        ranks: Ranks,
        plan: SavePlan,
        on_row_error: str = "skip",
        interrupted: Callable[[], bool] = lambda: False,
        group_by_length: bool = True,
        packs: Packs | None = None,
        early_stop: int | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.ranks, self.plan, self.outcome = ranks, plan, Outcome()
        self.on_row_error, self.interrupted = on_row_error, interrupted
        self.group_by_length = group_by_length and packs is None
        self.early_stop = early_stop
        self._bad_loss_rows: list[str] = []
        self._passes = self._bad_passes = 0  # since a loss was logged
        self._bad_in_a_row = 0
        self._grad_norm: float | None = None
        self._row_stop: MMToolError | None = None
        self._learner = learner
        learner.label_smoothing = args.label_smoothing_factor
        super().__init__(
            model=learner,
            args=args,
            data_collator=collator,
            train_dataset=RowDataset(train, packs, self._seen(learner)),
            eval_dataset=RowDataset(eval_rows, seen=self._seen(learner)) if eval_rows is not None else None,
            callbacks=[_EpochOrder(self), _Watch(self), *(callbacks or [])],
        )
        for name in ("PrinterCallback", "ProgressCallback"):
            for callback in [c for c in self.callback_handler.callbacks if type(c).__name__ == name]:
                self.remove_callback(callback)

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; where nothing wraps the model, it need not load DeepSpeed to look for a wrapper."""
        super().create_accelerator_and_postprocess()
        if self.is_plain:
            self.accelerator.unwrap_model = lambda model, **_: model

    @property
    def is_plain(self) -> bool:
        """Whether one process trains the whole model itself."""
        alone = self.ranks.world_size == 1 and self.args.n_gpu <= 1
        return alone and not (self.args.deepspeed or self.args.fsdp or self.args.torch_compile)

    # Data -------------------------------------------------------------------------------------------------------------

    @staticmethod
    def _seen(learner: Learner) -> SeenRows | None:
        return None if learner.cache is None else SeenRows()

    def _remember(self, dataset: RowDataset, light: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Note rows whose media need not be opened again."""
        if dataset.seen is not None and self._learner.cache is not None:
            for index, row in light:
                dataset.seen.add(index, row, self._learner.cache)

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches of this rank."""
        lengths = self.train_dataset.rows.lengths if self.group_by_length else None
        self.step_batches = StepBatches(
            len(self.train_dataset),
            self.args.per_device_train_batch_size,
            passes=self.args.gradient_accumulation_steps,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            seed=self.args.seed,
            lengths=lengths,
        )
        return self._loader(self.train_dataset, self.step_batches)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the batches of this rank, rows in their order."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        batches = StepBatches(
            len(dataset),
            self.args.per_device_eval_batch_size,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )
        return self._loader(dataset, batches)

    def _loader(self, dataset: RowDataset, batches: StepBatches) -> DataLoader:
        workers = self.args.dataloader_num_workers
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            # Its own generator: the one of torch, from which dropout draws, must not depend on how often we evaluate.
            generator=torch.Generator().manual_seed(self.args.seed),
            worker_init_fn=_start_worker if workers else None,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            persistent_workers=bool(workers) and self.args.dataloader_persistent_workers,
        )

    # Steps ------------------------------------------------------------------------------------------------------------

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, but no step more where a resumed run was at its end already."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Train on one batch; notes rows that could not be used, and a loss that is no number."""
        errors, origins, light = inputs.pop("errors"), inputs.pop("origins"), inputs.pop("light", ())
        self._report_rows(errors)
        pieces = [inputs]
        if self._learner.layers is not None and self.is_plain and num_items_in_batch is not None:
            pieces = split_batch(inputs, POSITIONS_AT_ONCE)
        losses = [super(SftTrainer, self).training_step(model, piece, num_items_in_batch) for piece in pieces]
        loss = sum(losses[1:], losses[0])
        self._remember(self.train_dataset, light)
        self._passes += 1
        if not math.isfinite(float(loss)):
            self._bad_passes += 1
            self._bad_loss_rows += origins
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; a loss of passes that all were no numbers is none, where Trainer takes 0 for them."""
        if "loss" in logs:
            if self._passes and self._bad_passes == self._passes:
                logs["loss"] = math.nan
            self._passes = self._bad_passes = 0
        super().log(logs, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of this rank's part of the step."""
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs["loss"]
        if num_items_in_batch is not None:  # the processes' gradients get averaged, but their losses are parts of a sum
            loss = loss * self.accelerator.num_processes
        if self.is_deepspeed_enabled and model.training:
            self._refuse_bad_loss(loss)
        return (loss, outputs) if return_outputs else loss

    def _refuse_bad_loss(self, loss: Tensor) -> None:
        """Stop all ranks: DeepSpeed steps inside the backward pass, so that a bad step cannot be left out."""
        (bad,) = self.ranks.any(not math.isfinite(float(loss.detach())))
        if bad:
            raise self.bad_loss_error(1)

    def bad_loss_error(self, steps: int) -> MMToolError:
        """Return the error of a run whose loss is no number."""
        rows = f", last with {', '.join(self._bad_loss_rows[:3])}" if self._bad_loss_rows else ""
        times = "" if steps == 1 else f" in {steps} steps in a row"
        return MMToolError(
            f"the loss is not a finite number at step {self.state.global_step + 1}{times}{rows}",
            "Lower --learning_rate, look at these rows, or use bf16 in place of fp16; the checkpoints are good.",
        )

    def _report_rows(self, errors: list[str]) -> None:
        for text in errors:
            self.outcome.row_errors += 1
            if self.on_row_error == "stop":
                self._row_stop = DataError(
                    f"a row cannot be used: {text}",
                    "Correct it and go on with --resume_from_checkpoint last, or pass --on_row_error skip.",
                )
            elif self.outcome.row_errors <= REPORTED_ERRORS:
                logger.warning("left out: %s", text)
            elif self.outcome.row_errors == REPORTED_ERRORS + 1:
                logger.warning("more rows are left out, and not told one by one")

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not self.is_plain:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self._learner.trained, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._grad_norm = None if norm is None else float(norm)
        return norm

    def drop_bad_gradient(self) -> None:
        """Leave out a step whose gradient is not finite: without a gradient, optimizers leave a parameter alone.

        The norm is that of all ranks, so that all decide alike.
        """
        norm, scaler = self._grad_norm, getattr(self.accelerator, "scaler", None)
        if self.is_deepspeed_enabled or scaler is not None or norm is None:
            return
        if math.isfinite(norm):
            self._bad_in_a_row = 0
            return
        self._bad_in_a_row += 1
        self.outcome.bad_steps += 1
        for parameter in self.model.parameters():
            parameter.grad = None
        rows = f" ({', '.join(self._bad_loss_rows[:3])})" if self._bad_loss_rows else ""
        logger.warning("step %d: the gradient is not finite%s; the step is left out", self.state.global_step + 1, rows)
        if self._bad_in_a_row >= MOST_BAD_STEPS:
            raise self.bad_loss_error(self._bad_in_a_row)
        self._bad_loss_rows = []

    def check_stop(self) -> None:
        """After a step: stop and save where the user or a row of some rank wants it, at the same step everywhere."""
        interrupted, row = self.ranks.any(self.interrupted(), self._row_stop is not None)
        if interrupted or row:
            self.outcome.stopped_by = "interrupt" if interrupted else "row"
            self.outcome.error = self._row_stop or (DataError("a row cannot be used") if row else None)
            self.control.should_save = self.control.should_training_stop = True

    def check_progress(self) -> None:
        """After an evaluation: stop where so many in a row were no better than the best one."""
        losses = [line["eval_loss"] for line in self.state.log_history if "eval_loss" in line]
        if self.early_stop is not None and len(losses) - 1 - int(np.argmin(losses)) >= self.early_stop:
            logger.info("stopping: the last %d evaluations were no better than %.4f", self.early_stop, min(losses))
            self.outcome.stopped_by = "early_stop"
            self.control.should_save = self.control.should_training_stop = True

    def try_longest_rows(self) -> None:
        """Run the longest batch once, without a step, so that memory runs out now and not in an hour (GPU only)."""
        lengths = self.train_dataset.rows.lengths
        if self.args.device.type != "cuda" or self.is_deepspeed_enabled or lengths is None:
            return
        if self.train_dataset.packs is not None:
            chosen = np.arange(min(self.args.per_device_train_batch_size, len(self.train_dataset)))
        else:
            count = min(self.args.per_device_train_batch_size, len(lengths))
            chosen = np.argpartition(-np.asarray(lengths), count - 1)[:count]
        batch = self.data_collator([self.train_dataset[int(index)] for index in chosen])
        states = torch.get_rng_state(), torch.cuda.get_rng_state()
        for name in ("errors", "origins", "light"):
            batch.pop(name, None)
        super().training_step(self.model_wrapped, batch, (batch["labels"] != IGNORED).sum().to(self.args.device))
        self.model_wrapped.zero_grad()
        torch.set_rng_state(states[0])
        torch.cuda.set_rng_state(states[1])
        moments = sum(8 * p.numel() for p in self.model.parameters() if p.requires_grad)
        needed, there = torch.cuda.max_memory_allocated() + moments, torch.cuda.get_device_properties(0).total_memory
        logger.info("the longest rows take %.1f of %.1f GiB", needed / 2**30, there / 2**30)

    # Evaluation -------------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return and log the mean loss per learned token, each row counted once."""
        model = self.model_wrapped
        model.eval()
        total = count = 0.0
        with torch.no_grad():
            loader = self.get_eval_dataloader(eval_dataset)
            for batch in loader:
                batch.pop("origins")
                light = batch.pop("light", ())
                self._report_rows(batch.pop("errors"))
                inputs = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    total += float(model(**inputs)["total"])
                self._remember(loader.dataset, light)
                count += float((inputs["labels"] != IGNORED).sum())
        model.train()
        total, count = self.ranks.sum(total, count)
        metrics = {f"{metric_key_prefix}_loss": total / max(count, 1.0)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write ``checkpoint-N`` of the run folder, whole or not at all."""
        run = Path(self.args.output_dir)
        folder = run / f"checkpoint-{self.state.global_step}"
        self.state.best_model_checkpoint = None  # Trainer's best evaluation may have no checkpoint
        with whole_or_not(folder, self.ranks.is_main, self.ranks.barrier) as partial:
            self.save_model(str(partial), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(partial))
                self._save_scaler(str(partial))
                self._save_rng_state(str(partial))
            if self.ranks.is_main:
                name = TRAINER_STATE if not self.args.save_only_model else f"only_model_{TRAINER_STATE}"
                self.state.save_to_json(str(partial / name))
        self.outcome.saved.append(folder)
        if self.ranks.is_main:
            self.outcome.best = self._best_checkpoint(run)
            best, loss = self.outcome.best or (None, None)
            record(run, folder, best, loss)
            rotate(run, self.plan.keep, best)
        self.ranks.barrier()

    def _best_checkpoint(self, run: Path) -> tuple[Path, float] | None:
        """Return the checkpoint with the lowest evaluation loss of its step, and that."""
        losses = {line["step"]: float(line["eval_loss"]) for line in self.state.log_history if "eval_loss" in line}
        found = [
            (losses[step], path)
            for step, path in checkpoint_steps(run)
            if step in losses and math.isfinite(losses[step])
        ]
        loss, path = min(found, key=lambda pair: pair[0], default=(0.0, None))
        return None if path is None else (path, loss)

    def save_now(self) -> None:
        """Write a checkpoint at the end, where the steps did not ask for one."""
        self._save_checkpoint(self.model_wrapped)

    def worker_died(self, error: Exception) -> MMToolError:
        """Save where one process can do so, and return the error of a data worker that is gone."""
        kept = "the checkpoints are good"
        if self.ranks.world_size == 1 and self.state.global_step:
            self.save_now()
            kept = f"checkpoint-{self.state.global_step} was saved"
        reason = " ".join(str(error).split())[:160]
        return MMToolError(
            f"a process that loads data has died: {reason}; {kept}",
            "It may have run out of memory: lower --dataloader_num_workers, then --resume_from_checkpoint last.",
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what inference needs; all ranks take part where the weights are spread over them."""
        learner, state = self.learner, self._gathered_state()
        if self.ranks.is_main:
            save_model(
                learner,
                Path(output_dir or self.args.output_dir),
                self.plan.base_folder,
                self.plan.settings,
                state=state,
                dtype=self.plan.dtype,
                with_master=not (self.args.save_only_model or self.is_deepspeed_enabled),
            )

    @property
    def learner(self) -> Learner:
        """The network without the wrappers of the processes."""
        return self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)

    def _gathered_state(self) -> dict[str, Tensor] | None:
        """Return all weights by name on the main rank where each rank has pieces of them, else None."""
        if self.is_fsdp_enabled:
            return self.accelerator.get_state_dict(self.model_wrapped)
        if self.is_deepspeed_enabled and self.deepspeed.zero_optimization_stage() == 3:
            has_adapters = self.learner.model is not self.learner.head
            return self.deepspeed._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=has_adapters)
        return None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.ranks.is_main:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Leave the weights: they were loaded from the checkpoint before."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if not (self.is_deepspeed_enabled and resume_from_checkpoint):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        # Frozen weights are not in the checkpoint, so what it holds is less than the model.
        path, _ = self.model_wrapped.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
        if path is None:
            raise MMToolError(
                f"{resume_from_checkpoint} holds no state of DeepSpeed", "Resume with the --deepspeed of the run."
            )
        scheduler = torch.load(Path(resume_from_checkpoint) / "scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)
        return prepared


class _EpochOrder(TrainerCallback):
    """Tells the batches which epoch begins, also after a resumption in its middle."""

    def __init__(self, trainer: SftTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the order of the epoch."""
        self.trainer.step_batches.set_epoch(math.floor((state.epoch or 0.0) + 1e-9))


class _Watch(TrainerCallback):
    """Looks at every step."""

    def __init__(self, trainer: SftTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find out now what will not fit later."""
        self.trainer.try_longest_rows()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop where nothing gets better."""
        self.trainer.check_progress()
        return self.trainer.control

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave out a step that would spoil the weights."""
        self.trainer.drop_bad_gradient()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop where somebody wants it."""
        self.trainer.check_stop()
        return self.trainer.control


def _start_worker(worker: int) -> None:
    """Seed a worker; Ctrl-C is the business of the main process, which still wants the batches of this step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.set_num_threads(1)
