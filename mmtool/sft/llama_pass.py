"""The layers of a plain Llama decoder as they train on a CPU: the same arithmetic in fewer passes over memory.

On a CPU most of the time of a small model goes into reading and writing activations: adapters that are added to a layer
in four steps, norms and activations in six, padding, masks. Here rows lie one behind the other without padding, each
sees itself alone, adapters are added by the matrix product itself, and the last layer computes only the positions that
have something to learn. Gradients are written out by hand. It is used only for exactly those classes, for peft's plain
adapters, and for float32; everything else goes through the model's ``forward``, with which tests compare it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LLAMA = "transformers.models.llama.modeling_llama"
SILU = ("SiLU", "SiLUActivation")  # torch's, and the one of transformers.activations
PLAIN_MODULES = (LLAMA, "transformers.activations", "torch.nn.modules.activation")
MOST_WANTED = 0.6  # share of positions with something to learn beyond which the last layer computes all of them
_UNSTABLE_ANGLES = ("dynamic", "longrope")  # they change with the length of the batch


class Linear(NamedTuple):
    """A linear layer and its adapter: weight, bias, and the adapter's two matrices; None where there is none."""

    weights: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
    scale: float
    dropout: nn.Module | None

    @property
    def rate(self) -> float:
        """Share of the adapter's input that is dropped now."""
        return self.dropout.p if self.dropout is not None and self.dropout.training else 0.0


class Layer(NamedTuple):
    """The parts of one layer; norms as their module, linear layers by their input."""

    input_norm: Any
    attention: tuple[Linear, Linear, Linear]
    output: Linear
    post_norm: Any
    gate_up: tuple[Linear, Linear]
    down: Linear


