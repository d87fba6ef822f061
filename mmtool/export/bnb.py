"""Quantise weights one at a time with bitsandbytes, into the files that transformers has for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from mmtool.errors import MMToolError
from mmtool.export.layout import Release
from mmtool.export.quantise import WeightQuantiser
from mmtool.export.shards import Entry
from mmtool.groups.export import QuantArgs
from mmtool.models.common.bnb import BLOCK, ROWS, eight_bits, four_bit_shapes, four_bits

_REPLACED = (nn.Linear, Conv1D)  # layers that transformers makes one of bitsandbytes of, where nothing says otherwise


class BitsAndBytes(WeightQuantiser):
    """Which matrices bitsandbytes rounds: NF4 with scales that are rounded themselves, or 8 bits."""

    def __init__(self, release: Release, layers: Mapping[str, nn.Linear], given: QuantArgs, dtype: torch.dtype) -> None:
        """Choose layers.

        Args:
            release: what is quantised.
            layers: what is asked for.
            given: the options.
            dtype: what the other weights are stored in, and matrices of 4 bits are computed back to.

        Raises:
            MMToolError: where nothing is left to quantise.
        """
        self.bits, self._dtype = int(given.quant_bits), dtype
        stored = {item.parameter for item in release.tensors}
        fits = {
            name: layer
            for name, layer in layers.items()
            if f"{name}.weight" in stored
            and (self.bits == 8 or (layer.in_features % BLOCK == 0 and layer.out_features % ROWS == 0))
        }
        self._skipped = _skipped(release.network, fits)
        self.left = [name for name in layers if name not in fits]
        self.group_sizes = {
            f"{name}.weight": layer.in_features if self.bits == 8 else BLOCK for name, layer in fits.items()
        }
        if not fits:
            raise MMToolError(
                f"no layer can be quantised: bitsandbytes wants widths in steps of {BLOCK}",
                "Use --quant_bits 8, or --quant_method torchao.",
            )
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def entries(self, name: str, parameter: str, shape: torch.Size, read: Callable[[], Tensor]) -> list[Entry]:
        """Return what is stored of a matrix."""
        if self.bits == 4:
            return [
                Entry(f"{name}{end}", size, dtype, lambda end=end: self._four(name, read)[end])
                for end, (size, dtype) in four_bit_shapes(shape).items()
            ]
        prefix = name.removesuffix("weight")
        return [
            Entry(f"{prefix}SCB", shape[:1], torch.float32, lambda: eight_bits(read())[1]),
            Entry(name, shape, torch.int8, lambda: eight_bits(read())[0]),
            Entry(f"{prefix}weight_format", torch.Size([]), torch.uint8, lambda: torch.zeros((), dtype=torch.uint8)),
        ]

    def _four(self, name: str, read: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Return the pieces of a matrix; those of the last one are kept, as they are asked for one after the other."""
        if self._last[0] != name:
            self._last = (name, four_bits(read(), self._dtype))
        return self._last[1]

    def describe(self, config: dict[str, Any]) -> None:
        """Note in a ``config.json`` how the weights are stored."""
        keywords: dict[str, Any] = {"load_in_8bit": True}
        if self.bits == 4:
            keywords = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
            keywords["bnb_4bit_compute_dtype"] = self._dtype
        config["quantization_config"] = BitsAndBytesConfig(**keywords, llm_int8_skip_modules=self._skipped).to_dict()


def _skipped(network: Any, chosen: dict[str, nn.Linear]) -> list[str]:
    """Return names that keep transformers from quantising more than ``chosen``: whole modules where that says it.

    A layer whose name no such list can part from a skipped one is taken out of ``chosen``.
    """
    while True:
        inside = {name.rsplit(".", depth)[0] for name in chosen for depth in range(name.count(".") + 1)}
        names: dict[str, None] = {}
        for name, module in network.named_modules():
            if isinstance(module, _REPLACED) and name not in chosen:
                levels = name.split(".")
                prefixes = (".".join(levels[:depth]) for depth in range(1, len(levels) + 1))
                names[next(prefix for prefix in prefixes if prefix not in inside)] = None
        patterns = [*names, *(network._keep_in_fp32_modules or ())]
        lost = [name for name in chosen if not should_convert_module(name, patterns)]
        if not lost:
            return list(names)
        for name in lost:
            del chosen[name]
