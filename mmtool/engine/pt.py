"""The engine on plain torch: requests join and leave between decode steps, and nothing is computed twice.

``PtEngine`` decides who runs where; ``slots`` stores keys and values, ``features`` media features, ``sampling`` chooses
tokens, ``text`` makes text of them. It has no thread of its own: ``generate`` drives ``step``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmtool.engine.features import FeatureCache, compute_features
from mmtool.engine.llama_step import LlamaStep, Rows, step_for
from mmtool.engine.positions import Positions, rope_settings
from mmtool.engine.sampling import Sampler
from mmtool.engine.slots import CAPACITY_STEP, KVSlots, SlotCache, common_prefix, write_index
from mmtool.engine.stepped import Run, SteppedEngine
from mmtool.errors import MMToolError
from mmtool.log import get_logger
from mmtool.models.common.release import ReleaseModel

if TYPE_CHECKING:
    from mmtool.template.base import MediaInput

logger = get_logger(__name__)

ROOM_AHEAD = 256  # positions reserved for an answer at first; more are added while it grows
TOWER_BATCH = 8  # media per tower call


class Slot:
    """One row of the KV storage: which content its positions hold, and who uses it."""

    def __init__(self, row: int) -> None:
        self.row = row
        self.tokens: list[int] = []  # content key of every position whose keys and values are valid
        self.written = 0  # positions that may be other than zero
        self.stretched = False  # the keys are turned for this one length
        self.run: Run | None = None
        self.last_used = 0


class Batch:
    """The runs that answer, rows 0 to B-1, as tensors; made anew when one joins or leaves."""

    def __init__(self, runs: Sequence[Run], kv: KVSlots, device: torch.device, dtype: torch.dtype) -> None:
        self.runs = runs
        positions = [len(run.slot.tokens) for run in runs]
        self.ids = torch.tensor([run.token_ids[-1] for run in runs], device=device)
        self.positions = torch.tensor(positions, device=device)
        self.longest = max(positions)
        self.shifts: Tensor | None = None  # (axes, B): position numbers are ahead of or behind the count of positions
        if runs[0].positions is not None:
            lengths = torch.tensor([len(run.prompt) for run in runs], device=device)
            self.shifts = torch.stack([run.positions[:, -1] for run in runs], dim=1) + 1 - lengths
        self.sampler = Sampler([run.draw for run in runs], device)
        self.mask = self.index = None
        if min(positions) < self.longest:
            self.index = write_index(self.positions, kv.keys[0].shape[1], kv.capacity)
            hidden = torch.arange(kv.capacity, device=device) > self.positions.unsqueeze(1)
            self.mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)

    def rows(self) -> Rows:
        """Return what the next step works on."""
        mask = None if self.mask is None else self.mask[:, None, None, : self.longest + 1]
        return Rows(self.ids, self.positions, self.longest, self.index, mask)

    def numbers(self) -> Tensor:
        """Return the position numbers of the tokens to feed, ``(B, 1)`` or ``(axes, B, 1)``."""
        positions = self.positions if self.shifts is None else self.positions + self.shifts
        return positions.unsqueeze(-1)

    def advance(self, ids: Tensor) -> None:
        """Go on by one position with the tokens just sampled."""
        self.ids = ids
        self.positions.add_(1)
        self.longest += 1
        if self.mask is not None and self.longest < self.mask.shape[1]:
            self.index.add_(1)
            self.mask.scatter_(1, self.positions.unsqueeze(1), 0.0)


class PtEngine(SteppedEngine):
    """Continuous batching over KV slots, with reuse of prompts and media features seen before.

    A slot keeps what it holds after its request has ended, is cancelled or fails; the next request that begins the
    same (pictures compared by content) continues from there. Greedy results equal those of ``model.generate``.

    Args:
        model: a head class with ``get_input_embeddings``, ``get_decoder``, ``lm_head`` and, for media,
            ``get_image_features``; on its device, in the attention implementation it should run with.
        tokenizer: only its ``decode`` is used.
        max_batch_size: most requests at once, and most conversations kept.
        max_model_len: most positions of prompt and answer; the model's own limit by default.
        feature_cache_bytes: how much of media features is kept.
        prefill_tokens: most prompt positions computed between two decode steps.
        reuse_prefix: whether computed prompts are used again.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_batch_size: int = 1,
        max_model_len: int | None = None,
        feature_cache_bytes: int = 256 * 2**20,
        prefill_tokens: int = 2048,
        reuse_prefix: bool = True,
    ) -> None:
        config = model.config.get_text_config()
        positions = Positions(model, model.get_decoder())
        limit = positions.limit
        check_attention(config, max_model_len or limit, positions.axes)
        if max_model_len is not None and not 1 < max_model_len <= limit:
            raise MMToolError(f"max_model_len must be from 2 to {limit} for this model, got {max_model_len}")
        super().__init__(model, tokenizer, max_batch_size, max_model_len or limit)
        self.prefill_tokens = prefill_tokens
        self.reuse_prefix = reuse_prefix
        self.vocab_size = config.vocab_size
        self.decoder = model.get_decoder()
        self.positions = positions
        # Towers of ours treat each medium alone; of others that cannot be known, so they get one at a time.
        self.tower_batch = TOWER_BATCH if isinstance(model, ReleaseModel) else 1
        self.embed = model.get_input_embeddings()
        self.device = self.embed.weight.device
        self.features = FeatureCache(feature_cache_bytes)
        self.kv = KVSlots(config.num_hidden_layers)
        self.slots: list[Slot] = []
        self._cache = SlotCache(self.kv)
        self._filling: deque[Run] = deque()  # in a slot, prompt not computed to its end
        self._batch: Batch | None = None  # None: who answers has changed
        self._step: LlamaStep | None = None
        self._clock = 0

    @torch.inference_mode()
    def step(self) -> None:
        """Continue every answer by one token, let requests in, and compute a part of their prompts.

        In this order a first token is out as soon as its prompt is computed.
        """
        self._decode()
        self._admit()
        self._prefill()

    def clear(self, features: bool = False) -> None:
        """Forget all conversations and give their memory back; also forget media features if asked."""
        self.cancel(self._unfinished())
        self.slots.clear()
        self.kv.clear()
        if features:
            self.features.clear()

    def _running(self) -> list[Run]:
        return [slot.run for slot in self.slots if slot.run is not None]

    def _starting(self) -> None:
        self._step = step_for(self.decoder, self._step)

    # Letting requests in

    def _admit(self) -> None:
        """Give waiting requests the free slots, and find the features of their media."""
        active = sum(slot.run is not None for slot in self.slots)
        new = [*self._waiting][: self.max_batch_size - active]
        if not new:
            return
        self._reserve(max(len(run.prompt) + min(run.max_new_tokens, ROOM_AHEAD) for run in new))
        for run in new:
            self._place(run)
            self._filling.append(self._waiting.popleft())
        self._find_features(new)

    def _place(self, run: Run) -> None:
        """Give a run a slot, with as much of its prompt in it as some slot holds."""
        free = [slot for slot in self.slots if slot.run is None]
        can_add = len(self.slots) < self.max_batch_size
        donor, shared = self._donor(run)
        if donor in free and (2 * shared >= len(donor.tokens) or (len(free) == 1 and not can_add)):
            target = donor
        else:  # rather forget an old conversation than most of the one that begins alike
            others = [slot for slot in free if slot is not donor]
            target = min(others, key=lambda slot: (len(slot.tokens) > 0, slot.last_used), default=None)
            if can_add and (target is None or target.tokens):
                target = Slot(len(self.slots))
                self.slots.append(target)
                self._reserve(0)
        assert target is not None, "there are as many slots as requests may run"
        target.tokens = target.tokens[:shared] if target is donor else []
        target.stretched = False
        target.run, run.slot = run, target
        self.kv.zero(target.row, len(target.tokens), target.written)
        target.written = len(target.tokens)
        if donor is not None and target is not donor:
            self._copy(donor, run, shared)

    def _copy(self, donor: Slot, run: Run, length: int) -> None:
        run.slot.written = length
        self.kv.copy(donor.row, run.slot.row, length)
        run.slot.tokens = run.prompt[:length]

    def _donor(self, run: Run) -> tuple[Slot | None, int]:
        """Return the slot that shares most positions with the run's prompt, and how many (never the whole prompt)."""
        if not self.reuse_prefix or not self.slots or self.positions.is_stretched(len(run.prompt)):
            return None, 0
        most = self.positions.stretched  # beyond, the keys of answers are turned otherwise; None is no limit
        shared = [0 if slot.stretched else common_prefix(slot.tokens[:most], run.prompt) for slot in self.slots]
        best = max(range(len(shared)), key=shared.__getitem__)
        length = min(shared[best], len(run.prompt) - 1)
        return (self.slots[best], length) if length else (None, 0)

    def _find_features(self, runs: Sequence[Run]) -> None:
        """Give runs the features of their media that are not covered by kept positions; towers run in batches."""
        wanted: dict[str, MediaInput] = {}
        for run in runs:
            for item in _uncovered(run):
                if item.key in self.features:
                    self.stats.feature_hits += 1
                else:
                    wanted.setdefault(item.key, item)
        fresh: dict[str, Tensor | Exception] = {}
        for items in _tower_batches(wanted.values(), self.tower_batch):
            fresh.update(self._run_tower(items))
        for run in runs:
            for item in _uncovered(run):
                features = fresh.get(item.key)
                if isinstance(features, Exception):
                    self._fail(run, features)
                    break
                run.num_features += features is not None
                run.features[item.start] = self.features.get(item.key) if features is None else features
        for key, features in fresh.items():
            if isinstance(features, Tensor):
                self.features.put(key, features)

    def _run_tower(self, items: Sequence[MediaInput]) -> dict[str, Tensor | Exception]:
        """Return the features by key; where a call fails, items are tried alone and the guilty get their exception."""
        try:
            features = compute_features(self.model, items, self.device)
        except Exception as error:
            if len(items) == 1:
                return {items[0].key: error}
            return {key: value for item in items for key, value in self._run_tower([item]).items()}
        self.stats.vision_calls += 1
        self.stats.vision_runs += len(items)
        return {item.key: rows for item, rows in zip(items, features, strict=True)}

    # Computing

    def _prefill(self) -> None:
        """Compute up to ``prefill_tokens`` prompt positions, oldest request first."""
        budget = self.prefill_tokens
        while self._filling and budget > 0:
            run = self._filling[0]
            try:
                budget -= self._prefill_chunk(run, budget)
            except Exception as error:  # it ends this request alone: its slot is valid up to where it was
                self._fail(run, error)
            if run.token_ids and not run.finished:
                self._filling.popleft()

    def _prefill_chunk(self, run: Run, most: int) -> int:
        if run.draw is None:
            self._share_again(run)
            run.draw = self._draw_for(run, self.vocab_size, self.device)
            run.positions = self.positions.of_prompt(run.request, self.device)
        slot, prompt = run.slot, run.prompt
        start = len(slot.tokens)
        if self.positions.is_stretched(len(prompt)):
            slot.stretched, most = True, len(prompt)
        end = min(start + most, len(prompt))
        embeds, media_mask = self._prompt_embeds(run, start, end)
        slot.written = end
        self._cache.use(slot.row, slot.row + 1, start)
        if run.positions is None:
            positions = torch.arange(start, end, device=self.device).unsqueeze(0)
        else:
            positions = run.positions[:, None, start:end]
        hidden = self._forward(embeds, positions, None, media_mask)
        slot.tokens += prompt[start:end]
        self.stats.prefill_tokens += end - start
        if end == len(prompt):
            run.features = {}
            ids = Sampler([run.draw], self.device)(self._head(hidden[:, -1]))
            self._batch = None
            self._publish(run, ids.item())
        return end - start

    def _prompt_embeds(self, run: Run, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Return embeddings ``(1, new, hidden)`` of the prompt from ``start`` to ``end``, and where media are."""
        ids = torch.tensor([run.request.input_ids[start:end]], device=self.device)
        media_mask = torch.zeros_like(ids, dtype=torch.bool)
        rows = []
        for item in run.request.media:
            if item.start + item.length > start and item.start < end:
                offsets = range(item.length) if item.feature_index is None else item.feature_index
                first, last = bisect_left(offsets, start - item.start), bisect_left(offsets, end - item.start)
                rows.append(run.features[item.start][first:last])
                places = torch.tensor(offsets[first:last], dtype=torch.long, device=self.device)
                media_mask[0, places + (item.start - start)] = True
        embeds = self.embed(ids.masked_fill(media_mask, 0))  # a placeholder need not be in the vocabulary
        if rows:
            embeds[media_mask] = torch.cat(rows).to(embeds)
        return embeds, media_mask

    def _share_again(self, run: Run) -> None:
        """Use what requests that came with this one have computed since it got its slot."""
        donor, shared = self._donor(run)
        if donor is not None and shared > len(run.slot.tokens):
            self._copy(donor, run, shared)
        run.cached_tokens = len(run.slot.tokens)
        self.stats.cached_tokens += run.cached_tokens

    def _decode(self) -> None:
        """Continue every answer by one token."""
        batch = self._batch
        if batch is None or batch.longest >= self.kv.capacity:
            batch = self._batch = self._make_batch()
            if batch is None:
                return
        fed = [run.token_ids[-1] for run in batch.runs]
        for run in batch.runs:
            run.slot.written = len(run.slot.tokens) + 1
        try:
            ids = batch.sampler(self._logits(batch))
            token_ids = ids.tolist()  # the one moment where the host waits for the device
            batch.advance(ids)
        except Exception as error:  # nobody knows whose it is
            for run in batch.runs:
                self._fail(run, error)
            return
        self.stats.decode_steps += 1
        self.stats.decode_tokens += len(token_ids)
        for run, fed_id, token_id in zip(batch.runs, fed, token_ids, strict=True):
            run.slot.tokens.append(fed_id)
            self._publish(run, token_id)

    def _make_batch(self) -> Batch | None:
        """Bring the runs that answer into rows 0 to B-1, make room for them, and return them as a batch."""
        answering = [slot for slot in self.slots if slot.run is not None and slot.run.token_ids]
        if not answering:
            return None
        count = len(answering)
        inside = {slot.row for slot in answering if slot.row < count}
        holes = [row for row in range(count) if row not in inside]
        for slot, row in zip((slot for slot in answering if slot.row >= count), holes, strict=True):
            self._swap(slot, self.slots[row])
        longest = max(len(slot.tokens) for slot in answering)
        if longest >= self.kv.capacity:
            most = max(len(slot.run.prompt) + slot.run.max_new_tokens for slot in answering)
            self._reserve(min(2 * self.kv.capacity, most))
        return Batch([slot.run for slot in self.slots[:count]], self.kv, self.device, self.embed.weight.dtype)

    def _swap(self, one: Slot, other: Slot) -> None:
        tokens = one.tokens, other.tokens
        one.tokens, other.tokens = [], []  # an interrupt half way must not leave rows that claim to be valid
        self.kv.swap(one.row, other.row, max(one.written, other.written))
        one.row, other.row = other.row, one.row
        self.slots[one.row], self.slots[other.row] = one, other
        one.tokens, other.tokens = tokens

    def _logits(self, batch: Batch) -> Tensor:
        rows = batch.rows()
        if self._step is not None:
            return self._head(self._step(rows, self.kv))
        if self.positions.is_stretched(batch.longest + 1):
            return torch.cat([self._logits_of_row(batch, row) for row in range(len(batch.runs))])
        self._cache.use(0, len(rows.ids), rows.longest, rows.index)
        mask = None if rows.mask is None else rows.mask[:, 0, 0] == 0
        hidden = self._forward(self.embed(rows.ids).unsqueeze(1), batch.numbers(), mask)
        return self._head(hidden[:, -1])

    def _logits_of_row(self, batch: Batch, row: int) -> Tensor:
        """Continue one row alone: the longest of a batch would decide how all of them are turned."""
        self._cache.use(row, row + 1, len(batch.runs[row].slot.tokens))
        embeds = self.embed(batch.ids[row : row + 1]).unsqueeze(1)
        hidden = self._forward(embeds, batch.numbers()[..., row : row + 1, :], None)
        return self._head(hidden[:, -1])

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden).to(self.device)

    def _forward(
        self, embeds: Tensor, positions: Tensor, mask: Tensor | None, media_mask: Tensor | None = None
    ) -> Tensor:
        """Run the model's own decoder on ``(rows, new, hidden)`` over the rows that the cache was told to use.

        A model whose layers treat media positions in their own way names the keyword that tells it where they are.
        """
        self.positions.forget_length()
        named = self.model.media_mask_argument if hasattr(self.model, "media_mask_argument") else None
        return self.decoder(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **({named: media_mask} if named is not None and media_mask is not None else {}),
        ).last_hidden_state

    def _reserve(self, capacity: int) -> None:
        """Make room for all slots, with ``capacity`` positions each."""
        rows = min(self.max_batch_size, 1 << (len(self.slots) - 1).bit_length()) if self.slots else 0
        capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
        before = self.kv.num_bytes
        self._batch = None
        try:
            self.kv.reserve(rows, capacity, max((len(slot.tokens) for slot in self.slots), default=0))
        except BaseException as error:  # out of memory, or interrupted: the layers no longer agree
            for run in self._unfinished():
                self._fail(run, error)
            self.clear()
            raise
        if self.kv.num_bytes != before:
            logger.debug("KV memory: %.1f MB", self.kv.num_bytes / 1e6)

    # Ends

    def _release(self, run: Run) -> None:
        run.features = {}
        if run in self._filling:
            self._filling.remove(run)
        if run.slot is not None:
            self._clock += 1
            run.slot.run, run.slot.last_used = None, self._clock
            run.slot = None
            self._batch = None


def _uncovered(run: Run) -> list[MediaInput]:
    kept = len(run.slot.tokens) if run.slot is not None else 0
    return [item for item in run.request.media if item.start + item.length > kept]


def _tower_batches(items: Iterable[MediaInput], size: int) -> Iterator[list[MediaInput]]:
    """Group up to ``size`` media that can go through a tower together: tensors that differ in their rows alone."""
    groups: dict[object, list[MediaInput]] = {}
    for item in items:
        shapes = tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in item.inputs.items())
        groups.setdefault((item.kind, shapes), []).append(item)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def check_attention(config: Any, max_model_len: int, axes: bool = False) -> None:
    """Raise MMToolError for a model whose state is not keys and values of all positions.

    ``axes`` says that the model numbers positions along several axes itself. Few
    configurations have these fields, so a missing one is the normal case.
    """
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if (getattr(config, "sliding_window", None) or max_model_len) < max_model_len and uses_window(config):
        kinds.add("sliding_attention")
    if not axes and "mrope_section" in rope_settings(config):
        kinds.add("several position numbers per token")
    if kinds:
        raise MMToolError(f"the pt engine runs models with full attention; this one has {', '.join(sorted(kinds))}")


def uses_window(config: Any) -> bool:
    """Whether a configuration with a sliding window lets a layer use it; without a list of layers, all do."""
    layers = getattr(config, "layer_types", None)
    return layers is None or "sliding_attention" in layers
