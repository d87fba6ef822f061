"""Options to what transformers' Trainer and DeepSpeed take."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import SchedulerType, TrainingArguments

from mmtool.args import SftArgs
from mmtool.errors import MMToolError
from mmtool.options import options_of
from mmtool.sft.run import Run
from mmtool.utils import did_you_mean

LEARNING_RATES = {"lora": 1e-4, "full": 1e-5}

# Fields of TrainingArguments that mean nothing here, or something else than they say, by the reason.
NOT_FOR_USERS = {
    "mmtool makes the batches itself": (
        *("train_sampling_strategy", "length_column_name", "dataloader_drop_last", "data_seed", "ignore_data_skip"),
        *("label_names", "auto_find_batch_size", "remove_unused_columns", "dataloader_multiprocessing_context"),
        *("dataloader_in_order", "average_tokens_across_devices", "accelerator_config", "parallelism_config"),
    ),
    "mmtool evaluates by the loss alone": (
        *("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
        *("include_for_metrics", "batch_eval_metrics", "do_train", "do_eval", "do_predict", "use_cache"),
        *("bf16_full_eval", "fp16_full_eval", "metric_for_best_model", "greater_is_better"),
    ),
    "mmtool writes checkpoints itself; the best one is noted in checkpoints.json": (
        *("load_best_model_at_end", "save_on_each_node", "enable_jit_checkpoint", "push_to_hub", "hub_token"),
        *("hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        "restore_callback_states_from_checkpoint",
    ),
    "mmtool writes the log itself": (
        *("log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "include_num_input_tokens_seen"),
        *("skip_memory_metrics", "logging_nan_inf_filter"),
    ),
}
# Fields that go by another name here.
_NAMES = {
    "use_cpu": "device_map",
    "local_rank": "nproc_per_node",
    "bf16": "dtype",
    "fp16": "dtype",
    "fsdp_config": "fsdp",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "liger_kernel_config": "use_liger_kernel",
}

_OFFLOAD = {"device": "cpu", "pin_memory": True}
_AUTO = {
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": "auto"},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 10**9,  # DeepSpeed's own lines say nothing that ours do not
    "wall_clock_breakdown": False,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
_ZERO2 = {
    "stage": 2,
    "allgather_partitions": True,
    "allgather_bucket_size": 2e8,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 2e8,
    "contiguous_gradients": True,
}
_ZERO3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
PRESETS: dict[str, dict[str, Any]] = {
    "default-zero2": {**_AUTO, "zero_optimization": _ZERO2},
    "default-zero3": {**_AUTO, "zero_optimization": _ZERO3},
    "default-zero2-offload": {**_AUTO, "zero_optimization": {**_ZERO2, "offload_optimizer": _OFFLOAD}},
    "default-zero3-offload": {
        **_AUTO,
        "zero_optimization": {**_ZERO3, "offload_optimizer": _OFFLOAD, "offload_param": _OFFLOAD},
    },
}


def read_deepspeed(asked: str | None, use_cpu: bool) -> dict[str, Any] | None:
    """Return the configuration that ``--deepspeed`` names: one of ours, or the content of a JSON file."""
    if asked is None:
        return None
    if importlib.util.find_spec("deepspeed") is None:
        raise MMToolError("--deepspeed needs the package deepspeed", "pip install 'mmtool[deepspeed]'")
    if use_cpu and torch.cuda.is_available():
        raise MMToolError(f"--deepspeed {asked} does not go with --device_map cpu", "Leave one of them out.")
    name = asked if asked.startswith("default-") else f"default-{asked}"
    if name in PRESETS:
        config = json.loads(json.dumps(PRESETS[name]))
        if use_cpu:  # nothing to overlap or to pin
            config["zero_optimization"]["overlap_comm"] = False
            for key in ("offload_optimizer", "offload_param"):
                config["zero_optimization"].pop(key, None)
        return config
    path = Path(asked).expanduser()
    if not path.is_file():
        hint = did_you_mean(asked, PRESETS, f"Use {', '.join(PRESETS)}, or a JSON file.")
        raise MMToolError(f"--deepspeed {asked}: neither one of ours nor a file", hint)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MMToolError(f"--deepspeed {asked} is not valid JSON: {error}", "Correct the file.") from error
    if not isinstance(config, dict):
        raise MMToolError(f"--deepspeed {asked} holds no JSON object", "Correct the file.")
    return config


def prepare_deepspeed(use_cpu: bool) -> None:
    """Load DeepSpeed so that it needs no compiler on a CPU: its own way to talk between processes gives way to gloo."""
    if use_cpu:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def training_arguments(run: Run, *, model_dtype: torch.dtype, find_unused: bool, has_eval: bool) -> TrainingArguments:
    """Return what Trainer takes.

    Args:
        run: the run.
        model_dtype: of the weights; 16 bits mean mixed precision.
        find_unused: some trained parameters may take no part in a pass.
        has_eval: there are rows to evaluate on.
    """
    args, given, run_args = run.args, run.args.train, run.args.run
    values: dict[str, Any] = {
        "output_dir": str(run.folder),
        "per_device_train_batch_size": given.batch_size,
        "per_device_eval_batch_size": run_args.eval_batch_size or given.batch_size,
        "gradient_accumulation_steps": run.accumulation,
        "num_train_epochs": given.num_train_epochs,
        "max_steps": given.max_steps,
        "learning_rate": learning_rate(args),
        "lr_scheduler_type": given.lr_scheduler_type,
        "warmup_steps": given.warmup_ratio,
        "weight_decay": given.weight_decay,
        "max_grad_norm": given.max_grad_norm,
        "neftune_noise_alpha": given.neftune_noise_alpha,
        "adam_beta2": 0.95,
        "seed": given.seed,
        "bf16": model_dtype == torch.bfloat16,
        "fp16": model_dtype == torch.float16,
        "use_cpu": run.use_cpu,
        "logging_steps": run_args.logging_steps,
        "logging_first_step": True,
        "eval_strategy": "steps" if has_eval else "no",
        "eval_steps": run_args.eval_steps or run_args.save_steps,
        "save_strategy": "steps",
        "save_steps": run_args.save_steps,
        "save_only_model": run_args.save_only_model,
        "metric_for_best_model": "loss" if has_eval else None,
        "greater_is_better": False if has_eval else None,
        "dataloader_num_workers": args.data.dataloader_num_workers,
        "dataloader_pin_memory": not run.use_cpu,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "report_to": "none",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": find_unused,
        "deepspeed": run.deepspeed,
        "torch_compile": args.devices.torch_compile,
        "use_liger_kernel": False,
    }
    values |= _fsdp(args.devices.fsdp)
    if run.use_cpu and run.deepspeed is not None:
        values["accelerator_config"] = _cpu_processes()
    values |= read_training_args(given.training_args)
    try:
        return TrainingArguments(**values)
    except (ValueError, ImportError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise MMToolError(f"transformers refuses these options: {reason}", "Check --training_args.") from error


def _cpu_processes() -> dict[str, Any]:
    """Tell accelerate of the processes before Trainer does, which knows DeepSpeed on GPUs only."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True).distributed_type = DistributedType.DEEPSPEED
    return {"use_configured_state": True}


