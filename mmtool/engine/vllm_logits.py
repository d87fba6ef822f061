"""What vLLM's sampler does not do: a grammar of ours, and a repetition penalty that sees the answer alone.

vLLM imports this module in the process that samples; see ``VllmEngine`` for how requests ask for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

GRAMMAR, PENALTY = "mmtool_grammar", "mmtool_answer_penalty"


class RequestLogits(AdapterLogitsProcessor):
    """Changes the logits of the requests whose ``extra_args`` name one of our keys."""

    def is_argmax_invariant(self) -> bool:
        """Return False: both may make another token the likeliest."""
        return False

    def new_req_logits_processor(self, params: Any) -> Callable[[list[int], Tensor], Tensor] | None:
        """Return what is done to ``(vocabulary,)`` logits after each token of a request; None for nothing."""
        extra = params.extra_args or {}
        grammar, penalty = extra.get(GRAMMAR), extra.get(PENALTY)
        if grammar is None and penalty is None:
            return None

        def change(answer: list[int], logits: Tensor) -> Tensor:
            if penalty is not None and answer:
                logits = _penalized(logits, answer, penalty)
            return logits if grammar is None else _allowed(logits, grammar.allowed())

        return change


def _penalized(logits: Tensor, answer: list[int], penalty: float) -> Tensor:
    seen = torch.tensor(sorted(set(answer)), device=logits.device)
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def _allowed(logits: Tensor, packed: Tensor | None) -> Tensor:
    if packed is None:
        return logits
    bits = packed.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32) & 1
    mask = torch.zeros(len(logits), dtype=torch.bool)
    flat = bits.flatten().bool()[: len(logits)]
    mask[: len(flat)] = flat
    return logits.masked_fill(~mask.to(logits.device), float("-inf"))