class LlamaPass:
    """Runs the layers of one decoder; ``pass_for`` says whether a decoder can have one."""

    def __init__(self, decoder: Any) -> None:
        self.rotary, self.norm = decoder.rotary_emb, decoder.norm
        attention = decoder.layers[0].self_attn
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.layers = [
            Layer(
                layer.input_layernorm,
                tuple(map(_linear, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj))),
                _linear(layer.self_attn.o_proj),
                layer.post_attention_layernorm,
                (_linear(layer.mlp.gate_proj), _linear(layer.mlp.up_proj)),
                _linear(layer.mlp.down_proj),
            )
            for layer in decoder.layers[: decoder.config.num_hidden_layers]
        ]

    def __call__(self, embeds: Tensor, lengths: Sequence[int], positions: Tensor, wanted: Tensor) -> Tensor:
        """Return the states after the last norm at the positions in ``wanted``, ``(M, hidden)``.

        Args:
            embeds: ``(N, hidden)``: rows one behind the other.
            lengths: of the rows; a row sees nothing of the others.
            positions: ``(N,)``: the position of each in its row.
            wanted: ``(M,)``: which of the ``N`` to return, in rising order.
        """
        cos, sin = self.rotary(embeds, positions.unsqueeze(0))
        half = self.head_dim // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        angles = cos.transpose(0, 1), sin.transpose(0, 1)  # (N, 1, head_dim)
        pruned = len(wanted) < MOST_WANTED * len(embeds)
        hidden = embeds
        for number, layer in enumerate(self.layers):
            chosen = wanted if pruned and number == len(self.layers) - 1 else None
            hidden = self._layer(layer, hidden, lengths, angles, chosen)
        return _norm(self.norm, hidden if pruned else hidden.index_select(0, wanted))

    def _layer(
        self,
        layer: Layer,
        hidden: Tensor,
        lengths: Sequence[int],
        angles: tuple[Tensor, Tensor],
        wanted: Tensor | None,
    ) -> Tensor:
        x = _norm(layer.input_norm, hidden)
        if wanted is None:
            query, key, value = _linears(layer.attention, x)
        else:
            (query,) = _linears(layer.attention[:1], x.index_select(0, wanted))
            key, value = _linears(layer.attention[1:], x)
            hidden = hidden.index_select(0, wanted)
        query = self._turned(query, *(angles if wanted is None else (a.index_select(0, wanted) for a in angles)))
        key = self._turned(key, *angles)
        context = self._attend(query, key, value.view(len(value), -1, self.head_dim), lengths, wanted)
        hidden = _linears((layer.output,), context, hidden)[0]
        gate, up = _linears(layer.gate_up, _norm(layer.post_norm, hidden))
        return _linears((layer.down,), _GatedUp.apply(gate, up), hidden)[0]

    def _turned(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return queries or keys turned by their angles, ``(N, heads, head_dim)``."""
        return _Turn.apply(states.view(len(states), -1, self.head_dim), cos, sin)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], wanted: Tensor | None
    ) -> Tensor:
        """Return the context of each query, ``(M, heads * head_dim)``; every row attends to itself alone."""
        counts, masks = list(lengths), None
        if wanted is not None:
            ends = torch.tensor(lengths).cumsum(0)
            bounds = torch.searchsorted(wanted, ends).tolist()
            counts = [end - start for start, end in zip([0, *bounds], bounds, strict=False)]
            starts = [0, *ends.tolist()]
            masks = [
                torch.arange(length) <= (rows - start).unsqueeze(1)
                for rows, start, length in zip(wanted.split(counts), starts, lengths, strict=False)
            ]
        group = query.shape[1] // key.shape[1]
        if group > 1:
            key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
        queries, keys, values = query.split(counts), key.split(list(lengths)), value.split(list(lengths))
        found = [
            F.scaled_dot_product_attention(
                *(t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)),
                attn_mask=None if masks is None else masks[number],
                is_causal=masks is None,
                scale=self.scaling,
            )
            .squeeze(0)
            .transpose(0, 1)
            for number, (q, k, v) in enumerate(zip(queries, keys, values, strict=True))
            if len(q)
        ]
        return (found[0] if len(found) == 1 else torch.cat(found)).reshape(len(query), -1)


def pass_for(decoder: Any) -> LlamaPass | None:
    """Return the pass of ``decoder``, or None if it cannot have one."""
    return LlamaPass(decoder) if fits(decoder) else None


def fits(decoder: Any) -> bool:
    """Return whether ``decoder`` is transformers' Llama on a CPU in float32, with SDPA and peft's plain adapters."""
    if f"{type(decoder).__module__}.{type(decoder).__name__}" != f"{LLAMA}.LlamaModel":
        return False
    config = decoder.config
    if config._attn_implementation != "sdpa" or config.attention_dropout:
        return False
    if decoder.rotary_emb.rope_type in _UNSTABLE_ANGLES or type(decoder.layers[0].mlp.act_fn).__name__ not in SILU:
        return False
    if getattr(decoder, "gradient_checkpointing", False) or any(
        getattr(layer, "gradient_checkpointing", False) for layer in decoder.layers
    ):
        return False
    if {(weight.device.type, weight.dtype) for weight in decoder.parameters()} != {("cpu", torch.float32)}:
        return False
    return all(map(_is_plain, _modules(decoder)))


def _modules(decoder: Any) -> list[nn.Module]:
    """Return the modules whose work is done here: those inside adapters count with the adapter."""
    found: list[nn.Module] = []
    waiting: list[nn.Module] = [decoder]
    while waiting:
        module = waiting.pop()
        found.append(module)
        waiting += [module.base_layer] if type(module) is LoraLinear else module.children()
    return found


def _is_plain(module: nn.Module) -> bool:
    """Return whether calling ``module`` does what its class says, so that the same can be done without calling it."""
    kind = type(module)
    if kind is LoraLinear:
        return _is_plain_adapter(module)
    if kind is nn.Embedding:  # it is called, hooks and all
        return True
    if kind.__module__ not in PLAIN_MODULES and kind not in (nn.Linear, nn.ModuleList):
        return False
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if hook.__module__ != "transformers.utils.output_capturing":  # those do nothing unless asked
            return False
    return "forward" not in vars(module)


def _is_plain_adapter(module: LoraLinear) -> bool:
    """Return whether an adapter is one pair of matrices, switched on, and with nothing special about it."""
    if module.merged or module.disable_adapters or len(module.active_adapters) != 1 or module.fan_in_fan_out:
        return False
    name = module.active_adapters[0]
    if name not in module.lora_A or name in module.lora_variant or module.lora_bias[name]:
        return False
    return type(module.lora_dropout[name]) in (nn.Identity, nn.Dropout)


# Arithmetic -----------------------------------------------------------------------------------------------------------


def _linear(module: nn.Module) -> Linear:
    if type(module) is not LoraLinear:
        return Linear((module.weight, module.bias, None, None), 1.0, None)
    name, base = module.active_adapters[0], module.base_layer
    weights = base.weight, base.bias, module.lora_A[name].weight, module.lora_B[name].weight
    dropout = module.lora_dropout[name]
    return Linear(weights, module.scaling[name], dropout if isinstance(dropout, nn.Dropout) else None)


def _linears(linears: Sequence[Linear], x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return what linear layers make of the same input, added to ``residual`` where it is given (one layer only)."""
    scales, rates = [item.scale for item in linears], [item.rate for item in linears]
    apart = any(rates) or any(item.weights[2] is None for item in linears)
    function = _Linears if apart else _AdaptedLinears
    return function.apply(x, residual, scales, rates, *(weight for item in linears for weight in item.weights))


def _base(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``residual + x @ weight.T + bias``."""
    if residual is None:
        return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
    output = torch.addmm(residual, x, weight.t())
    return output if bias is None else output.add_(bias)


class _Linears(torch.autograd.Function):
    """``y_i = residual + x @ W_i.T + b_i + s_i * dropout(x) @ A_i.T @ B_i.T`` for some layers with one input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        scales: Sequence[float],
        rates: Sequence[float],
        *weights: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outputs, lows, masks = [], [], []
        for number, scale in enumerate(scales):
            weight, bias, down, up = weights[4 * number : 4 * number + 4]
            output = _base(x, residual, weight, bias)
            low = mask = None
            if down is not None:
                dropped = x
                if rates[number]:
                    dropped, mask = torch.native_dropout(x, rates[number], True)
                low = dropped @ down.t()
                output.addmm_(low, up.t(), alpha=scale)
            outputs.append(output)
            lows.append(low)
            masks.append(mask)
        ctx.scales, ctx.rates, ctx.has_residual = scales, rates, residual is not None
        ctx.save_for_backward(x, *weights, *lows, *masks)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        count = len(ctx.scales)
        x, *saved = ctx.saved_tensors
        weights, lows, masks = saved[: 4 * count], saved[4 * count : 5 * count], saved[5 * count :]
        grad_x, grad_weights = _base_gradients(ctx, x, weights, grads)
        for number, grad in enumerate(grads):
            _, _, down, up = weights[4 * number : 4 * number + 4]
            if down is None:
                continue
            scale, rate, mask = ctx.scales[number], ctx.rates[number], masks[number]
            keeps = 1.0 / (1.0 - rate) if rate else 1.0
            grad_low = (grad @ up).mul_(scale)
            dropped = x if mask is None else x * mask
            grad_weights[4 * number + 2] = (grad_low.t() @ dropped).mul_(keeps)
            grad_weights[4 * number + 3] = (grad.t() @ lows[number]).mul_(scale)
            if grad_x is not None and mask is None:
                grad_x.addmm_(grad_low, down)
            elif grad_x is not None:
                grad_x.addcmul_(grad_low @ down, mask.to(grad_x.dtype), value=keeps)
        return grad_x, grads[0] if ctx.has_residual else None, None, None, *grad_weights


class _AdaptedLinears(torch.autograd.Function):
    """The same where every layer has an adapter and nothing is dropped: the first matrices of all work as one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        scales: Sequence[float],
        rates: Sequence[float],
        *weights: Tensor | None,
    ) -> tuple[Tensor, ...]:
        downs = weights[2::4]
        down = downs[0] if len(downs) == 1 else torch.cat(downs)
        low = x @ down.t()
        ranks = [len(item) for item in downs]
        outputs = []
        for number, piece in enumerate(low.split(ranks, dim=1)):
            weight, bias, _, up = weights[4 * number : 4 * number + 4]
            outputs.append(_base(x, residual, weight, bias).addmm_(piece, up.t(), alpha=scales[number]))
        ctx.scales, ctx.ranks, ctx.has_residual = scales, ranks, residual is not None
        ctx.save_for_backward(x, low, down, *weights)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, low, down, *weights = ctx.saved_tensors
        grad_x, grad_weights = _base_gradients(ctx, x, weights, grads)
        pieces = [(grad @ up).mul_(scale) for grad, up, scale in zip(grads, weights[3::4], ctx.scales, strict=True)]
        grad_low = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        if grad_x is not None:
            grad_x.addmm_(grad_low, down)
        grad_weights[2::4] = (grad_low.t() @ x).split(ctx.ranks)
        grad_weights[3::4] = [
            (grad.t() @ piece).mul_(scale)
            for grad, piece, scale in zip(grads, low.split(ctx.ranks, dim=1), ctx.scales, strict=True)
        ]
        return grad_x, grads[0] if ctx.has_residual else None, None, None, *grad_weights


def _base_gradients(
    ctx: Any, x: Tensor, weights: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of the input, as far as it comes through the layers themselves, and of their weights."""
    grad_x: Tensor | None = None
    grad_weights: list[Tensor | None] = [None] * len(weights)
    for number, grad in enumerate(grads):
        at = 4 * number
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weights[at] if grad_x is None else grad_x.addmm_(grad, weights[at])
        if ctx.needs_input_grad[4 + at]:
            grad_weights[at] = grad.t() @ x
        if ctx.needs_input_grad[5 + at]:
            grad_weights[at + 1] = grad.sum(0)
    return grad_x, grad_weights


def _norm(module: Any, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, module.weight, module.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    """``x / sqrt(mean(x * x) + eps) * weight``; torch composes it of slower operations on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, scale = ctx.saved_tensors
        grad_weight = (grad * x).mul_(scale).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        inner = grad * weight
        share = torch.linalg.vecdot(inner, x).unsqueeze(-1).mul_(scale.square()).div_(x.shape[-1])
        return inner.addcmul_(x, share, value=-1).mul_(scale), grad_weight, None


class _GatedUp(torch.autograd.Function):
    """``silu(gate) * up``."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _Turn(torch.autograd.Function):
    """``x * cos + rotated(x) * sin`` with ``(N, heads, head_dim)`` states; the first half of ``sin`` is negative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        turned = x * cos
        turned[..., :half].addcmul_(x[..., half:], sin[..., :half])
        turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        turned = grad * cos
        turned[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        turned[..., half:].addcmul_(grad[..., :half], sin[..., :half])
        return turned, None, None
