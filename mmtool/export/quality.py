"""What quantisation costs: loss, likeliest tokens and whole answers of a quantised model beside those of its source."""

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


@dataclass(frozen=True)
class Measured:
    """What a model makes of some rows.

    Attributes:
        loss: mean cross entropy of the learned tokens.
        likeliest: for every learned token the one the model would have taken.
        answers: greedy ids for the question of each row.
    """

    loss: float
    likeliest: Tensor
    answers: list[tuple[int, ...]]


@torch.no_grad()
def measure(model: Any, rows: Rows, title: str) -> Measured:
    """Run a model over rows: once with their answers, once to answer itself."""
    device = model.get_input_embeddings().weight.device
    total, likeliest = 0.0, []
    answers: list[tuple[int, ...]] = []
    engine = create_engine(model, rows.template.processor, "pt", max_batch_size=1)
    with Progress(title, len(rows.encoded)) as progress:
        for row, messages in zip(rows.encoded, rows.messages, strict=True):
            batch = {name: value.to(device) for name, value in rows.template.collate([row]).items()}
            labels = batch.pop("labels")[0, 1:]
            logits = model(**batch, use_cache=False).logits[0, :-1].float()
            learned = labels != -100
            total += float(torch.nn.functional.cross_entropy(logits[learned], labels[learned], reduction="sum"))
            likeliest.append(logits[learned].argmax(-1).cpu())
            answers.append(_answer(engine, rows.template, messages))
            progress.advance()
    joined = torch.cat(likeliest)
    return Measured(total / max(1, len(joined)), joined, answers)


def _answer(engine: Any, template: Any, messages: Sequence[Any]) -> tuple[int, ...]:
    if len(messages) < 2:  # text to go on with, no question
        return ()
    request = request_from(template, messages[:-1], Sampling(max_new_tokens=ANSWER_TOKENS))
    return tuple(index for delta in engine.generate([request]) for index in delta.token_ids)


def describe(before: Measured, after: Measured, origin: str) -> list[tuple[str, str]]:
    """Return rows for the table.

    Raises:
        MMToolError: where the quantised model computes no finite numbers.
    """
    if not math.isfinite(after.loss):
        raise MMToolError("the quantised model computes no finite numbers; nothing was kept", "Use more bits.")
    same_tokens = float((before.likeliest == after.likeliest).float().mean())
    same = sum(a == b for a, b in zip(before.answers, after.answers, strict=True))
    return [
        ("loss", f"{before.loss:.4f} before, {after.loss:.4f} after ({origin})"),
        ("agreement", f"{100 * same_tokens:.2f} % of {len(before.likeliest)} likeliest tokens"),
        ("answers", f"{same} of {len(before.answers)} the same, to {ANSWER_TOKENS} tokens"),
    ]
