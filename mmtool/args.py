"""The options of every command, each written once as a field; ``options.py`` makes command line, YAML and docs of it.

Arguments are data: checks that need no file, model or network live here, everything else in the ``*_main`` functions.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from mmtool.errors import MMToolError
from mmtool.options import opt


def _require(valid: bool, name: str, value: object, expected: str) -> None:
    if not valid:
        shown = f"{value:g}" if isinstance(value, float) else value
        raise MMToolError(f"--{name} {shown} is out of range", f"Give --{name} {expected}.")


@dataclass(kw_only=True)
class ModelArgs:
    """Model"""

    model_type: str | None = opt(
        None, "Model type, see `mmtool list models`. Default: tiny, or what the folder of --model_id_or_path holds."
    )
    model_id_or_path: str | None = opt(
        None, "Folder with the weights, or a hub id such as 01-ai/Yi-VL-6B.", metavar="FOLDER|ID", aliases=("model",)
    )
    hub: Literal["hf", "ms"] = opt("hf", "Where ids are looked up: hf (Hugging Face) or ms (ModelScope).")
    dtype: Literal["AUTO", "fp32", "bf16", "fp16"] = opt(
        "AUTO",
        "Number format of the weights; AUTO takes the checkpoint's, and fp32 where the device is slow in that.",
        aliases=("torch_dtype",),
    )
    device_map: str | dict[str, Any] | None = opt(
        None,
        "Where the weights go: cpu, cuda:0, auto, or JSON by module. Default: the first GPU, else the CPU.",
        metavar="NAME|JSON",
    )
    attn_impl: Literal["eager", "sdpa", "flash_attention_2"] | None = opt(
        None, "Attention: eager, sdpa or flash_attention_2. Default: what transformers chooses.", metavar="NAME"
    )
    model_kwargs: dict[str, Any] | None = opt(None, "More keywords for loading the model.", metavar="JSON")
    processor_kwargs: dict[str, Any] | None = opt(
        None, "Settings of the image or audio processor that win over the folder's.", metavar="JSON"
    )

    def __post_init__(self) -> None:
        if self.model_type is None and self.model_id_or_path is None:
            self.model_type = "tiny"


@dataclass(kw_only=True)
class PromptArgs:
    """Prompt"""

    system: str | None = opt(None, "System text. Default: the template's own; an empty text means none.")
    max_length: int | None = opt(
        None, "Most positions of the conversation before the answer; a picture counts those it takes."
    )
    truncation_strategy: Literal["delete", "truncation_left", "raise"] = opt(
        "delete",
        "A conversation over --max_length: drop the row, cut its oldest positions (never inside a picture), or stop.",
    )
    template_kwargs: dict[str, Any] | None = opt(None, "More settings of the template.", metavar="JSON")

    def __post_init__(self) -> None:
        _require(self.max_length is None or self.max_length > 0, "max_length", self.max_length, "a number above 0")


@dataclass(kw_only=True)
class TemplateArgs(PromptArgs):
    """Prompt"""

    show_prompt: bool = opt(False, "Print what the model really sees, with media spans and control tokens, to stderr.")


@dataclass(kw_only=True)
class SamplingArgs:
    """Generation (defaults come with the model)"""

    max_new_tokens: int | None = opt(None, "Most tokens in one answer.")
    do_sample: bool | None = opt(
        None,
        "Draw tokens at random; false always takes the likeliest. --temperature, --top_p and --top_k turn it on.",
    )
    temperature: float | None = opt(None, "Randomness of sampling, above 0; 0 means --do_sample false.")
    top_p: float | None = opt(None, "Draw from the likeliest tokens that share this much probability, above 0 up to 1.")
    top_k: int | None = opt(None, "Draw from this many likeliest tokens; 0 means all.")
    repetition_penalty: float | None = opt(None, "Above 1 makes tokens that are already there less likely.")
    num_beams: int = opt(1, "Only 1; beam search is not supported: it cannot stream and multiplies the KV cache.")
    stop_words: list[str] = opt([], "Texts that end the answer, beside those of the template.")
    seed: int | None = opt(None, "Seed of sampling: the same seed gives the same answer, alone or in a batch.")

    def __post_init__(self) -> None:
        length, penalty = self.max_new_tokens, self.repetition_penalty
        _require(_unset_or(length, lambda n: n > 0), "max_new_tokens", length, "a number above 0")
        _require(_unset_or(self.temperature, lambda t: t >= 0), "temperature", self.temperature, "a number from 0")
        _require(_unset_or(self.top_p, lambda p: 0 < p <= 1), "top_p", self.top_p, "a number above 0, at most 1")
        _require(_unset_or(self.top_k, lambda k: k >= 0), "top_k", self.top_k, "a number from 0 (all tokens)")
        _require(_unset_or(penalty, lambda p: p > 0), "repetition_penalty", penalty, "a number above 0, such as 1.05")
        _require(_unset_or(self.seed, lambda s: 0 <= s < 2**63), "seed", self.seed, "a number from 0 to 2**63 - 1")
        _require(self.num_beams >= 1, "num_beams", self.num_beams, "1")
        if self.num_beams > 1:
            raise MMToolError(
                f"--num_beams {self.num_beams} is not supported: beam search cannot stream and multiplies the KV cache",
                "Leave it out; --do_sample false gives the one answer that greedy search finds.",
            )
        self._settle_sampling()

    def _settle_sampling(self) -> None:
        """Let temperature 0 mean greedy, and other sampling options mean sampling unless do_sample is set."""
        if self.temperature == 0:
            self.do_sample = False
        elif self.do_sample is None and any(value is not None for value in (self.temperature, self.top_p, self.top_k)):
            self.do_sample = True


@dataclass(kw_only=True)
class GenerationArgs(SamplingArgs):
    """Generation (defaults come with the model)"""

    stream: bool = opt(True, "Print the answer while it is being made.")


def _unset_or(value: float | None, valid: Any) -> bool:
    return value is None or (math.isfinite(value) and valid(value))


@dataclass(kw_only=True)
class InputArgs:
    """One question (without it: a chat)"""

    query: str | None = opt(None, "Ask this and print the answer; - reads the question from stdin.")
    images: list[str] = opt([], "Pictures for --query: paths, URLs or data URIs.", metavar="PATH|URL ...")
    audios: list[str] = opt([], "Sounds for --query: paths, URLs or data URIs.", metavar="PATH|URL ...")
    json: bool = opt(False, "Print one line of JSON: answer, number of tokens, finish reason, timings.")

    def __post_init__(self) -> None:
        if self.query is None:
            for name, given in (("images", self.images), ("audios", self.audios), ("json", self.json)):
                if given:
                    raise MMToolError(
                        f"--{name} needs --query", "Add --query TEXT, or leave it out and give media inside the chat."
                    )


@dataclass(kw_only=True)
class InferDataArgs:
    """Answer a dataset"""

    val_dataset: str | None = opt(
        None,
        "File (.jsonl, .json, .csv, .parquet) or dataset name whose rows are answered.",
        metavar="FILE|NAME",
        aliases=("custom_val_dataset_path",),
    )
    val_dataset_sample: int | None = opt(None, "Answer only this many rows from the start; -1 means all.")
    dataset_format: str | None = opt(None, "Format of the rows. Default: told from the row itself.", metavar="NAME")
    columns: dict[str, Any] | None = opt(None, 'Rename columns, such as {"question": "query"}.', metavar="JSON")
    media_root: str | None = opt(None, "Folder that relative media paths start from.", metavar="FOLDER")
    max_batch_size: int = opt(1, "Most rows answered at the same time.")
    result_path: str | None = opt(
        None,
        "File the answers go to, one line of JSON per row. Default: DATASET.MODEL_TYPE.jsonl in this folder.",
        metavar="FILE",
    )
    resume: bool = opt(False, "Go on with a result file that an earlier run left unfinished.")
    overwrite: bool = opt(False, "Replace an existing result file.")
    on_error: Literal["skip", "stop"] = opt("skip", "What to do at a row that cannot be used.")

    def __post_init__(self) -> None:
        if self.val_dataset_sample == -1:
            self.val_dataset_sample = None
        sample = self.val_dataset_sample
        _require(sample is None or sample > 0, "val_dataset_sample", sample, "a number above 0, or -1 for all")
        _require(self.max_batch_size > 0, "max_batch_size", self.max_batch_size, "a number above 0")
        if self.resume and self.overwrite:
            raise MMToolError("--resume and --overwrite exclude each other", "Leave one of them out.")

    def check_dataset_given(self) -> None:
        """Refuse options that say something about a dataset where none is given."""
        if self.val_dataset is None:
            for name in (
                "val_dataset_sample",
                "dataset_format",
                "columns",
                "media_root",
                "result_path",
                "resume",
                "overwrite",
            ):
                if getattr(self, name):
                    raise MMToolError(f"--{name} needs --val_dataset", "Add --val_dataset FILE.")


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
        0.01, "Share of the training rows to evaluate on where --val_dataset is not given; 0 for none."
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
    dataset_num_proc: int = opt(1, "Processes that check the data.")
    dataloader_num_workers: int = opt(1, "Processes that open media and encode rows while the model trains.")
    on_row_error: Literal["skip", "stop"] = opt(
        "skip", "What to do at a row that cannot be used in mid-training, such as a picture that is gone."
    )

    def __post_init__(self) -> None:
        for name in ("train_dataset_sample", "val_dataset_sample"):
            if getattr(self, name) == -1:
                setattr(self, name, None)
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "a number above 0, or -1 for all")
        ratio = self.dataset_test_ratio
        _require(0 <= ratio < 1, "dataset_test_ratio", ratio, "a number from 0, below 1")
        _require(self.dataset_num_proc > 0, "dataset_num_proc", self.dataset_num_proc, "a number above 0")
        workers = self.dataloader_num_workers
        _require(workers >= 0, "dataloader_num_workers", workers, "a number from 0")


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
        _require(self.lora_rank > 0, "lora_rank", self.lora_rank, "a number above 0")
        _require(self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "a number above 0")
        _require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "a number from 0, below 1")
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
            _require(_unset_or(value, lambda number: number > 0), name, value, "a number above 0")
        _require(self.max_steps == -1 or self.max_steps > 0, "max_steps", self.max_steps, "a number above 0, or -1")
        _require(_unset_or(self.learning_rate, lambda rate: rate >= 0), "learning_rate", self.learning_rate, "1e-4")
        _require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "a number from 0, below 1")
        _require(self.max_grad_norm >= 0, "max_grad_norm", self.max_grad_norm, "a number from 0")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "a number from 0 to 2**32 - 1")
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
            _require(_unset_or(value, lambda number: number > 0), name, value, "a number above 0")
        _require(self.save_total_limit >= 0, "save_total_limit", self.save_total_limit, "a number from 0")


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
        _require(_unset_or(self.nproc_per_node, lambda n: n > 0), "nproc_per_node", self.nproc_per_node, "1 or more")


@dataclass(kw_only=True)
class LogArgs:
    """Messages (to stderr)"""

    log_level: Literal["error", "warning", "info", "debug"] = opt(
        "info", "Least important messages to show; debug adds where the time went."
    )
    verbose: bool = opt(False, "Also show the messages and warnings of the libraries below.")


@dataclass(kw_only=True)
class CommandArgs:
    """What every command has; ``explicit`` names the options set on the command line, in the environment or in YAML."""

    log: LogArgs = field(default_factory=LogArgs)
    explicit: frozenset[str] = frozenset()


@dataclass(kw_only=True)
class TunedArgs:
    """What `mmtool sft` left"""

    ckpt_dir: str | None = opt(
        None,
        "Checkpoint, or run folder (its best one). It knows its model, prompt and system text.",
        metavar="FOLDER",
        aliases=("adapters",),
    )
    merge_lora: bool = opt(False, "Fold the adapter into the weights in memory: answers come a little faster.")

    def __post_init__(self) -> None:
        if self.merge_lora and self.ckpt_dir is None:
            raise MMToolError("--merge_lora true needs --ckpt_dir", "Give a checkpoint folder of `mmtool sft`.")


@dataclass(kw_only=True)
class CheckpointArgs(TunedArgs):
    """What `mmtool sft` left"""

    load_dataset_config: bool = opt(
        False,
        "Answer the rows that the run kept to evaluate on; --val_dataset_sample and so on apply.",
        aliases=("load_data_args",),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_dataset_config and self.ckpt_dir is None:
            raise MMToolError("--load_dataset_config true needs --ckpt_dir", "Give a checkpoint of `mmtool sft`.")


@dataclass(kw_only=True)
class VllmArgs:
    """vLLM (with --infer_backend vllm)"""

    tensor_parallel_size: int = opt(1, "GPUs that share the model.")
    gpu_memory_utilization: float | None = opt(None, "Share of a GPU's memory to take. Default: vLLM's own.")
    vllm_args: dict[str, Any] | None = opt(
        None, 'More settings of vLLM, by their names in its EngineArgs, as in {"enforce_eager": true}.', metavar="JSON"
    )

    def __post_init__(self) -> None:
        share = self.gpu_memory_utilization
        _require(self.tensor_parallel_size > 0, "tensor_parallel_size", self.tensor_parallel_size, "a number above 0")
        valid = _unset_or(share, lambda x: 0 < x <= 1)
        _require(valid, "gpu_memory_utilization", share, "a number above 0, at most 1")

    def check_backend(self, backend: str, model: ModelArgs, merge_lora: bool) -> None:
        """Refuse options that say something about another engine than ``backend``."""
        if backend != "vllm":
            for name in ("gpu_memory_utilization", "vllm_args"):
                if getattr(self, name) is not None:
                    raise MMToolError(f"--{name} needs --infer_backend vllm", "Add it, or leave it out.")
            if self.tensor_parallel_size > 1:
                raise MMToolError("--tensor_parallel_size needs --infer_backend vllm", "Or use --device_map auto.")
            return
        for name in ("device_map", "attn_impl", "model_kwargs"):
            if getattr(model, name) is not None:
                raise MMToolError(f"--{name} is not for --infer_backend vllm", "Leave it out; see --vllm_args.")
        if merge_lora:
            raise MMToolError(
                "--merge_lora true is not for --infer_backend vllm",
                "Merge with `mmtool export --merge_lora true`, or leave it out: vLLM adds the adapter to each request.",
            )


@dataclass(kw_only=True)
class InferVllmArgs(VllmArgs):
    """vLLM (with --infer_backend vllm)"""

    max_model_len: int | None = opt(None, "Most positions of a prompt and its answer. Default: the model's own limit.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(_unset_or(self.max_model_len, lambda n: n > 1), "max_model_len", self.max_model_len, "2 or more")


@dataclass(kw_only=True)
class InferArgs(CommandArgs):
    """Engine"""

    model: ModelArgs = field(default_factory=ModelArgs)
    checkpoint: CheckpointArgs = field(default_factory=CheckpointArgs)
    template: TemplateArgs = field(default_factory=TemplateArgs)
    generation: GenerationArgs = field(default_factory=GenerationArgs)
    input: InputArgs = field(default_factory=InputArgs)
    data: InferDataArgs = field(default_factory=InferDataArgs)
    vllm: InferVllmArgs = field(default_factory=InferVllmArgs)
    infer_backend: Literal["AUTO", "pt", "vllm"] = opt(
        "AUTO", "Engine that generates: pt is mmtool's own, which AUTO takes as well; vllm needs that package."
    )

    def __post_init__(self) -> None:
        if self.input.query is not None and self.data.val_dataset is not None:
            raise MMToolError("--query and --val_dataset exclude each other", "Leave one of them out.")
        if self.checkpoint.load_dataset_config and (self.input.query or self.data.val_dataset):
            other = "query" if self.input.query else "val_dataset"
            raise MMToolError(f"--load_dataset_config true and --{other} exclude each other", "Leave one of them out.")
        if not self.checkpoint.load_dataset_config:
            self.data.check_dataset_given()
        self.vllm.check_backend(self.infer_backend, self.model, self.checkpoint.merge_lora)


@dataclass(kw_only=True)
class SftArgs(CommandArgs):
    """Fine-tuning"""

    model: ModelArgs = field(default_factory=ModelArgs)
    template: TemplateArgs = field(default_factory=TemplateArgs)
    data: SftDataArgs = field(default_factory=SftDataArgs)
    tuner: TunerArgs = field(default_factory=TunerArgs)
    parts: PartArgs = field(default_factory=PartArgs)
    train: TrainArgs = field(default_factory=TrainArgs)
    run: RunArgs = field(default_factory=RunArgs)
    devices: DeviceArgs = field(default_factory=DeviceArgs)

    def __post_init__(self) -> None:
        if self.train.packing and self.template.max_length is None:
            raise MMToolError("--packing true needs --max_length", "Say how long a packed row may be.")
        if self.train.early_stop is not None and not (self.data.val_dataset or self.data.dataset_test_ratio):
            raise MMToolError("--early_stop needs rows to evaluate on", "Give --val_dataset or --dataset_test_ratio.")


@dataclass(kw_only=True)
class ExportModelArgs(ModelArgs):
    """Model"""

    dtype: Literal["AUTO", "fp32", "bf16", "fp16"] = opt(
        "AUTO", "Number format of the written weights; AUTO keeps that of the model.", aliases=("torch_dtype",)
    )


@dataclass(kw_only=True)
class ExportSourceArgs:
    """What is exported (without these: the model itself)"""

    ckpt_dir: str | None = opt(
        None, "Checkpoint of `mmtool sft`, or run folder (its best one); it knows its model.", metavar="FOLDER"
    )
    adapters: list[str] = opt(
        [],
        "Several LoRA checkpoints of one model and how much each counts, as in a/checkpoint-9:0.7 b/checkpoint-9:0.3.",
        metavar="FOLDER[:WEIGHT] ...",
    )
    merge_lora: bool = opt(False, "Fold the adapter into the weights.")

    def __post_init__(self) -> None:
        if self.ckpt_dir is not None and self.adapters:
            raise MMToolError("--ckpt_dir and --adapters exclude each other", "Name every checkpoint with --adapters.")
        if self.merge_lora and self.ckpt_dir is None and not self.adapters:
            raise MMToolError("--merge_lora true needs --ckpt_dir", "Give a checkpoint folder of `mmtool sft`.")
        if self.adapters and not self.merge_lora:
            raise MMToolError("--adapters needs --merge_lora true", "Add it: several adapters become one model.")


@dataclass(kw_only=True)
class ExportOutputArgs:
    """What is written"""

    output_dir: str | None = opt(
        None, "Folder to write. Default: the source's with -merged, -bf16, -torchao-int8 and so on.", metavar="FOLDER"
    )
    overwrite: bool = opt(False, "Replace the folder if it exists.")
    to_safetensors: bool = opt(False, "Convert .bin weights, so that later loads are mapped.")
    max_shard_size: str = opt("5GB", "Largest weight file.", metavar="SIZE")
    verify: bool = opt(True, "Load what was written and compare it with the source; nothing is left if it fails.")
    to_gguf: bool = opt(False, "Write one .gguf file for llama.cpp.")
    gguf_type: Literal["f32", "f16", "bf16", "q8_0"] = opt("f16", "Number format of the matrices in a .gguf file.")


@dataclass(kw_only=True)
class QuantArgs:
    """Quantisation (of the language model; towers and projectors stay as they are)"""

    quant_method: Literal["bnb", "torchao", "gptq", "awq"] | None = opt(
        None, "torchao; gptq or awq (through llm-compressor); bnb (bitsandbytes)."
    )
    quant_bits: Literal["4", "8"] = opt("4", "Bits per weight.")
    quant_group_size: int | None = opt(
        None, "Weights that share a scale. Default: 128, or what fits; for 8 bit torchao a whole row."
    )
    quant_parts: list[str] = opt([], "Parts to quantise. Default: llm.", metavar="PART ...")
    quant_modules_to_not_convert: list[str] = opt([], "Layers that stay as they are, too.", metavar="NAME ...")
    dataset: list[str] = opt([], "Rows to calibrate on (gptq, awq) and to compare answers on.", metavar="FILE|NAME ...")
    quant_n_samples: int = opt(128, "How many rows to calibrate on.")
    quant_seqlen: int = opt(2048, "Longest row to calibrate on, in positions.")

    def __post_init__(self) -> None:
        _require(self.quant_n_samples > 0, "quant_n_samples", self.quant_n_samples, "a number above 0")
        _require(self.quant_seqlen > 0, "quant_seqlen", self.quant_seqlen, "a number above 0")
        size = self.quant_group_size
        _require(size is None or size > 0 or size == -1, "quant_group_size", size, "a number above 0, or -1 for a row")


@dataclass(kw_only=True)
class PushArgs:
    """Publishing"""

    push_to_hub: bool = opt(False, "Upload what was written, with a model card.")
    hub_model_id: str | None = opt(None, "Repository to upload to, owner/name; it is made if it is not there.")
    hub_token: str | None = opt(None, "Access token. Default: the one that the hub's own tools have stored.")
    hub_private_repo: bool = opt(False, "Make the repository a private one.")
    push_hub: Literal["hf", "ms"] | None = opt(None, "Hub to upload to. Default: that of --hub.")

    def __post_init__(self) -> None:
        if self.push_to_hub and self.hub_model_id is None:
            raise MMToolError("--push_to_hub true needs --hub_model_id", "Name one: --hub_model_id owner/name.")
        if self.hub_model_id is not None:
            if not self.push_to_hub:
                raise MMToolError("--hub_model_id needs --push_to_hub true", "Add it, or leave --hub_model_id out.")
            owner, _, name = self.hub_model_id.partition("/")
            if not owner or not name or "/" in name:
                raise MMToolError(f"--hub_model_id {self.hub_model_id} is not owner/name", "Write it like me/my-model.")


@dataclass(kw_only=True)
class ExportArgs(CommandArgs):
    """Export"""

    model: ExportModelArgs = field(default_factory=ExportModelArgs)
    source: ExportSourceArgs = field(default_factory=ExportSourceArgs)
    output: ExportOutputArgs = field(default_factory=ExportOutputArgs)
    quant: QuantArgs = field(default_factory=QuantArgs)
    push: PushArgs = field(default_factory=PushArgs)

    def __post_init__(self) -> None:
        kinds = {
            "to_gguf true": self.output.to_gguf,
            f"quant_method {self.quant.quant_method}": self.quant.quant_method,
        }
        asked = [name for name, value in kinds.items() if value]
        if len(asked) > 1:
            raise MMToolError(f"--{asked[0]} and --{asked[1]} exclude each other", "Export twice.")
        if self.quant.quant_method is None:
            for name in ("quant_group_size", "quant_parts", "quant_modules_to_not_convert", "dataset"):
                if getattr(self.quant, name):
                    raise MMToolError(f"--{name} needs --quant_method", "Add --quant_method torchao, say.")

    @property
    def writes(self) -> bool:
        """Whether a folder is written; else one is only uploaded."""
        output = self.output.to_safetensors or self.output.to_gguf or self.quant.quant_method is not None
        return self.source.merge_lora or output or self.model.dtype != "AUTO"


@dataclass(kw_only=True)
class ServerArgs:
    """Server"""

    host: str = opt("127.0.0.1", "Address to listen at; 0.0.0.0 is every one of this machine.", metavar="ADDRESS")
    port: int = opt(8000, "Port to listen at; 0 takes a free one and says which.")
    api_key: list[str] = opt([], "Keys, any of which opens the server; none lets everybody in.", metavar="KEY ...")
    api_key_file: str | None = opt(None, "File with keys, one on each line.", metavar="FILE")
    served_model_name: list[str] = opt(
        [], "What clients may call the model; answers have the first. Default: its type or folder.", metavar="NAME ..."
    )
    cors_origins: list[str] = opt(
        [], "Web pages of these origins may ask, such as https://chat.example.com; * for all.", metavar="ORIGIN ..."
    )
    web_ui: bool = opt(False, "Also serve a page to chat on, at /ui (extra ui).")
    log_requests: bool = opt(False, "Write questions and answers to the log; otherwise no text of theirs gets there.")
    shutdown_timeout: float = opt(30.0, "Seconds that running answers get at SIGTERM before they are cut.")

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, "port", self.port, "a number from 0 to 65535")
        seconds = self.shutdown_timeout
        _require(math.isfinite(seconds) and seconds >= 0, "shutdown_timeout", seconds, "a number from 0")


@dataclass(kw_only=True)
class CapacityArgs:
    """Capacity"""

    max_num_seqs: int = opt(16, "Most answers under way at once.")
    max_model_len: int | None = opt(
        None, "Most positions of a prompt and its answer. Default: the model's own limit, or what memory allows."
    )
    max_queue: int | None = opt(
        None, "Most requests that wait; more are refused with 429. Default: four times --max_num_seqs."
    )
    lora_modules: list[str] = opt(
        [], "LoRA adapters that clients choose by name as if they were models.", metavar="NAME=FOLDER ..."
    )
    max_request_mib: float = opt(32.0, "Largest request, in MiB.")
    compile: bool | None = opt(
        None, "Replay the steps of answers from CUDA graphs, recorded as they are needed. Default: on a GPU."
    )
    pack_weights: bool | None = opt(
        None,
        "Hold a second copy of the weights that several answers at once are faster with; float32 on a CPU gains. "
        "Default: where memory allows it.",
    )

    def __post_init__(self) -> None:
        _require(self.max_num_seqs > 0, "max_num_seqs", self.max_num_seqs, "a number above 0")
        _require(_unset_or(self.max_model_len, lambda n: n > 1), "max_model_len", self.max_model_len, "2 or more")
        _require(_unset_or(self.max_queue, lambda n: n >= 0), "max_queue", self.max_queue, "a number from 0")
        _require(0 < self.max_request_mib <= 4096, "max_request_mib", self.max_request_mib, "a number above 0")
        names = [module.partition("=")[0] for module in self.lora_modules]
        for module, name in zip(self.lora_modules, names, strict=True):
            if not name or not module.partition("=")[2] or names.count(name) > 1:
                raise MMToolError(f"--lora_modules {module} is not NAME=FOLDER", "Give each adapter a name of its own.")


@dataclass(kw_only=True)
class RequestMediaArgs:
    """Pictures and sounds of requests"""

    allowed_local_media_path: str | None = opt(
        None, "Folder whose files requests may name as file:// URLs. Default: none.", metavar="FOLDER"
    )
    allowed_media_domains: list[str] = opt(
        [], "Hosts that may be asked for media, such as *.example.com. Default: every public one.", metavar="HOST ..."
    )
    allowed_media_schemes: list[str] = opt(["https"], "URLs that are fetched: https, http.", metavar="SCHEME ...")
    allow_private_media: bool = opt(
        False, "The hosts of --allowed_media_domains may be on this machine or in its network."
    )
    max_media_per_request: int = opt(16, "Most pictures and sounds in a request.")
    max_media_mib: float = opt(20.0, "Largest picture or sound, in MiB.")
    max_pixels: int = opt(50_000_000, "Largest picture, width times height.")
    media_timeout: float = opt(10.0, "Seconds for a download, from looking up the name to the last byte.")

    def __post_init__(self) -> None:
        for scheme in self.allowed_media_schemes:
            if scheme not in ("http", "https"):
                raise MMToolError(f"--allowed_media_schemes {scheme}: not a scheme to fetch from", "Use https or http.")
        if self.allow_private_media and not self.allowed_media_domains:
            raise MMToolError(
                "--allow_private_media true needs --allowed_media_domains", "Name the hosts that may be asked."
            )
        count = self.max_media_per_request
        _require(count >= 0, "max_media_per_request", count, "a number from 0")
        _require(0 < self.max_media_mib <= 4096, "max_media_mib", self.max_media_mib, "a number above 0")
        _require(self.max_pixels > 0, "max_pixels", self.max_pixels, "a number above 0")
        _require(0 < self.media_timeout <= 3600, "media_timeout", self.media_timeout, "a number above 0")


@dataclass(kw_only=True)
class ServeArgs(CommandArgs):
    """Engine"""

    model: ModelArgs = field(default_factory=ModelArgs)
    checkpoint: TunedArgs = field(default_factory=TunedArgs)
    template: PromptArgs = field(default_factory=PromptArgs)
    generation: SamplingArgs = field(default_factory=SamplingArgs)
    server: ServerArgs = field(default_factory=ServerArgs)
    capacity: CapacityArgs = field(default_factory=CapacityArgs)
    media: RequestMediaArgs = field(default_factory=RequestMediaArgs)
    vllm: VllmArgs = field(default_factory=VllmArgs)
    infer_backend: Literal["AUTO", "pt", "vllm"] = opt(
        "AUTO", "Engine that generates: pt is mmtool's own, which AUTO takes as well; vllm needs that package."
    )

    def __post_init__(self) -> None:
        if self.capacity.lora_modules and self.checkpoint.ckpt_dir is not None and not self.checkpoint.merge_lora:
            raise MMToolError(
                "--lora_modules and --ckpt_dir exclude each other",
                "Add --merge_lora true, or give the checkpoint to --lora_modules as well.",
            )
        self.vllm.check_backend(self.infer_backend, self.model, self.checkpoint.merge_lora)


@dataclass(kw_only=True)
class ListArgs:
    """What to list"""

    table: Literal["models", "templates", "datasets"] = opt("models", "Which table.", positional=True)
    json: bool = opt(False, "Print JSON instead of a table.")
    explicit: frozenset[str] = frozenset()


# What `docs/generate.py` writes tables of; the keys are the names of the commands.
COMMANDS: dict[str, type] = {"infer": InferArgs, "sft": SftArgs, "export": ExportArgs, "serve": ServeArgs}
COMMANDS |= {"list": ListArgs}
