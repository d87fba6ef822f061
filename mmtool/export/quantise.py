"""Quantise weights one at a time with torchao: nothing has to be calibrated, and no whole model is in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmtool.errors import MMToolError
from mmtool.export.shards import Entry
from mmtool.export.table import format_size
from mmtool.groups.export import QuantArgs
from mmtool.loader import fit_layout
from mmtool.models.common.quantised import CONFIG_KEY, DATA, SCALE, ZERO, Numbers, load_torchao, pack, quantise
from mmtool.sft.parts import PartNames
from mmtool.spec import ModelSpec
from mmtool.utils import did_you_mean

GROUP_SIZES = (128, 64, 32)
WHOLE_ROW = -1


def linear_layers(
    network: Any, spec: ModelSpec, parts: Sequence[str], left_out: Sequence[str] = ()
) -> dict[str, nn.Linear]:
    """Return the linear layers of some parts by name, without the head.

    Args:
        network: the network.
        spec: its model type.
        parts: names of parts; the language model if empty.
        left_out: names of layers, or parts of names between dots (``down_proj``, ``layers.0``), that are left out.

    Raises:
        MMToolError: for a part or a layer that does not exist, or where there is none.
    """
    layout = fit_layout(spec, network).parts
    wanted = list(parts) or ["llm"]
    for part in wanted:
        if part not in layout:
            hint = did_you_mean(part, layout, f"There are {', '.join(layout)}.")
            raise MMToolError(f"--quant_parts {part}: this model has no such part", hint)
    part_of, head = PartNames(layout), network.get_output_embeddings()
    found = {
        name: module
        for name, module in network.named_modules()
        if type(module) is nn.Linear and module is not head and part_of(name) in wanted
    }
    if not found:
        raise MMToolError(
            f"no layer can be quantised: {', '.join(wanted)} of this model has no plain linear layers",
            "It can be exported as it is, with --dtype bf16 or fp16.",
        )
    for word in left_out:
        hits = [name for name in found if f".{word}." in f".{name}."]
        if not hits:
            ends = dict.fromkeys(name.rpartition(".")[2] for name in found)
            hint = did_you_mean(word, ends, f"There are {', '.join(ends)}.")
            raise MMToolError(f"--quant_modules_to_not_convert {word} fits no layer that would be quantised", hint)
        found = {name: module for name, module in found.items() if name not in hits}
    return found


class WeightQuantiser:
    """Which matrices are rounded, and how.

    Attributes:
        bits: per weight.
        group_sizes: columns that share a scale, by parameter.
        left: layers whose width no group size divides; they stay as they are.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], given: QuantArgs, dtype: torch.dtype) -> None:
        """Choose group sizes; ``dtype`` is that of scales.

        Raises:
            MMToolError: where torchao is missing, or nothing is left to quantise.
        """
        load_torchao()
        self.bits, self._dtype = int(given.quant_bits), dtype
        chosen = {name: self._group_size(module.in_features, given) for name, module in layers.items()}
        self.left = [name for name, size in chosen.items() if size is None]
        self.group_sizes = {f"{name}.weight": size for name, size in chosen.items() if size is not None}
        if not self.group_sizes:
            raise MMToolError(
                "no layer can be quantised: no group size divides their widths", "Give another --quant_group_size."
            )

    def _group_size(self, width: int, given: QuantArgs) -> int | None:
        asked = given.quant_group_size
        if asked == WHOLE_ROW or (asked is None and self.bits == 8):
            return width if self.bits == 8 or width % 2 == 0 else None
        sizes = GROUP_SIZES if asked is None else (asked,)
        return next((size for size in sizes if width % size == 0 and size % 2 == 0), None)

    def entries(self, name: str, parameter: str, shape: torch.Size, read: Callable[[], Tensor]) -> list[Entry]:
        """Return what is stored of a matrix; each piece is computed anew when its turn comes."""
        size = self.group_sizes[parameter]
        return self.pieces(name, parameter, shape, lambda: quantise(read(), self.bits, size))

    def pieces(self, name: str, parameter: str, shape: torch.Size, numbers: Callable[[], Numbers]) -> list[Entry]:
        """Return the entries of a matrix that ``numbers`` gives."""
        rows, columns = shape
        groups = torch.Size([rows, columns // self.group_sizes[parameter]])
        scale = Entry(f"{name}{SCALE}", groups, self._dtype, lambda: numbers().scale)
        if self.bits == 8:
            return [Entry(f"{name}{DATA}", shape, torch.int8, lambda: numbers().data), scale]
        packed = torch.Size([rows, columns // 2])
        return [
            Entry(f"{name}{DATA}", packed, torch.uint8, lambda: pack(numbers().data)),
            scale,
            Entry(f"{name}{ZERO}", groups, torch.int8, lambda: numbers().zero),
        ]

    def rows(self, before: int, after: int) -> list[tuple[str, str]]:
        """Return rows for the table; sizes are bytes of all weights."""
        sizes = sorted(set(self.group_sizes.values()))
        shared = "a scale per row" if self.bits == 8 and len(sizes) > 1 else f"a scale per {sizes[0]} weights"
        if len(sizes) > 1 and self.bits != 8:
            shared = f"a scale per {sizes[0]} to {sizes[-1]} weights"
        found = [("quantised", f"{len(self.group_sizes)} layers to {self.bits} bits, {shared}")]
        if self.left:
            found.append(("left", f"{len(self.left)} layers whose width fits no group, such as {self.left[0]}"))
        return [*found, ("size", f"{format_size(after)} of {format_size(before)}, {100 * after / before:.0f} %")]

    def describe(self, config: dict[str, Any]) -> None:
        """Note in a ``config.json`` how the weights are stored."""
        config[CONFIG_KEY] = {"method": "torchao", "bits": self.bits}
