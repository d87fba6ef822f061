"""From logits to tokens: one batched function, with the settings of each row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmtool.engine.base import Grammar, Sampling, TokenLogprob
from mmtool.errors import MMToolError

__all__ = ["Draw", "RowError", "Sampler", "Sampling"]

NUM_UNIFORMS = 32  # random numbers drawn at once per row
SCORED_TOGETHER = 64  # prompt positions whose log-probabilities, for all of the vocabulary, are there at a time
MIN_TOP_P = 1e-30  # what is less is 0 in float32, which would leave no token at all


class RowError(Exception):
    """What one row of a batch cannot be continued for; nothing was chosen for any row."""

    def __init__(self, row: int, error: Exception) -> None:
        super().__init__(str(error))
        self.row = row
        self.error = error


class Draw:
    """What one request needs to choose its tokens: settings, its own random numbers, the tokens seen so far.

    The random numbers come from a generator on the CPU, one per token, so that they depend neither on the device nor
    on other rows.

    Attributes:
        seen: ``(vocab,)`` bool, what the repetition penalty is for; None without one.
        counts: ``(vocab,)`` float, how often the answer has each token; None where no penalty asks.
        num_tokens: how many tokens the answer has.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt_ids: Sequence[int],
        vocab_size: int,
        device: torch.device,
        stop_token_ids: Sequence[int] = (),
        grammar: Grammar | None = None,
    ) -> None:
        self.sampling = sampling
        self.stop_token_ids = [token_id for token_id in stop_token_ids if token_id < vocab_size]
        self.grammar = grammar
        self.num_tokens = 0
        self._uniforms: list[float] = []
        if not sampling.greedy:
            seed = sampling.seed if sampling.seed is not None else int(torch.randint(2**63 - 1, ()))
            self._generator = torch.Generator().manual_seed(seed)
        self.seen = self.counts = None
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            known = [token_id for token_id in prompt_ids if token_id < vocab_size]  # placeholders may be beyond
            self.seen[torch.tensor(known, dtype=torch.long, device=device)] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.counts = torch.zeros(vocab_size, device=device)

    @property
    def early(self) -> bool:
        """Whether the answer may not stop yet."""
        return self.num_tokens < self.sampling.min_new_tokens and bool(self.stop_token_ids)

    def uniform(self) -> float:
        """Return the number in [0, 1) for the next token."""
        if not self._uniforms:
            self._uniforms = torch.rand(NUM_UNIFORMS, generator=self._generator).tolist()[::-1]
        return self._uniforms[-1]

    def advance(self) -> None:
        """Go on to the token after the next."""
        self.num_tokens += 1
        if self._uniforms:
            self._uniforms.pop()


