"""Options of `mmtool sft` alone: data, what is trained and how, output, devices."""

from dataclasses import dataclass
from typing import Any, Literal

from mmtool.errors import MMToolError
from mmtool.groups.checks import require, unset_or
from mmtool.options import opt


@dataclass(kw_only=True)
class SftDataArgs:
    """Data"""

    dataset: list[str] = opt(
        [],
        "Training rows: files, dataset names, NAME#500 for a sample of them. Default for tiny: the embedded set.",
        metavar="FILE|NAME ...",
        aliases=("custom_train_dataset_path",),
    )
    val_dataset: list[str] = opt(
        [], "Rows to evaluate on, named in the same way.", metavar="FILE|NAME ...", aliases=("custom_val_dataset_path",)
    )
    dataset_test_ratio: float = opt(
        0.01,
        "Share of the training rows to evaluate on where --val_dataset is not given; 0 for none.",
        aliases=("split_dataset_ratio",),
    )
    dataset_seed: int = opt(42, "Seed of samples and of the split.")
    train_dataset_sample: int | None = opt(None, "Use only this many training rows, drawn at random; -1 means all.")
    val_dataset_sample: int | None = opt(None, "Use only this many rows to evaluate on; -1 means all.")
    custom_dataset_info: str | None = opt(None, "JSON file that gives names to more datasets.", metavar="FILE")
    dataset_hub: Literal["ms", "hf"] = opt(
        "ms", "Where named datasets come from that are not in the package: ms (ModelScope) or hf (Hugging Face)."
    )
    dataset_format: str | None = opt(None, "Format of the rows. Default: told from the row itself.", metavar="NAME")
    columns: dict[str, Any] | None = opt(None, 'Rename columns, such as {"question": "query"}.', metavar="JSON")
    media_root: str | None = opt(None, "Folder that relative media paths start from.", metavar="FOLDER")
    check_dataset: Literal["strict", "warn", "off"] = opt(
        "warn", "Check every row before the model loads: stop at a bad one, leave it out, or do not look."
    )
    dataset_num_proc: int = opt(1, "Processes that check the data.", aliases=("preprocess_num_proc",))
    dataloader_num_workers: int = opt(1, "Processes that open media and encode rows while the model trains.")
    on_row_error: Literal["skip", "stop"] = opt(
        "skip", "What to do at a row that cannot be used in mid-training, such as a picture that is gone."
    )

    def __post_init__(self) -> None:
        for name in ("train_dataset_sample", "val_dataset_sample"):
            if getattr(self, name) == -1:
                setattr(self, name, None)
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "a number above 0, or -1 for all")
        ratio = self.dataset_test_ratio
        require(0 <= ratio < 1, "dataset_test_ratio", ratio, "a number from 0, below 1")
        require(self.dataset_num_proc > 0, "dataset_num_proc", self.dataset_num_proc, "a number above 0")
        workers = self.dataloader_num_workers
        require(workers >= 0, "dataloader_num_workers", workers, "a number from 0")


@dataclass(kw_only=True)
class TunerArgs:
    """What is trained"""

    sft_type: Literal["lora", "full"] = opt(
        "lora", "lora: small adapters beside frozen weights; full: the weights.", aliases=("train_type", "tuner_type")
    )
    lora_target_modules: list[str] = opt(
        [],
        "Layers that get an adapter: ALL (every linear layer of the parts that train), names such as q_proj v_proj, or "
        "one regular expression. Default: the qkv of the language model.",
        metavar="ALL|NAME ...",
        aliases=("target_modules",),
    )
    modules_to_save: list[str] = opt(
        [],
        "Modules trained as a whole beside the adapters, and saved with them.",
        metavar="NAME ...",
        aliases=("lora_modules_to_save",),
    )
    lora_rank: int = opt(8, "Rank of the adapters.")
    lora_alpha: float = opt(32, "Adapters count alpha / rank; with --use_rslora alpha / sqrt(rank).")
    lora_dropout: float = opt(0.05, "Dropout before the adapters.", aliases=("lora_dropout_p",))
    init_lora_weights: str = opt(
        "true", "true, false, gaussian, olora, pissa, pissa_niter_16 or orthogonal, see peft.", metavar="NAME"
    )
    use_dora: bool = opt(False, "DoRA: also learn the length of each weight vector.")
    use_rslora: bool = opt(False, "Scale by alpha / sqrt(rank), better for large ranks.")
    quantization_bit: Literal["0", "4", "8"] = opt(
        "0", "QLoRA: hold the frozen weights in 4 or 8 bit (needs bitsandbytes); 0 for not."
    )

    def __post_init__(self) -> None:
        require(self.lora_rank > 0, "lora_rank", self.lora_rank, "a number above 0")
        require(self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "a number above 0")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "a number from 0, below 1")
        if self.sft_type == "full":
            given = {"lora_target_modules": self.lora_target_modules, "modules_to_save": self.modules_to_save}
            given |= {"use_dora": self.use_dora, "use_rslora": self.use_rslora}
            given |= {"quantization_bit": self.quantization_bit != "0"}
            for name, value in given.items():
                if value:
                    raise MMToolError(f"--{name} needs --sft_type lora", "Leave it out, or train adapters.")


