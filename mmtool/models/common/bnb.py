"""Weights in 4 or 8 bits as bitsandbytes and transformers store them, and what rounds a matrix so.

A matrix ``X.weight`` in 4 bits (NF4) is stored as ``X.weight`` (two numbers a byte) with ``X.weight.absmax``,
``X.weight.quant_map``, ``X.weight.nested_absmax``, ``X.weight.nested_quant_map`` and
``X.weight.quant_state...``; one in 8 bits as ``X.weight`` with ``X.SCB``, a scale per row, and ``X.weight_format``.
transformers makes the layers of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmtool.errors import CheckpointError

if TYPE_CHECKING:
    from mmtool.models.common.weights import LazyTensor

METHOD = "bitsandbytes"
BLOCK = 64  # weights that share a scale in 4 bits
ROWS = 32  # the library's kernels for 4 bits on a CPU take rows in such steps
_NESTED_BLOCK = 256  # scales of 4 bits that share one themselves
_KIND = "nf4"
_STATE = f".quant_state.bitsandbytes__{_KIND}"
_STATE_BYTES = 256  # room for it: its length depends on a number that is known last
# Endings after ``X.weight`` (4 bits) and after ``X.`` (8 bits).
_FOUR = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _STATE)
_EIGHT = ("SCB", "weight_format")


@dataclass(frozen=True)
class BnbTensor:
    """A matrix in few bits, in a file; has what ``LazyTensor`` has for those who check names and shapes.

    Attributes:
        data: its numbers.
        more: its other pieces, by what is put behind its name.
        bits: per weight.
        shape: of the matrix.
    """

    data: LazyTensor
    more: Mapping[str, LazyTensor]
    bits: int
    shape: torch.Size

    @property
    def stored_dtype(self) -> torch.dtype:
        """Number format in the file; one of whole numbers."""
        return self.data.stored_dtype

    @property
    def path(self) -> Any:
        """The file."""
        return self.data.path

    @property
    def offset(self) -> int:
        """Byte where the numbers start."""
        return self.data.offset

    def astype(self, dtype: torch.dtype) -> BnbTensor:
        """Return the same matrix: what it is multiplied in is said by the layer."""
        return self


def join_bnb(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return stored tensors by name, those that belong to one matrix of bitsandbytes as one ``BnbTensor``.

    Raises:
        CheckpointError: where what is stored beside a matrix cannot be read.
    """
    joined: dict[str, Any] = {}
    pieces: set[str] = set()
    for name, tensor in tensors.items():
        if name.endswith(_STATE) and name.removesuffix(_STATE) in tensors:
            whole = name.removesuffix(_STATE)
            more = {end: tensors[f"{whole}{end}"] for end in _FOUR if f"{whole}{end}" in tensors}
            joined[whole] = BnbTensor(tensors[whole], more, 4, _shape(whole, tensor))
            pieces.update(f"{whole}{end}" for end in more)
        elif name.endswith(".SCB") and f"{name.removesuffix('SCB')}weight" in tensors:
            prefix = name.removesuffix("SCB")
            data = tensors[f"{prefix}weight"]
            more = {end: tensors[f"{prefix}{end}"] for end in _EIGHT if f"{prefix}{end}" in tensors}
            joined[f"{prefix}weight"] = BnbTensor(data, more, 8, data.shape)
            pieces.update(f"{prefix}{end}" for end in more)
    return {name: joined.get(name, tensor) for name, tensor in tensors.items() if name not in pieces}


def _shape(name: str, state: LazyTensor) -> torch.Size:
    try:
        return torch.Size(json.loads(bytes(state.read().numpy()))["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{state.path}: what is stored of {name} cannot be read", "Export it again.") from error


def parted(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Undo ``join_bnb``: transformers takes the pieces by their names."""
    found: dict[str, Any] = {}
    for name, tensor in weights.items():
        if not isinstance(tensor, BnbTensor):
            found[name] = tensor
            continue
        prefix = name if tensor.bits == 4 else name.removesuffix("weight")
        found |= {name: tensor.data} | {f"{prefix}{end}": piece for end, piece in tensor.more.items()}
    return found


def is_bnb(config: Mapping[str, Any]) -> bool:
    """Tell whether a ``config.json`` is of a model that bitsandbytes has quantised."""
    given = config.get("quantization_config")
    return isinstance(given, Mapping) and given.get("quant_method") == METHOD


def finish_bnb(model: nn.Module) -> None:
    """Let the 4-bit layers of a loaded model multiply in the model's own number format."""
    import bitsandbytes

    dtype = model.get_input_embeddings().weight.dtype
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True


# Rounding -------------------------------------------------------------------------------------------------------------


def four_bit_shapes(shape: torch.Size) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return what is stored of a matrix in 4 bits: shape and number format, by what is put behind its name."""
    blocks = -(-shape.numel() // BLOCK)
    return {
        ".nested_absmax": (torch.Size([-(-blocks // _NESTED_BLOCK)]), torch.float32),
        ".nested_quant_map": (torch.Size([256]), torch.float32),
        ".quant_map": (torch.Size([16]), torch.float32),
        "": (torch.Size([-(-shape.numel() // 2), 1]), torch.uint8),
        ".absmax": (torch.Size([blocks]), torch.uint8),
        _STATE: (torch.Size([_STATE_BYTES]), torch.uint8),
    }


def four_bits(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Round a float32 matrix to NF4; return the pieces by what is put behind its name.

    Args:
        weight: the matrix.
        dtype: what it is computed back to.
    """
    from bitsandbytes.functional import quantize_4bit

    data, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type=_KIND)
    state.dtype = dtype
    stored = {f".{name}": value for name, value in state.as_dict(packed=True).items()}
    text = stored[_STATE]
    room = torch.full((_STATE_BYTES,), ord(" "), dtype=torch.uint8)  # which JSON allows at its end
    room[: len(text)] = text
    return stored | {"": data.view(-1, 1), _STATE: room}


def eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to 8 bits; return the numbers and a scale per row, as bitsandbytes' layers make them."""
    from bitsandbytes.functional import int8_vectorwise_quant

    data, scale, _ = int8_vectorwise_quant(weight.to(torch.float16).contiguous())
    return data, scale
