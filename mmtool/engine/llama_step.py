"""One decode step of a plain Llama decoder with as few calls as torch allows.

Calling the modules of a small model costs more than its arithmetic, and on a GPU every extra kernel is waited for. This
does what ``LlamaModel.forward`` does for one new token per row, on the model's own weights. It is used only for exactly
those classes, without hooks or adapters; everything else goes through the model's ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmtool.engine.slots import KVSlots

LLAMA = "transformers.models.llama.modeling_llama"
SILU = ("SiLU", "SiLUActivation")  # torch's, and the one of transformers.activations
PLAIN_MODULES = (LLAMA, "transformers.activations", "torch.nn.modules.activation")


class Rows(NamedTuple):
    """The rows 0 to B-1 that a step continues.

    Attributes:
        ids: ``(B,)`` tokens to feed.
        positions: ``(B,)`` where they stand.
        longest: the largest of ``positions``.
        index: where their keys go if positions differ (see ``write_index``), else None.
        mask: ``(B, 1, 1, longest + 1)``, 0 or minus infinity, if positions differ, else None.
    """

    ids: Tensor
    positions: Tensor
    longest: int
    index: Tensor | None
    mask: Tensor | None


class Layer(NamedTuple):
    """The weights of one layer; matrices transposed (a view), biases or None."""

    input_norm: Tensor
    query: tuple[Tensor, Tensor | None]
    key: tuple[Tensor, Tensor | None]
    value: tuple[Tensor, Tensor | None]
    output: tuple[Tensor, Tensor | None]
    post_norm: Tensor
    gate: tuple[Tensor, Tensor | None]
    up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]


class LlamaStep:
    """The step of one decoder; ``fits`` says whether a decoder can have one."""

    def __init__(self, decoder: Any) -> None:
        self.weights = _addresses(decoder)
        self.rotary = decoder.rotary_emb
        self.embeddings = decoder.embed_tokens.weight
        self.norm = _norm_of(decoder.norm)
        self.final_norm = decoder.norm.weight
        attention = decoder.layers[0].self_attn
        self.head_dim = attention.head_dim
        self.scaling = attention.scaling
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.group = attention.num_key_value_groups
        act = decoder.layers[0].mlp.act_fn
        self.act = partial(F.silu, inplace=True) if type(act).__name__ in SILU else act
        self.cos = self.sin = self.embeddings.new_empty(0, 1, self.head_dim)  # by position, see _angles
        self.layers = [
            Layer(
                layer.input_layernorm.weight,
                *(_matrix(linear) for linear in _attention_linears(layer)),
                layer.post_attention_layernorm.weight,
                *(_matrix(linear) for linear in _mlp_linears(layer)),
            )
            for layer in decoder.layers[: decoder.config.num_hidden_layers]
        ]

    def __call__(self, rows: Rows, slots: KVSlots) -> Tensor:
        """Return the ``(B, hidden)`` states after the last norm; keys and values are written into ``slots``."""
        batch, kv_heads, group, head_dim = len(rows.ids), self.kv_heads, self.group, self.head_dim
        norm, act, longest, mask, half = self.norm, self.act, rows.longest, rows.mask, head_dim // 2
        seen = (batch, kv_heads, longest + 1, head_dim)
        hidden = F.embedding(rows.ids, self.embeddings)
        cos, sin = self._angles(rows, slots.capacity)
        for weights, keys, values in zip(self.layers, slots.keys, slots.values, strict=True):
            x = norm(hidden, weights.input_norm)
            query = _linear(x, weights.query).view(batch, -1, head_dim)
            key = _linear(x, weights.key).view(batch, kv_heads, head_dim)
            value = _linear(x, weights.value).view(batch, kv_heads, head_dim)
            query = torch.addcmul(query * cos, query.roll(half, -1), sin)
            key = torch.addcmul(key * cos, key.roll(half, -1), sin)
            if rows.index is None:
                keys[:batch, :, longest] = key
                values[:batch, :, longest] = value
            else:
                keys.view(-1, head_dim).index_copy_(0, rows.index, key.view(-1, head_dim))
                values.view(-1, head_dim).index_copy_(0, rows.index, value.view(-1, head_dim))
            # The heads that share keys stand as query positions, so that keys are never repeated.
            context = F.scaled_dot_product_attention(
                query.view(batch, kv_heads, group, head_dim),
                keys.as_strided(seen, keys.stride()),
                values.as_strided(seen, values.stride()),
                attn_mask=mask,
                scale=self.scaling,
            )
            hidden = _add_linear(hidden, context.reshape(batch, -1), weights.output)
            x = norm(hidden, weights.post_norm)
            x = act(_linear(x, weights.gate)).mul_(_linear(x, weights.up))
            hidden = _add_linear(hidden, x, weights.down)
        return norm(hidden, self.final_norm)

    def _angles(self, rows: Rows, capacity: int) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines, ``(B or 1, 1, head_dim)``: the same for all heads of a row."""
        if len(self.cos) < capacity:
            cos, sin = self.rotary(self.embeddings, torch.arange(capacity, device=self.cos.device).unsqueeze(0))
            sin[..., : self.head_dim // 2].neg_()
            self.cos, self.sin = cos.transpose(0, 1), sin.transpose(0, 1)
        if rows.index is None:
            return self.cos.narrow(0, rows.longest, 1), self.sin.narrow(0, rows.longest, 1)
        return self.cos.index_select(0, rows.positions), self.sin.index_select(0, rows.positions)


def step_for(decoder: Any, known: LlamaStep | None = None) -> LlamaStep | None:
    """Return the step of ``decoder``, which is ``known`` if that is still true of it, or None if it cannot have one."""
    if not fits(decoder):
        return None
    return known if known is not None and known.weights == _addresses(decoder) else LlamaStep(decoder)


def fits(decoder: Any) -> bool:
    """Return whether ``decoder`` is a Llama decoder as transformers made it, on one device, with SDPA attention."""
    if f"{type(decoder).__module__}.{type(decoder).__name__}" != f"{LLAMA}.LlamaModel":
        return False
    if decoder.config._attn_implementation != "sdpa":
        return False
    if decoder.rotary_emb.rope_type in ("dynamic", "longrope"):  # angles change with the length
        return False
    if len({(weight.device, weight.dtype) for weight in decoder.parameters()}) != 1:
        return False
    return all(map(_is_plain, decoder.modules()))


def _is_plain(module: nn.Module) -> bool:
    """Return whether calling ``module`` does what its class says: a known class, no hooks, no replaced ``forward``."""
    kind = type(module)
    if kind.__module__ not in PLAIN_MODULES and kind not in (nn.Linear, nn.Embedding, nn.ModuleList):
        return False
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if hook.__module__ != "transformers.utils.output_capturing":  # those do nothing unless asked
            return False
    return "forward" not in vars(module)


def _addresses(decoder: Any) -> list[int]:
    return [weight.data_ptr() for weight in decoder.parameters()]


def _attention_linears(layer: Any) -> tuple[nn.Linear, ...]:
    attention = layer.self_attn
    return attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj


def _mlp_linears(layer: Any) -> tuple[nn.Linear, ...]:
    return layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj


def _matrix(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return linear.weight.t(), linear.bias


def _linear(x: Tensor, weights: tuple[Tensor, Tensor | None]) -> Tensor:
    matrix, bias = weights
    return torch.mm(x, matrix) if bias is None else torch.addmm(bias, x, matrix)


def _add_linear(residual: Tensor, x: Tensor, weights: tuple[Tensor, Tensor | None]) -> Tensor:
    matrix, bias = weights
    hidden = torch.addmm(residual, x, matrix)
    return hidden if bias is None else hidden.add_(bias)


def _norm_of(module: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the RMS norm as a function of ``(B, hidden)`` states and the weight."""
    eps, shape = module.variance_epsilon, tuple(module.weight.shape)
    if module.weight.device.type != "cpu" or module.weight.dtype != torch.float32:
        return lambda x, weight: F.rms_norm(x, shape, weight, eps)
    # On the CPU, torch composes rms_norm of slower operations; measured in examples/bench/README.md.
    floor = torch.tensor(eps)
    share = 1.0 / shape[0]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, 2, -1, True)
        return (x * torch.addcmul(floor, length, length, value=share).rsqrt_()).mul_(weight)

    return norm
