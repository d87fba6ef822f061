"""Rows to batches: which rows make up a step, and their tensors.

The order depends on the seed, the epoch and the rows alone: with the same global batch, any number of processes sees
the same rows in each step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from mmtool.data.sampling import Permutation, seed_of
from mmtool.sft.features import SeenRows, light_row
from mmtool.template.base import IGNORED_LABEL, MediaInput, Template

Row: TypeAlias = Mapping[str, Any]

IGNORED = IGNORED_LABEL
EMPTY = -1  # index of a row that is not there: it fills up the last batches, so that all ranks have as many


class MediaBatch(TypedDict):
    """The media of one kind in a batch, in reading order.

    ``inputs``: tensors for the tower, rows of all media one after the other. ``rows``: how many are each medium's, by
    tensor. ``places``: positions of the features in the flattened batch. ``lengths``: features per medium. ``keys``:
    content keys.
    """

    inputs: dict[str, Tensor]
    rows: dict[str, list[int]]
    places: Tensor
    lengths: list[int]
    keys: list[str]


class Collator:
    """Stacks encoded rows, with labels shifted to the position that predicts them.

    An item is a row, or a list of rows that share one: then each of them has positions of its own from 0, and no
    attention mask is given, so that transformers tells them apart by their positions.

    A row that could not be encoded (``{"error": ..}``) becomes an empty one without labels; its text goes to
    ``errors`` of the batch, for the trainer to report.
    """

    def __init__(self, template: Template) -> None:
        self._collate = template.collate

    def __call__(self, items: Sequence[Row | list[Row]]) -> dict[str, Any]:
        """Return the batch: keyword arguments of ``Learner.forward``, and ``errors``, ``origins``, ``light``."""
        packs = [item if isinstance(item, list) else [item] for item in items]
        found = [row for pack in packs for row in pack]
        packed = [_joined([row if "error" not in row else empty_row() for row in pack]) for pack in packs]
        batch: dict[str, Any] = self._collate(
            [{"input_ids": row["input_ids"], "labels": row["labels"], "media": []} for row in packed],
            padding_side="right",
        )
        if any(isinstance(item, list) for item in items):
            for number, row in enumerate(packed):
                length = len(row["positions"])
                batch["position_ids"][number, :length] = torch.tensor(row["positions"])
                batch["position_ids"][number, length:] = torch.arange(batch["input_ids"].shape[1] - length)
            batch["attention_mask"] = None
        batch["media"] = gather_media([row["media"] for row in packed], batch["input_ids"].shape[1])
        batch["errors"] = [row["error"] for row in found if "error" in row]
        batch["origins"] = [str(row["row"]) for row in found if "error" not in row and row.get("row")]
        light = [row["light"] for row in found if "light" in row]
        if light:
            batch["light"] = light
        return batch


def _joined(rows: Sequence[Row]) -> dict[str, Any]:
    """Return rows one after the other, labels shifted within each, so that no row predicts the next one's start."""
    joined: dict[str, Any] = {"input_ids": [], "labels": [], "positions": [], "media": []}
    for row in rows:
        start, length = len(joined["input_ids"]), len(row["input_ids"])
        joined["input_ids"] += row["input_ids"]
        joined["labels"] += [*row["labels"][1:], IGNORED]
        joined["positions"] += range(length)
        joined["media"] += [replace(item, start=start + item.start) for item in row["media"]]
    return joined


def empty_row() -> dict[str, Any]:
    """Return a row of one token with nothing to learn."""
    return {"input_ids": [0], "labels": [IGNORED], "media": []}


def gather_media(rows: Sequence[Sequence[MediaInput]], width: int) -> dict[str, MediaBatch]:
    """Return the media of a right-padded batch of rows of ``width``, by kind."""
    kinds: dict[str, list[tuple[int, MediaInput]]] = {}
    for number, media in enumerate(rows):
        for item in media:
            kinds.setdefault(item.kind, []).append((number * width, item))
    return {kind: media_batch(found) for kind, found in kinds.items()}


def media_batch(found: Sequence[tuple[int, MediaInput]]) -> MediaBatch:
    """Return a batch of media of one kind, each with the position where its row begins."""
    items = [item for _, item in found]
    names = dict.fromkeys(name for item in items for name in item.inputs)
    places = [
        torch.arange(item.length) if item.feature_index is None else torch.tensor(item.feature_index) for item in items
    ]
    return {
        "inputs": {name: torch.cat([item.inputs[name] for item in items if name in item.inputs]) for name in names},
        "rows": {name: [len(item.inputs[name]) if name in item.inputs else 0 for item in items] for name in names},
        "places": torch.cat([base + item.start + place for (base, item), place in zip(found, places, strict=True)]),
        "lengths": [item.num_features for item in items],
        "keys": [item.key for item in items],
    }


