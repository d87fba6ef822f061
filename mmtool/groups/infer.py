"""Options of `mmtool infer` alone: one question, a dataset, a checkpoint."""

from dataclasses import dataclass
from typing import Any, Literal

from mmtool.errors import MMToolError
from mmtool.groups.checks import require, unset_or
from mmtool.groups.model import TunedArgs, VllmArgs
from mmtool.options import opt


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
    val_dataset_sample: int | None = opt(
        None, "Answer only this many rows from the start; -1 means all.", aliases=("show_dataset_sample",)
    )
    dataset_format: str | None = opt(None, "Format of the rows. Default: told from the row itself.", metavar="NAME")
    columns: dict[str, Any] | None = opt(None, 'Rename columns, such as {"question": "query"}.', metavar="JSON")
    media_root: str | None = opt(None, "Folder that relative media paths start from.", metavar="FOLDER")
    max_batch_size: int = opt(1, "Most rows answered at the same time.")
    result_path: str | None = opt(
        None,
        "File the answers go to, one line of JSON per row. Default: DATASET.MODEL_TYPE.jsonl (or "
        "DATASET.CHECKPOINT.jsonl) in this folder.",
        metavar="FILE",
    )
    resume: bool = opt(False, "Go on with a result file that an earlier run left unfinished.")
    overwrite: bool = opt(False, "Replace an existing result file.")
    on_error: Literal["skip", "stop"] = opt("skip", "What to do at a row that cannot be used.")

    def __post_init__(self) -> None:
        if self.val_dataset_sample == -1:
            self.val_dataset_sample = None
        sample = self.val_dataset_sample
        require(sample is None or sample > 0, "val_dataset_sample", sample, "a number above 0, or -1 for all")
        require(self.max_batch_size > 0, "max_batch_size", self.max_batch_size, "a number above 0")
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
class InferVllmArgs(VllmArgs):
    """vLLM (with --infer_backend vllm)"""

    max_model_len: int | None = opt(None, "Most positions of a prompt and its answer. Default: the model's own limit.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(unset_or(self.max_model_len, lambda n: n > 1), "max_model_len", self.max_model_len, "2 or more")