def learning_rate(args: SftArgs) -> float:
    """Return the highest learning rate."""
    given = args.train.learning_rate
    return LEARNING_RATES[args.tuner.sft_type] if given is None else given


def _fsdp(asked: str | None) -> dict[str, Any]:
    if asked is None:
        return {}
    known = {"full_shard", "shard_grad_op", "offload", "auto_wrap"}
    words = [word for word in asked.replace(",", " ").split() if word]
    for word in words:
        if word not in known:
            raise MMToolError(
                f"--fsdp {asked}: unknown word {word!r}", did_you_mean(word, known, f"Use {', '.join(sorted(known))}.")
            )
    config = {
        "version": 2,
        "reshard_after_forward": "shard_grad_op" not in words,
        "cpu_offload": "offload" in words,
        "cpu_ram_efficient_loading": False,
        "state_dict_type": "FULL_STATE_DICT",
    }
    return {"fsdp": True, "fsdp_config": config}


def _refuse(key: str) -> None:
    """Refuse a field of ``TrainingArguments`` that has an option of its own, or no meaning here."""
    options = {name: option.name for option in options_of(SftArgs) for name in (option.name, *option.aliases)}
    option = options.get(_NAMES.get(key, key))
    if option is not None:
        raise MMToolError(f"--training_args {key}: there is an option of its own", f"Use --{option}.")
    for reason, names in NOT_FOR_USERS.items():
        if key in names:
            raise MMToolError(f"--training_args {key} has no effect: {reason}", "Leave it out.")


def check_scheduler(name: str) -> None:
    """Refuse a ``--lr_scheduler_type`` that transformers does not know."""
    known = [item.value for item in SchedulerType]
    if name not in known:
        hint = did_you_mean(name, known, f"Choose from {', '.join(known)}.")
        raise MMToolError(f"--lr_scheduler_type {name}: there is no such schedule", hint)


def read_training_args(pairs: list[str]) -> dict[str, Any]:
    """Return ``KEY=VALUE`` texts as keywords of ``TrainingArguments``; values are JSON where they can be."""
    names = {item.name for item in fields(TrainingArguments)}
    values: dict[str, Any] = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        key = key.strip().removeprefix("--")
        if key not in names:
            raise MMToolError(
                f"--training_args {key}: transformers' TrainingArguments has no such field",
                did_you_mean(key, names, "See its documentation for the fields."),
            )
        _refuse(key)
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = {"True": True, "False": False, "None": None}.get(text, text)
    return values