def flat_rows(attention_mask: Tensor | None, position_ids: Tensor, labels: Tensor) -> tuple[Tensor, list[int], Tensor]:
    """Return the rows of a right-padded batch one behind the other, without padding and rows that learn nothing.

    Args:
        attention_mask: ``(batch, seq)``; None where several rows share one.
        position_ids: ``(batch, seq)``; then a row begins wherever they are 0.
        labels: ``(batch, seq)``.

    Returns:
        The places of their positions in the flattened batch, their lengths, and which of these positions have a label.
    """
    learned = (labels != IGNORED).flatten()
    if attention_mask is None:
        starts = (position_ids.flatten() == 0).nonzero().squeeze(1)
        sizes = torch.diff(starts, append=torch.tensor([learned.numel()]))
    else:
        starts = torch.arange(len(labels)) * labels.shape[1]
        sizes = attention_mask.sum(1)
    before = torch.cat([torch.zeros(1, dtype=torch.long), learned.cumsum(0)])
    some = before[starts + sizes] > before[starts]
    spans = list(zip(starts[some].tolist(), sizes[some].tolist(), strict=True))
    index = torch.cat([torch.arange(start, start + size) for start, size in spans])
    return index, [size for _, size in spans], learned[index].nonzero().squeeze(1)


def split_batch(batch: Mapping[str, Any], most: int) -> list[dict[str, Any]]:
    """Return a batch in pieces of at most ``most`` positions, padding not counted, or of one row.

    The pieces hold the rows in their order, with less padding. Rows that share one stay together.
    """
    mask, width = batch["attention_mask"], batch["labels"].shape[1]
    if mask is None or len(mask) == 1 or int(mask.sum()) <= most:
        return [dict(batch)]
    sizes, pieces, first, total = mask.sum(1).tolist(), [], 0, 0
    for row, size in enumerate([*sizes, most + 1]):
        if row > first and total + size > most:
            pieces.append((first, row, max(sizes[first:row])))
            first, total = row, 0
        total += size
    tensors = ("input_ids", "attention_mask", "position_ids", "labels")
    return [
        {name: batch[name][start:end, :longest] for name in tensors}
        | {"media": _media_of_rows(batch["media"], start, end, width, longest)}
        for start, end, longest in pieces
    ]


