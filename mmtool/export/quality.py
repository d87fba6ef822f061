"""What quantisation costs: loss, likeliest tokens and whole answers of a quantised model beside those of its source.

Tokens that the source finds about as likely as each other change places in few bits, which is no harm. So the bounds
are on the loss, and on how far below its own likeliest token a quantised model puts that of the source: in standard
deviations of its logits, since those of trained and untrained models differ much. Random logits are 3 of them off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmtool.engine.base import Sampling, request_from
from mmtool.engine.create import create_engine
from mmtool.errors import MMToolError
from mmtool.export.progress import Progress
from mmtool.export.rows import Rows

ROWS = 16  # compared at most
ANSWER_TOKENS = 16
# By bits: how much the loss may grow, and how far off likeliest tokens may be on average.
LOSS_BOUNDS = {8: 0.1, 4: 0.5}
GAP_BOUNDS = {8: 0.1, 4: 1.0}


@dataclass(frozen=True)
class Measured:
    """What a model makes of some rows.

    Attributes:
        loss: mean cross entropy of the learned tokens.
        likeliest: for every learned token the one the model would have taken.
        answers: greedy ids for the question of each row.
        gap: how far below its likeliest token it puts that of the source, on average, in standard deviations of its
            logits; 0 for the source itself.
    """

    loss: float
    likeliest: Tensor
    answers: list[tuple[int, ...]]
    gap: float = 0.0


@torch.no_grad()
def measure(model: Any, rows: Rows, title: str, source: Measured | None = None) -> Measured:
    """Run a model over rows: once with their answers, once to answer itself; ``source`` is what it is compared to.

    Raises:
        MMToolError: where it computes no finite numbers.
    """
    device = model.get_input_embeddings().weight.device
    total, likeliest, gaps = 0.0, [], []
    answers: list[tuple[int, ...]] = []
    engine = create_engine(model, rows.template.processor, "pt", max_batch_size=1)
    with Progress(title, len(rows.encoded)) as progress:
        for row, messages in zip(rows.encoded, rows.messages, strict=True):
            batch = {name: value.to(device) for name, value in rows.template.collate([row]).items()}
            labels = batch.pop("labels")[0, 1:]
            logits = model(**batch, use_cache=False).logits[0, :-1].float()
            learned = labels != -100
            total += float(torch.nn.functional.cross_entropy(logits[learned], labels[learned], reduction="sum"))
            if not math.isfinite(total):
                raise MMToolError(f"{title}: the model computes no finite numbers; nothing was kept", "Use more bits.")
            likeliest.append(logits[learned].argmax(-1).cpu())
            if source is not None:
                start = sum(map(len, likeliest[:-1]))
                wanted = source.likeliest[start : start + len(likeliest[-1])]
                gaps.append(_gap(logits[learned], wanted.to(device)))
            answers.append(_answer(engine, rows.template, messages))
            progress.advance()
    joined = torch.cat(likeliest)
    gap = float(torch.cat(gaps).mean()) if gaps else 0.0
    return Measured(total / max(1, len(joined)), joined, answers, gap)


def _gap(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return how far below the largest of ``(positions, vocabulary)`` logits ``wanted`` is, in standard deviations."""
    below = logits.max(-1).values - logits.gather(1, wanted.unsqueeze(1)).squeeze(1)
    return (below / logits.std(-1)).cpu()


def _answer(engine: Any, template: Any, messages: Sequence[Any]) -> tuple[int, ...]:
    if len(messages) < 2:  # text to go on with, no question
        return ()
    request = request_from(template, messages[:-1], Sampling(max_new_tokens=ANSWER_TOKENS))
    return tuple(index for delta in engine.generate([request]) for index in delta.token_ids)


def describe(before: Measured, after: Measured, origin: str, bits: int) -> list[tuple[str, str]]:
    """Return rows for the table.

    Raises:
        MMToolError: where the quantised model is worse than the bounds for its bits.
    """
    loss_bound, gap_bound = LOSS_BOUNDS[bits], GAP_BOUNDS[bits]
    if after.loss > before.loss + loss_bound or after.gap > gap_bound:
        raise MMToolError(
            f"the quantised model is too far from its source: loss {before.loss:.3g} before, {after.loss:.3g} after "
            f"(bound: {loss_bound} more), likeliest tokens off by {after.gap:.3g} (bound {gap_bound}); nothing kept",
            "Try more bits, a smaller --quant_group_size, another --quant_method, or leave layers out "
            "(--quant_modules_to_not_convert); --verify false writes it all the same.",
        )
    same_tokens = float((before.likeliest == after.likeliest).float().mean())
    same = sum(a == b for a, b in zip(before.answers, after.answers, strict=True))
    return [
        ("loss", f"{before.loss:.4f} before, {after.loss:.4f} after (bound: {loss_bound} more; {origin})"),
        (
            "agreement",
            f"{100 * same_tokens:.2f} % of {len(before.likeliest)} likeliest tokens, off by {after.gap:.3f} "
            f"(bound {gap_bound})",
        ),
        ("answers", f"{same} of {len(before.answers)} the same, to {ANSWER_TOKENS} tokens"),
    ]
