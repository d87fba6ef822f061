"""The decode step in a few fixed shapes, so that a GPU can replay a recording instead of being told each kernel.

Rows are filled up to 1, 2, 4, ... and lengths to a multiple of some hundreds; keys and values lie at fixed addresses.
So there is one CUDA graph for each pair that occurs, recorded when it is first needed. Rows beyond those that answer
write into a spare row of the storage and are thrown away. Without a GPU the same shapes run as they are, which is how
they are tested; it brings nothing there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmtool.engine.llama_step import LlamaStep, Rows
from mmtool.engine.slots import KVSlots
from mmtool.log import get_logger

logger = get_logger(__name__)

LENGTH_STEP = 256  # lengths are multiples of it; longer ones of more, see ``padded_length``
WARM_UPS = 2  # calls before a recording, in which libraries choose their kernels


class GraphedStep:
    """The logits of a decode step by fixed shapes; of one storage, as long as that stays where it is.

    Args:
        step: has a head.
        kv: with a spare row.
        max_rows: most rows that answer at once.
        records: False where a recording has failed before; the shapes run as they are then.
    """

    def __init__(self, step: LlamaStep, kv: KVSlots, max_rows: int, records: bool = True) -> None:
        assert step.head is not None and kv.spare, "asked only where both are so"
        self.step = step
        self.kv = kv
        self.storage = storage_of(kv)
        self.max_rows = min(max_rows, kv.num_slots)
        device = step.embeddings.device
        self.may_record = records
        self.records = records and device.type == "cuda"
        self.ids, self.positions, self.targets = torch.zeros(3, self.max_rows, dtype=torch.long, device=device)
        self.every_position = torch.arange(kv.capacity, device=device)
        self.every_head = torch.arange(step.kv_heads, device=device)
        self.spare = kv.num_slots  # the row behind the slots
        self.filled = 0  # rows of ``targets`` that are those of answers
        self.replays: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self.pool = None

    def fits(self, step: LlamaStep, kv: KVSlots) -> bool:
        """Return whether recordings are still those of this step and storage."""
        return self.step is step and self.storage == storage_of(kv)

    def __call__(self, ids: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Return the ``(B, vocabulary)`` logits after ``ids`` ``(B,)`` at ``positions`` of rows 0 to B-1.

        They are overwritten by the next call.
        """
        count = len(ids)
        rows, length = padded_rows(count, self.max_rows), padded_length(longest + 1, self.kv.capacity)
        if self.filled != count:
            self.targets.fill_(self.spare)
            self.targets[:count] = self.every_row(count)
            self.positions.zero_()
            self.filled = count
        self.ids[:count].copy_(ids)
        self.positions[:count].copy_(positions)
        replay = self.replays.get((rows, length))
        if replay is None:
            replay = self.replays[rows, length] = self._recorded_if_possible(rows, length)
        return replay()[:count]

    def every_row(self, count: int) -> Tensor:
        """Return 0 to ``count - 1``."""
        return torch.arange(count, device=self.ids.device)

    def logits(self, rows: int, length: int) -> Tensor:
        """Compute ``(rows, vocabulary)`` from the fixed inputs; every shape follows from the two numbers."""
        positions, targets = self.positions[:rows], self.targets[:rows]
        lines = targets.unsqueeze(1) * self.step.kv_heads + self.every_head
        index = (lines * self.kv.capacity + positions.unsqueeze(1)).flatten()
        hidden = self.every_position[:length] > positions.unsqueeze(1)
        mask = torch.zeros_like(hidden, dtype=self.step.embeddings.dtype).masked_fill_(hidden, -torch.inf)
        states = self.step(Rows(self.ids[:rows], positions, length - 1, index, mask[:, None, None]), self.kv)
        return self.step.logits(states)

    def _recorded_if_possible(self, rows: int, length: int) -> Callable[[], Tensor]:
        """Return what computes ``logits`` of these shapes, as a recording where there is a GPU that can."""
        if self.records:
            try:
                return self._recorded(rows, length)
            except RuntimeError as error:  # what CUDA and its memory have against it; answers need no recording
                self.records = self.may_record = False
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                logger.warning("CUDA graphs are not used any more: the step could not be recorded: %s", reason)
        return lambda: self.logits(rows, length)

    def _recorded(self, rows: int, length: int) -> Callable[[], Tensor]:
        """Return the replay of a recording of ``logits``.

        Raises:
            RuntimeError: when it cannot be recorded; the stream is what it was.
        """
        before = torch.cuda.current_stream(self.ids.device)
        try:
            return self._record(rows, length)
        finally:
            torch.cuda.set_stream(before)  # a recording that fails does not always do it

    def _record(self, rows: int, length: int) -> Callable[[], Tensor]:
        stream = torch.cuda.Stream(self.ids.device)
        stream.wait_stream(torch.cuda.current_stream(self.ids.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.logits(rows, length)
        torch.cuda.current_stream(self.ids.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = self.logits(rows, length)
        self.pool = graph.pool()
        logger.debug("recorded the step of %d rows and %d positions", rows, length)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def graphed(known: GraphedStep | None, step: LlamaStep, kv: KVSlots, max_rows: int) -> GraphedStep | None:
    """Return ``step`` in fixed shapes, which is ``known`` unless weights or storage have moved; None without a head."""
    if step.head is None:
        return None
    if known is not None and known.fits(step, kv):
        return known
    return GraphedStep(step, kv, max_rows, records=known is None or known.may_record)


def storage_of(kv: KVSlots) -> tuple[int, ...]:
    """Return what changes when keys and values move."""
    tensors = (*kv.keys, *kv.values)
    return (kv.num_slots, kv.capacity, *(0 if tensor is None else tensor.data_ptr() for tensor in tensors))


def padded_rows(count: int, most: int) -> int:
    """Return the next power of two, or ``most``."""
    return min(1 << (count - 1).bit_length(), most)


def padded_length(length: int, capacity: int) -> int:
    """Return ``length`` filled up to a multiple of ``LENGTH_STEP``, of an eighth of its own size for long ones."""
    step = max(LENGTH_STEP, (1 << (length - 1).bit_length()) // 8)
    return min(-(-length // step) * step, capacity)
