"""Options of `mmtool export` alone: the source, what is written, quantisation, publishing."""

from dataclasses import dataclass
from typing import Literal

from mmtool.errors import MMToolError
from mmtool.groups.checks import require
from mmtool.groups.model import DTYPE_WORDS, ModelArgs
from mmtool.options import opt


@dataclass(kw_only=True)
class ExportModelArgs(ModelArgs):
    """Model"""

    dtype: Literal["AUTO", "fp32", "bf16", "fp16"] = opt(
        "AUTO",
        "Number format of the written weights; AUTO keeps that of the model.",
        aliases=("torch_dtype",),
        same=DTYPE_WORDS,
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
        None,
        "Folder to write. Default: the source's with -merged, -bf16, -torchao-int8 and so on.",
        metavar="FOLDER",
        aliases=("quant_output_dir",),
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
        require(self.quant_n_samples > 0, "quant_n_samples", self.quant_n_samples, "a number above 0")
        require(self.quant_seqlen > 0, "quant_seqlen", self.quant_seqlen, "a number above 0")
        size = self.quant_group_size
        require(size is None or size > 0 or size == -1, "quant_group_size", size, "a number above 0, or -1 for a row")


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
