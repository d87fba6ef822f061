"""The engine on plain torch: requests join and leave between decode steps, and nothing is computed twice.

``PtEngine`` decides who runs where; ``slots`` stores keys and values, ``features`` media features, ``sampling`` chooses
tokens, ``text`` makes text of them. It has no thread of its own: ``generate`` drives ``step``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mmtool.engine.base import Delta, Engine, FinishReason, Request, Stats, Usage
from mmtool.engine.features import FeatureCache, compute_features
from mmtool.engine.llama_step import LlamaStep, Rows, step_for
from mmtool.engine.sampling import Draw, Sampler
from mmtool.engine.slots import CAPACITY_STEP, KVSlots, SlotCache, common_prefix, content_keys, write_index
from mmtool.engine.text import Detokenizer, StopText
from mmtool.errors import MMToolError, TooLongError
from mmtool.log import get_logger

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
        self.run: Run | None = None
        self.last_used = 0


class Run:
    """A request on its way: waiting, then in a slot until its prompt is computed, then answering."""

    def __init__(self, request: Request, index: int, emit: Callable[[Delta], None], max_new_tokens: int) -> None:
        self.request = request
        self.index = index
        self.emit = emit
        self.max_new_tokens = max_new_tokens
        self.prompt = content_keys(request.input_ids, request.media)
        self.slot: Slot | None = None
        self.features: dict[int, Tensor] = {}  # by the position where the medium starts
        self.draw: Draw | None = None
        self.token_ids: list[int] = []
        self.cached_tokens = 0
        self.num_features = 0
        self.started = time.perf_counter()
        self.first_token = 0.0
        self.finished = False

    def text_from(self, detokenizer: Detokenizer) -> None:
        """Make text with ``detokenizer``."""
        self.detokenizer = detokenizer
        words = (*self.request.stop_words, *self.request.sampling.stop)
        self.stop_text = StopText(tuple(dict.fromkeys(words)), self.request.strip)

    def accept(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Add a sampled token; return the text that can be shown and whether this is the end."""
        if not self.token_ids:
            self.first_token = time.perf_counter()
        self.token_ids.append(token_id)
        stopped = token_id in self.request.stop_token_ids
        text = "" if stopped else self.stop_text.push(self.detokenizer.push(token_id))
        at_end = stopped or len(self.token_ids) >= self.max_new_tokens
        if at_end and not self.stop_text.stopped:
            text += self.stop_text.push(self.detokenizer.flush())
        if at_end and not self.stop_text.stopped:
            text += self.stop_text.flush()
        if stopped or self.stop_text.stopped:
            return text, "stop"
        return text, "length" if at_end else None

    def usage(self) -> Usage:
        """Return what it took."""
        now = time.perf_counter()
        return Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.token_ids),
            cached_tokens=self.cached_tokens,
            image_features_computed=self.num_features,
            time_to_first_token=self.first_token - self.started,
            seconds=now - self.started,
        )


class Batch:
    """The runs that answer, rows 0 to B-1, as tensors; made anew when one joins or leaves."""

    def __init__(self, runs: Sequence[Run], kv: KVSlots, device: torch.device, dtype: torch.dtype) -> None:
        self.runs = runs
        positions = [len(run.slot.tokens) for run in runs]
        self.ids = torch.tensor([run.token_ids[-1] for run in runs], device=device)
        self.positions = torch.tensor(positions, device=device)
        self.longest = max(positions)
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

    def advance(self, ids: Tensor) -> None:
        """Go on by one position with the tokens just sampled."""
        self.ids = ids
        self.positions.add_(1)
        self.longest += 1
        if self.mask is not None and self.longest < self.mask.shape[1]:
            self.index.add_(1)
            self.mask.scatter_(1, self.positions.unsqueeze(1), 0.0)


