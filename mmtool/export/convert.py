"""Write a model folder from a released one, tensor by tensor: with adapters merged, in another number format."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import torch
from torch import Tensor

from mmtool.errors import MMToolError
from mmtool.export.layout import Release, Stored
from mmtool.export.merge_lora import NotStreamable
from mmtool.export.output import LEFT_OUT, edit_config, set_dtype, set_untied
from mmtool.export.progress import Progress
from mmtool.export.quantise import WeightQuantiser
from mmtool.export.shards import Entry, write_shards
from mmtool.export.source import Source
from mmtool.finetuned import attach_adapter
from mmtool.loader import load_model
from mmtool.models.common.folders import copy_beside_weights
from mmtool.models.common.weights import LazyTensor

MAIN = PurePosixPath(".")


class ChangedWeights(Protocol):
    """Weights that differ from those of a release; see ``MergedWeights``."""

    names: frozenset[str]
    keeps_tie: bool

    def merged(self, name: str, read: Callable[[], Tensor]) -> Tensor:
        """Return a weight in float32; ``read`` gives the release's."""


@dataclass(frozen=True)
class Plan:
    """What is written of a release.

    Attributes:
        entries: the tensors of each folder of weight files.
        changed: how many of them differ from the release's in more than their number format.
        untied: whether the head, which was the embedding, becomes a matrix of its own.
    """

    entries: Mapping[PurePosixPath, list[Entry]]
    changed: int
    untied: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entries in self.entries.values() for entry in entries)


def plan_weights(
    release: Release,
    merged: ChangedWeights | None,
    dtype: torch.dtype | None,
    quantiser: WeightQuantiser | None = None,
) -> Plan:
    """Return what to write.

    Args:
        release: the base.
        merged: what changes; None for nothing.
        dtype: of all floating point tensors; None keeps each as it is stored.
        quantiser: rounds the matrices that it names to a few bits.

    Raises:
        NotStreamable: where a weight that changes is not stored as one tensor.
    """
    names = merged.names if merged is not None else frozenset()
    tied = release.tied_names if release.is_tied else ()
    touched = bool(names.intersection(tied))
    untied = touched and not (merged is not None and merged.keeps_tie)
    lost = names.difference((item.parameter for item in release.tensors), tied)
    if lost:
        raise NotStreamable(f"{sorted(lost)[0]} is not stored as one tensor")
    entries: dict[PurePosixPath, list[Entry]] = {}
    changed = 0
    for item in _with_head(release, untied):
        parameter, tensor = item.parameter, item.tensor
        if touched and not untied and parameter in tied:
            parameter = tied[0]
        changes = parameter in names
        changed += changes
        target = dtype if dtype is not None and tensor.stored_dtype.is_floating_point else tensor.stored_dtype
        group = entries.setdefault(item.group, [])
        read = reader(parameter, tensor, merged if changes else None)
        if quantiser is not None and parameter in quantiser.group_sizes:
            group += quantiser.entries(item.name, parameter, tensor.shape, read)
        elif changes:
            group.append(Entry(item.name, tensor.shape, target, _rounded(item, read, target)))
        else:
            group.append(Entry(item.name, tensor.shape, target, _in_range(item, target)))
    return Plan(entries, changed, untied)


def _with_head(release: Release, untied: bool) -> Iterator[Stored]:
    """Yield what is stored; where the head parts from the embedding, as if it were stored on its own."""
    if not untied:
        yield from release.tensors
        return
    embedding, head = release.tied_names
    source = next(item for item in release.tensors if item.parameter == embedding)
    if source.name == release.head_name:
        raise NotStreamable("the embedding is stored as the head")
    for item in release.tensors:
        if item.parameter != head:
            yield item
    yield Stored(MAIN, release.head_name, source.tensor, head)


def reader(parameter: str | None, tensor: LazyTensor, merged: ChangedWeights | None) -> Callable[[], Tensor]:
    """Return what reads a weight in float32, with what adapters make of it."""
    read = tensor.astype(torch.float32).read
    if merged is None or parameter is None:
        return read
    return lambda: merged.merged(parameter, read)


def _rounded(item: Stored, read: Callable[[], Tensor], target: torch.dtype) -> Callable[[], Tensor]:
    return lambda: _finite(item, read().to(target))


def _in_range(item: Stored, target: torch.dtype) -> Callable[[], Tensor]:
    """Return what reads a weight that does not change but in its number format."""
    tensor = item.tensor.astype(target)
    narrow = target == torch.float16 and tensor.stored_dtype != target
    return (lambda: _finite(item, tensor.read())) if narrow else tensor.read


def _finite(item: Stored, weight: Tensor) -> Tensor:
    """Return a weight; raise MMToolError where its number format does not reach far enough."""
    if weight.numel() and not all(math.isfinite(float(value)) for value in torch.aminmax(weight)):
        name = str(weight.dtype).removeprefix("torch.")
        raise MMToolError(f"{item.name} has numbers that {name} cannot hold", "Use --dtype bf16 or fp32.")
    return weight


def write_folder(
    folder: Path,
    release: Release,
    plan: Plan,
    *,
    dtype: torch.dtype | None,
    max_bytes: int,
    quantiser: WeightQuantiser | None = None,
) -> None:
    """Write weights, and copy everything else that the release has."""
    copy_beside_weights(release.folder, folder, LEFT_OUT)
    with Progress("writing weights", plan.nbytes) as progress:
        for group, entries in plan.entries.items():
            (folder / group).mkdir(parents=True, exist_ok=True)
            write_shards(folder / group, entries, max_bytes, progress.advance)
    if plan.untied:
        edit_config(folder, set_untied)
    if quantiser is not None:
        edit_config(folder, quantiser.describe)
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        edit_config(folder, lambda config: set_dtype(config, name))


def write_in_memory(
    folder: Path, source: Source, release: Release, *, dtype: torch.dtype | None, max_bytes: int
) -> None:
    """Merge in a whole model in float32 and let it write itself: the way for adapters of rare kinds.

    Raises:
        MMToolError: for several adapters.
    """
    if len(source.adapters) != 1 or source.adapters[0].weight != 1:
        raise MMToolError(
            "these adapters are of kinds that can only be merged one at a time", "Merge one with --ckpt_dir."
        )
    stored = next(item.tensor.stored_dtype for item in release.tensors if item.tensor.stored_dtype.is_floating_point)
    model, _ = load_model(source.spec, source.folder, dtype="fp32", device_map="cpu", model_kwargs=source.model_kwargs)
    model = attach_adapter(model, source.adapters[0].folder, merge=True)
    model = model.to(dtype or stored)
    model.save_pretrained(folder, max_shard_size=max_bytes)
    copy_beside_weights(source.folder, folder, LEFT_OUT)
