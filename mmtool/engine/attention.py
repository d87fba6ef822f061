"""The attention of one layer for ``LlamaStep``: what is stored of a position, and how queries use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtool.engine.products import Product

Turn = Callable[[Tensor], Tensor]  # turns heads ``(rows, heads, turned_width)`` by their rows' positions
Norm = Callable[[Tensor, Tensor], Tensor]


class Heads(NamedTuple):
    """Keys and values of its own for each head, or for groups of them.

    Attributes:
        products: queries, keys and values of the states.
        kv_heads: how many keys a position has.
        head_dim: their width.
        scaling: of scores.
        norms: the RMS norm of query and key heads with both weights, where the family has them.
        grouped: one product makes all three, ordered by key head: its queries, its key, its value.
    """

    products: Product
    kv_heads: int
    head_dim: int
    scaling: float
    norms: tuple[Norm, Tensor, Tensor] | None = None
    grouped: bool = False

    @property
    def all_products(self) -> list[Product]:
        """All there are."""
        return [self.products]

    @property
    def widths(self) -> tuple[int, int, int]:
        """What is stored as key and as value of a head, and how much of a head is turned."""
        return self.head_dim, self.head_dim, self.head_dim

    def project(self, x: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries ``(rows, heads, d)``, keys and values ``(rows, kv_heads, d)``, the first two turned."""
        rows, dim = len(x), self.head_dim
        if self.grouped:
            fused = self.products.together(x).view(rows, self.kv_heads, -1, dim)
            query, key, value = fused[:, :, :-2].reshape(rows, -1, dim), fused[:, :, -2], fused[:, :, -1]
            return turn(query), turn(key), value
        fused = self.products.together(x).view(rows, -1, dim)
        turned = fused[:, : -self.kv_heads]  # both in one go
        if self.norms is not None:
            norm, query_weight, key_weight = self.norms
            query, key = turned[:, : -self.kv_heads], turned[:, -self.kv_heads :]
            turned = torch.cat((norm(query, query_weight), norm(key, key_weight)), 1)
        turned = turn(turned)
        return turned[:, : -self.kv_heads], turned[:, -self.kv_heads :], fused[:, -self.kv_heads :]

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, length: int, mask: Tensor | None) -> Tensor:
        """Return ``(rows, heads * d)`` for one query per row over the first ``length`` positions of rows 0 to B-1.

        ``mask`` is None or ``(rows, 1, 1, length)``, added to the scores.
        """
        rows = len(query)
        seen = (rows, self.kv_heads, length, self.head_dim)
        # The heads that share keys stand as query positions, so that keys are never repeated. Not so in bfloat16 on a
        # CPU: there, heads of one query each are up to 1.7 times as fast, although keys are read again.
        apart = keys.dtype == torch.bfloat16 and keys.device.type == "cpu"
        context = F.scaled_dot_product_attention(
            query.unsqueeze(2) if apart else query.reshape(rows, self.kv_heads, -1, self.head_dim),
            keys.as_strided(seen, keys.stride()),
            values.as_strided(seen, values.stride()),
            attn_mask=mask,
            scale=self.scaling,
            enable_gqa=apart and query.shape[1] != self.kv_heads,
        )
        return context.reshape(rows, -1)

    def prompt(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Return ``(new, heads * d)`` for queries ``(new, heads, d)`` and keys ``(kv_heads, seen, d)`` of one row."""
        context = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            attn_mask=mask,
            is_causal=causal,
            scale=self.scaling,
            enable_gqa=query.shape[1] != len(keys),
        )
        return context[0].transpose(0, 1).reshape(len(query), -1)


class Latents(NamedTuple):
    """MLA: one latent per position, from which all heads' keys and values are made; stored are it and a turned part.

    A new token works on the latents themselves: what would make the keys is applied to its query, and what makes the
    values to the result. That is the same sum in another order.

    Attributes:
        first: of the states: the queries or what they are made from, and the latent with the turned part behind it.
        queries: the queries from the former; None where ``first`` makes them.
        query_norm: before ``queries``.
        latent_norm: of the latent.
        both: keys and values of latents.
        weight: of ``both``.
        parts: widths of a query's part without and with position, and of a value.
        scaling: of scores.
    """

    first: Product
    queries: Product | None
    query_norm: tuple[Norm, Tensor] | None
    latent_norm: tuple[Norm, Tensor]
    both: Product
    weight: Tensor
    parts: tuple[int, int, int]
    scaling: float
    kv_heads: int = 1

    @property
    def all_products(self) -> list[Product]:
        """All there are."""
        return [self.first, self.both] if self.queries is None else [self.first, self.queries, self.both]

    @property
    def widths(self) -> tuple[int, int, int]:
        """Those of the latent, of the turned part, and of what is turned."""
        return self.weight.shape[1], self.parts[1], self.parts[1]

    def project(self, x: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries ``(rows, heads, d)``, latents and turned parts ``(rows, 1, width)``."""
        plain, turned, _ = self.parts
        query, latent = self.first(x)
        if self.queries is not None and self.query_norm is not None:
            norm, weight = self.query_norm
            (query,) = self.queries(norm(query, weight))
        query = by_rows(query).view(len(x), -1, plain + turned)
        latent, key = by_rows(latent).split((self.weight.shape[1], turned), -1)
        norm, weight = self.latent_norm
        query = torch.cat((query[..., :plain], turn(query[..., plain:])), -1)
        return query, norm(latent, weight).unsqueeze(1), turn(key.unsqueeze(1))

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, length: int, mask: Tensor | None) -> Tensor:
        """Return ``(rows, heads * value)``; see ``Heads``."""
        plain = self.parts[0]
        to_keys, to_values = self._halves()
        latents, parts = keys[: len(query), 0, :length], values[: len(query), 0, :length]
        on_latents = torch.bmm(query[..., :plain].transpose(0, 1), to_keys).transpose(0, 1)  # (rows, heads, rank)
        scores = torch.bmm(on_latents, latents.transpose(1, 2))
        scores = torch.baddbmm(scores, query[..., plain:], parts.transpose(1, 2)).float().mul_(self.scaling)
        if mask is not None:
            scores += mask[:, 0]
        context = torch.bmm(scores.softmax(-1).to(latents.dtype), latents)
        return torch.bmm(context.transpose(0, 1), to_values.mT).transpose(0, 1).reshape(len(query), -1)

    def prompt(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Return ``(new, heads * value)``; see ``Heads``."""
        plain, _, value_width = self.parts
        heads = query.shape[1]
        both = by_rows(self.both(keys[0])[0]).view(keys.shape[1], heads, plain + value_width)
        key = torch.cat((both[..., :plain], values[0].unsqueeze(1).expand(-1, heads, -1)), -1)
        context = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            key.transpose(0, 1).unsqueeze(0),
            both[..., plain:].transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=causal,
            scale=self.scaling,
        )
        return context[0].transpose(0, 1).reshape(len(query), -1)

    def _halves(self) -> tuple[Tensor, Tensor]:
        """Return what makes keys ``(heads, plain, rank)`` and what makes values ``(heads, value, rank)``."""
        plain, _, value_width = self.parts
        return self.weight.view(-1, plain + value_width, self.weight.shape[1]).split((plain, value_width), 1)


def by_rows(x: Tensor) -> Tensor:
    """Return ``x`` with the numbers of a row side by side in memory, which attention needs."""
    return x if x.stride(-1) == 1 else x.contiguous()