class PtEngine(Engine):
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
        limit = config.max_position_embeddings
        _check_attention(config, max_model_len or limit)
        if max_model_len is not None and not 1 < max_model_len <= limit:
            raise MMToolError(f"max_model_len must be from 2 to {limit} for this model, got {max_model_len}")
        if max_batch_size < 1:
            raise MMToolError(f"max_batch_size must be at least 1, got {max_batch_size}")
        model.eval()
        self.model = model  # may be a weak proxy: nothing else here holds the head object
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size
        self.max_model_len = max_model_len or limit
        self.prefill_tokens = prefill_tokens
        self.reuse_prefix = reuse_prefix
        self.vocab_size = config.vocab_size
        self.decoder = model.get_decoder()
        self.embed = model.get_input_embeddings()
        self.device = self.embed.weight.device
        self.stats = Stats()
        self.features = FeatureCache(feature_cache_bytes)
        self.kv = KVSlots(config.num_hidden_layers)
        self.slots: list[Slot] = []
        self._cache = SlotCache(self.kv)
        self._waiting: deque[Run] = deque()
        self._filling: deque[Run] = deque()  # in a slot, prompt not computed to its end
        self._batch: Batch | None = None  # None: who answers has changed
        self._step: LlamaStep | None = None
        self._clock = 0

    # What callers use

    def check(self, request: Request) -> None:
        """Raise MMToolError for a request that can never run."""
        length = len(request.input_ids)
        if length == 0:
            raise MMToolError("the prompt is empty")
        if length >= self.max_model_len:
            raise TooLongError(
                f"the prompt has {length} positions, but the model takes {self.max_model_len}, answer included",
                "Shorten the question or start a new conversation.",
                length=length,
                limit=self.max_model_len,
            )

    def generate(self, requests: Iterable[Request], *, errors: Literal["raise", "yield"] = "raise") -> Iterator[Delta]:
        """Continue every request; see ``Engine.generate``. Several of these iterators may be open at the same time."""
        deltas: deque[Delta] = deque()
        runs: list[Run] = []
        source = enumerate(requests)
        exhausted = False
        try:
            while True:
                while not exhausted and len(runs) < self.max_batch_size:
                    index, request = next(source, (-1, None))
                    exhausted = request is None
                    if not exhausted:
                        runs.append(self.submit(request, deltas.append, index))
                if not runs:
                    return
                if not deltas:
                    self.step()
                while deltas:
                    delta = deltas.popleft()
                    if delta.error is not None and errors == "raise":
                        raise delta.error
                    yield delta
                runs = [run for run in runs if not run.finished]
        finally:
            self.cancel(runs)

    def submit(self, request: Request, emit: Callable[[Delta], None], index: int = 0) -> Run:
        """Queue a request; ``emit`` gets its deltas during later steps (or an error at once)."""
        self.stats.requests += 1
        max_new_tokens = min(request.sampling.max_new_tokens, self.max_model_len - len(request.input_ids))
        run = Run(request, index, emit, max_new_tokens)
        try:
            self.check(request)
        except MMToolError as error:
            self._fail(run, error)
            return run
        run.text_from(Detokenizer(self.tokenizer))
        if not self.busy:
            self._step = step_for(self.decoder, self._step)
        self._waiting.append(run)
        return run

    def cancel(self, runs: Iterable[Run]) -> None:
        """Stop runs without another delta; what they have computed stays of use."""
        for run in runs:
            if not run.finished:
                self._leave(run)

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._unfinished())

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

    def _unfinished(self) -> list[Run]:
        return [*self._waiting, *(slot.run for slot in self.slots if slot.run is not None)]

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
        if not self.reuse_prefix or not self.slots:
            return None, 0
        shared = [common_prefix(slot.tokens, run.prompt) for slot in self.slots]
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
        for items in _tower_batches(wanted.values()):
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
            run.draw = Draw(run.request.sampling, run.request.input_ids, self.vocab_size, self.device)
        slot, prompt = run.slot, run.prompt
        start = len(slot.tokens)
        end = min(start + most, len(prompt))
        embeds = self.embed(torch.tensor([run.request.input_ids[start:end]], device=self.device))
        for item in run.request.media:
            first, last = max(item.start, start), min(item.start + item.length, end)
            if first < last:
                rows = run.features[item.start][first - item.start : last - item.start]
                embeds[0, first - start : last - start] = rows.to(embeds)
        slot.written = end
        self._cache.use(slot.row, slot.row + 1, start)
        positions = torch.arange(start, end, device=self.device).unsqueeze(0)
        hidden = self._forward(embeds, positions, None)
        slot.tokens += prompt[start:end]
        self.stats.prefill_tokens += end - start
        if end == len(prompt):
            run.features = {}
            ids = Sampler([run.draw], self.device)(self._head(hidden[:, -1]))
            self._batch = None
            self._publish(run, ids.item())
        return end - start

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
            ids = batch.sampler(self._logits(batch.rows()))
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

    def _logits(self, rows: Rows) -> Tensor:
        if self._step is not None:
            return self._head(self._step(rows, self.kv))
        self._cache.use(0, len(rows.ids), rows.longest, rows.index)
        mask = None if rows.mask is None else rows.mask[:, 0, 0] == 0
        hidden = self._forward(self.embed(rows.ids).unsqueeze(1), rows.positions.unsqueeze(1), mask)
        return self._head(hidden[:, -1])

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden).to(self.device)

    def _forward(self, embeds: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Run the model's own decoder on ``(rows, new, hidden)`` over the rows that the cache was told to use."""
        return self.decoder(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
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

    def _publish(self, run: Run, token_id: int) -> None:
        text, finish_reason = run.accept(token_id)
        usage = None
        if finish_reason is not None:
            usage = run.usage()
            self._leave(run)
        run.emit(Delta(run.request, run.index, (token_id,), text, finish_reason, usage))

    def _fail(self, run: Run, error: BaseException) -> None:
        self._leave(run)
        run.emit(Delta(run.request, run.index, finish_reason="error", error=error))

    def _leave(self, run: Run) -> None:
        run.finished = True
        run.features = {}
        for queue in (self._waiting, self._filling):
            if run in queue:
                queue.remove(run)
        if run.slot is not None:
            self._clock += 1
            run.slot.run, run.slot.last_used = None, self._clock
            run.slot = None
            self._batch = None


def _uncovered(run: Run) -> list[MediaInput]:
    kept = len(run.slot.tokens) if run.slot is not None else 0
    return [item for item in run.request.media if item.start + item.length > kept]


def _tower_batches(items: Iterable[MediaInput]) -> Iterator[list[MediaInput]]:
    """Group media that can go through a tower together: of one kind, with tensors that differ in their rows alone."""
    groups: dict[object, list[MediaInput]] = {}
    for item in items:
        shapes = tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in item.inputs.items())
        groups.setdefault((item.kind, shapes), []).append(item)
    for group in groups.values():
        for start in range(0, len(group), TOWER_BATCH):
            yield group[start : start + TOWER_BATCH]


def _check_attention(config: Any, max_model_len: int) -> None:
    """Raise MMToolError for a model whose state is not keys and values of all positions, numbered one by one.

    Few configurations have these fields, so a missing one is the normal case.
    """
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if (getattr(config, "sliding_window", None) or max_model_len) < max_model_len:
        kinds.add("sliding_attention")
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        kinds.add("several position numbers per token")
    if kinds:
        raise MMToolError(f"the pt engine runs models with full attention; this one has {', '.join(sorted(kinds))}")