TuneWay = Literal["true", "false", "lora", "full"]


@dataclass(kw_only=True)
class PartArgs:
    """Parts of the model (true: in the way of --sft_type; projectors always as a whole)"""

    tune_llm: TuneWay | None = opt(None, "Train the language model. Default: true.")
    tune_vision_encoder: TuneWay | None = opt(
        None, "Train the vision tower. Default: false.", aliases=("tune_vision", "tune_vit")
    )
    tune_vision_proj: TuneWay | None = opt(None, "Train the vision projector. Default: true with --sft_type full.")
    tune_audio_encoder: TuneWay | None = opt(None, "Train the audio tower. Default: false.", aliases=("tune_audio",))
    tune_audio_proj: TuneWay | None = opt(None, "Train the audio projector. Default: true with --sft_type full.")
    freeze_vit: bool | None = opt(None, "false is the same as --tune_vision_encoder true.")
    freeze_parameters: list[str] = opt(
        [], "Parameters that stay as they are: beginnings of names, or regular expressions.", metavar="NAME ..."
    )
    additional_trainable_parameters: list[str] = opt(
        [], "Parameters that train as well: beginnings of names, or regular expressions.", metavar="NAME ..."
    )

    def __post_init__(self) -> None:
        if self.freeze_vit is not None:
            wanted = "false" if self.freeze_vit else "true"
            if self.tune_vision_encoder not in (None, wanted) and (
                self.freeze_vit or self.tune_vision_encoder == "false"
            ):
                raise MMToolError(
                    f"--freeze_vit {str(self.freeze_vit).lower()} contradicts "
                    f"--tune_vision_encoder {self.tune_vision_encoder}",
                    "Leave one of them out.",
                )
            self.tune_vision_encoder = self.tune_vision_encoder or wanted


