"""Who sits where: slots for requests, what they share with earlier conversations, and the memory for all of it."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from mmtool.engine.batch import Batch
from mmtool.engine.beside import Beside
from mmtool.engine.features import FeatureCache
from mmtool.engine.memory import give_back, is_out_of_memory
from mmtool.engine.positions import Positions
from mmtool.engine.slots import CAPACITY_STEP, KVSlots, Slot, common_prefix
from mmtool.engine.stepped import Run, SteppedEngine
from mmtool.log import get_logger

logger = get_logger(__name__)

ROOM_AHEAD = 256  # positions reserved for an answer at first; more are added while it grows


class SlottedEngine(SteppedEngine):
    """An engine whose requests each have a row of one storage; a row keeps what it holds for the next that begins so.

    Subclasses compute: they take runs from ``_filling`` when their prompts are done, and set ``_batch`` to those that
    answer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_batch_size: int,
        max_model_len: int,
        *,
        positions: Positions,
        kv: KVSlots,
        features: FeatureCache,
        reuse_prefix: bool,
        preallocated: bool,
    ) -> None:
        super().__init__(model, tokenizer, max_batch_size, max_model_len)
        self.positions = positions
        self.kv = kv
        self.features = features
        self.reuse_prefix = reuse_prefix
        self.preallocated = preallocated
        self.embed = model.get_input_embeddings()
        self.device: torch.device = self.embed.weight.device
        self.slots: list[Slot] = []
        self._filling: deque[Run] = deque()  # in a slot, prompt not computed to its end
        self._batch: Batch | None = None  # None: who answers has changed
        self._beside = Beside()
        self._clock = 0

    @property
    def kv_bytes(self) -> int:
        """Memory for keys and values, as it is allocated now."""
        return self.kv.num_bytes

    @torch.inference_mode()
    def clear(self, features: bool = False) -> None:
        """Forget all conversations, and give their memory back where it grows; also forget features if asked."""
        for run in self._unfinished():
            self.cancel(run)
        self._beside.drop()
        for slot in self.slots:
            self.kv.zero(slot.row, 0, slot.written)
        self.slots.clear()
        if not self.preallocated:
            self.kv.clear()
        if features:
            self.features.clear()

    def _running(self) -> list[Run]:
        return [slot.run for slot in self.slots if slot.run is not None]

    def _answering(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.run is not None and slot.run.token_ids]

    def _release(self, run: Run) -> None:
        run.features = {}
        run.draw = None
        if run in self._filling:
            self._filling.remove(run)
        if run.slot is not None:
            self._clock += 1
            run.slot.run, run.slot.last_used = None, self._clock
            run.slot = None
            self._batch = None

    # Letting requests in

    def _admit(self) -> None:
        """Give waiting requests the free slots."""
        held = sum(slot.run is None for slot in self._beside.slots)  # their requests have ended meanwhile
        new = [*self._waiting][: self.max_batch_size - len(self._running()) - held]
        if not new:
            return
        rooms = [len(run.prompt) + min(run.max_new_tokens, ROOM_AHEAD) for run in new]
        try:
            self._reserve(max(rooms))
        except Exception as error:  # too much for all of them together; each alone may find room
            logger.debug("no memory for all waiting requests: %s", error)
        for run, room in zip(new, rooms, strict=True):
            try:
                self._reserve(room)
                self._place(run, room)
            except Exception as error:
                self._fail(run, error)
            else:
                self._waiting.remove(run)
                self._filling.append(run)

    def _place(self, run: Run, room: int) -> None:
        """Give a run a slot of ``room`` positions, with as much of its prompt in it as some slot holds."""
        free = [slot for slot in self.slots if slot.run is None and slot not in self._beside.slots]
        can_add = len(self.slots) < self.max_batch_size
        donor, shared = self._donor(run)
        if donor in free and (2 * shared >= len(donor.tokens) or (len(free) == 1 and not can_add)):
            target = donor
        else:  # rather forget an old conversation than most of the one that begins alike
            others = [slot for slot in free if slot is not donor]
            target = min(others, key=lambda slot: (len(slot.tokens) > 0, slot.last_used), default=None)
            if can_add and (target is None or target.tokens):
                if len(self.slots) >= self.kv.num_slots:
                    self._reserve(room, len(self.slots) + 1)
                    self._place(run, room)  # what was kept may have been dropped to make room
                    return
                target = Slot(len(self.slots))
                self.slots.append(target)
        assert target is not None, "there are as many slots as requests may run"
        target.tokens = target.tokens[:shared] if target is donor else []
        target.stretched = False
        target.adapter = run.request.adapter
        self.kv.zero(target.row, len(target.tokens), target.written)
        target.written = len(target.tokens)
        target.run, run.slot = run, target
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
        if run.request.prompt_logprobs is not None:  # they are made of states, which are not kept
            return None, 0
        most = self.positions.stretched  # beyond, the keys of answers are turned otherwise; None is no limit
        adapter = run.request.adapter
        shared = [
            0 if slot.stretched or slot.adapter != adapter else common_prefix(slot.tokens[:most], run.prompt)
            for slot in self.slots
        ]
        best = max(range(len(shared)), key=shared.__getitem__)
        length = min(shared[best], len(run.prompt) - 1)
        return (self.slots[best], length) if length else (None, 0)

    def _swap(self, one: Slot, other: Slot) -> None:
        if one in self._beside.slots or other in self._beside.slots:
            self._beside.wait()
        tokens = one.tokens, other.tokens
        one.tokens, other.tokens = [], []  # an interrupt half way must not leave rows that claim to be valid
        self.kv.swap(one.row, other.row, max(one.written, other.written))
        one.row, other.row = other.row, one.row
        self.slots[one.row], self.slots[other.row] = one, other
        one.tokens, other.tokens = tokens

    # Memory

    def _reserve(self, capacity: int, num_slots: int | None = None) -> None:
        """Make room for all slots, or so many, with ``capacity`` positions each; what fails leaves all as it was."""
        capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
        for last in (False, True):
            count = num_slots or len(self.slots)
            rows = min(self.max_batch_size, 1 << (count - 1).bit_length()) if count else 0
            if rows <= self.kv.num_slots and capacity <= self.kv.capacity:
                return
            self._batch = None
            self._beside.wait()
            try:
                self.kv.reserve(rows, capacity, max((slot.written for slot in self.slots), default=0))
                break
            except BaseException as error:
                if not self.kv.num_slots and self.slots:  # not even what there was could be kept
                    for run in self._unfinished():
                        self._fail(run, error)
                    self.clear()
                    raise
                if last or not is_out_of_memory(error):
                    raise
            self._free_memory()
        logger.debug("KV memory: %.1f MB", self.kv_bytes / 1e6)

    def _free_memory(self) -> None:
        """Give up what is kept for later requests: features, and conversations that nobody goes on with."""
        logger.warning("out of memory: features and conversations kept for later are dropped")
        self._beside.wait()
        self.features.clear()
        active = [slot for slot in self.slots if slot.run is not None]
        for slot in self.slots:
            if slot.run is None:
                slot.tokens = []
        if not active and not self.preallocated:
            self.slots.clear()
            self.kv.clear()
        elif not self.preallocated:
            for row, slot in enumerate(sorted(active, key=lambda slot: slot.row)):
                if slot.row != row:
                    self._swap(slot, self.slots[row])
            del self.slots[len(active) :]
            self._batch = None
            longest = max(
                len(slot.run.prompt) + 1 if not slot.run.token_ids else len(slot.tokens) + 1 for slot in active
            )
            self.kv.shrink(len(active), -(-longest // CAPACITY_STEP) * CAPACITY_STEP)
        give_back(self.device)
