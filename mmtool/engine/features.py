"""Media features: computed once per content, kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmtool.errors import MMToolError

if TYPE_CHECKING:
    from mmtool.engine.adapters import Adapters
    from mmtool.engine.base import Stats
    from mmtool.engine.stepped import Run
    from mmtool.template.base import MediaInput

TOWERS = {"image": "get_image_features", "audio": "get_audio_features"}  # methods every family names like this


class FeatureCache:
    """Features by content key, the least recently used ones dropped beyond ``max_bytes``."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def get(self, key: str) -> Tensor | None:
        """Return the ``(tokens, hidden)`` features of ``key`` if they are kept."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: str, features: Tensor) -> None:
        """Keep ``features``, in the place of older ones; what is larger than the whole cache is not kept."""
        self._drop(key)
        size = features.nbytes
        if size > self.max_bytes:
            return
        while self.num_bytes + size > self.max_bytes:
            self._drop(next(iter(self._kept)))
        self._kept[key] = features
        self.num_bytes += size

    def clear(self) -> None:
        """Drop everything."""
        self._kept.clear()
        self.num_bytes = 0

    def _drop(self, key: str) -> None:
        features = self._kept.pop(key, None)
        if features is not None:
            self.num_bytes -= features.nbytes


class MediaFeatures:
    """Gives runs the features of their media that are not covered by kept positions; towers run in batches.

    Two threads may ask for them; a tower runs in one at a time.

    Args:
        model: has the towers.
        device: where its inputs go.
        cache: what is kept for later requests.
        stats: counters to go on with.
        batch: most media per tower call.
        adapters: those of the model.
    """

    def __init__(
        self, model: Any, device: torch.device, cache: FeatureCache, stats: Stats, batch: int, adapters: Adapters | None
    ) -> None:
        self.model = model
        self.device = device
        self.cache = cache
        self.stats = stats
        self.batch = batch
        self.adapters = adapters
        self._lock = Lock()

    def provide(self, run: Run, others: Iterable[Run], once: bool) -> bool:
        """Give ``run`` what its media need; what ``others`` need goes through a tower with it.

        Args:
            run: the one that is next.
            others: runs that wait to be next.
            once: call a tower once at most, because somebody waits for the end of this step.

        Returns:
            Whether nothing is missing and this step may go on.

        Raises:
            MMToolError, RuntimeError, ...: what the tower has against a medium of ``run``.
        """
        with self._lock:
            return self._provide(run, others, once)

    def ready(self, run: Run) -> bool:
        """Return whether nothing is missing for ``run``."""
        with self._lock:
            return not self._missing(run)

    def _provide(self, run: Run, others: Iterable[Run], once: bool) -> bool:
        while missing := self._missing(run):
            # A CPU gains nothing from several at once, and somebody would wait for all of them.
            most = 1 if once and self.device.type == "cpu" else self.batch
            items = self._like(missing[0], run, others, most)
            key = self._key(missing[0], run)
            found = self._run_tower(items, run.request.adapter)
            if isinstance(found[key], Exception):
                raise found[key]
            for other in (run, *others):
                for item in _uncovered(other):
                    features = found.get(self._key(item, other))
                    if isinstance(features, Tensor) and item.start not in other.features:
                        other.num_features += 1
                        other.features[item.start] = features
            for key, features in found.items():
                if isinstance(features, Tensor):
                    self.cache.put(key, features)
            if once:
                return False
        return True

    def _key(self, item: MediaInput, run: Run) -> str:
        return item.key if self.adapters is None else self.adapters.media_key(item.key, run.request.adapter)

    def _missing(self, run: Run) -> list[MediaInput]:
        """Return the media of a run whose features are neither there nor kept."""
        missing = []
        for item in _uncovered(run):
            if item.start in run.features:
                continue
            features = self.cache.get(self._key(item, run))
            if features is None:
                missing.append(item)
            else:
                self.stats.feature_hits += 1
                run.features[item.start] = features
        return missing

    def _like(self, first: MediaInput, run: Run, others: Iterable[Run], most: int) -> dict[str, MediaInput]:
        """Return ``first`` and up to ``most`` media in all that can go through its tower beside it, by key."""
        found = {self._key(first, run): first}
        kind = _kind(first)
        for other in (run, *others):
            if other.request.adapter != run.request.adapter:
                continue
            for item in _uncovered(other):
                if len(found) >= most:
                    return found
                key = self._key(item, other)
                if item.start not in other.features and key not in self.cache and _kind(item) == kind:
                    found.setdefault(key, item)
        return found

    def _run_tower(self, items: dict[str, MediaInput], adapter: str | None) -> dict[str, Tensor | Exception]:
        """Return the features by key; where a call fails, items are tried alone and the guilty get their exception."""
        chosen = nullcontext()
        if self.adapters is not None:
            chosen = self.adapters.chosen(self.adapters.media_choice(adapter))
        try:
            with chosen:
                features = compute_features(self.model, list(items.values()), self.device)
        except Exception as error:
            if len(items) == 1:
                return dict.fromkeys(items, error)
            return {
                key: value
                for one, item in items.items()
                for key, value in self._run_tower({one: item}, adapter).items()
            }
        self.stats.vision_calls += 1
        self.stats.vision_runs += len(items)
        return dict(zip(items, features, strict=True))


def _uncovered(run: Run) -> list[MediaInput]:
    slot = run.slot  # once: another thread may end the run meanwhile
    kept = 0 if slot is None else len(slot.tokens)
    return [item for item in run.request.media if item.start + item.length > kept]


def _kind(item: MediaInput) -> object:
    """Return what media must share to go through a tower together: tensors that differ in their rows alone."""
    return item.kind, tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in item.inputs.items())


def compute_features(model: Any, items: Sequence[MediaInput], device: torch.device) -> list[Tensor]:
    """Run the tower of one kind of media over ``items`` in one call.

    Returns:
        One ``(rows, hidden)`` tensor per item, a row for each position that holds a feature.

    Raises:
        MMToolError: when the model has no such tower, or gives another number of positions than the prompt has.
    """
    kind = items[0].kind
    tower = getattr(model, TOWERS[kind], None)
    name = model.__class__.__name__
    if tower is None:
        raise MMToolError(f"{name} has no part that takes {kind} input")
    inputs = {}
    for field in items[0].inputs:
        tensor = torch.cat([item.inputs[field] for item in items]).to(device)
        inputs[field] = tensor.to(model.dtype) if tensor.is_floating_point() else tensor
    features = [rows.reshape(-1, rows.shape[-1]) for rows in tower(**inputs).pooler_output]
    if len(items) == 1:  # some give a tensor per tile
        features = [torch.cat(features)]
    lengths, wanted = [len(rows) for rows in features], [item.num_features for item in items]
    if lengths != wanted:
        raise MMToolError(
            f"{name} gave {lengths} positions for {kind} input, the prompt has {wanted}",
            "The processor and the weights do not belong together.",
        )
    # A copy of its own per item: a view would keep the features of the whole batch alive.
    return [rows.clone() if len(features) > 1 else rows for rows in features]
