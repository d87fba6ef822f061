"""The network as it trains: batch in, loss out.

Text is embedded, features take the places of media, the decoder runs, and only positions that have something to
learn go through the head: logits of the whole batch never exist. This is the path of the engine, so every family that
chats can train.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmtool.engine.features import TOWERS
from mmtool.errors import MMToolError
from mmtool.sft.batches import IGNORED, MediaBatch
from mmtool.sft.features import Features

LOGITS_AT_ONCE = 2**25  # numbers in a piece of logits: 128 MiB in float32


class Learner(nn.Module):
    """Computes the loss of a batch of ``batches.Collator``.

    Args:
        model: the head class of a family, or peft's wrapper of one.
        frozen_kinds: kinds of media whose tower and projector have nothing to train: they run without gradients.
        cache: keeps features of frozen towers by content; None computes them every time.
        frozen_modules: stay in evaluation mode.
        one_piece: call the head once in every pass, as ranks that hold pieces of it must.
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
    ) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.frozen_kinds = frozenset(frozen_kinds)
        self.cache = cache
        self.dummies = dict(dummies or {})
        self.one_piece = one_piece
        self.towers_run = 0
        self._frozen_modules = list(frozen_modules)  # a list: they are children of the model already
        # For what Trainer, accelerate and DeepSpeed read and set; a copy, or their settings would be saved.
        self.config = copy.deepcopy(self.head.config.get_text_config())
        self._no_split_modules = self.head._no_split_modules

    @property
    def head(self) -> Any:
        """The head class itself, adapters and all."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def train(self, mode: bool = True) -> Learner:
        """Switch dropout on, but not in towers that are frozen: their features are kept, and shall not vary."""
        super().train(mode)
        for module in self._frozen_modules:
            module.eval()
        return self

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
        hidden = self.hidden_states(input_ids, attention_mask, position_ids, media)
        total = summed_loss(hidden, labels, self.head.lm_head, one_piece=self.one_piece)
        num_items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        if not isinstance(num_items, Tensor):
            num_items = torch.tensor(num_items)
        return {"loss": total / num_items.to(total.device).clamp(min=1), "total": total.detach()}

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, media: Mapping[str, MediaBatch]
    ) -> Tensor:
        """Return what goes into the head, ``(batch, seq, hidden)``."""
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
        named = head.media_mask_argument if hasattr(head, "media_mask_argument") else None
        more = {named: places} if named is not None and bool(media) else {}
        return head.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            **more,
        ).last_hidden_state

    def features(self, kind: str, batch: MediaBatch) -> list[Tensor]:
        """Return the features of each medium, ``(positions, hidden)``; from the cache where it has them."""
        frozen = kind in self.frozen_kinds
        if not frozen or self.cache is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                return self._run_tower(kind, batch["inputs"], batch["lengths"])
        keys = batch["keys"]
        found = {key: self.cache.get(key) for key in keys}
        wanted = list(dict.fromkeys(key for key in keys if found[key] is None))
        if wanted:
            chosen = [keys.index(key) for key in wanted]
            with torch.no_grad():
                fresh = self._run_tower(kind, _rows_of(batch, chosen), [batch["lengths"][item] for item in chosen])
            for key, rows in zip(wanted, fresh, strict=True):
                found[key] = rows
                self.cache.put(key, rows)
        return [found[key].to(batch["places"].device, non_blocking=True) for key in keys]

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


def _rows_of(batch: MediaBatch, chosen: Sequence[int]) -> dict[str, Tensor]:
    """Return the input tensors of some media of a batch."""
    if len(chosen) == len(batch["keys"]):
        return dict(batch["inputs"])
    picked = {}
    for name, tensor in batch["inputs"].items():
        pieces = tensor.split(batch["rows"][name])
        picked[name] = torch.cat([pieces[item] for item in chosen])
    return picked


def summed_loss(hidden: Tensor, labels: Tensor, head: nn.Module, *, one_piece: bool = False) -> Tensor:
    """Return the summed cross entropy of the labelled positions, in float32.

    Logits are made piece by piece and made again for the gradient, so that only one piece exists at a time.

    Args:
        hidden: ``(batch, seq, width)``.
        labels: ``(batch, seq)``, shifted; -100 for nothing to learn.
        head: hidden states to logits.
        one_piece: all logits at once.
    """
    where = (labels != IGNORED).flatten().nonzero().squeeze(1)
    rows, targets = hidden.flatten(0, 1)[where], labels.flatten()[where]
    if len(rows) == 0:  # everything must have a gradient all the same: processes wait for one another's
        return 0.0 * (hidden.sum().float() + head(hidden[:1, :1]).sum().float())
    step = max(1, LOGITS_AT_ONCE // _vocab_size(head))
    if one_piece or len(rows) <= step:
        return _piece_loss(rows, targets, head)
    total = torch.zeros((), device=hidden.device)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step], targets[start : start + step]
        if torch.is_grad_enabled():
            total = total + checkpoint(_piece_loss, *piece, head, use_reentrant=False)
        else:
            total = total + _piece_loss(*piece, head)
    return total


def _piece_loss(rows: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(head(rows).float(), targets, reduction="sum")


def _vocab_size(head: nn.Module) -> int:
    return int(getattr(head, "out_features", 2**16))
