"""Quantisation with a whole model in memory: GPTQ and AWQ through llm-compressor, which look at rows.

What llm-compressor makes is stored as torchao's weights are, so that it loads and runs in the same way.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmtool.errors import MMToolError
from mmtool.export import awq
from mmtool.export.merge_lora import Adapter
from mmtool.export.quantise import WeightQuantiser
from mmtool.export.rows import Rows
from mmtool.export.shards import Entry
from mmtool.finetuned import attach_adapter
from mmtool.log import get_logger
from mmtool.models.common.quantised import Numbers

logger = get_logger(__name__)

PACKAGES = {"bnb": "bitsandbytes", "gptq": "llmcompressor", "awq": "llmcompressor"}
_TALKATIVE = ("LLM_COMPRESSOR_LOG_LEVEL", "COMPRESSED_TENSORS_LOG_LEVEL")
_EXTRAS = {"bitsandbytes": "quant", "llmcompressor": "compress"}


def check_library(method: str) -> None:
    """Raise MMToolError where the package of a method is missing."""
    package = PACKAGES[method]
    if importlib.util.find_spec(package) is None:
        raise MMToolError(
            f"--quant_method {method} needs the package {package}", f"pip install 'mmtool[{_EXTRAS[package]}]'"
        )


class Calibrated(WeightQuantiser):
    """Weights that a library has rounded, and all others as it left them.

    Attributes:
        names: every parameter of the network: AWQ moves factors from one into another.
    """

    keeps_tie = True

    def calibrate(self, model: Any, method: str, layers: Mapping[str, nn.Linear], rows: Rows) -> None:
        """Let llm-compressor round the layers of a model with what it sees of some rows.

        Raises:
            MMToolError: where it cannot.
        """
        for name in _TALKATIVE:  # lines per layer; what counts stands in our table
            os.environ.setdefault(name, "ERROR")  # they read it several times, and set their loggers up anew
        from llmcompressor import oneshot

        logger.info("calibrating on %d %s", len(rows.encoded), rows.origin)
        batches = [rows.template.collate([row]) for row in rows.encoded]
        for batch in batches:
            batch.pop("labels", None)
        self._model = model.eval()
        self._parameters = dict(model.named_parameters())
        self.names = frozenset(self._parameters)
        try:
            oneshot(
                model=model,
                processor=rows.template.processor,  # not used, but looked for in the hub where none is given
                dataset=torch.utils.data.DataLoader(batches, batch_size=None),
                recipe=self._recipe(model, method, layers),
                pipeline="basic",
                num_calibration_samples=len(batches),
            )
        except (ValueError, RuntimeError) as error:
            first = " ".join(str(error).split())[:300]
            raise MMToolError(
                f"--quant_method {method}: llm-compressor cannot quantise this model: {first}",
                "Use --quant_method torchao, which needs no calibration.",
            ) from error
        self._parameters = dict(model.named_parameters())

    def _recipe(self, model: Any, method: str, layers: Mapping[str, nn.Linear]) -> list[Any]:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor.modifiers.quantization import GPTQModifier

        by_size: dict[int, list[str]] = {}
        for name in layers:
            size = self.group_sizes.get(f"{name}.weight")
            if size is not None:
                by_size.setdefault(size, []).append(name)
        groups = {
            f"group_{size}": QuantizationScheme(
                targets=names,
                weights=QuantizationArgs(
                    num_bits=self.bits, type="int", symmetric=self.bits == 8, strategy="group", group_size=size
                ),
            )
            for size, names in by_size.items()
        }
        if method == "awq":
            return awq.modifiers(model, groups)
        return [GPTQModifier(config_groups=groups, ignore=[])]

    def merged(self, name: str, read: Callable[[], Tensor]) -> Tensor:
        """Return a weight as the library left it; ``read`` is not needed."""
        return self._parameters[name].detach().float().cpu()

    def entries(self, name: str, parameter: str, shape: torch.Size, read: Callable[[], Tensor]) -> list[Entry]:
        """Return what is stored of a matrix."""
        return self.pieces(name, parameter, shape, lambda: self._numbers(parameter))

    def _numbers(self, parameter: str) -> Numbers:
        """Return a rounded matrix as whole numbers."""
        layer = self._model.get_submodule(parameter.rpartition(".")[0])
        size = self.group_sizes[parameter]
        scale = layer.weight_scale.detach().float().cpu()
        zero = torch.zeros_like(scale) if self.bits == 8 else layer.weight_zero_point.detach().float().cpu()
        lowest, highest = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        exact = layer.weight.detach().float().cpu() / scale.repeat_interleave(size, dim=1)
        data = (exact + zero.repeat_interleave(size, dim=1)).round().clamp(lowest, highest)
        return Numbers(data.to(torch.int8), scale, zero.to(torch.int8), self.bits)


def with_adapters(model: Any, adapters: Sequence[Adapter]) -> Any:
    """Return a model with its adapter folded in.

    Raises:
        MMToolError: for several adapters.
    """
    if not adapters:
        return model
    if len(adapters) > 1 or adapters[0].weight != 1:
        raise MMToolError(
            "this --quant_method takes one adapter", "Merge them first, and quantise what comes out: --ckpt_dir FOLDER."
        )
    return attach_adapter(model, adapters[0].folder, merge=True)
