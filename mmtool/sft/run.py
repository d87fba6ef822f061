"""One run of `mmtool sft`: what is known of it before the weights load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtool.args import SftArgs
from mmtool.sft.ranks import Ranks
from mmtool.spec import ModelSpec

ROWS_PER_STEP = 16


@dataclass(frozen=True)
class Run:
    """What trains, where, and in which processes.

    Attributes:
        args: the options.
        spec: the model.
        weights: the folder with its weights.
        folder: where the run writes.
        resumed: the checkpoint that it goes on from, if any.
        ranks: the processes.
        use_cpu: train on the CPU though there may be a GPU.
        deepspeed: DeepSpeed's configuration, if it is used.
    """

    args: SftArgs
    spec: ModelSpec
    weights: Path
    folder: Path
    resumed: Path | None
    ranks: Ranks
    use_cpu: bool
    deepspeed: dict[str, Any] | None

    @property
    def sharded(self) -> bool:
        """Whether a process holds only pieces of the weights."""
        stage = (self.deepspeed or {}).get("zero_optimization", {}).get("stage", 0)
        return int(stage) == 3 or self.args.devices.fsdp is not None

    @property
    def accumulation(self) -> int:
        """How many passes make a step: enough for 16 rows, unless said; one for the embedded model."""
        given = self.args.train.gradient_accumulation_steps
        if given is not None:
            return given
        rows_per_pass = self.args.train.batch_size * self.ranks.world_size
        return 1 if self.spec.embedded is not None else max(1, -(-ROWS_PER_STEP // rows_per_pass))
