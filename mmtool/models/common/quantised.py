"""Weights in 4 or 8 bits as `mmtool export --quant_method torchao` stores them, and as torchao's tensors in memory.

A matrix ``X.weight`` is stored as ``X.weight_qdata`` (whole numbers; two of 4 bits share a byte, the even column in the
low half), ``X.weight_scale`` (one per row and group of columns) and, for 4 bits, ``X.weight_zero``: a weight is
``(number - zero) * scale``. ``mmtool_quantization`` in ``config.json`` tells the bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmtool.errors import MMToolError

if TYPE_CHECKING:
    from mmtool.models.common.weights import LazyTensor

CONFIG_KEY = "mmtool_quantization"
DATA, SCALE, ZERO = "_qdata", "_scale", "_zero"
INSTALL = "pip install 'mmtool[quant]'"
# What the kernel for 4 bits on the CPU takes: groups of so many columns, rows in such steps.
_KERNEL_GROUPS, _KERNEL_ROWS = (32, 64, 128), 32
_FOUR_BITS = torch.uint8  # what two numbers share; a number of 8 bits is an int8


@dataclass(frozen=True)
class Numbers:
    """A quantised matrix: whole numbers ``(rows, columns)`` int8, scales and zeros ``(rows, groups)``."""

    data: Tensor
    scale: Tensor
    zero: Tensor
    bits: int


@dataclass(frozen=True)
class QuantisedTensor:
    """A quantised matrix in a file; has what ``LazyTensor`` has for those who load it.

    Attributes:
        data, scale, zero: its pieces; ``zero`` is None where all are 0.
        dtype: what it is multiplied in.
    """

    data: LazyTensor
    scale: LazyTensor
    zero: LazyTensor | None
    dtype: torch.dtype

    @property
    def bits(self) -> int:
        """Bits per weight."""
        return 4 if self.data.stored_dtype == _FOUR_BITS else 8

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix."""
        rows, columns = self.data.shape
        return torch.Size([rows, columns * 2 if self.bits == 4 else columns])

    @property
    def stored_dtype(self) -> torch.dtype:
        """Number format of the scales."""
        return self.scale.stored_dtype

    @property
    def path(self) -> Any:
        """The file."""
        return self.data.path

    @property
    def offset(self) -> int:
        """Byte where the numbers start."""
        return self.data.offset

    def astype(self, dtype: torch.dtype) -> QuantisedTensor:
        """Return the same matrix, multiplied in ``dtype``."""
        return replace(self, dtype=dtype)

    def numbers(self) -> Numbers:
        """Read the pieces."""
        data, scale = self.data.read(), self.scale.astype(self.dtype).read()
        if self.bits == 4:
            data = unpack(data)
        zero = torch.zeros(scale.shape, dtype=torch.int8) if self.zero is None else self.zero.read()
        return Numbers(data, scale, zero, self.bits)

    def read(self) -> Tensor:
        """Return the matrix as a tensor of torchao."""
        return as_torchao(self.numbers())

    def __getitem__(self, index: Any) -> Tensor:
        """Return ``read()``; transformers asks for ``[...]``, which is all of it."""
        assert index is Ellipsis, "a quantised matrix is read as a whole"
        return self.read()


