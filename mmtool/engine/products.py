"""Products of states with weight matrices, in the form that is fastest for their format, device and number of rows.

What torch's own ``linear`` does is right on a GPU. On a CPU it is not the fastest for a few rows: in bfloat16 the
turned product ``W @ x.T`` is up to a third faster at any number of rows, and in float32 a packed copy of the weights is
up to twice as fast from two rows on. Measured in ``examples/bench/README.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Product:
    """The products of one input with the weights of one or several linear layers; the weights stay the layers' own.

    Weights that lie one behind the other in memory are one matrix where outputs are wanted together, so that there is
    one product instead of several.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
        self.sizes = [len(weight) for weight in weights]
        self.each = list(zip(weights, biases, strict=True))
        whole = joined(weights), None if biases[0] is None else joined(biases)
        known = whole[0] is not None and all((bias is None) == (whole[1] is None) for bias in biases)
        self.parts = [whole] if known else self.each
        self.turned_each, self.turned_parts = ([(w.t(), b) for w, b in pairs] for pairs in (self.each, self.parts))

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Return ``(rows, out)`` for each layer and ``(rows, in)``; the memory may be that of the transposed."""
        return _products(x, self.turned_each)

    def together(self, x: Tensor) -> Tensor:
        """Return ``(rows, sum of all out)``, the numbers of a row side by side in memory."""
        outputs = _products(x, self.turned_parts)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def add(self, states: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:
        """Return ``states`` plus ``factor`` times the product, ``(rows, out)``, for a single layer."""
        ((matrix, bias),) = self.turned_each
        states = torch.addmm(states, x, matrix, alpha=factor)
        return states if bias is None else states.add_(bias, alpha=factor)

    @property
    def num_bytes(self) -> int:
        """Memory beside the weights of the layers."""
        return 0


class TurnedProduct(Product):
    """``(W @ x.T).T``: on a CPU with bfloat16 units much faster than ``x @ W.T``, without a second copy of ``W``.

    Where the result is needed by rows, that takes a copy, which costs more than it gains for many rows.
    """

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """See ``Product``."""
        outputs = self._turned(x)
        if len(outputs) < len(self.sizes):
            outputs = outputs[0].split(self.sizes)
        return [output.t() for output in outputs]

    def together(self, x: Tensor) -> Tensor:
        """See ``Product``."""
        if len(x) > MOST_COPIED and x.stride(-1) == 1:
            return super().together(x)
        outputs = self._turned(x)
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).t().contiguous()

    def add(self, states: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:
        """See ``Product``."""
        if len(x) > MOST_COPIED and x.stride(-1) == 1:
            return super().add(states, x, factor)
        return torch.add(states, self.together(x), alpha=factor)

    def _turned(self, x: Tensor) -> list[Tensor]:
        """Return ``(out, rows)``."""
        if len(x) == 1:
            x = x[0]
            return [
                (torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)).unsqueeze(1)
                for weight, bias in self.parts
            ]
        columns = x.t()
        return [
            torch.mm(weight, columns) if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
            for weight, bias in self.parts
        ]


class PackedProduct(Product):
    """Float32 on a CPU with a copy of the weights in oneDNN's order, all layers in one, for 2 to ``MOST_PACKED`` rows.

    The copy is as large as the weights. One row is faster without it. So are prompts: oneDNN makes a program for every
    number of rows, which takes longer than the product itself and half a megabyte as long as it is kept, and prompts
    come in all lengths.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__(linears)
        weights = [weight.detach() for weight, _ in self.parts]
        whole = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.packed_bytes = whole.nbytes
        self.packed = torch.ops.mkldnn._reorder_linear_weight(whole, PACKED_FOR_ROWS)
        self.bias = None
        if any(bias is not None for _, bias in self.parts):
            biases = [weight.new_zeros(len(weight)) if bias is None else bias.detach() for weight, bias in self.parts]
            self.bias = torch.cat(biases)

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """See ``Product``."""
        return self._packed(x).split(self.sizes, -1) if self._takes(x) else super().__call__(x)

    def together(self, x: Tensor) -> Tensor:
        """See ``Product``."""
        return self._packed(x) if self._takes(x) else super().together(x)

    def add(self, states: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:
        """See ``Product``."""
        return torch.add(states, self._packed(x), alpha=factor) if self._takes(x) else super().add(states, x, factor)

    def _packed(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    @staticmethod
    def _takes(x: Tensor) -> bool:
        return 2 <= len(x) <= MOST_PACKED

    @property
    def num_bytes(self) -> int:
        """Memory beside the weights of the layers."""
        return self.packed_bytes


def _products(x: Tensor, turned: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    return [torch.mm(x, matrix) if bias is None else torch.addmm(bias, x, matrix) for matrix, bias in turned]


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return tensors that lie one behind the other in memory as one, without a copy; None where they do not."""
    first = tensors[0].detach()
    end, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for tensor in tensors:
        if tensor is None or not tensor.is_contiguous() or tensor.data_ptr() != end:
            return None
        if tensor.shape[1:] != first.shape[1:] or tensor.untyped_storage().data_ptr() != storage:
            return None
        end += tensor.nbytes
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


PACKED_FOR_ROWS = 16  # oneDNN's order for so many rows is as good for 2 and for 32
MOST_PACKED = 32  # a tenth faster than without there, and ever less beyond
MOST_COPIED = 128  # rows of a product in bfloat16 that is rather copied than made by rows


def product_kind(weight: Tensor, pack: bool) -> type[Product]:
    """Return what is fastest for weights of this format and device; ``pack`` allows a copy of them."""
    if weight.device.type != "cpu":
        return Product
    if weight.dtype == torch.bfloat16:
        return TurnedProduct
    if weight.dtype == torch.float32:
        return PackedProduct if pack and torch.backends.mkldnn.is_available() else Product
    return Product


def norm_of(weight: Tensor, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the RMS norm over the last dimension, as a function of states and of a weight like ``weight``."""
    shape = tuple(weight.shape)
    if weight.device.type != "cpu":
        return lambda x, weight: F.rms_norm(x, shape, weight, eps)
    # On the CPU, torch composes rms_norm of slower operations; measured in examples/bench/README.md.
    floor, share, dtype = torch.tensor(eps), 1.0 / shape[0], weight.dtype

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, 2, -1, True)
        return (x * torch.addcmul(floor, length, length, value=share).rsqrt_()).mul_(weight)

    def half_norm(x: Tensor, weight: Tensor) -> Tensor:
        states = x.to(torch.float32, copy=True)
        length = torch.linalg.vector_norm(states, 2, -1, True)
        return states.mul_(torch.addcmul(floor, length, length, value=share).rsqrt_()).to(dtype).mul_(weight)

    if dtype == torch.float32:
        return norm
    return half_norm if dtype in (torch.bfloat16, torch.float16) else lambda x, w: F.rms_norm(x, shape, w, eps)
