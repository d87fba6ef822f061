"""One .gguf file for llama.cpp: the matrices of a language model, its numbers and its tokenizer, through ``gguf``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtool.errors import MMToolError
from mmtool.export.convert import MAIN, reader
from mmtool.export.gguf_tokenizer import write_tokenizer
from mmtool.export.layout import Release
from mmtool.export.merge_lora import MergedWeights
from mmtool.export.progress import Progress
from mmtool.models.common.gguf import GGUFLayout, not_representable
from mmtool.spec import ModelSpec
from mmtool.utils import import_object

_ITEM_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
_BLOCK = 32  # of q8_0


def gguf_layout(spec: ModelSpec, config: Any) -> GGUFLayout:
    """Return how llama.cpp takes a model.

    Raises:
        MMToolError: where it cannot, with the reason; where ``gguf`` is not installed.
    """
    if spec.modalities:
        takes = " and ".join(spec.modalities)
        raise not_representable(
            f"{spec.model_type} takes {takes}: a .gguf file holds a language model alone, and llama.cpp has no tower "
            "and no projector of this family"
        )
    if spec.gguf is None:
        raise not_representable(f"llama.cpp has no model with the maths of {spec.model_type}")
    if importlib.util.find_spec("gguf") is None:
        raise MMToolError("--to_gguf true needs the package gguf", "pip install 'mmtool[gguf]'")
    return import_object(spec.gguf)(config)


@dataclass(frozen=True)
class Matrix:
    """A tensor of the file: its name there, shape, and what makes it in float32."""

    name: str
    shape: torch.Size
    read: Callable[[], Tensor]


def matrices(release: Release, layout: GGUFLayout, merged: MergedWeights | None) -> list[Matrix]:
    """Return the tensors of the file.

    Raises:
        MMToolError: for a parameter that llama.cpp's model does not have.
    """
    import gguf

    architecture = gguf.MODEL_ARCH[layout.architecture]
    names = gguf.get_tensor_name_map(architecture, release.network.config.num_hidden_layers)
    embedding, head = release.tied_names
    changes = merged.names if merged is not None else frozenset()
    untied = release.is_tied and bool({embedding, head} & changes)
    found: list[Matrix] = []
    for item in release.tensors:
        if item.group != MAIN or item.parameter is None or (item.parameter == head and release.is_tied):
            continue
        parameter = item.parameter
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise not_representable(f"llama.cpp's {layout.architecture} has nothing for {parameter}")
        read = reader(parameter, item.tensor, merged if parameter in changes else None)
        found.append(Matrix(name, item.tensor.shape, _changed(layout, parameter, read)))
        if parameter == embedding and release.is_tied and (untied or layout.own_head):
            read = reader(head, item.tensor, merged if head in changes else None)
            found.append(Matrix("output.weight", item.tensor.shape, _scaled(read, layout.head_factor)))
        elif parameter == head and layout.head_factor != 1.0:
            found[-1] = Matrix(name, item.tensor.shape, _scaled(read, layout.head_factor))
    if layout.rope_factors is not None:
        factors = torch.tensor(layout.rope_factors)
        for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
            found.append(Matrix(name, factors.shape, lambda: factors))
    return found


def _changed(layout: GGUFLayout, parameter: str, read: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: layout.changed(parameter, read())


def _scaled(read: Callable[[], Tensor], factor: float) -> Callable[[], Tensor]:
    return lambda: read() * factor


def file_size(found: list[Matrix], kind: str) -> int:
    """Return about how many bytes the tensors take."""
    return int(sum(matrix.shape.numel() * _ITEM_BYTES[_kind_of(matrix, kind)] for matrix in found))


def _kind_of(matrix: Matrix, kind: str) -> str:
    if len(matrix.shape) < 2:  # norms, biases, factors
        return "f32"
    return "f16" if kind == "q8_0" and matrix.shape[-1] % _BLOCK else kind


def write_gguf(
    path: Path, name: str, layout: GGUFLayout, found: list[Matrix], processor: Any, template: Any, kind: str
) -> None:
    """Write the file, one tensor in memory at a time.

    Args:
        path: the file.
        name: of the model, for people.
        layout: its numbers.
        found: its tensors.
        processor: has the tokenizer.
        template: knows what ends an answer.
        kind: number format of matrices.
    """
    import gguf

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[layout.architecture]])
    writer.add_name(name)
    writer.add_file_type(_file_type(gguf, kind))
    for key, value in layout.numbers.items():
        if key == "rope_scaling_type":
            value = gguf.RopeScalingType(value)
        getattr(writer, f"add_{key}")(value)
    write_tokenizer(writer, processor.tokenizer, template, layout.numbers["vocab_size"])
    types = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
    for matrix in found:
        quantised = gguf.GGMLQuantizationType[types[_kind_of(matrix, kind)]]
        shape = gguf.quant_shape_to_byte_shape(matrix.shape, quantised)
        if quantised in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            dtype = np.dtype(np.float32 if quantised == gguf.GGMLQuantizationType.F32 else np.float16)
            size = matrix.shape.numel() * dtype.itemsize
            writer.add_tensor_info(matrix.name, tuple(matrix.shape), dtype, size)
        else:
            writer.add_tensor_info(matrix.name, shape, np.dtype(np.uint8), int(np.prod(shape)), quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with Progress("writing .gguf", len(found)) as progress:
        for matrix in found:
            quantised = gguf.GGMLQuantizationType[types[_kind_of(matrix, kind)]]
            writer.write_tensor_data(gguf.quantize(matrix.read().contiguous().numpy(), quantised))
            progress.advance()
    writer.close()


def _file_type(gguf: Any, kind: str) -> Any:
    names = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    return gguf.LlamaFileType[names[kind]]
