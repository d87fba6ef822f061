"""The engine on plain torch: requests join and leave between decode steps, and nothing is computed twice.

``PtEngine`` computes; ``slotted`` decides who runs where, ``slots`` stores keys and values, ``features`` media
features, ``adapters`` what LoRA adds, ``batch`` holds those that answer, ``sampling`` chooses tokens, ``text`` makes
text of them.
``generate`` or a worker drives ``step``; if asked for, a second thread (``beside``) computes prompts meanwhile.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmtool.engine.adapters import Choice
from mmtool.engine.base import TokenLogprob
from mmtool.engine.batch import Batch
from mmtool.engine.beside import has_spare_cores
from mmtool.engine.features import FeatureCache, MediaFeatures
from mmtool.engine.graphs import GraphedStep, graphed
from mmtool.engine.llama_step import Chunk, LlamaStep, step_for
from mmtool.engine.memory import fitting_length, free_memory, is_out_of_memory
from mmtool.engine.pages import move_to_huge_pages
from mmtool.engine.positions import Positions, check_attention
from mmtool.engine.sampling import SCORED_TOGETHER, RowError, Sampler, logprobs_of
from mmtool.engine.slots import CAPACITY_STEP, KVSlots, Slot, SlotCache, common_prefix
from mmtool.engine.slotted import SlottedEngine
from mmtool.engine.stepped import Run
from mmtool.errors import MMToolError
from mmtool.log import get_logger
from mmtool.models.common.release import ReleaseModel

logger = get_logger(__name__)

TOWER_BATCH = 8  # media per tower call
PACK_SHARE = 1 / 3  # of free memory, for a copy of the weights
SHARED_AT_MOST = 0.25  # part of a prompt that is rather computed than waited for
TOGETHER_BESIDE = 256  # prompt positions that share their products in the second thread: the next wait less then
TOUCHED_AT_ONCE = 256 * 2**20  # bytes of keys and values whose pages are taken at the start, not by the first requests
PREFILL_ALONE = 2048  # prompt positions computed at once while nobody waits for the next token


class PromptWork(NamedTuple):
    """Parts of prompts that are computed together, and the slots they are written to."""

    runs: list[Run]
    chunks: list[Chunk]
    slots: list[Slot]


class PtEngine(SlottedEngine):
    """Continuous batching over KV slots, with reuse of prompts and media features seen before.

    A slot keeps what it holds after its request has ended, is cancelled or fails; the next request that begins the
    same (pictures compared by content, the same adapter) continues from there. Greedy results equal those of
    ``model.generate``, and those of a request do not depend on which others run beside it.

    Args:
        model: a head class with ``get_input_embeddings``, ``get_decoder``, ``lm_head`` and, for media,
            ``get_image_features``; on its device, in the attention implementation it should run with.
        tokenizer: only its ``decode`` is used.
        max_batch_size: most requests at once, and most conversations kept.
        max_model_len: most positions of prompt and answer; the model's own limit by default.
        adapters: folders of LoRA adapters by the name that requests choose them by.
        feature_cache_bytes: how much of media features is kept.
        prefill_chunk: most prompt positions computed between two decode steps, all requests together; also at most one
            call of a tower. So a long prompt holds up running answers by that much per token.
        reuse_prefix: whether computed prompts are used again.
        preallocate: take all memory for keys and values now, for a server; otherwise it grows as it is needed. Without
            ``max_model_len``, half of the free memory bounds the length.
        pack_weights: hold a second copy of the decoder's weights in the order that several rows are fastest with; the
            weights must not change then. Only float32 on a CPU gains from one, elsewhere this does nothing. None is
            yes where more than one request may run and a third of the free memory is enough.
        compile: run decode steps in fixed shapes, which a GPU replays from CUDA graphs; one is recorded when a number
            of answers and a length first occur. None is yes on a GPU. Only decoders that ``LlamaStep`` knows have it.
        prompts_beside: compute prompts and towers in a second thread while answers go on, so that first tokens come
            sooner; elsewhere than on a CPU this does nothing. Only decoders that ``LlamaStep`` knows, without adapters,
            have it. It takes processor cores that are really other ones: see ``examples/bench/README.md``. None is yes
            where torch's own threads leave as many free as they use.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_batch_size: int = 1,
        max_model_len: int | None = None,
        adapters: Mapping[str, Path] | None = None,
        feature_cache_bytes: int = 256 * 2**20,
        prefill_chunk: int = 512,
        reuse_prefix: bool = True,
        preallocate: bool = False,
        pack_weights: bool | None = False,
        compile: bool | None = None,
        prompts_beside: bool | None = False,
    ) -> None:
        config = model.config.get_text_config()
        positions = Positions(model, model.get_decoder())
        limit = positions.limit
        check_attention(config, max_model_len or limit, positions.axes)
        if max_model_len is not None and not 1 < max_model_len <= limit:
            raise MMToolError(f"--max_model_len {max_model_len}: this model takes 2 to {limit}", "Or leave it out.")
        if prefill_chunk < 1:
            raise MMToolError(f"prefill_chunk must be at least 1, got {prefill_chunk}")
        features = FeatureCache(feature_cache_bytes)
        device = model.get_input_embeddings().weight.device
        self.fixed_shapes = device.type == "cuda" if compile is None else compile
        kv = KVSlots(config.num_hidden_layers, spare=int(self.fixed_shapes))
        super().__init__(model, tokenizer, max_batch_size, max_model_len or limit, positions=positions, kv=kv,
                         features=features, reuse_prefix=reuse_prefix, preallocated=preallocate)  # fmt: skip
        self.vocab_size = config.vocab_size
        self._load_adapters(adapters)
        self.prefill_chunk = prefill_chunk
        self.decoder = model.get_decoder()
        # Towers of ours treat each medium alone; of others that cannot be known, so they get one at a time.
        tower_batch = TOWER_BATCH if isinstance(model, ReleaseModel) else 1
        self._media = MediaFeatures(model, device, features, self.stats, tower_batch, self._adapters)
        self._cache = SlotCache(kv)
        self._step: LlamaStep | None = None
        self._graphs: GraphedStep | None = None
        self._work: PromptWork | None = None
        wanted = has_spare_cores() if prompts_beside is None else prompts_beside
        self.prompts_beside = wanted and device.type == "cpu"
        if preallocate:
            move_to_huge_pages([*self.decoder.parameters(), *model.lm_head.parameters()])
            self._preallocate(may_shorten=max_model_len is None)
        self.pack_weights = self._can_pack() if pack_weights is None else pack_weights
        if self.pack_weights:
            self._starting()

    @torch.inference_mode()
    def step(self) -> None:
        """Continue every answer by one token, let requests in, and compute a part of their prompts.

        In this order a first token is out as soon as its prompt is computed.
        """
        self._take_prompts()
        self._decode()
        if self.prompts_beside and self._batch is None:
            self._batch = self._make_batch()  # before somebody takes a row in front of those that answer
        self._admit()
        self._prefill()

    def _starting(self) -> None:
        known = self._step
        self._step = step_for(self.decoder, known, self.model.lm_head, self.pack_weights)
        if self._step is not known and self._step is not None and self._step.packed_bytes:
            logger.info("packed weights: %.1f MB beside the model's", self._step.packed_bytes / 1e6)

    # Prompts

    def _prefill(self) -> None:
        """Compute prompt positions, oldest request first: a bounded number while others wait for their next token."""
        spent = 0
        while waiting := self._unattended():
            waited_for, later = bool(self._answering()), waiting[(len(waiting) + 1) // 2 :]
            if not waited_for and later and not self._beside.at_work and self._may_go_beside(later[0]):
                waiting = later  # the first half is this thread's: its answers go on from the rows that come first
            run, *others = waiting
            beside = self._may_go_beside(run)
            most = self.prefill_chunk if waited_for or beside else max(self.prefill_chunk, PREFILL_ALONE)
            if spent and len(run.prompt) - len(run.slot.tokens) > most - spent:
                return  # rather whole in the next step: two parts take longer
            if self._beside.at_work and not self._lends_a_hand(run):
                return
            try:
                self._begin(run)
                if beside and not self._beside.at_work and (waited_for or waiting is later):
                    self._prefill_beside(run, others)
                    continue
                if not self._media.provide(run, others, once=waited_for):
                    return
                spent += self._attempt_chunk(run, others, most - spent)
            except Exception as error:  # it ends this request alone: its slot is valid up to where it was
                self._fail(run, error.error if isinstance(error, RowError) else error)
            if self._beside.done:
                self._take_prompts()

    def _begin(self, run: Run) -> None:
        """Prepare the first part of a prompt: use what requests that came with this one have computed meanwhile."""
        if run.draw is not None:
            return
        donor, shared = self._donor(run)
        if donor is not None and shared > len(run.slot.tokens):
            self._copy(donor, run, shared)
        run.cached_tokens = len(run.slot.tokens)
        self.stats.cached_tokens += run.cached_tokens
        run.positions = self.positions.of_prompt(run.request, self.device)
        run.draw = self._draw_for(run, self.vocab_size, self.device)

    def _attempt_chunk(self, run: Run, others: Sequence[Run], most: int) -> int:
        """Compute a part of a run's prompt, and with it whole prompts of others; what fails is tried again alone."""
        runs = [run, *self._companions(run, others, most)]
        try:
            return self._prefill_chunks(runs, most)
        except Exception as error:
            if is_out_of_memory(error):
                self._free_memory()
            elif len(runs) == 1:
                raise
        return self._prefill_chunks([run], most)

    def _companions(self, run: Run, others: Sequence[Run], most: int) -> list[Run]:
        """Return those of ``others``, who wait behind ``run``, whose prompts fit into the same call of the step."""
        if not self._steps_prompt(run):
            return []
        if self._may_go_beside(run):  # rather let the first answer begin, which then goes on beside the others
            most = min(most, TOGETHER_BESIDE)
        most -= len(run.prompt) - len(run.slot.tokens)
        together = [run]
        for other in others:
            held = len(other.slot.tokens)
            rest = len(other.prompt) - held
            if other.request.adapter != run.request.adapter or not self._steps_prompt(other):
                break
            if rest > most or not self._media.ready(other):
                break
            shared = max(common_prefix(other.prompt, one.prompt) for one in together) - held
            if shared > SHARED_AT_MOST * rest:  # it can have that part for nothing when the other is done
                break
            self._begin(other)
            together.append(other)
            most -= rest
        return together[1:]

    def _steps_prompt(self, run: Run) -> bool:
        """Whether the prompt of a run can go through the step of the decoder, which gives the states of its end."""
        known = self._step is not None and self._step.takes_prompts and not self.positions.axes
        return known and run.request.prompt_logprobs is None and not self.positions.is_stretched(len(run.prompt))

    def _prefill_chunks(self, runs: list[Run], most: int) -> int:
        """Compute up to ``most`` positions of the first run's prompt, and the whole prompts of the others."""
        work = self._work_on(runs, most)
        self._finish(work, self._prompt_logits(runs, work.chunks))
        return sum(chunk.end - chunk.start for chunk in work.chunks)

    def _work_on(self, runs: list[Run], most: int) -> PromptWork:
        chunks = []
        for run in runs:
            start, end = len(run.slot.tokens), len(run.prompt)
            if self.positions.is_stretched(end):
                run.slot.stretched = True
            elif run is runs[0]:
                end = min(end, start + most)
            run.slot.written = max(run.slot.written, end)
            chunks.append(Chunk(run.slot.row, start, end))
        return PromptWork(runs, chunks, [run.slot for run in runs])

    def _prompt_logits(self, runs: list[Run], chunks: list[Chunk]) -> Tensor | None:
        """Return ``(ended, vocabulary)`` for the prompts that end with these parts; None where none does."""
        ended = sum(chunk.end == len(run.prompt) for run, chunk in zip(runs, chunks, strict=True))
        with self._adapted(self._choice(runs[:1])):
            hidden = self._prompt_states(runs, chunks)
            return self._head(hidden[-ended:]) if ended else None  # the first run alone may not have ended

    def _finish(self, work: PromptWork, logits: Tensor | None) -> None:
        """Note what was computed, and give those whose prompt has ended their first token."""
        token_ids, logprobs = [], []
        ended = [run for run, chunk in zip(work.runs, work.chunks, strict=True) if chunk.end == len(run.prompt)]
        rows = [row for row, run in enumerate(ended) if not run.finished]  # some may have left meanwhile
        if rows and logits is not None:
            sampler = Sampler([ended[row].draw for row in rows], self.device)
            token_ids = sampler(logits[rows]).tolist()
            logprobs = sampler.logprobs(token_ids)
            self._batch = None
        for run, slot, chunk in zip(work.runs, work.slots, work.chunks, strict=True):
            if len(slot.tokens) == chunk.start:  # else it was made to forget
                slot.tokens += run.prompt[chunk.start : chunk.end]
            self.stats.prefill_tokens += chunk.end - chunk.start
        for row, token_id, logprob in zip(rows, token_ids, logprobs, strict=True):
            run = ended[row]
            run.features = {}
            self._filling.remove(run)
            self._publish(run, token_id, logprob)

    # Prompts in the second thread

    def _may_go_beside(self, run: Run) -> bool:
        """Whether a prompt has nothing to do with what a decode step uses beside weights: ``LlamaStep`` keeps none."""
        return self.prompts_beside and self._adapters is None and self._steps_prompt(run)

    def _unattended(self) -> list[Run]:
        """Return those whose prompts wait for somebody to compute them."""
        taken = [] if self._work is None else self._work.runs
        return [run for run in self._filling if run not in taken]

    def _lends_a_hand(self, run: Run) -> bool:
        """Whether this thread computes the prompt of ``run`` although others are computed beside.

        Answers wait for it then as they do without a second thread: in exchange, prompts never queue longer than there.
        It does not where the prompt has much in common with the others, which it gets for nothing when they are done.
        """
        assert self._work is not None, "asked only while there is some"
        if not self._may_go_beside(run):
            return False
        most = SHARED_AT_MOST * len(run.prompt)
        return all(common_prefix(run.prompt, one.prompt) <= most for one in self._work.runs)

    def _prefill_beside(self, run: Run, others: Sequence[Run]) -> None:
        """Begin to compute a part of a run's prompt, after the media that it needs."""
        runs = [run, *self._companions(run, others, self.prefill_chunk)] if self._media.ready(run) else [run]
        work = self._work = self._work_on(runs, self.prefill_chunk)

        def compute() -> Tensor | None:
            self._media.provide(run, (), once=False)
            return self._prompt_logits(work.runs, work.chunks)

        self._beside.start(compute, work.slots)

    def _take_prompts(self) -> None:
        """Take what the second thread has computed; wait for it where there is nothing else to do."""
        if not self._beside.at_work:
            return
        waiting = self._unattended()
        if not self._beside.done and (self._answering() or (waiting and self._lends_a_hand(waiting[0]))):
            return
        assert self._work is not None, "it says what is computed"
        work, self._work = self._work, None
        try:
            self._finish(work, self._beside.result())
        except Exception as error:
            self._take_alone(work, error)

    def _take_alone(self, work: PromptWork, error: Exception) -> None:
        """Try the first of several prompts alone, here and now, after they have failed together."""
        run = work.runs[0]
        if is_out_of_memory(error):
            self._free_memory()
        if run.finished:
            return
        try:
            if len(work.runs) == 1 and not is_out_of_memory(error):
                raise error
            self._media.provide(run, (), once=False)
            self._prefill_chunks([run], self.prefill_chunk)
        except Exception as again:
            self._fail(run, again.error if isinstance(again, RowError) else again)

    def _prompt_states(self, runs: list[Run], chunks: list[Chunk]) -> Tensor:
        """Return ``(runs, hidden)``, the states at the ends of parts of their prompts."""
        parts = [self._prompt_embeds(run, *chunk[1:]) for run, chunk in zip(runs, chunks, strict=True)]
        if self._steps_prompt(runs[0]):
            assert self._step is not None, "it takes prompts"
            return self._step.fill(torch.cat([embeds[0] for embeds, _ in parts]), chunks, self.kv)
        ((embeds, media_mask),), (run,), ((row, start, end),) = parts, runs, chunks
        self._cache.use(row, row + 1, start)
        if run.positions is None:
            positions = torch.arange(start, end, device=self.device).unsqueeze(0)
        else:
            positions = run.positions[:, None, start:end]
        states = self._forward(embeds, positions, None, media_mask)
        if run.request.prompt_logprobs is not None:
            self._score_prompt(run, states[0], start)
        return states[:, -1]

    def _score_prompt(self, run: Run, states: Tensor, start: int) -> None:
        """Note how likely the tokens of a prompt behind positions ``start`` and on are.

        A chunk that is computed again, after an error, takes the place of what was noted.

        Args:
            run: whose prompt.
            states: ``(new, hidden)`` of these positions.
            start: the first of them.
        """
        ids = run.request.input_ids
        del run.prompt_logprobs[start:]
        for first in range(0, len(states), SCORED_TOGETHER):
            block = states[first : first + SCORED_TOGETHER]
            following = ids[start + first + 1 : start + first + 1 + len(block)]  # none behind the last
            if following:
                logits = self._head(block[: len(following)])
                run.prompt_logprobs += logprobs_of(logits, following, run.request.prompt_logprobs)

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

    # Answers

    def _decode(self) -> None:
        """Continue every answer by one token."""
        batch = self._batch
        if batch is None or batch.longest >= self.kv.capacity:
            batch = self._batch = self._make_batch()
            if batch is None:
                return
        for run in batch.runs:
            run.slot.written = max(run.slot.written, len(run.slot.tokens) + 1)
        try:
            ids = batch.sampler(self._logits(batch))
            token_ids = ids.tolist()  # the one moment where the host waits for the device
            logprobs = batch.sampler.logprobs(token_ids)
            batch.advance(ids)
        except RowError as error:
            self._fail(batch.runs[error.row], error.error)
            self._decode()
        except Exception as error:  # nobody knows whose it is
            logger.warning("a step of %d requests has failed; each is tried alone: %r", len(batch.runs), error)
            self._decode_alone(batch, error)
        else:
            self._go_on(batch, token_ids, logprobs)

    def _go_on(self, batch: Batch, token_ids: list[int], logprobs: list[TokenLogprob | None]) -> None:
        self.stats.decode_steps += 1
        self.stats.decode_tokens += len(token_ids)
        fed = [run.token_ids[-1] for run in batch.runs]
        for run, fed_id, token_id, logprob in zip(batch.runs, fed, token_ids, logprobs, strict=True):
            run.slot.tokens.append(fed_id)
            self._publish(run, token_id, logprob)

    def _decode_alone(self, failed: Batch, error: Exception) -> None:
        """Continue the rows of a failed batch one by one through the model's own forward; the guilty fail again."""
        if is_out_of_memory(error):
            self._free_memory()
        self._batch = None
        for run in failed.runs:
            try:
                batch = self._batch_of([run])
                token_ids = batch.sampler(self._logits_of_row(batch, 0)).tolist()
                logprobs = batch.sampler.logprobs(token_ids)
            except Exception as again:
                self._fail(run, again.error if isinstance(again, RowError) else again)
            else:
                self._go_on(batch, token_ids, logprobs)

    def _make_batch(self) -> Batch | None:
        """Bring the runs that answer into rows 0 to B-1, make room for them, and return them as a batch."""
        answering = self._answering()
        count = len(answering)
        if not count:
            return None
        inside = {slot.row for slot in answering if slot.row < count}
        holes = [row for row in range(count) if row not in inside]
        for slot, row in zip((slot for slot in answering if slot.row >= count), holes, strict=True):
            self._swap(slot, self.slots[row])
        longest = max(len(slot.tokens) for slot in answering)
        if longest >= self.kv.capacity:
            most = max(len(slot.run.prompt) + slot.run.max_new_tokens for slot in answering)
            try:
                self._reserve(min(2 * self.kv.capacity, most))
            except Exception as error:  # those that need the room end, the others go on
                for slot in answering:
                    if slot.run is not None and len(slot.tokens) >= self.kv.capacity:
                        self._fail(slot.run, error)
                return self._make_batch()
        return self._batch_of([slot.run for slot in self.slots[:count]])

    def _batch_of(self, runs: list[Run]) -> Batch:
        return Batch(runs, self.kv, self.device, self.embed.weight.dtype, self._choice(runs))

    def _logits(self, batch: Batch) -> Tensor:
        if self.fixed_shapes and self._step is not None and batch.choice is None:
            self._graphs = graphed(self._graphs, self._step, self.kv, self.max_batch_size)
            if self._graphs is not None:
                return self._graphs(batch.ids, batch.positions, batch.longest)
        rows = batch.rows()
        if self._step is not None:
            with self._adapted(batch.choice):
                return self._head(self._step(rows, self.kv))
        if self.positions.is_stretched(batch.longest + 1):
            return torch.cat([self._logits_of_row(batch, row) for row in range(len(batch.runs))])
        self._cache.use(0, len(rows.ids), rows.longest, rows.index)
        mask = None if rows.mask is None else rows.mask[:, 0, 0] == 0
        with self._adapted(batch.choice):
            hidden = self._forward(self.embed(rows.ids).unsqueeze(1), batch.numbers(), mask)
            return self._head(hidden[:, -1])

    def _logits_of_row(self, batch: Batch, row: int) -> Tensor:
        """Continue one row alone: the longest of a batch would decide how all of them are turned."""
        slot = batch.runs[row].slot
        self._cache.use(slot.row, slot.row + 1, len(slot.tokens))
        with self._adapted(self._choice([batch.runs[row]])):
            embeds = self.embed(batch.ids[row : row + 1]).unsqueeze(1)
            hidden = self._forward(embeds, batch.numbers()[..., row : row + 1, :], None)
            return self._head(hidden[:, -1])

    # The model

    def _can_pack(self) -> bool:
        free = free_memory(self.device)
        needed = sum(weight.nbytes for weight in self.decoder.parameters())
        return self.max_batch_size > 1 and free is not None and PACK_SHARE * free >= needed

    def _choice(self, runs: list[Run]) -> Choice | None:
        return None if self._adapters is None else self._adapters.choice_of([run.request.adapter for run in runs])

    def _adapted(self, choice: Choice | None) -> Any:
        return nullcontext() if choice is None or self._adapters is None else self._adapters.chosen(choice)

    def _head(self, hidden: Tensor) -> Tensor:
        plain = self._adapters is None or self._adapters.choice is None
        if plain and self._step is not None and self._step.head is not None:
            return self._step.logits(hidden)
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

    # Memory

    @torch.inference_mode()
    def _preallocate(self, may_shorten: bool) -> None:
        """Take the memory for all slots, learning from one token what a position takes.

        Raises:
            MMToolError: where there is not enough.
        """
        self.kv.reserve(1, CAPACITY_STEP, 0)
        self._cache.use(0, 1, 0)
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        numbers = ids if not self.positions.axes else ids.expand(3, 1, 1)
        self._forward(self.embed(ids), numbers, None)
        each = self.kv.num_bytes // CAPACITY_STEP  # bytes per position
        self.kv.clear()
        rows = self.max_batch_size + self.kv.spare
        self.max_model_len = fitting_length(self.max_model_len, rows, each, free_memory(self.device), may_shorten)
        capacity = -(-self.max_model_len // CAPACITY_STEP) * CAPACITY_STEP
        self._cache.use(0, 1, 0)
        self.kv.reserve(self.max_batch_size, capacity, 0)
        self._forward(self.embed(ids), numbers, None)
        self.kv.zero(0, 0, 1)
        if self.device.type == "cpu" and self.kv_bytes <= TOUCHED_AT_ONCE:
            self.kv.zero(slice(None), 0, capacity)
        logger.info(
            "KV memory: %.1f MB, for %d conversations of %d positions",
            self.kv_bytes / 1e6,
            self.max_batch_size,
            self.max_model_len,
        )
