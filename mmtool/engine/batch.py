"""The requests that answer, as tensors: what one decode step of all of them needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtool.engine.adapters import Choice
from mmtool.engine.llama_step import Rows
from mmtool.engine.sampling import Sampler
from mmtool.engine.slots import KVSlots, write_index
from mmtool.engine.stepped import Run


class Batch:
    """The runs that answer, rows 0 to B-1, as tensors; made anew when one joins or leaves.

    Attributes:
        runs: by row.
        ids: ``(B,)``, the tokens to feed.
        positions: ``(B,)``, where they stand.
        longest: the largest of them.
        choice: which adapters the rows use; None where none does.
        sampler: chooses the tokens after them.
    """

    def __init__(
        self, runs: Sequence[Run], kv: KVSlots, device: torch.device, dtype: torch.dtype, choice: Choice | None = None
    ) -> None:
        self.runs = runs
        self.choice = choice
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
