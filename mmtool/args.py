"""The commands: which groups of options each has, and the checks that need more than one group.

Arguments are data: checks that need no file, model or network live here and in ``groups``, everything else in the
``*_main`` functions. ``options.py`` makes command line, YAML and docs of them.
"""

from dataclasses import dataclass, field
from typing import Literal

from mmtool.errors import MMToolError
from mmtool.groups.export import ExportModelArgs, ExportOutputArgs, ExportSourceArgs, PushArgs, QuantArgs
from mmtool.groups.infer import CheckpointArgs, InferDataArgs, InferVllmArgs, InputArgs
from mmtool.groups.model import ModelArgs, TunedArgs, VllmArgs
from mmtool.groups.prompt import GenerationArgs, PromptArgs, SamplingArgs, TemplateArgs
from mmtool.groups.serve import CapacityArgs, RequestMediaArgs, ServerArgs
from mmtool.groups.sft import DeviceArgs, PartArgs, RunArgs, SftDataArgs, TrainArgs, TunerArgs
from mmtool.options import opt


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
        if self.quant.quant_method == "bnb" and self.quant.quant_group_size is not None:
            raise MMToolError(
                f"--quant_group_size {self.quant.quant_group_size}: the groups of bitsandbytes are fixed",
                "Leave it out, or use --quant_method torchao.",
            )

    @property
    def writes(self) -> bool:
        """Whether a folder is written; else one is only uploaded."""
        output = self.output.to_safetensors or self.output.to_gguf or self.quant.quant_method is not None
        return self.source.merge_lora or output or self.model.dtype != "AUTO"


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
