"""Check the rows that training will see: can each be read, are its media there and sound, how many positions it takes.

No weights are needed: the template knows all of it.
"""

from __future__ import annotations

import json
import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_all_start_methods, get_context
from typing import Any, TextIO

import torch

from mmtool.data.dataset import Row, check_purpose
from mmtool.data.formats import FormatCheck, rename_columns, row_to_messages
from mmtool.data.index import IndexedFile, RecordReader
from mmtool.data.media_cache import UrlCache
from mmtool.data.records import Conversation
from mmtool.errors import DataError, MMToolError, TooLongError
from mmtool.log import get_logger
from mmtool.media import load_image
from mmtool.messages import Image, Message, Text
from mmtool.template.base import IGNORED_LABEL, MediaInput, Segment, Template
from mmtool.utils import counted

_CHUNK = 32  # rows that a process gets at a time
_AHEAD = 4  # chunks that wait for each process
_TOLD_EVERY = 10.0  # seconds
_SIZES_KEPT = 20_000
_REASONS_KEPT = 50
_PLACES_TOLD = 5
_REASONS_TOLD = 8
_ORIENTATION = 274  # the EXIF tag: a picture that is turned may count as one of the other size
_VARIABLE = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d+")

logger = get_logger(__name__)


@dataclass(frozen=True)
class TrainFile:
    """A data file of training, and how its rows are read; picklable."""

    file: IndexedFile
    format: str | None
    columns: Mapping[str, str]
    constants: Mapping[str, Any]
    media_root: str | None
    media_style: str

    def row(self, reader: RecordReader, start: int, length: int, number: int) -> Row:
        """Read the row that lies there; ``number`` is its own, for errors.

        Raises:
            DataError: where it cannot be read.
        """
        file = self.file
        row = file.parse(reader.read(file.stored, start, length, (file.size, file.modified)), number)
        if isinstance(row, DataError):
            raise row
        return self.fields(row)

    def fields(self, row: Row) -> Row:
        """Return a row with its columns renamed and the missing constant ones added.

        Raises:
            DataError: where two columns get the same name.
        """
        row = rename_columns(row, self.columns) if self.columns else row
        missing = {key: value for key, value in self.constants.items() if row.get(key) is None}
        return row | missing if missing else row

    def conversation(self, row: Row, format: str) -> Conversation:
        """Read a row in a format of ``FORMATS``; it must have an answer to learn.

        Raises:
            DataError: naming the field.
        """
        folder = self.file.path.parent
        conversation = row_to_messages(
            row, format, base_dir=folder, media_root=self.media_root, media_style=self.media_style
        )
        check_purpose(conversation, "train")
        return conversation


@dataclass(frozen=True)
class Encoder:
    """Conversations to what training takes; picklable.

    Attributes:
        template: of the model.
        urls: where media given as URLs are.
        system: the system text of rows that bring none; None for the template's own.
    """

    template: Template
    urls: UrlCache
    system: str | None = None

    def messages(self, conversation: Conversation) -> list[Message]:
        """Return the messages of a row, with a system text and files in place of URLs."""
        messages = [self.urls.localized(message) for message in conversation.messages]
        alone = conversation.raw or messages[0].role == "assistant"
        if self.system is not None and conversation.system is None and not alone:
            messages.insert(0, Message("system", (Text(self.system),)))
        return messages

    def segments(self, conversation: Conversation, messages: Sequence[Message]) -> list[Segment]:
        """Return the tokenised conversation, with an answer to learn at its end."""
        return _raw_segments(self.template, messages) if conversation.raw else self.template.segments(messages, True)

    def encode(self, conversation: Conversation) -> dict[str, Any]:
        """Return what ``Template.encode`` makes of a row.

        Raises:
            MMToolError: for media that cannot be opened, a row that is too long, one without a token to learn.
        """
        messages = self.messages(conversation)
        encoded = self._encode_raw(messages) if conversation.raw else self.template.encode(messages, train=True)
        if all(label == IGNORED_LABEL for label in encoded["labels"]):
            raise DataError("nothing of the row is left to learn", "Its answer is empty, or cut off by --max_length.")
        return encoded

    def _encode_raw(self, messages: Sequence[Message]) -> dict[str, Any]:
        segments = _raw_segments(self.template, messages)
        cut = self.template.first_kept(segments)
        ids = [index for segment in segments for index in segment.ids]
        labels = [index if seg.train else IGNORED_LABEL for seg in segments for index in seg.ids]
        return {"input_ids": ids[cut:], "media": [], "labels": labels[cut:]}


