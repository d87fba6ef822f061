"""Options of the model: which one, what `mmtool sft` left, and the engine on vLLM."""

from dataclasses import dataclass
from typing import Any, Literal

from mmtool.errors import MMToolError
from mmtool.groups.checks import require, unset_or
from mmtool.options import opt

DTYPE_WORDS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""What torch calls the number formats."""


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
        same=DTYPE_WORDS,
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
class VllmArgs:
    """vLLM (with --infer_backend vllm)"""

    tensor_parallel_size: int = opt(1, "GPUs that share the model.")
    gpu_memory_utilization: float | None = opt(None, "Share of a GPU's memory to take. Default: vLLM's own.")
    vllm_args: dict[str, Any] | None = opt(
        None, 'More settings of vLLM, by their names in its EngineArgs, as in {"enforce_eager": true}.', metavar="JSON"
    )

    def __post_init__(self) -> None:
        share = self.gpu_memory_utilization
        require(self.tensor_parallel_size > 0, "tensor_parallel_size", self.tensor_parallel_size, "a number above 0")
        valid = unset_or(share, lambda x: 0 < x <= 1)
        require(valid, "gpu_memory_utilization", share, "a number above 0, at most 1")

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