def _media_of_rows(
    media: Mapping[str, MediaBatch], start: int, end: int, width: int, new_width: int
) -> dict[str, MediaBatch]:
    """Return the media of the rows ``start`` to ``end - 1``, in a batch of these rows alone."""
    found = {}
    for kind, batch in media.items():
        places = batch["places"].split(batch["lengths"])
        chosen = [item for item, at in enumerate(places) if len(at) and start <= int(at[0]) // width < end]
        if not chosen:
            continue
        at = torch.cat([places[item] for item in chosen])
        found[kind] = MediaBatch(
            inputs=inputs_of(batch, chosen),
            rows={name: [rows[item] for item in chosen] for name, rows in batch["rows"].items()},
            places=(at // width - start) * new_width + at % width,
            lengths=[batch["lengths"][item] for item in chosen],
            keys=[batch["keys"][item] for item in chosen],
        )
    return found


def inputs_of(batch: MediaBatch, chosen: Sequence[int]) -> dict[str, Tensor]:
    """Return the input tensors of some media of a batch."""
    if len(chosen) == len(batch["keys"]):
        return dict(batch["inputs"])
    picked = {}
    for name, tensor in batch["inputs"].items():
        pieces = tensor.split(batch["rows"][name])
        picked[name] = torch.cat([pieces[item] for item in chosen])
    return picked


@dataclass(frozen=True)
class Packs:
    """Which rows share one: pack ``i`` holds ``rows[starts[i]:starts[i + 1]]``."""

    rows: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> list[int]:
        return self.rows[self.starts[index] : self.starts[index + 1]].tolist()


def pack_rows(lengths: np.ndarray, limit: int, seed: int, window: int = 2048) -> Packs:
    """Choose rows that share one of at most ``limit`` positions: the longest first, each where it fits best.

    Rows are drawn at random in groups of ``window``, and packed within them.
    """
    order, rows, starts = Permutation(len(lengths), seed), [], [0]
    for start in range(0, len(lengths), window):
        group = order.block(np.arange(start, min(start + window, len(lengths))))
        sizes = np.asarray(lengths)[group]
        packs: list[list[int]] = []
        room: list[tuple[int, int]] = []  # room left and number of the pack, sorted
        for place in np.argsort(-sizes, kind="stable"):
            size = int(sizes[place])
            at = bisect_left(room, (size, -1))
            if at < len(room):
                left, number = room.pop(at)
            else:
                left, number = max(limit, size), len(packs)
                packs.append([])
            packs[number].append(int(group[place]))
            insort(room, (left - size, number))
        for pack in packs:
            rows += pack
            starts.append(len(rows))
    return Packs(np.array(rows, np.int64), np.array(starts, np.int64))


class RowDataset(torch.utils.data.Dataset):
    """The rows of a data set, or packs of them, and an empty one at index ``EMPTY``.

    Args:
        rows: encodes a row when asked for it.
        packs: which rows share one.
        seen: rows that need not be encoded again; where it is given, rows that are new to it come with what it wants
            to know of them, under ``light``.
    """

    def __init__(self, rows: Any, packs: Packs | None = None, seen: SeenRows | None = None) -> None:
        self.rows, self.packs, self.seen = rows, packs, seen

    def __len__(self) -> int:
        return len(self.rows) if self.packs is None else len(self.packs)

    def __getitem__(self, index: int) -> Row | list[Row]:
        """Return an encoded row, or those of a pack."""
        if self.packs is None:
            return empty_row() if index == EMPTY else self._row(index)
        return [empty_row()] if index == EMPTY else [self._row(row) for row in self.packs[index]]

    def _row(self, index: int) -> Row:
        if self.seen is None:
            return self.rows[index]
        known = self.seen.get(index)
        if known is not None:
            return known
        row = self.rows[index]
        light = light_row(row)
        return row if light is None else row | {"light": (index, light)}


class StepBatches(Sampler[list[int]]):
    """The batches of one rank: in each step rank r takes the r-th piece of the step's rows.

    Args:
        num_rows: how many rows there are.
        batch_size: rows per rank and pass.
        passes: passes that make up a step.
        rank: of ``world_size``.
        world_size: number of ranks.
        seed: of the order; None keeps the rows as they come, and then the same in every epoch.
        lengths: of the encoded rows, to put like ones together; None for a plain shuffle.
        window: global batches among which rows are sorted by length.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        passes: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
        lengths: np.ndarray | None = None,
        window: int = 50,
    ) -> None:
        self.num_rows, self.batch_size, self.passes = num_rows, batch_size, passes
        self.rank, self.world_size = rank, world_size
        self.seed, self.lengths, self.window = seed, lengths, window
        self.epoch = 0

    @property
    def global_size(self) -> int:
        """Rows of one pass on all ranks."""
        return self.batch_size * self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; each epoch has its own."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_rows // self.global_size)

    def __iter__(self) -> Iterator[list[int]]:
        for order in self._spans():
            for start in range(0, len(order), self.global_size):
                step = order[start : start + self.global_size].tolist()
                step += [EMPTY] * (self.global_size - len(step))
                # Dealt out in turn, so that empty rows of the last step are spread over the ranks.
                yield step[self.rank :: self.world_size]

    def _spans(self) -> Iterator[np.ndarray]:
        """Give the order of the epoch in pieces: memory does not grow with the rows."""
        size = self.global_size * self.passes
        span = self.window * size
        shuffled = None if self.seed is None else Permutation(self.num_rows, seed_of(self.seed, self.epoch))
        for start in range(0, self.num_rows, span):
            order = np.arange(start, min(start + span, self.num_rows))
            if shuffled is not None:
                order = shuffled.block(order)
                if self.lengths is not None and size > 1:
                    order = self._alike(order, size, start)
            yield order

    def _alike(self, order: np.ndarray, size: int, start: int) -> np.ndarray:
        """Return a piece of the order with rows of like length in the same step, the steps in any order."""
        order = order[np.argsort(-np.asarray(self.lengths)[order], kind="stable")]
        # A last step that is short stays where it is.
        full = len(order) // size
        steps = order[: full * size].reshape(full, size)
        rng = np.random.default_rng((self.seed or 0, self.epoch, start))
        return np.concatenate([steps[rng.permutation(full)].reshape(-1), order[full * size :]])
