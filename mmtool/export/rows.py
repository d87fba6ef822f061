"""Rows to measure or to calibrate on, encoded by the model's own template, media included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmtool.args import ExportArgs
from mmtool.data.train import load_training_data
from mmtool.export.source import Source
from mmtool.export.verify import conversations
from mmtool.groups.sft import SftDataArgs
from mmtool.loader import get_template, load_processor
from mmtool.messages import Message
from mmtool.models.common.folders import read_json

SAMPLE_SEED = 0
FEW = 8  # rows that a run kept say little alone


@dataclass(frozen=True)
class Rows:
    """Conversations that end with an answer.

    Attributes:
        messages: the conversations.
        encoded: what the template makes of them, with labels.
        origin: where they are from, for people.
        template: that of the source.
    """

    messages: Sequence[Sequence[Message]]
    encoded: Sequence[dict[str, Any]]
    origin: str
    template: Any


def read_rows(args: ExportArgs, source: Source, count: int, max_length: int | None = None) -> Rows:
    """Return at most ``count`` rows: of ``--dataset``; or kept by the run; or, of the embedded model, its own set.

    Without any, a few built-in conversations; they are added to a few rows that were not asked for.
    """
    config = read_json(source.folder / "config.json")
    limit = config.get("text_config", config).get("max_position_embeddings")
    template = get_template(
        source.spec,
        load_processor(source.spec, source.folder, processor_kwargs=source.processor_kwargs),
        system=source.system,
        max_length=min(filter(None, (max_length, limit)), default=None),
    )
    files = list(args.quant.dataset)
    kept = source.finetuned.val_dataset if source.finetuned is not None else None
    if not files and kept is not None and kept.is_file():
        files = [str(kept)]
    if not files and not source.spec.embedded:
        messages = conversations(source.spec, source.system)
        return Rows(messages, [template.encode(each, train=True) for each in messages], "built-in rows", template)
    options = SftDataArgs(dataset=files, dataset_test_ratio=0.0, train_dataset_sample=count, dataset_seed=SAMPLE_SEED)
    data = load_training_data(options, template, source.spec, system=source.system)
    encoded, messages = [], []
    for index in range(len(data.train)):
        row = data.train[index]
        if "error" not in row:
            row.pop("row")
            encoded.append(row)
            messages.append(data.train.conversation(index).messages)
    origin = f"rows of {', '.join(files) if files else 'the embedded set'}"
    if not args.quant.dataset and len(messages) < FEW:
        more = conversations(source.spec, source.system)
        messages += more
        encoded += [template.encode(each, train=True) for each in more]
        origin += " and built-in ones"
    return Rows(messages, encoded, origin, template)
