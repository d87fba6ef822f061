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
    """The products of one input with the weights of one or several linear layers; the weights stay the layers' own."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.weights = [linear.weight for linear in linears]
        self.turned = [weight.t() for weight in self.weights]
        self.biases = [linear.bias for linear in linears]
        self.plain = all(bias is None for bias in self.biases)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Return ``(rows, out)`` for each layer and ``(rows, in)``; the memory may be that of the transposed."""
        if self.plain:
            return [torch.mm(x, matrix) for matrix in self.turned]
        return [
            torch.mm(x, matrix) if bias is None else torch.addmm(bias, x, matrix)
            for matrix, bias in zip(self.turned, self.biases, strict=True)
        ]

    def add(self, states: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:
        """Return ``states`` plus ``factor`` times the product, ``(rows, out)``, for a single layer."""
        (matrix,), (bias,) = self.turned, self.biases
        states = torch.addmm(states, x, matrix, alpha=factor)
        return states if bias is None else states.add_(bias, alpha=factor)

    @property
    def num_bytes(self) -> int:
        """Memory beside the weights of the layers."""
        return 0


class TurnedProduct(Product):
    """``(W @ x.T).T``: on a CPU with bfloat16 units much faster than ``x @ W.T``, without a second copy of ``W``."""

    def __call__(self, x: Tensor) -> list[Tensor]:
        """See ``Product``."""
        if len(x) == 1:
            return [self._of_vector(x[0], which).unsqueeze(0) for which in range(len(self.weights))]
        columns = x.t()
        if self.plain:
            return [torch.mm(weight, columns).t() for weight in self.weights]
        return [
            (torch.mm(weight, columns) if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)).t()
            for weight, bias in zip(self.weights, self.biases, strict=True)
        ]

    def _of_vector(self, x: Tensor, which: int) -> Tensor:
        weight, bias = self.weights[which], self.biases[which]
        return torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)

    def add(self, states: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:
        """See ``Product``."""
        return torch.add(states, self(x)[0], alpha=factor)


class PackedProduct(Product):
    """Float32 on a CPU with a copy of the weights in oneDNN's order, all layers in one, for 2 to ``MOST_PACKED`` rows.

    The copy is as large as the weights. One row is faster without it. So are prompts: oneDNN makes a program for every
    number of rows, which takes longer than the product itself and half a megabyte as long as it is kept, and prompts
    come in all lengths.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__(linears)
        joined = torch.cat([linear.weight.detach() for linear in linears])
        self.sizes = [len(weight) for weight in self.weights]
        self.packed_bytes = joined.nbytes
        self.packed = torch.ops.mkldnn._reorder_linear_weight(joined, PACKED_FOR_ROWS)
        self.bias = None
        if not self.plain:
            zeros = [weight.new_zeros(len(weight)) for weight in self.weights]
            pairs = zip(self.biases, zeros, strict=True)
            self.bias = torch.cat([zero if bias is None else bias.detach() for bias, zero in pairs])

    def __call__(self, x: Tensor) -> list[Tensor]:
        """See ``Product``."""
        if not self._takes(x):
            return super().__call__(x)
        joined = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return [joined] if len(self.sizes) == 1 else list(joined.split(self.sizes, -1))

    def add(self, states: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:
        """See ``Product``."""
        if not self._takes(x):
            return super().add(states, x, factor)
        return torch.add(states, self(x)[0], alpha=factor)

    @staticmethod
    def _takes(x: Tensor) -> bool:
        return 2 <= len(x) <= MOST_PACKED

    @property
    def num_bytes(self) -> int:
        """Memory beside the weights of the layers."""
        return self.packed_bytes


PACKED_FOR_ROWS = 16  # oneDNN's order for so many rows is as good for 2 and for 32
MOST_PACKED = 32  # a tenth faster than without there, and ever less beyond


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
        x = x.float()
        length = torch.linalg.vector_norm(x, 2, -1, True)
        return (x * torch.addcmul(floor, length, length, value=share).rsqrt_()).to(dtype).mul_(weight)

    if dtype == torch.float32:
        return norm
    return half_norm if dtype in (torch.bfloat16, torch.float16) else lambda x, w: F.rms_norm(x, shape, w, eps)