@dataclass(kw_only=True)
class TrainArgs:
    """Training"""

    num_train_epochs: float = opt(1.0, "How often all rows are seen.")
    max_steps: int = opt(-1, "Stop after this many steps; -1: --num_train_epochs decides.")
    batch_size: int = opt(
        1, "Rows per device and forward pass.", aliases=("per_device_train_batch_size", "train_batch_size")
    )
    gradient_accumulation_steps: int | None = opt(
        None, "Forward passes per step. Default: such that a step has at least 16 rows; 1 for tiny."
    )
    learning_rate: float | None = opt(None, "Highest learning rate. Default: 1e-4 for lora, 1e-5 for full.")
    lr_scheduler_type: str = opt(
        "cosine", "How it falls: cosine, linear, constant, constant_with_warmup, polynomial, ...", metavar="NAME"
    )
    warmup_ratio: float = opt(0.05, "Share of the steps in which the learning rate rises.")
    weight_decay: float = opt(0.1, "Weight decay of matrices.")
    max_grad_norm: float = opt(1.0, "Longer gradients are cut to this length; 0 for never.")
    neftune_noise_alpha: float | None = opt(None, "NEFTune: noise on the embeddings, such as 5.")
    gradient_checkpointing: bool | None = opt(
        None, "Compute activations again instead of keeping them. Default: true on a GPU."
    )
    packing: bool = opt(False, "Put several conversations into one row of --max_length positions.")
    group_by_length: bool = opt(True, "Put rows of like length into one batch.")
    cache_media_features: Literal["auto", "memory", "disk", "off"] = opt(
        "auto", "Run frozen towers once per picture or sound and keep the features; auto: in memory."
    )
    early_stop: int | None = opt(
        None, "Stop when so many evaluations in a row were no better.", aliases=("early_stop_interval",)
    )
    seed: int = opt(42, "Seed of the order of the rows, dropout and new weights.")
    resume_from_checkpoint: str | None = opt(
        None, "Go on with a run: last, a run folder, or a checkpoint folder.", metavar="last|FOLDER"
    )
    training_args: list[str] = opt(
        [], "Any other field of transformers' TrainingArguments, such as adam_beta2=0.95.", metavar="KEY=VALUE ..."
    )

    def __post_init__(self) -> None:
        positive = {"num_train_epochs": self.num_train_epochs, "batch_size": self.batch_size}
        positive |= {"gradient_accumulation_steps": self.gradient_accumulation_steps, "early_stop": self.early_stop}
        for name, value in positive.items():
            require(unset_or(value, lambda number: number > 0), name, value, "a number above 0")
        require(self.max_steps == -1 or self.max_steps > 0, "max_steps", self.max_steps, "a number above 0, or -1")
        require(unset_or(self.learning_rate, lambda rate: rate >= 0), "learning_rate", self.learning_rate, "1e-4")
        require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "a number from 0, below 1")
        require(self.max_grad_norm >= 0, "max_grad_norm", self.max_grad_norm, "a number from 0")
        require(0 <= self.seed < 2**32, "seed", self.seed, "a number from 0 to 2**32 - 1")
        for item in self.training_args:
            if "=" not in item:
                raise MMToolError(f"--training_args {item!r} is not KEY=VALUE", "Write it like adam_beta2=0.95.")


@dataclass(kw_only=True)
class RunArgs:
    """Output"""

    output_dir: str = opt("output", "Folder of runs; this one goes to FOLDER/MODEL_TYPE/vN-TIME.", metavar="FOLDER")
    add_output_dir_suffix: bool = opt(True, "false: write to --output_dir itself.")
    logging_steps: int = opt(5, "Log every so many steps, and the first one.")
    eval_steps: int | None = opt(None, "Evaluate every so many steps. Default: as --save_steps.")
    eval_batch_size: int | None = opt(
        None, "Rows per device when evaluating. Default: as --batch_size.", aliases=("per_device_eval_batch_size",)
    )
    save_steps: int = opt(50, "Save every so many steps, and at the end.")
    save_total_limit: int = opt(2, "Keep so many checkpoints, and the best one; 0 keeps all.")
    save_only_model: bool = opt(False, "Save what inference needs only; such a checkpoint cannot be resumed.")
    tensorboard: bool = opt(True, "Write TensorBoard logs.")

    def __post_init__(self) -> None:
        for name in ("logging_steps", "save_steps", "eval_steps", "eval_batch_size"):
            value = getattr(self, name)
            require(unset_or(value, lambda number: number > 0), name, value, "a number above 0")
        if self.save_total_limit == -1:  # as ms-swift has it
            self.save_total_limit = 0
        require(self.save_total_limit >= 0, "save_total_limit", self.save_total_limit, "a number from 0")


@dataclass(kw_only=True)
class DeviceArgs:
    """Processes and devices"""

    nproc_per_node: int | None = opt(
        None, "Processes on this machine, one per GPU; also NPROC_PER_NODE. Default: 1.", metavar="INT"
    )
    deepspeed: str | None = opt(
        None,
        "DeepSpeed: default-zero2, default-zero3, default-zero2-offload, default-zero3-offload, or a JSON file.",
        metavar="NAME|FILE",
    )
    fsdp: str | None = opt(
        None, "PyTorch FSDP instead: full_shard, shard_grad_op, with offload: full_shard,offload.", metavar="NAME"
    )
    use_liger_kernel: bool = opt(False, "Faster layers from the package liger-kernel (GPU).", aliases=("use_liger",))
    torch_compile: bool = opt(False, "Compile the model.")

    def __post_init__(self) -> None:
        if self.deepspeed and self.fsdp:
            raise MMToolError("--deepspeed and --fsdp exclude each other", "Leave one of them out.")
        require(unset_or(self.nproc_per_node, lambda n: n > 0), "nproc_per_node", self.nproc_per_node, "1 or more")
