"""The network as it trains: batch in, loss out.

Text is embedded, features take the places of media, the decoder runs, and only positions that have something to
learn go through the head: logits of the whole batch never exist. This is the path of the engine, so every family that
chats can train.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from mmtool.engine.features import TOWERS
from mmtool.errors import MMToolError
from mmtool.sft.batches import IGNORED, MediaBatch, flat_rows, inputs_of
from mmtool.sft.features import Features
from mmtool.sft.llama_pass import LlamaPass

LOGITS_AT_ONCE = 2**24  # numbers in a piece of logits: 64 MiB in float32


class Learner(nn.Module):
    """Computes the loss of a batch of ``batches.Collator``.

    Args:
        model: the head class of a family, or peft's wrapper of one.
        frozen_kinds: kinds of media whose tower and projector have nothing to train: they run without gradients.
        cache: keeps features of frozen towers by content; None computes them every time.
        frozen_modules: stay in evaluation mode.
        one_piece: call the head once in every pass, as ranks that hold pieces of it must.
        layers: runs the layers of the language model; None to call the model for that.
        dummies: one medium of each kind that must run in every pass on every rank, used where a batch has none, so
            that processes never wait for one another's towers.
    """

    accepts_loss_kwargs = True  # Trainer: the loss is divided by the items of the whole step

    def __init__(
        self,
        model: Any,
        *,
        frozen_kinds: Iterable[str] = (),
        cache: Features | None = None,
        dummies: Mapping[str, MediaBatch] | None = None,
        frozen_modules: Iterable[nn.Module] = (),
        one_piece: bool = False,
        layers: LlamaPass | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.training = model.training
        self.frozen_kinds = frozenset(frozen_kinds)
        self.cache = cache
        self.dummies = dict(dummies or {})
        self.one_piece = one_piece
        self.label_smoothing = 0.0  # the share of each target that is spread over all tokens while it trains
        self.towers_run = 0
        self._frozen_modules = list(frozen_modules)  # a list: they are children of the model already
        self._mode: bool | None = None
        # For what Trainer, accelerate and DeepSpeed read and set; a copy, or their settings would be saved.
        self.config = copy.deepcopy(self.head.config.get_text_config())
        self._no_split_modules = self.head._no_split_modules

    @property
    def head(self) -> Any:
        """The head class itself, adapters and all."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def train(self, mode: bool = True) -> Learner:
        """Switch dropout on, but not in towers that are frozen: their features are kept, and shall not vary."""
        if mode != self._mode:  # Trainer asks in every step, and there are thousands of modules
            super().train(mode)
            for module in self._frozen_modules:
                module.eval()
            self._mode = mode
        return self

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that train; not for weights that are spread over processes, which change their objects."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        if self.one_piece or not set_to_none:
            super().zero_grad(set_to_none)
            return
        for parameter in self.trained:
            parameter.grad = None

    def get_input_embeddings(self) -> nn.Module:
        """Return the text embeddings; NEFTune adds its noise there."""
        return self.head.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        labels: Tensor,
        media: Mapping[str, MediaBatch],
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Return ``loss``, the summed cross entropy divided by ``num_items_in_batch`` (here: the labelled positions).

        Args:
            input_ids: ``(batch, seq)``.
            attention_mask: ``(batch, seq)``, 0 at padding; None for packed rows.
            position_ids: ``(batch, seq)``; where they begin anew, so does the row.
            labels: ``(batch, seq)``: what each position has to predict, -100 for nothing. Shifted already.
            media: by kind, in reading order.
            num_items_in_batch: labelled positions of all batches and ranks that make up the step.
        """
        if self.layers is not None and bool((labels != IGNORED).any()):
            total = self._total_of_rows(input_ids, attention_mask, position_ids, labels, media)
        else:
            hidden = self.hidden_states(input_ids, attention_mask, position_ids, media)
            total = summed_loss(hidden, labels, self.head.lm_head, one_piece=self.one_piece, smoothing=self._smoothing)
        num_items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        if not isinstance(num_items, Tensor):
            num_items = torch.tensor(num_items)
        return {"loss": total / num_items.to(total.device).clamp(min=1), "total": total.detach()}

    def _total_of_rows(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        labels: Tensor,
        media: Mapping[str, MediaBatch],
    ) -> Tensor:
        """Return the summed cross entropy by way of ``layers``, without padding."""
        index, lengths, wanted = flat_rows(attention_mask, position_ids, labels)
        embeds, _ = self.embeds(input_ids, media)
        hidden = self.layers(
            embeds.flatten(0, 1).index_select(0, index), lengths, position_ids.flatten()[index], wanted
        )
        targets = labels.flatten()[index[wanted]]
        return summed_loss(hidden.unsqueeze(0), targets.unsqueeze(0), self.head.lm_head, smoothing=self._smoothing)

    @property
    def _smoothing(self) -> float:
        return self.label_smoothing if self.training else 0.0

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, media: Mapping[str, MediaBatch]
    ) -> Tensor:
        """Return what goes into the head, ``(batch, seq, hidden)``."""
        head = self.head
        embeds, places = self.embeds(input_ids, media)
        named = head.media_mask_argument if hasattr(head, "media_mask_argument") else None
        more = {named: places} if named is not None and bool(media) else {}
        return head.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            **more,
        ).last_hidden_state

    def embeds(self, input_ids: Tensor, media: Mapping[str, MediaBatch]) -> tuple[Tensor, Tensor]:
        """Return embeddings with the features of media in their places, and where those are.

        ``(batch, seq, hidden)``, ``(batch, seq)``.
        """
        head = self.head
        places = torch.zeros(input_ids.shape, dtype=torch.bool, device=input_ids.device)
        for batch in media.values():
            places.view(-1)[batch["places"]] = True
        # A placeholder need not be in the vocabulary.
        embeds = head.get_input_embeddings()(input_ids.masked_fill(places, 0))
        for kind in dict.fromkeys((*media, *self.dummies)):
            if kind in media:
                features = torch.cat(self.features(kind, media[kind]))
                index = media[kind]["places"].unsqueeze(1).expand(-1, embeds.shape[-1])
                flat = embeds.reshape(-1, embeds.shape[-1])
                embeds = flat.scatter(0, index, features.to(flat)).view_as(embeds)
            else:  # a rank without media runs the tower all the same; what comes out counts nothing
                features = torch.cat(self.features(kind, self.dummies[kind]))
                embeds = embeds + 0.0 * features.sum().to(embeds)
        return embeds, places

    def features(self, kind: str, batch: MediaBatch) -> list[Tensor]:
        """Return the features of each medium, ``(positions, hidden)``; from the cache where it has them."""
        frozen = kind in self.frozen_kinds
        if not frozen:
            return self._run_tower(kind, batch["inputs"], batch["lengths"])
        if self.cache is None:
            return self._run_frozen(kind, batch, range(len(batch["keys"])))
        keys = batch["keys"]
        found = {key: self.cache.get(key) for key in keys}
        wanted = list(dict.fromkeys(key for key in keys if found[key] is None))
        if wanted:
            fresh = self._run_frozen(kind, batch, [keys.index(key) for key in wanted])
            for key, rows in zip(wanted, fresh, strict=True):
                found[key] = rows
                self.cache.put(key, rows)
        return [found[key].to(batch["places"].device, non_blocking=True) for key in keys]

    @torch.no_grad()
    def _run_frozen(self, kind: str, batch: MediaBatch, chosen: Sequence[int]) -> list[Tensor]:
        """Run a frozen tower for some media of a batch.

        On a CPU it takes one at a time, which is as fast: so the last bits of its features never depend on what else
        was in the batch, and a run that is resumed without its cache is the same run. Ranks that hold pieces of a
        tower must call it as often as one another.
        """
        alone = self._device_type() == "cpu" and not self.one_piece
        groups = [[item] for item in chosen] if alone else [list(chosen)]
        return [
            rows
            for group in groups
            for rows in self._run_tower(kind, inputs_of(batch, group), [batch["lengths"][item] for item in group])
        ]

    def _run_tower(self, kind: str, inputs: Mapping[str, Tensor], lengths: Sequence[int]) -> list[Tensor]:
        head = self.head
        tower = getattr(head, TOWERS[kind], None)
        if tower is None:
            raise MMToolError(f"{type(head).__name__} has no part that takes {kind} input")
        dtype = self._tower_dtype(kind)
        floats = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
        features = list(tower(**floats).pooler_output)
        self.towers_run += len(lengths)
        got = [len(rows) for rows in features]
        if got != list(lengths):
            raise MMToolError(
                f"{TOWERS[kind]} gave {got} positions, the prompts have {list(lengths)}",
                "The processor and the weights do not belong together.",
            )
        return features

    def _tower_dtype(self, kind: str) -> torch.dtype:
        if torch.is_autocast_enabled(self._device_type()):
            return torch.float32
        return next(p.dtype for p in self.head.parameters() if p.is_floating_point())

    def _device_type(self) -> str:
        return self.head.get_input_embeddings().weight.device.type

    @torch.no_grad()
    def keeps_packed_rows_apart(self) -> bool:
        """Try whether rows that share one see nothing of each other.

        What is masked counts exactly nothing, so another first row must not change one bit of the second.
        """
        device = self.head.get_input_embeddings().weight.device
        second = torch.arange(3, 15, device=device).unsqueeze(0)
        positions = torch.cat([torch.arange(12), torch.arange(12)]).to(device).unsqueeze(0)
        training = self.training
        self.eval()
        seen = [
            self.hidden_states(torch.cat([first, second], dim=1), None, positions, {})[0, 12:]
            for first in (second + 12, second.flip(1) + 5)
        ]
        alone = self.hidden_states(second, None, positions[:, 12:], {})[0].float()
        self.train(training)
        near = bool((seen[0].float() - alone).norm() < 0.02 * alone.norm())  # the order of sums may differ
        return torch.equal(*seen) and near


def summed_loss(
    hidden: Tensor, labels: Tensor, head: nn.Module, *, one_piece: bool = False, smoothing: float = 0.0
) -> Tensor:
    """Return the summed cross entropy of the labelled positions, in float32.

    Logits are made piece by piece, so that only one piece exists at a time. A plain head in float32 leaves the gradient
    behind with each piece; another one makes its logits again in the backward pass.

    Args:
        hidden: ``(batch, seq, width)``.
        labels: ``(batch, seq)``, shifted; -100 for nothing to learn.
        head: hidden states to logits.
        one_piece: all logits at once.
        smoothing: the share of each target that is spread over all tokens.
    """
    where = (labels != IGNORED).flatten().nonzero().squeeze(1)
    rows, targets = hidden.flatten(0, 1)[where], labels.flatten()[where]
    if len(rows) == 0:  # everything must have a gradient all the same: processes wait for one another's
        return 0.0 * (hidden.sum().float() + head(hidden[:1, :1]).sum().float())
    step = max(1, LOGITS_AT_ONCE // _vocab_size(head))
    if not one_piece and not smoothing and _is_plain_head(head, rows):
        weights = (head.weight, head.bias)
        if not torch.is_grad_enabled():  # or it would work for gradients that nobody wants
            weights = tuple(None if weight is None else weight.detach() for weight in weights)
        return _HeadLoss.apply(rows, targets, *weights, step)
    if one_piece or len(rows) <= step:
        return _piece_loss(rows, targets, head, smoothing)
    total = torch.zeros((), device=hidden.device)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step], targets[start : start + step]
        if torch.is_grad_enabled():
            total = total + checkpoint(_piece_loss, *piece, head, smoothing, use_reentrant=False)
        else:
            total = total + _piece_loss(*piece, head, smoothing)
    return total


def _piece_loss(rows: Tensor, targets: Tensor, head: nn.Module, smoothing: float) -> Tensor:
    return nn.functional.cross_entropy(head(rows).float(), targets, reduction="sum", label_smoothing=smoothing)


def _is_plain_head(head: nn.Module, rows: Tensor) -> bool:
    """Return whether logits are ``rows @ weight.T + bias`` in float32, and nobody watches."""
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
        return False
    plain = head.weight.dtype == rows.dtype == torch.float32
    return plain and not torch.is_autocast_enabled(rows.device.type)


class _HeadLoss(torch.autograd.Function):
    """Summed cross entropy of ``rows`` ``(N, width)`` behind a linear head, ``step`` rows at a time."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, step: int) -> Tensor:
        wants = [tensor is not None and ctx.needs_input_grad[at] for at, tensor in ((0, rows), (2, weight), (3, bias))]
        grads = [torch.zeros_like(t) if want else None for t, want in zip((rows, weight, bias), wants, strict=True)]
        total = rows.new_zeros(())
        for start in range(0, len(rows), step):
            piece, wanted = rows[start : start + step], targets[start : start + step].unsqueeze(1)
            logits = piece @ weight.t() if bias is None else torch.addmm(bias, piece, weight.t())
            logits -= logits.amax(dim=1, keepdim=True)
            right = logits.gather(1, wanted)
            sums = logits.exp_().sum(dim=1, keepdim=True)
            total += (sums.log() - right).sum()
            if not any(wants):
                continue
            slopes = logits.div_(sums).scatter_add_(1, wanted, torch.full_like(sums, -1.0))
            if grads[0] is not None:
                torch.mm(slopes, weight, out=grads[0][start : start + step])
            if grads[1] is not None:
                grads[1].addmm_(slopes.t(), piece)
            if grads[2] is not None:
                grads[2] += slopes.sum(0)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, weight, bias = (None if kept is None else kept * grad for kept in ctx.saved_tensors)
        return rows, None, weight, bias, None


def _vocab_size(head: nn.Module) -> int:
    return int(getattr(head, "out_features", 2**16))