def _raw_segments(template: Template, messages: Sequence[Message]) -> list[Segment]:
    """Return a complete prompt and its answer: as texts to go on with, one behind the other, the first not learned."""
    prompt, answer = messages
    around = [Message("assistant", prompt.parts, train=False)], [Message("assistant", answer.parts)]
    front, back = (template.segments(text, True) for text in around)
    begin = [segment for segment in back if not segment.train]
    texts = [segment for segment in front if not _is_control(segment)]
    learned = [segment for segment in back if segment.train]
    if texts and learned and not _is_control(learned[0]):
        learned[0] = replace(learned[0], ids=_continued(template, prompt.text[-1:], answer.text) or learned[0].ids)
    return [*begin, *texts, *learned]


def _continued(template: Template, last: str, text: str) -> list[int] | None:
    """Return the ids of text behind the character ``last``: without the blank that tokenizers put at a beginning."""
    before, both = template.text_ids(last), template.text_ids(last + text)
    return both[len(before) :] if before and both[: len(before)] == before else None


def _is_control(segment: Segment) -> bool:
    return all(piece.control for piece in segment.pieces)


@dataclass(frozen=True)
class Measure:
    """What a sound row takes."""

    tokens: int
    learned: int
    positions: Mapping[str, int] = field(default_factory=dict)  # by kind of medium
    media: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Measurer:
    """Measures conversations; every picture is decoded, but made into tensors only where its size is new.

    How many positions a picture takes depends on its size alone, in every family.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._by_size: OrderedDict[tuple[int, int, Any], MediaInput] = OrderedDict()

    def __call__(self, conversation: Conversation) -> Measure:
        """Return what a conversation takes.

        Raises:
            MMToolError: as ``Encoder.encode``.
        """
        template, messages = self.encoder.template, self.encoder.messages(conversation)
        media = [part for message in messages for part in message.media]
        if media and Image in map(type, media):
            template.check(messages, True)  # before anything is opened
            for part in media:
                if isinstance(part, Image):
                    self._note(part)
        segments = self.encoder.segments(conversation, messages)
        cut = template.first_kept(segments)
        tokens = learned = 0
        positions: dict[str, int] = {}
        numbers: dict[str, int] = {}
        for segment in segments:
            kept = min(max(tokens + len(segment.ids) - cut, 0), len(segment.ids))
            tokens += len(segment.ids)
            learned += kept * segment.train
            if segment.media is not None and kept:
                kind = segment.media.kind
                positions[kind] = positions.get(kind, 0) + kept
                numbers[kind] = numbers.get(kind, 0) + 1
        if not learned:
            raise DataError("nothing of the row is left to learn", "Its answer is empty, or cut off by --max_length.")
        return Measure(tokens - cut, learned, positions, numbers, conversation.warnings)

    def _note(self, part: Image) -> None:
        template = self.encoder.template
        picture = load_image(part.source, template.media_limits)
        key = (*picture.size, picture.getexif().get(_ORIENTATION))
        known = self._by_size.get(key)
        if known is None:
            # Another key: what a template keeps by key must not be found by a picture of which only the size counts.
            known = replace(template.prepare(part), inputs={}, key=f"size {key}")
            self._by_size[key] = known
            if len(self._by_size) > _SIZES_KEPT:
                self._by_size.popitem(last=False)
        template.remember(part, known)


@dataclass(frozen=True)
class Bad:
    """Why a row cannot be used. ``too_long``: because of --max_length alone."""

    reason: str
    hint: str | None = None
    too_long: bool = False


@dataclass(frozen=True)
class Task:
    """A row to check: its file by number, where it lies, and what it is read as."""

    file: int
    start: int
    length: int
    number: int
    format: str


class RowChecker:
    """Checks rows one by one; lives in each process of the check."""

    def __init__(self, files: Sequence[TrainFile], encoder: Encoder) -> None:
        self.files = files
        self.reader = RecordReader()
        self.measure = Measurer(encoder)

    def check(self, task: Task, row: Row | None = None) -> Measure | Bad:
        """Return what a row takes, or why it cannot be used."""
        train_file = self.files[task.file]
        try:
            if row is None:
                row = train_file.row(self.reader, task.start, task.length, task.number)
            return self.measure(train_file.conversation(row, task.format))
        except TooLongError as error:
            return Bad(error.message, error.hint, too_long=True)
        except MMToolError as error:
            return Bad(error.message, error.hint)


_checker: RowChecker | None = None  # of a process of the check


def _start_process(checker: RowChecker) -> None:
    global _checker
    torch.set_num_threads(1)
    _checker = checker


def _check_chunk(tasks: list[Task]) -> list[Measure | Bad]:
    assert _checker is not None
    return [_checker.check(task) for task in tasks]


def check_rows(
    tasks: Iterable[tuple[Task, Row | Bad]], checker: RowChecker, num_processes: int
) -> Iterator[tuple[Task, Measure | Bad]]:
    """Check rows in their order; a row that is ``Bad`` already stays so."""
    if num_processes == 1:
        for task, row in tasks:
            yield task, row if isinstance(row, Bad) else checker.check(task, row)
        return
    # Forked processes start at once and share the tokenizer; where there is no fork, everything is pickled.
    context = get_context("fork" if "fork" in get_all_start_methods() else None)
    waiting: deque[tuple[list[tuple[Task, Bad | None]], Future[list[Measure | Bad]]]] = deque()
    with ProcessPoolExecutor(num_processes, context, _start_process, (checker,)) as pool:
        try:
            for chunk in _chunks(tasks):
                waiting.append((chunk, pool.submit(_check_chunk, [task for task, bad in chunk if bad is None])))
                if len(waiting) > num_processes * _AHEAD:
                    yield from _results(*waiting.popleft())
            while waiting:
                yield from _results(*waiting.popleft())
        except BrokenProcessPool:
            raise MMToolError(
                "a process that checked the data has died; the machine may be out of memory",
                "Give fewer with --dataset_num_proc.",
            ) from None


def _chunks(tasks: Iterable[tuple[Task, Row | Bad]]) -> Iterator[list[tuple[Task, Bad | None]]]:
    chunk: list[tuple[Task, Bad | None]] = []
    for task, row in tasks:
        chunk.append((task, row if isinstance(row, Bad) else None))
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _results(
    chunk: list[tuple[Task, Bad | None]], future: Future[list[Measure | Bad]]
) -> Iterator[tuple[Task, Measure | Bad]]:
    measures = iter(future.result())
    for task, bad in chunk:
        yield task, next(measures) if bad is None else bad


class FormatReader:
    """Parses records in their order and says which format each is read as; a file's first row decides, see there."""

    def __init__(self, files: Sequence[TrainFile]) -> None:
        self._files = files
        self._checks = [FormatCheck(file.format) for file in files]
        self._reader = RecordReader()
        self._renamed: set[int] = set()

    def read(self, index: int, start: int, length: int, number: int) -> tuple[bytes, Row | Bad, str]:
        """Return the bytes of a record, its row, and the format; or why it cannot be read."""
        train_file = self._files[index]
        file = train_file.file
        record = self._reader.read(file.stored, start, length, (file.size, file.modified))
        row = file.parse(record, number)
        if isinstance(row, DataError):
            return record, Bad(row.message, row.hint), ""
        try:
            if train_file.columns and index not in self._renamed:
                self._renamed.add(index)
                self._warn_of_columns(train_file, row, number)
            row = train_file.fields(row)
            return record, row, self._checks[index].format_of(row)
        except DataError as error:
            return record, Bad(error.message, error.hint), ""

    def _warn_of_columns(self, train_file: TrainFile, row: Row, number: int) -> None:
        if not train_file.constants:  # a named set lists the columns of all its places
            for key in train_file.columns.keys() - row.keys():
                place = train_file.file.source.place(number)
                logger.warning("%s: --columns renames %r, which is no key of the record", place, key)