class Sampler:
    """Chooses the next token of every row of a batch; built anew when rows join or leave.

    The order of the steps is that of transformers: penalties, bias, what is forbidden, temperature, top-k, top-p,
    min-p, draw. Nothing that is chosen for a row depends on the others.
    """

    def __init__(self, draws: Sequence[Draw], device: torch.device) -> None:
        self.draws = draws
        self.device = device
        settings = [draw.sampling for draw in draws]
        self._set_penalties(settings)
        self._set_bias(settings)
        self.constrained = [row for row, draw in enumerate(draws) if draw.grammar is not None]
        self.early = [row for row, draw in enumerate(draws) if draw.early and draw.grammar is None]
        self.early_index: tuple[Tensor, Tensor] | None = None
        self.reported = [row for row, s in enumerate(settings) if s.logprobs is not None]
        self.reported_rows = self._indices(self.reported)
        self.num_top = max((settings[row].logprobs for row in self.reported), default=0)
        self._report: tuple[Tensor, Tensor, Tensor] | None = None

        self.drawn = [row for row, s in enumerate(settings) if not s.greedy]
        self.all_drawn = len(self.drawn) == len(draws)
        if self.drawn:
            some = [settings[row] for row in self.drawn]
            self.rows = self._indices(self.drawn)
            self.temperatures = self._column([s.temperature for s in some])
            self.largest_k = max(s.top_k for s in some)
            self.top_k_rows = self._indices([row for row, s in enumerate(some) if s.top_k > 0])
            self.top_k = self._indices([s.top_k for s in some if s.top_k > 0]).unsqueeze(1)
            self.top_p_rows = self._indices([row for row, s in enumerate(some) if s.top_p < 1])
            self.top_p = self._column([max(s.top_p, MIN_TOP_P) for s in some if s.top_p < 1])
            self.min_p_rows = self._indices([row for row, s in enumerate(some) if s.min_p > 0])
            self.min_p = self._column([math.log(s.min_p) for s in some if s.min_p > 0])

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self.device).unsqueeze(1)

    def _indices(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def _set_penalties(self, settings: Sequence[Sampling]) -> None:
        self.seen = self._stacked("seen")
        if self.seen is not None:
            self.repetition = self._column([s.repetition_penalty for s in settings])
        self.counts = self._stacked("counts")
        if self.counts is not None:
            self.presence = self._column([s.presence_penalty for s in settings])
            self.frequency = self._column([s.frequency_penalty for s in settings])

    def _stacked(self, name: str) -> Tensor | None:
        """Return one tensor for all rows; what is changed in it is changed in the draws, which get views of it."""
        own = [getattr(draw, name) for draw in self.draws]
        some = next((tensor for tensor in own if tensor is not None), None)
        if some is None:
            return None
        stacked = torch.stack([torch.zeros_like(some) if tensor is None else tensor for tensor in own])
        for draw, tensor, row in zip(self.draws, own, stacked, strict=True):
            if tensor is not None:
                setattr(draw, name, row)
        return stacked

    def _set_bias(self, settings: Sequence[Sampling]) -> None:
        entries = [(row, key, value) for row, s in enumerate(settings) for key, value in s.logit_bias.items()]
        self.bias: tuple[Tensor, Tensor, Tensor] | None = None
        if entries:
            rows, keys, values = zip(*entries, strict=True)
            self.bias = self._indices(rows), self._indices(keys), torch.tensor(values, device=self.device).float()

    def __call__(self, logits: Tensor) -> Tensor:
        """Return ``(batch,)`` token ids for ``(batch, vocab)`` logits; -1 where the numbers of a row are not finite.

        Raises:
            RowError: when the grammar of a row fails.
        """
        chances = logits[self.reported_rows].float().log_softmax(-1) if self.reported else None
        logits = self._changed(logits)
        if not self.drawn:
            ids = likeliest(logits)
        elif self.all_drawn:
            ids = self._draw(logits.float())
        else:
            ids = likeliest(logits)
            ids[self.rows] = self._draw(logits[self.rows].float())
        if chances is not None:
            chosen = chances.gather(1, ids[self.reported_rows].unsqueeze(1))
            self._report = (chosen, *chances.topk(self.num_top, dim=-1))
        if self.seen is not None:
            self.seen.scatter_(1, ids.unsqueeze(1), True)
        if self.counts is not None:
            self.counts.scatter_add_(1, ids.unsqueeze(1), torch.ones_like(ids, dtype=self.counts.dtype).unsqueeze(1))
        for draw in self.draws:
            draw.advance()
        return torch.where(logits.gather(1, ids.unsqueeze(1)).squeeze(1).isfinite(), ids, -1)

    def logprobs(self, token_ids: Sequence[int]) -> list[TokenLogprob | None]:
        """Return what the rows of the last call asked to know of their tokens."""
        found: list[TokenLogprob | None] = [None] * len(self.draws)
        if self._report is not None:
            (chosen, values, ids), self._report = (tensor.tolist() for tensor in self._report), None
            for place, row in enumerate(self.reported):
                count = self.draws[row].sampling.logprobs
                top = tuple(zip(ids[place][:count], values[place][:count], strict=True))
                found[row] = TokenLogprob(token_ids[row], chosen[place][0], top)
        return found

    # What changes logits

    def _changed(self, logits: Tensor) -> Tensor:
        """Return logits with penalties, bias and -inf where a token is forbidden; a new tensor unless nothing is."""
        if self.seen is not None:
            logits = logits.float()
            penalised = torch.where(logits < 0, logits * self.repetition, logits / self.repetition)
            logits = torch.where(self.seen, penalised, logits)
        if self.counts is not None:
            logits = logits.float() - self.counts * self.frequency - (self.counts > 0) * self.presence
        if self.bias is not None:
            rows, keys, values = self.bias
            logits = logits.float().index_put((rows, keys), values, accumulate=True)
        if self.early:
            logits = self._without_stops(logits)
        if self.constrained:
            packed = torch.stack([self._allowed(row, -(-logits.shape[1] // 32)) for row in self.constrained])
            allowed = unpacked(packed.to(self.device), logits.shape[1])
            rows = self._indices(self.constrained)
            logits = logits.index_put((rows,), logits[rows].masked_fill(~allowed, -torch.inf))
        return logits

    def _without_stops(self, logits: Tensor) -> Tensor:
        early = [row for row in self.early if self.draws[row].early]
        if self.early_index is None or early != self.early:
            self.early = early
            pairs = [(row, token_id) for row in early for token_id in self.draws[row].stop_token_ids]
            self.early_index = self._indices([row for row, _ in pairs]), self._indices([key for _, key in pairs])
        return logits.index_put(self.early_index, logits.new_tensor(-torch.inf))

    def _allowed(self, row: int, num_words: int) -> Tensor:
        """Return what a row's grammar lets come, packed into ``(num_words,)`` int32 on the CPU."""
        draw = self.draws[row]
        assert draw.grammar is not None
        try:
            packed = draw.grammar.allowed()
            if packed is None:
                packed = torch.full((num_words,), -1, dtype=torch.int32)
            if not packed.any():
                raise MMToolError("the grammar leaves no token that may come")
        except Exception as error:
            raise RowError(row, error) from error
        packed = packed.flatten()[:num_words]
        packed = torch.nn.functional.pad(packed, (0, num_words - len(packed)))
        if draw.early:
            without = without_tokens(packed, draw.stop_token_ids)
            return without if without.any() else packed
        return packed

    # Drawing

    def _draw(self, logits: Tensor) -> Tensor:
        """Draw one token per row by inverting the distribution function at the row's random number.

        Every row is treated in the order of the vocabulary, whatever the others need, so none depends on another.
        """
        logits = logits / self.temperatures
        if len(self.top_k_rows):
            self._keep_top_k(logits)
        if len(self.top_p_rows):
            self._keep_top_p(logits)
        if len(self.min_p_rows):
            rows = logits[self.min_p_rows]
            least = rows.amax(-1, keepdim=True) + self.min_p
            logits[self.min_p_rows] = rows.masked_fill(rows < least, -torch.inf)
        cumulated = logits.softmax(-1).cumsum(-1)
        total = cumulated[:, -1:]
        uniforms = torch.tensor([self.draws[row].uniform() for row in self.drawn], device=self.device)
        # Below the total, so that the first entry above it is one with a probability.
        targets = torch.minimum(uniforms.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
        ids = torch.searchsorted(cumulated, targets, right=True).squeeze(1)
        return ids.clamp_(max=logits.shape[1] - 1)  # numbers that are not finite have no place

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


def unpacked(packed: Tensor, vocab_size: int) -> Tensor:
    """Return the ``(rows, vocab)`` bool masks of packed ones, ``(rows, words)``; see ``Grammar.allowed``."""
    bits = (packed.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=packed.device)) & 1
    return bits.flatten(1)[:, :vocab_size].bool()


def without_tokens(packed: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Return a packed ``(words,)`` mask without some tokens."""
    packed = packed.clone()
    for token_id in token_ids:
        word, bit = divmod(token_id, 32)
        packed[word] &= ~torch.tensor(1 << bit).to(torch.int32)  # bit 31 is the sign
    return packed


def logprobs_of(logits: Tensor, token_ids: Sequence[int], count: int) -> list[TokenLogprob]:
    """Return how likely tokens are by ``(tokens, vocab)`` logits, and the ``count`` likeliest in the place of each."""
    chances = logits.float().log_softmax(-1)
    chosen = chances.gather(1, torch.tensor(token_ids, device=chances.device).unsqueeze(1))
    values, ids = chances.topk(count, dim=-1)
    rows = zip(token_ids, chosen.flatten().tolist(), ids.tolist(), values.tolist(), strict=True)
    return [TokenLogprob(token, own, tuple(zip(tops, theirs, strict=True))) for token, own, tops, theirs in rows]


def likeliest(logits: Tensor) -> Tensor:
    """Return ``(rows,)``; on a CPU through numpy: torch takes ten times as long, 2.5 ms for 16 rows of 122 000."""
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    return torch.from_numpy(logits.contiguous().float().numpy().argmax(-1))
