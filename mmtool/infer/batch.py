"""A dataset run: every row gets its answer as one line of the result file, in input order.

A thread reads rows, opens their pictures and encodes them while the engine answers earlier ones; only a few rows are
in memory at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any

from mmtool.data.dataset import SUFFIXES, read_conversations, read_rows
from mmtool.data.records import TAGS, Conversation
from mmtool.data.registry import DATASETS, DatasetSpec
from mmtool.data.sources import single_file
from mmtool.engine.base import Request
from mmtool.errors import DataError, MMToolError, TooLongError
from mmtool.groups.infer import InferDataArgs
from mmtool.infer.answer import Model
from mmtool.infer.prefetch import Prefetch
from mmtool.infer.progress import Progress
from mmtool.infer.results import ResultFile, check_result_path
from mmtool.log import get_logger
from mmtool.media import describe_source
from mmtool.messages import Audio, Image, Message, Text
from mmtool.spec import ModelSpec
from mmtool.utils import counted, did_you_mean

REPORTED_ERRORS = 5
"""How many bad rows stderr tells about; the result file names them all."""

# What a line of the result file must share with its row when a run goes on. Media are left out: their paths start at
# the folder of the dataset, which may be written in another way the next time.
COMPARED = ("line", "query", "history", "label")

logger = get_logger(__name__)


@dataclass
class Row:
    """A row of the dataset on its way to the result file.

    Attributes:
        index: its place in the result file, from 0.
        record: what the result file says about it.
        messages: what is asked; empty where the row cannot be used.
        warnings: what looks like a mistake in the row.
        error: why it cannot be used.
        request: what the engine gets.
        pieces: the answer so far.
    """

    index: int
    record: dict[str, Any]
    messages: list[Message] = field(default_factory=list)
    warnings: tuple[str, ...] = ()
    error: MMToolError | None = None
    request: Request | None = None
    pieces: list[str] = field(default_factory=list)


class DatasetRun:
    """The rows that are still to be answered, and the file the answers go to.

    Making one opens both and checks that they belong together, without any model; ``answer`` does the work.

    Args:
        options: what was asked for.
        spec: the model that will answer.
        system: the system text of rows that bring none; None for the template's own.
        name: what the result file is called after beside the dataset; None for the model type.
    """

    def __init__(
        self, options: InferDataArgs, spec: ModelSpec, system: str | None = None, name: str | None = None
    ) -> None:
        options, named = find_dataset(options)
        self.options = options
        self.dataset = single_file(named) if named else Path(options.val_dataset).expanduser()
        data_format = options.dataset_format or (named.format if named else None)
        rows = read_dataset(self.dataset, options, spec, system, data_format)
        first = next(rows, None)  # a dataset that cannot be read must not cost the result file
        path = Path(options.result_path or f"{self.dataset.stem}.{name or spec.model_type}.jsonl")
        check_result_path(path, self.dataset, resume=options.resume, overwrite=options.overwrite)
        self.failed = self.told = 0
        self.results = ResultFile(path, resume=options.resume)
        self._rows = chain([first] if first else [], rows)
        try:
            if options.resume:
                skip_answered(self._rows, self.results, self.dataset)
            self._next = next(self._rows, None)
        except BaseException:  # raised again; the file is open, and nobody else can close it yet
            self.results.close()
            raise

    def __enter__(self) -> DatasetRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.results.close()

    @property
    def finished(self) -> bool:
        """Whether no row is left."""
        return self._next is None

    def answer(self, model: Model) -> None:
        """Answer the rows that are left.

        Raises:
            DataError: for a bad row under ``--on_error stop``, after the rows before it are answered.
            KeyboardInterrupt: on Ctrl-C; what is written stays.
        """
        total = count_rows(self.dataset, self.options.val_dataset_sample)
        rows = encode_rows(chain([self._next] if self._next else [], self._rows), model)
        try:
            with (
                Prefetch(rows, 2 * self.options.max_batch_size + 2) as encoded,
                Progress(total, self.results.written) as progress,
            ):
                stopped_by = self._answer(model, encoded, progress)
        except KeyboardInterrupt:
            done = counted(self.results.written, "row")
            logger.warning("stopped after %s; run it again with --resume true to go on", done)
            raise
        logger.info("%s: %s", self.results.path, progress.summary(self.failed))
        if stopped_by is not None:
            raise stopped_by

    def _answer(self, model: Model, rows: Iterator[Row], progress: Progress) -> MMToolError | None:
        """Answer rows until they end or something stops the run; return that, once what runs beside it is done."""
        stopped_by: MMToolError | None = None

        def fail(row: Row, error: MMToolError) -> None:
            nonlocal stopped_by
            if self._stops(error, model):
                hint = "Correct the row and go on with --resume true, or pass --on_error skip."
                stopped_by = stopped_by or DataError(self._place(row, error.message), hint, row.record["line"])
                return
            self.failed += 1
            self._tell(row, f"{error.message} (skipped)")
            progress.advance(self.results.add(row.index, row.record | {"error": error.message}), 0)

        def requests() -> Iterator[Request]:
            nonlocal stopped_by
            try:
                for row in rows:
                    for warning in row.warnings:
                        self._tell(row, warning)
                    request, row.request = row.request, None  # a finished row shall not keep its pictures
                    if row.error is not None:
                        fail(row, row.error)
                    if stopped_by is not None:
                        return
                    if request is not None:
                        yield request
            except DataError as error:  # nothing behind this place of the file can be read
                stopped_by = error

        for delta in model.engine.generate(requests(), errors="yield"):
            row: Row = delta.request.id
            row.pieces.append(delta.text)
            num_written = 0
            if isinstance(delta.error, MMToolError):
                fail(row, delta.error)
            elif delta.error is not None:
                raise delta.error
            elif delta.finish_reason is not None:
                record = row.record | {"response": "".join(row.pieces), "finish_reason": delta.finish_reason}
                num_written = self.results.add(row.index, record)
            progress.advance(num_written, len(delta.token_ids))
        return stopped_by

    def _stops(self, error: MMToolError, model: Model) -> bool:
        too_long = isinstance(error, TooLongError) and model.template.truncation_strategy == "raise"
        return too_long or self.options.on_error == "stop"

    def _tell(self, row: Row, text: str) -> None:
        self.told += 1
        if self.told <= REPORTED_ERRORS:
            logger.warning("%s", self._place(row, text))
        elif self.told == REPORTED_ERRORS + 1:
            logger.warning("more rows like these are not told; the result file has their errors")

    def _place(self, row: Row, text: str) -> str:
        name, line = self.dataset.name, row.record["line"]
        if text.startswith(name):  # errors of the reader say where they are
            return text
        place = f"{name}: record {line}" if self.dataset.suffix in (".json", ".parquet") else f"{name}:{line}"
        return f"{place}: {text}"


def find_dataset(options: InferDataArgs) -> tuple[InferDataArgs, DatasetSpec | None]:
    """Return the options with ``NAME#500`` taken apart, and the named set that is meant; None for a file.

    Raises:
        MMToolError: where ``--val_dataset`` is neither.
    """
    text = options.val_dataset
    name, _, count = text.rpartition("#")
    if name and count.isdecimal() and int(count) and not Path(text).expanduser().exists():
        options = dataclasses.replace(options, val_dataset=name, val_dataset_sample=int(count))
    path = Path(options.val_dataset).expanduser()
    named = DATASETS.get(options.val_dataset)
    if named is None and not path.exists() and path.suffix.lower() not in SUFFIXES:
        listed = f"Give a file ({', '.join(SUFFIXES)}), or a name: {', '.join(DATASETS)}."
        raise MMToolError(
            f"--val_dataset {text}: there is no such file and no dataset of this name",
            did_you_mean(options.val_dataset, DATASETS, listed),
        )
    return options, named


def read_dataset(
    path: Path, options: InferDataArgs, spec: ModelSpec, system: str | None, format: str | None
) -> Iterator[Row]:
    """Give the rows of a data file, lazily; their media are not opened."""
    conversations = read_conversations(
        path,
        format=format,
        columns=options.columns,
        media_root=options.media_root,
        media_style=spec.media_style,
    )
    for index, (line, item) in enumerate(islice(conversations, options.val_dataset_sample)):
        if isinstance(item, DataError):
            yield Row(index, {"line": line}, error=item)
        elif item.raw:
            error = DataError(f"a prompt that has its role marks already, which {spec.model_type} does not take")
            yield Row(index, describe(line, item, item.prompt()), error=error)
        else:
            messages = item.prompt()
            if item.system is None and system is not None:
                messages.insert(0, Message("system", (Text(system),)))
            yield Row(index, describe(line, item, messages), messages, item.warnings)


def describe(line: int, conversation: Conversation, messages: Sequence[Message]) -> dict[str, Any]:
    """Return the result line of a row that is not answered yet: its own other fields, then ours."""
    turns = [message for message in messages if message.role != "system"]
    marked = len(turns) > 1 or any(isinstance(part, Text) for part in turns[0].parts[: len(turns[0].media)])
    *earlier, query = [_text(message, marked) for message in turns]
    ours = {"line": line, "query": query, "response": None, "label": conversation.label}
    record = {"line": line} | dict(conversation.extra) | ours
    record["history"] = [earlier[start : start + 2] for start in range(0, len(earlier), 2)]
    if messages[0].role == "system":
        record["system"] = messages[0].text
    for name, kind in (("images", Image), ("audios", Audio)):
        record[name] = [_reference(part.source) for part in conversation.media if isinstance(part, kind)]
    return record


def _text(message: Message, marked: bool) -> str:
    """Return the text, with a tag for each medium if they are not simply in front of the only question."""
    if not marked:
        return message.text
    return "".join(part.text if isinstance(part, Text) else TAGS[type(part)] for part in message.parts)


def _reference(source: object) -> str:
    return str(source) if isinstance(source, str | Path) else describe_source(source)


def skip_answered(rows: Iterator[Row], results: ResultFile, dataset: Path) -> None:
    """Take the rows that ``results`` holds from the front of ``rows``.

    Raises:
        MMToolError: where a line of the file does not belong to the row in its place.
    """
    for done in results.done():
        row = next(rows, None)
        if row is None:
            raise MMToolError(
                f"--result_path {results.path} has {counted(results.written, 'row')} or more, and there "
                f"are only {results.written - 1} to answer",
                "Go on with the dataset and the --val_dataset_sample that the file was made with.",
            )
        differing = [
            name for name in COMPARED if name in done and name in row.record and done[name] != row.record[name]
        ]
        if differing or "line" not in done:
            raise MMToolError(
                f"line {results.written} of --result_path {results.path} is not about line {row.record['line']} "
                f"of {dataset}: another {' and '.join(differing) or 'kind of file'}",
                "Go on with the dataset the file was made with, or give another --result_path.",
            )


def encode_rows(rows: Iterator[Row], model: Model) -> Iterator[Row]:
    """Open the media of every row and make its request; what cannot be used gets its ``error`` instead."""
    seed = model.sampling.seed
    for row in rows:
        if row.error is None:
            try:
                row.request = model.request(row.messages)
                model.engine.check(row.request)
            except MMToolError as error:
                row.request, row.error = None, error
            else:
                model = dataclasses.replace(model, show_prompt=False)  # one is enough
                row.request.id = row
                if seed is not None:  # rows draw differently, and a run that goes on draws like one in one piece
                    row.request.sampling = dataclasses.replace(row.request.sampling, seed=(seed + row.index) % 2**63)
        yield row


def count_rows(dataset: Path, sample: int | None) -> int | None:
    """Return how many rows will be answered, None where the file has no end that can be read."""
    try:
        if dataset.suffix == ".jsonl":
            with dataset.open("rb") as file:
                return sum(1 for _ in islice((line for line in file if line.strip()), sample))
        return sum(1 for _ in islice(read_rows(dataset), sample))
    except DataError:
        return None