@dataclass
class Spread:
    """Least, mean and most of numbers."""

    number: int = 0
    total: int = 0
    least: int = 0
    most: int = 0

    def add(self, value: int) -> None:
        """Count a number in."""
        self.least = min(self.least, value) if self.number else value
        self.most = max(self.most, value)
        self.number += 1
        self.total += value

    @property
    def mean(self) -> float:
        """Their mean, 0 of none."""
        return self.total / self.number if self.number else 0.0

    def as_json(self) -> dict[str, float]:
        """Return the figures by name."""
        return {"min": self.least, "mean": round(self.mean, 2), "max": self.most}

    def __str__(self) -> str:
        return f"min {self.least}, mean {self.mean:.1f}, max {self.most}"


class CheckReport:
    """Counts what the check finds; rows that cannot be used go to a file one by one, so memory stays as it is."""

    def __init__(self, dropped: TextIO, places: Callable[[Task], str]) -> None:
        self._dropped = dropped
        self._place = places
        self._started = self._told = time.monotonic()
        self.seen = self.bad = self.too_long = self.warned = 0
        self.tokens, self.learned = Spread(), Spread()
        self.positions: dict[str, Spread] = {}
        self.media: dict[str, int] = {}
        self.reasons: dict[str, dict[str, Any]] = {}
        self.first_bad: list[tuple[str, Bad]] = []

    def add(self, task: Task, found: Measure | Bad, total: int) -> None:
        """Count a row in; tell now and then how far the check is."""
        self.seen += 1
        if isinstance(found, Bad):
            self._add_bad(task, found)
        else:
            self.tokens.add(found.tokens)
            self.learned.add(found.learned)
            for kind, positions in found.positions.items():
                self.positions.setdefault(kind, Spread()).add(positions)
                self.media[kind] = self.media.get(kind, 0) + found.media[kind]
            for warning in found.warnings:
                self.warned += 1
                if self.warned <= _PLACES_TOLD:
                    logger.warning("%s: %s", self._place(task), warning)
        if time.monotonic() - self._told > _TOLD_EVERY:
            self._told = time.monotonic()
            speed = self.seen / (self._told - self._started)
            logger.info(
                "checked %d of %d rows; about %d s to go", self.seen, total, (total - self.seen) / max(speed, 1e-9)
            )

    def _add_bad(self, task: Task, bad: Bad) -> None:
        place = self._place(task)
        reason = bad.reason.removeprefix(f"{place}: ")
        self.bad += not bad.too_long
        self.too_long += bad.too_long
        if len(self.first_bad) < _PLACES_TOLD and not bad.too_long:
            self.first_bad.append((place, replace(bad, reason=reason)))
        self._dropped.write(json.dumps({"row": place, "reason": reason}, ensure_ascii=False) + "\n")
        group = _VARIABLE.sub("…", reason) if not bad.too_long else "longer than --max_length"
        if group not in self.reasons and len(self.reasons) >= _REASONS_KEPT:
            group = "other reasons"
        entry = self.reasons.setdefault(group, {"rows": 0, "examples": []})
        entry["rows"] += 1
        if len(entry["examples"]) < _PLACES_TOLD:
            entry["examples"].append({"row": place, "reason": reason})

    def as_json(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {
            "checked": self.seen,
            "dropped": self.bad + self.too_long,
            "dropped_by_reason": self.reasons,
            "warnings": self.warned,
            "tokens": self.tokens.as_json(),
            "learned_tokens": self.learned.as_json(),
            "media": {
                kind: {"number": self.media[kind], "rows": spread.number, "positions_per_row": spread.as_json()}
                for kind, spread in self.positions.items()
            },
            "seconds": round(time.monotonic() - self._started, 1),
        }

    def lines(self) -> list[str]:
        """Return the figures for people."""
        if not self.tokens.number:
            return self.dropped_lines()
        lines = [f"tokens per row: {self.tokens}; learned: {self.learned}"]
        for kind, spread in self.positions.items():
            lines.append(f"{kind} positions per row that has any: {spread}; {counted(self.media[kind], kind)}")
        return [*lines, *self.dropped_lines()]

    def dropped_lines(self) -> list[str]:
        """Return why rows were left out, and where the first of them are."""
        dropped = self.bad + self.too_long
        if not dropped:
            return []
        lines = [f"left out: {counted(dropped, 'row')} of {self.seen} ({dropped / self.seen:.1%})"]
        ordered = sorted(self.reasons.items(), key=lambda item: -item[1]["rows"])
        for reason, entry in ordered[:_REASONS_TOLD]:
            examples = entry["examples"]
            same = len({example["reason"] for example in examples}) == 1
            shown = examples[0]["reason"] if same and reason != "longer than --max_length" else reason
            more = ", ..." if entry["rows"] > len(examples) else ""
            lines.append(f"  {entry['rows']} x {shown}: {', '.join(example['row'] for example in examples)}{more}")
        if len(ordered) > _REASONS_TOLD:
            rest = sum(entry["rows"] for _, entry in ordered[_REASONS_TOLD:])
            lines.append(f"  {rest} x {counted(len(ordered) - _REASONS_TOLD, 'other reason')}")
        return lines
