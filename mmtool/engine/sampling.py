"""From logits to tokens: one batched function, with the settings of each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtool.engine.base import Sampling

__all__ = ["Draw", "Sampler", "Sampling"]

NUM_UNIFORMS = 32  # random numbers drawn at once per row


class Draw:
    """What one request needs to choose its tokens: settings, its own random numbers, the tokens seen so far.

    The random numbers come from a generator on the CPU, one per token, so that they depend neither on the device nor
    on other rows.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], vocab_size: int, device: torch.device) -> None:
        self.sampling = sampling
        self._uniforms: list[float] = []
        if not sampling.greedy:
            seed = sampling.seed if sampling.seed is not None else int(torch.randint(2**63 - 1, ()))
            self._generator = torch.Generator().manual_seed(seed)
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(prompt_ids, dtype=torch.long, device=device)] = True

    def uniform(self) -> float:
        """Return the next number in [0, 1)."""
        if not self._uniforms:
            self._uniforms = torch.rand(NUM_UNIFORMS, generator=self._generator).tolist()[::-1]
        return self._uniforms.pop()


class Sampler:
    """Chooses the next token of every row of a batch; built anew when rows join or leave.

    The order of the steps is that of transformers: penalty, temperature, top-k, top-p, draw.
    """

    def __init__(self, draws: Sequence[Draw], device: torch.device) -> None:
        self.draws = draws
        self.device = device
        settings = [draw.sampling for draw in draws]

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=device).unsqueeze(1)

        def indices(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        self.penalties = self.seen = None
        if any(draw.seen is not None for draw in draws):
            some = next(draw.seen for draw in draws if draw.seen is not None)
            rows = [torch.zeros_like(some) if draw.seen is None else draw.seen for draw in draws]
            self.penalties = column([s.repetition_penalty for s in settings])
            self.seen = torch.stack(rows)
            for draw, row in zip(draws, self.seen, strict=True):
                draw.seen = row if draw.seen is not None else None  # a view: what is seen here is seen there

        self.drawn = [row for row, s in enumerate(settings) if not s.greedy]
        self.all_drawn = len(self.drawn) == len(draws)
        if self.drawn:
            some = [settings[row] for row in self.drawn]
            self.rows = indices(self.drawn)
            self.temperatures = column([s.temperature for s in some])
            self.largest_k = max(s.top_k for s in some)
            self.top_k_rows = indices([row for row, s in enumerate(some) if s.top_k > 0])
            self.top_k = indices([s.top_k for s in some if s.top_k > 0]).unsqueeze(1)
            self.top_p_rows = indices([row for row, s in enumerate(some) if s.top_p < 1])
            self.top_p = column([s.top_p for s in some if s.top_p < 1])

    def __call__(self, logits: Tensor) -> Tensor:
        """Return ``(batch,)`` token ids for ``(batch, vocab)`` logits."""
        if self.seen is not None:
            logits = self._penalise(logits.float())
        if not self.drawn:
            ids = logits.argmax(-1)
        elif self.all_drawn:
            ids = self._draw(logits.float())
        else:
            ids = logits.argmax(-1)
            ids[self.rows] = self._draw(logits[self.rows].float())
        if self.seen is not None:
            self.seen.scatter_(1, ids.unsqueeze(1), True)
        return ids

    def _penalise(self, logits: Tensor) -> Tensor:
        penalised = torch.where(logits < 0, logits * self.penalties, logits / self.penalties)
        return torch.where(self.seen, penalised, logits)

    def _draw(self, logits: Tensor) -> Tensor:
        """Draw one token per row by inverting the distribution function at the row's random number.

        Every row is treated in the order of the vocabulary, whatever the others need, so none depends on another.
        """
        logits = logits / self.temperatures
        if len(self.top_k_rows):
            self._keep_top_k(logits)
        if len(self.top_p_rows):
            self._keep_top_p(logits)
        cumulated = logits.softmax(-1).cumsum(-1)
        total = cumulated[:, -1:]
        uniforms = torch.tensor([self.draws[row].uniform() for row in self.drawn], device=self.device)
        # Below the total, so that the first entry above it is one with a probability.
        targets = torch.minimum(uniforms.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(cumulated, targets, right=True).squeeze(1)

    def _keep_top_k(self, logits: Tensor) -> None:
        rows = logits[self.top_k_rows]
        likeliest = rows.topk(min(self.largest_k, rows.shape[1]), dim=-1).values
        smallest = likeliest.gather(1, self.top_k.clamp(max=rows.shape[1]) - 1)
        logits[self.top_k_rows] = rows.masked_fill(rows < smallest, -torch.inf)

    def _keep_top_p(self, logits: Tensor) -> None:
        rows, order = logits[self.top_p_rows].sort(dim=-1, descending=True, stable=True)
        probabilities = rows.softmax(-1)
        likelier = probabilities.cumsum(-1) - probabilities  # what the tokens before this one hold together
        rows = rows.masked_fill(likelier >= self.top_p, -torch.inf)
        logits[self.top_p_rows] = torch.empty_like(rows).scatter_(1, order, rows)
