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

    def __post_init__(self) -> None:
        if self.model_type is None and self.model_id_or_path is None:
            self.model_type = "tiny"


@dataclass(kw_only=True)
class TemplateArgs:
    """Prompt"""

    system: str | None = opt(None, "System text. Default: the template's own; an empty text means none.")
    max_length: int | None = opt(
        None, "Most positions of the conversation before the answer; a picture counts those it takes."
    )
    truncation_strategy: Literal["delete", "truncation_left", "raise"] = opt(
        "delete",
        "A conversation over --max_length: drop the row, cut its oldest positions (never inside a picture), or stop.",
    )
    show_prompt: bool = opt(False, "Print what the model really sees, with media spans and control tokens, to stderr.")

    def __post_init__(self) -> None:
        _require(self.max_length is None or self.max_length > 0, "max_length", self.max_length, "a number above 0")


@dataclass(kw_only=True)
class GenerationArgs:
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
    stream: bool = opt(True, "Print the answer while it is being made.")

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
class InferArgs(CommandArgs):
    """Engine"""

    model: ModelArgs = field(default_factory=ModelArgs)
    template: TemplateArgs = field(default_factory=TemplateArgs)
    generation: GenerationArgs = field(default_factory=GenerationArgs)
    input: InputArgs = field(default_factory=InputArgs)
    data: InferDataArgs = field(default_factory=InferDataArgs)
    infer_backend: Literal["AUTO", "pt"] = opt("AUTO", "Engine that generates; AUTO takes the one that fits.")

    def __post_init__(self) -> None:
        if self.input.query is not None and self.data.val_dataset is not None:
            raise MMToolError("--query and --val_dataset exclude each other", "Leave one of them out.")


@dataclass(kw_only=True)
class ListArgs:
    """What to list"""

    table: Literal["models", "templates", "datasets"] = opt("models", "Which table.", positional=True)
    json: bool = opt(False, "Print JSON instead of a table.")
    explicit: frozenset[str] = frozenset()


# What `docs/generate.py` writes tables of; the keys are the names of the commands.
COMMANDS: dict[str, type] = {"infer": InferArgs, "list": ListArgs}
