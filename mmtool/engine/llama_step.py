"""One step of a plain Llama decoder with as few calls as torch allows.

Calling the modules of a small model costs more than its arithmetic, and on a GPU every extra kernel is waited for. This
does what ``LlamaModel.forward`` does, on the model's own weights: for one new token per row, or for the prompts of
several rows one behind the other, so that short prompts share the matrix products. It is used for the classes that
``step_layers`` knows, without hooks but those of LoRA adapters; everything else goes through the model's ``forward``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtool.engine.products import norm_of
from mmtool.engine.step_layers import Layer, anatomy_of, fits, head_is_plain, packed_bytes, product_maker

if TYPE_CHECKING:
    from mmtool.engine.attention import Turn
    from mmtool.engine.slots import KVSlots

__all__ = ["Chunk", "LlamaStep", "Rows", "fits", "step_for"]


# Positions that go through the products of bfloat16 on a CPU: for every number oneDNN compiles a program for each shape
# of weights, which takes a fifth of the time of a prompt of 100 positions. And the products are fastest with multiples
# of this: 480 rows take a third less time than 468.
FILLED_UP_TO = 32


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


class Chunk(NamedTuple):
    """A part of a prompt: positions ``start`` to ``end - 1`` of a row."""

    row: int
    start: int
    end: int


class LlamaStep:
    """The step of one decoder; ``fits`` says whether a decoder can have one.

    Args:
        decoder: whose weights it uses, as they are at every call.
        head: the linear layer that makes logits, if the step is to use it.
        pack: allow copies of weights in float32 on a CPU, which more than one row is faster with; the weights must not
            change then.
    """

    def __init__(self, decoder: Any, head: Any = None, pack: bool = False) -> None:
        self.pack = pack
        self.weights = _weights_of(decoder, head)
        self.anatomy = anatomy = anatomy_of(decoder, pack)
        self.layers = anatomy.layers
        plain = head is not None and head_is_plain(head)
        self.head = product_maker(head.weight, pack)([head]) if plain else None
        self.packed_bytes = packed_bytes(anatomy, self.head)
        self.takes_prompts = anatomy.takes_prompts
        self.embeddings = anatomy.embeddings
        self.kv_heads = self.layers[0].attention.kv_heads
        self.key_width, self.value_width, self.turned_width = self.layers[0].attention.widths
        self.norm = norm_of(anatomy.final_norm, anatomy.eps)
        self.act = anatomy.act
        self.fills_up = self.embeddings.device.type == "cpu" and self.embeddings.dtype == torch.bfloat16
        self.table = self.embeddings.new_empty(2, 0, 1, self.turned_width).unbind()  # by position, see _table

    def __call__(self, rows: Rows, slots: KVSlots) -> Tensor:
        """Return the ``(B, hidden)`` states for the head; keys and values are written into ``slots``."""
        batch, longest, mask, index = len(rows.ids), rows.longest, rows.mask, rows.index
        key_width, value_width = self.key_width, self.value_width
        hidden = self._embedded(rows.ids)
        turn = self._turn(*self._angles(rows, slots.capacity))
        for layer, keys, values in zip(self.layers, slots.keys, slots.values, strict=True):
            query, key, value = layer.attention.project(self.norm(hidden, layer.input_norm), turn)
            if index is None:
                keys[:batch, :, longest] = key
                values[:batch, :, longest] = value
            else:
                keys.view(-1, key_width).index_copy_(0, index, key.reshape(-1, key_width))
                values.view(-1, value_width).index_copy_(0, index, value.reshape(-1, value_width))
            context = layer.attention.decode(query, keys, values, longest + 1, mask)
            hidden = self._finish(layer, hidden, context)
        return self._final(hidden)

    def fill(self, embeds: Tensor, chunks: Sequence[Chunk], slots: KVSlots) -> Tensor:
        """Compute parts of prompts, one behind the other, and return the ``(chunks, hidden)`` states of their ends.

        Args:
            embeds: ``(positions, hidden)`` of all chunks.
            chunks: where they stand; different rows.
            slots: gets their keys and values.
        """
        spans = _spans(chunks)
        filled = self.fills_up and 2 * len(embeds) > FILLED_UP_TO  # fewer are as many as decode steps have
        idle = -len(embeds) % FILLED_UP_TO if filled else 0
        embeds = F.pad(embeds, (0, 0, 0, idle))
        ranges = [torch.arange(chunk.start, chunk.end) for chunk in chunks]
        positions = torch.cat([*ranges, torch.zeros(idle, dtype=torch.long)]).to(embeds.device)
        cos, sin = self._table(max(slots.capacity, max(chunk.end for chunk in chunks)))
        turn = self._turn(cos.index_select(0, positions), sin.index_select(0, positions))
        ends = torch.tensor([last - 1 for _, last in spans], device=embeds.device)
        leads = [_lead(chunk) for chunk in chunks]
        behind = zip(chunks, leads, strict=True)
        masks = [None if lead == chunk.start else self._mask_behind(chunk) for chunk, lead in behind]
        hidden = embeds
        for number, (layer, keys, values) in enumerate(self._with_storage(slots)):
            last_layer = number == len(self.layers) - 1
            query, key, value = layer.attention.project(self.norm(hidden, layer.input_norm), turn)
            context = []
            for chunk, (first, last), lead, mask in zip(chunks, spans, leads, masks, strict=True):
                where = (chunk.row, slice(None), slice(chunk.start, chunk.end))
                keys[where] = key[first:last].transpose(0, 1)
                values[where] = value[first:last].transpose(0, 1)
                reach = chunk.end if last_layer else self._rounded(chunk.end)
                seen = keys[chunk.row, :, :reach], values[chunk.row, :, :reach]
                if last_layer:
                    context.append(layer.attention.prompt(query[last - 1 : last], *seen, None, False))
                else:
                    used = lead + last - first
                    asked = query[first : first + self._rounded(used)]  # what follows the chunk does no harm
                    if lead or len(asked) < self._rounded(used):
                        asked = F.pad(query[first:last], (0, 0, 0, 0, lead, self._rounded(used) - used))
                    context.append(layer.attention.prompt(asked, *seen, mask, mask is None)[lead:used])
            if idle and not last_layer:
                context.append(context[0].new_zeros(idle, context[0].shape[1]))
            if last_layer:  # nothing follows that would look at the other positions
                hidden = hidden.index_select(0, ends)
            hidden = self._finish(layer, hidden, torch.cat(context))
        return self._final(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return ``(rows, vocabulary)`` for what a call returned."""
        assert self.head is not None, "asked only where there is one"
        return self.head(hidden)[0]

    def _embedded(self, ids: Tensor) -> Tensor:
        hidden = F.embedding(ids, self.embeddings)
        if self.anatomy.embedding_factor != 1.0:
            hidden = hidden * self.anatomy.embedding_factor
        return hidden

    def _turn(self, cos: Tensor, sin: Tensor) -> Turn:
        """Return what turns heads ``(rows, heads, width)``, in the format of the angles."""
        half = self.turned_width // 2

        def turn(x: Tensor) -> Tensor:
            return torch.addcmul(x * cos, x.roll(half, -1), sin)

        dtype = self.embeddings.dtype
        return turn if cos.dtype == dtype else lambda x: turn(x.to(cos.dtype)).to(dtype)

    def _finish(self, layer: Layer, hidden: Tensor, context: Tensor) -> Tensor:
        """Return the states behind a layer, from those before it and the result of its attention."""
        factor = self.anatomy.factor
        hidden = layer.output.add(hidden, context, factor)
        gate, up = layer.gate_up(self.norm(hidden, layer.post_norm))
        return layer.down.add(hidden, self.act(gate).mul_(up), factor)

    def _final(self, hidden: Tensor) -> Tensor:
        hidden = self.norm(hidden, self.anatomy.final_norm)
        return hidden if self.anatomy.divisor == 1.0 else hidden / self.anatomy.divisor

    def _with_storage(self, slots: KVSlots) -> list[tuple[Layer, Tensor, Tensor]]:
        """Return each layer with the tensors of its keys and values, allocated on first use."""
        keys, values = (self.embeddings.new_empty(1, self.kv_heads, 0, n) for n in (self.key_width, self.value_width))
        return [(layer, *slots.layer(number, keys, values)) for number, layer in enumerate(self.layers)]

    def _rounded(self, positions: int) -> int:
        """Return how many positions attention works on: torch keeps a program for every number of them, without end."""
        return -(-positions // FILLED_UP_TO) * FILLED_UP_TO if self.fills_up else positions

    def _mask_behind(self, chunk: Chunk) -> Tensor:
        """Return the mask of a chunk that goes on behind computed positions, ``(new, seen)``."""
        new, seen = self._rounded(chunk.end - chunk.start), self._rounded(chunk.end)
        asked = torch.arange(chunk.start, chunk.start + new, device=self.embeddings.device)
        hidden = torch.arange(seen, device=self.embeddings.device) > asked.unsqueeze(1)
        return torch.zeros_like(hidden, dtype=self.embeddings.dtype).masked_fill_(hidden, -torch.inf)

    def _table(self, capacity: int) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines by position, ``(capacity or more, 1, width)``: all heads turn alike."""
        table = self.table  # in one piece: two threads may be here
        if len(table[0]) < capacity:
            cos, sin = self.anatomy.angles(torch.arange(capacity, device=self.embeddings.device))
            sin = sin.clone()
            sin[..., : self.turned_width // 2].neg_()
            table = self.table = cos.unsqueeze(1), sin.unsqueeze(1)
        return table

    def _angles(self, rows: Rows, capacity: int) -> tuple[Tensor, Tensor]:
        """Return those of the rows' positions, ``(B or 1, 1, width)``."""
        cos, sin = self._table(capacity)
        if rows.index is None:
            return cos.narrow(0, rows.longest, 1), sin.narrow(0, rows.longest, 1)
        return cos.index_select(0, rows.positions), sin.index_select(0, rows.positions)


def step_for(decoder: Any, known: LlamaStep | None = None, head: Any = None, pack: bool = False) -> LlamaStep | None:
    """Return the step of ``decoder``, which is ``known`` if that is still true of it, or None if it cannot have one."""
    if not fits(decoder):
        return None
    if known is not None and known.pack == pack and known.weights == _weights_of(decoder, head):
        return known
    return LlamaStep(decoder, head, pack)


def _weights_of(decoder: Any, head: Any) -> list[tuple[int, int]]:
    """Return where the weights are, and how often each has been changed in place, as far as torch counts."""
    weights = list(decoder.parameters())
    if head is not None and head_is_plain(head):
        weights += [head.weight]
    return [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]


def _lead(chunk: Chunk) -> int:
    """Return how many queries of computed positions attention gets in front of those of a chunk, with any values.

    All of them where that is the cheaper: attention is causal then and skips what lies ahead, half of the square. Where
    more than a half was computed before, a mask over the chunk's own rows costs less.
    """
    return chunk.start if chunk.start <= chunk.end - chunk.start else 0


def _spans(chunks: Sequence[Chunk]) -> list[tuple[int, int]]:
    spans, first = [], 0
    for chunk in chunks:
        spans.append((first, first + chunk.end - chunk.start))
        first = spans[-1][1]
    return spans