def join_pieces(tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """Return stored tensors by name, those that belong to one quantised matrix as one ``QuantisedTensor``."""
    joined: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name.endswith(DATA) and f"{name.removesuffix(DATA)}{SCALE}" in tensors:
            whole = name.removesuffix(DATA)
            scale = tensors[f"{whole}{SCALE}"]
            joined[whole] = QuantisedTensor(tensor, scale, tensors.get(f"{whole}{ZERO}"), scale.stored_dtype)
    pieces = {f"{name}{end}" for name in joined for end in (DATA, SCALE, ZERO)}
    return {name: tensor for name, tensor in tensors.items() if name not in pieces} | joined


def quantise(weight: Tensor, bits: int, group_size: int) -> Numbers:
    """Round a matrix ``(rows, columns)`` to whole numbers, ``group_size`` columns with one scale.

    8 bits are rounded around 0, 4 bits around the middle of each group.
    """
    torchao = load_torchao()
    mapping = torchao.MappingType.SYMMETRIC if bits == 8 else torchao.MappingType.ASYMMETRIC
    made = torchao.IntxUnpackedToInt8Tensor.from_hp(
        weight, block_size=(1, group_size), target_dtype=getattr(torch, f"int{bits}"), mapping_type=mapping
    )
    return Numbers(made.qdata, made.scale, made.zero_point.to(torch.int8), bits)


def pack(data: Tensor) -> Tensor:
    """Put whole numbers from -8 to 7, ``(rows, columns)`` int8, two into a byte; ``columns`` is even."""
    shifted = (data + 8).to(torch.uint8)
    return shifted[:, 0::2] | (shifted[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Undo ``pack``."""
    pairs = torch.stack([packed & 15, packed >> 4], dim=-1)
    return pairs.flatten(-2).to(torch.int8) - 8


def as_torchao(numbers: Numbers) -> Tensor:
    """Return a quantised matrix as a tensor of torchao that any device takes."""
    torchao = load_torchao()
    columns = numbers.data.shape[1]
    groups, dtype = numbers.scale.shape[1], numbers.scale.dtype
    if numbers.bits == 8 and groups == 1:
        return torchao.Int8Tensor(numbers.data, numbers.scale, block_size=[1, columns], dtype=dtype)
    kind, block = getattr(torch, f"int{numbers.bits}"), (1, columns // groups)
    return torchao.IntxUnpackedToInt8Tensor(numbers.data, numbers.scale, numbers.zero, kind, block, dtype, None)


class QuantisedLinear(nn.Linear):
    """A linear layer with a weight of torchao; a class of its own for those who read plain weights directly."""


def finish_quantised(model: nn.Module) -> None:
    """Mark the layers of a loaded model whose weights are quantised, and pack 4 bits for the CPU's own kernel."""
    torchao = load_torchao()
    for module in model.modules():
        if type(module) is not nn.Linear:
            continue
        weight = module.weight
        if isinstance(weight, torchao.Int8Tensor | torchao.IntxUnpackedToInt8Tensor):
            module.__class__ = QuantisedLinear
        if isinstance(weight, torchao.IntxUnpackedToInt8Tensor) and _has_kernel(weight):
            module.weight = nn.Parameter(_packed_for_cpu(weight), requires_grad=False)


def _has_kernel(weight: Any) -> bool:
    return (
        load_torchao().Int4OpaqueTensor is not None
        and weight.device.type == "cpu"
        and weight.target_dtype == torch.int4
        and weight.block_size[1] in _KERNEL_GROUPS
        and weight.shape[0] % _KERNEL_ROWS == 0
    )


def _packed_for_cpu(weight: Any) -> Tensor:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.qdata.to(torch.int32) + 8, 1)
    zero = -weight.zero_point.to(weight.scale.dtype) * weight.scale  # the kernel adds it to the product
    scales = torch.stack([weight.scale, zero], dim=-1).transpose(0, 1).contiguous()
    return load_torchao().Int4OpaqueTensor(packed, scales, list(weight.block_size), weight.shape)


@dataclass(frozen=True)
class TorchAO:
    """What is used of torchao."""

    MappingType: Any
    IntxUnpackedToInt8Tensor: Any
    Int8Tensor: Any
    Int4OpaqueTensor: Any


_loaded: list[TorchAO] = []


def load_torchao() -> TorchAO:
    """Return what is used of torchao.

    Raises:
        MMToolError: where it is not installed.
    """
    if _loaded:
        return _loaded[0]
    try:
        from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, MappingType
    except ModuleNotFoundError as error:
        raise MMToolError("weights quantised by torchao need the package torchao", INSTALL) from error
    try:
        from torchao.prototype.quantization.int4 import Int4OpaqueTensor
    except ImportError:  # it moves between versions; the other tensor gives the same results with more memory
        Int4OpaqueTensor = None
    _loaded.append(TorchAO(MappingType, IntxUnpackedToInt8Tensor, Int8Tensor, Int4OpaqueTensor))
    return _loaded[0]
