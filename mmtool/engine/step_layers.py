"""What ``LlamaStep`` needs of a decoder: its weights and constants, read from the modules of the families it knows.

A decoder is known by its exact class, and must be as that class made it: no hooks, no replaced parts. Everything else
goes through the model's own ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mmtool.engine.adapters import adapted
from mmtool.engine.attention import Heads, Latents
from mmtool.engine.products import Product, norm_of, product_kind

TRANSFORMERS = "transformers.models"
MLA = "mmtool.models.common.mla"
FM9G = "mmtool.models.fm9g.modeling_fm9g"
XCOMPOSER2 = "mmtool.models.internlm_xcomposer2.modeling_internlm2"
PLAIN = tuple(f"{TRANSFORMERS}.{name}.modeling_{name}" for name in ("llama", "qwen2", "qwen3", "mistral"))
SILU = ("SiLU", "SiLUActivation")  # torch's, and the one of transformers.activations
PLAIN_MODULES = (*PLAIN, MLA, FM9G, XCOMPOSER2, "transformers.activations", "torch.nn.modules.activation")
PLAIN_CLASSES = (nn.Linear, nn.Embedding, nn.ModuleList, nn.Dropout)
IDLE_HOOKS = ("transformers.utils.output_capturing", "mmtool.engine.adapters")  # they do nothing unless asked
LENGTH_DEPENDENT = ("dynamic", "longrope")  # rope types of transformers whose angles change with the length


ProductMaker = Callable[[list[nn.Linear]], Product]


class Layer(NamedTuple):
    """The weights of one layer."""

    input_norm: Tensor
    attention: Heads | Latents
    output: Product
    post_norm: Tensor
    gate_up: Product
    down: Product


@dataclass(frozen=True)
class Anatomy:
    """What a decoder does, in the terms of ``LlamaStep``.

    Attributes:
        layers: weights by layer.
        embeddings: ``(vocabulary, hidden)``.
        embedding_factor: what embeddings of text are multiplied by.
        angles: cosines and sines ``(positions, width)`` of positions ``(positions,)``.
        final_norm: weight of the norm behind the last layer.
        eps: of the norms of states.
        act: the MLP's function; it may write into its input.
        factor: of what attention and MLP add to the states.
        divisor: of the last states.
        takes_prompts: whether prompts can go through the step, too, and not only single tokens.
    """

    layers: list[Layer]
    embeddings: Tensor
    angles: Callable[[Tensor], tuple[Tensor, Tensor]]
    final_norm: Tensor
    eps: float
    act: Callable[[Tensor], Tensor]
    embedding_factor: float = 1.0
    factor: float = 1.0
    divisor: float = 1.0
    takes_prompts: bool = True


def anatomy_of(decoder: Any, pack: bool = False) -> Anatomy:
    """Return what ``LlamaStep`` needs of a decoder that ``fits``; ``pack`` allows copies of weights, see products."""
    return READERS[_name_of(decoder)](decoder, pack)


def fits(decoder: Any) -> bool:
    """Return whether ``decoder`` is one of those above as its class made it, on one device, with SDPA attention."""
    if _name_of(decoder) not in READERS or decoder.config._attn_implementation != "sdpa":
        return False
    if not CONDITIONS.get(_name_of(decoder), _angles_are_fixed)(decoder):
        return False
    if len({(weight.device, weight.dtype) for weight in decoder.parameters()}) != 1:
        return False
    return all(map(is_untouched, decoder.modules()))


def is_untouched(module: nn.Module) -> bool:
    """Return whether calling ``module`` does what its class says: a known class, no hooks, no replaced ``forward``."""
    kind = type(module)
    if kind.__module__ not in PLAIN_MODULES and kind not in PLAIN_CLASSES:
        return False
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if hook.__module__ not in IDLE_HOOKS:
            return False
    return "forward" not in vars(module)


def product_maker(weight: Tensor, pack: bool) -> ProductMaker:
    """Return what makes products of linear layers, with what LoRA adapters add to them."""
    kind = product_kind(weight, pack)
    return lambda linears: adapted(kind(linears), linears)


def _name_of(decoder: Any) -> str:
    return f"{type(decoder).__module__}.{type(decoder).__name__}"


def _angles_are_fixed(decoder: Any) -> bool:
    return decoder.rotary_emb.rope_type not in LENGTH_DEPENDENT


# Llama, and those that differ from it in biases, norms of heads, or constant factors


def _read_plain(decoder: Any, pack: bool) -> Anatomy:
    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = decoder.rotary_emb(decoder.embed_tokens.weight, positions.unsqueeze(0))
        return cos[0], sin[0]

    return Anatomy(
        layers=_layers(decoder, pack),
        embeddings=decoder.embed_tokens.weight,
        angles=angles,
        final_norm=decoder.norm.weight,
        eps=decoder.norm.variance_epsilon,
        act=_act(decoder.layers[0].mlp.act_fn),
    )


def _read_mup(decoder: Any, pack: bool) -> Anatomy:
    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = decoder.rotary_emb(positions.unsqueeze(0))
        return cos[0], sin[0]

    return Anatomy(
        layers=_layers(decoder, pack),
        embeddings=decoder.embed_tokens.weight,
        embedding_factor=decoder.embed_tokens.embed_scale,
        angles=angles,
        final_norm=decoder.norm.weight,
        eps=decoder.norm.variance_epsilon,
        act=_act(decoder.layers[0].mlp.act_fn),
        factor=decoder.layers[0].residual_factor,
        divisor=decoder.config.logits_divisor,
    )


def _layers(decoder: Any, pack: bool) -> list[Layer]:
    kind = product_maker(decoder.embed_tokens.weight, pack)
    return [
        Layer(
            layer.input_layernorm.weight,
            _heads(layer.self_attn, kind),
            kind([layer.self_attn.o_proj]),
            layer.post_attention_layernorm.weight,
            kind([layer.mlp.gate_proj, layer.mlp.up_proj]),
            kind([layer.mlp.down_proj]),
        )
        for layer in decoder.layers[: decoder.config.num_hidden_layers]
    ]


def _heads(attention: Any, kind: ProductMaker) -> Heads | Latents:
    if hasattr(attention, "kv_b_proj"):
        return _latents(attention, kind)
    norms = None
    if hasattr(attention, "q_norm"):
        weight = attention.q_norm.weight
        norms = norm_of(weight, attention.q_norm.variance_epsilon), weight, attention.k_norm.weight
    products = kind([attention.q_proj, attention.k_proj, attention.v_proj])
    kv_heads = attention.k_proj.out_features // attention.head_dim
    return Heads(products, kv_heads, attention.head_dim, attention.scaling, norms)


def _latents(attention: Any, kind: ProductMaker) -> Latents:
    low_rank = attention.config.q_lora_rank is not None
    first = [attention.q_a_proj if low_rank else attention.q_proj, attention.kv_a_proj_with_mqa]
    query_norm = None
    if low_rank:
        weight = attention.q_a_layernorm.weight
        query_norm = norm_of(weight, attention.q_a_layernorm.variance_epsilon), weight
    weight = attention.kv_a_layernorm.weight
    return Latents(
        first=kind(first),
        queries=kind([attention.q_b_proj]) if low_rank else None,
        query_norm=query_norm,
        latent_norm=(norm_of(weight, attention.kv_a_layernorm.variance_epsilon), weight),
        both=kind([attention.kv_b_proj]),
        weight=attention.kv_b_proj.weight,
        parts=(attention.nope_dim, attention.rope_dim, attention.value_dim),
        scaling=attention.scaling,
    )


def _act(function: Any) -> Callable[[Tensor], Tensor]:
    return partial(F.silu, inplace=True) if type(function).__name__ in SILU else function


def _is_whole(decoder: Any) -> bool:
    """Return whether angles are fixed, and latents become keys and values by a product and nothing more."""
    latents = [layer.self_attn.kv_b_proj for layer in decoder.layers if hasattr(layer.self_attn, "kv_b_proj")]
    return decoder.rotary_emb.rope_type != "dynamic" and not any(layer._forward_hooks for layer in latents)


# InternLM2 inside XComposer2: one matrix for queries, keys and values. Its prompts may hold pictures, which its layers
# treat in their own way; single tokens are text.


def _read_internlm2(decoder: Any, pack: bool) -> Anatomy:
    kind = product_maker(decoder.tok_embeddings.weight, pack)

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        # Every position is a row of its own: the base of a row's angles depends on its length.
        cos, sin = decoder.rotary(decoder.tok_embeddings.weight, positions.unsqueeze(1))
        return cos[:, 0], sin[:, 0]

    def heads(attention: Any) -> Heads:
        kv_heads = decoder.config.num_key_value_heads
        return Heads(kind([attention.wqkv]), kv_heads, attention.head_dim, attention.scaling, grouped=True)

    return Anatomy(
        layers=[
            Layer(
                layer.attention_norm.weight,
                heads(layer.attention),
                kind([layer.attention.wo]),
                layer.ffn_norm.weight,
                kind([layer.feed_forward.w1, layer.feed_forward.w3]),
                kind([layer.feed_forward.w2]),
            )
            for layer in decoder.layers
        ],
        embeddings=decoder.tok_embeddings.weight,
        angles=angles,
        final_norm=decoder.norm.weight,
        eps=decoder.norm.variance_epsilon,
        act=_act(decoder.layers[0].feed_forward.act),
        takes_prompts=False,
    )


def _adds_no_task(decoder: Any) -> bool:
    return decoder.config.task_mode == "base"


READERS: dict[str, Callable[[Any, bool], Anatomy]] = {
    f"{PLAIN[0]}.LlamaModel": _read_plain,
    f"{PLAIN[1]}.Qwen2Model": _read_plain,
    f"{PLAIN[2]}.Qwen3Model": _read_plain,
    f"{PLAIN[3]}.MistralModel": _read_plain,
    f"{FM9G}.FM9GModel": _read_mup,
    f"{MLA}.MLADecoder": _read_mup,
    f"{XCOMPOSER2}.XComposer2TextModel": _read_internlm2,
}
CONDITIONS: dict[str, Callable[[Any], bool]] = {
    f"{FM9G}.FM9GModel": _is_whole,
    f"{MLA}.MLADecoder": _is_whole,
    f"{XCOMPOSER2}.XComposer2TextModel": _adds_no_task,
}


def head_is_plain(head: Any) -> bool:
    """Return whether logits are the product of the states with the weights of ``head`` and nothing more."""
    return type(head) is nn.Linear and is_untouched(head)


def packed_bytes(anatomy: Anatomy, head: Product | None) -> int:
    """Return the memory that copies of weights take."""
    products = [head] if head is not None else []
    for layer in anatomy.layers:
        products += [*layer.attention.all_products, layer.output, layer.gate_up, layer.down]
    return sum(product.num_bytes for product in products)
