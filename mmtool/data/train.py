"""Rows for training: found, checked and split before any weights load, then encoded one by one where they are needed.

What is kept of a row is where it lies in its file, on disk: memory does not grow with the number of rows.
"""

from __future__ import annotations

import base64
import copy
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmtool.data.check import Encoder, TrainFile
from mmtool.data.dataset import Row
from mmtool.data.formats import FormatCheck
from mmtool.data.index import IndexedFile, RecordReader
from mmtool.data.media_cache import UrlCache
from mmtool.data.prepare import RESULT, Preparation
from mmtool.data.records import Conversation
from mmtool.data.table import FORMAT_NAMES, ROW, SPLITS, UNKNOWN_FORMAT
from mmtool.errors import DataError, MMToolError
from mmtool.log import get_logger
from mmtool.messages import Message, Text
from mmtool.spec import ModelSpec
from mmtool.template.base import Template
from mmtool.utils import counted

if TYPE_CHECKING:
    from mmtool.groups.sft import SftDataArgs

_FAILURE = "failed.json"

logger = get_logger(__name__)


class EncodedRows(torch.utils.data.Dataset):
    """The rows of a split, encoded when they are asked for; picklable, with neither rows nor open files inside.

    Attributes:
        fingerprint: another one where rows, their order, or how they are encoded differ.
    """

    def __init__(self, table: Path, files: list[TrainFile], encoder: Encoder, fingerprint: str, counted: bool) -> None:
        self.fingerprint = fingerprint
        self._table = table
        self._files = files
        self._encoder = encoder
        self._counted = counted
        self._size = table.stat().st_size // ROW.size
        self._reader = RecordReader()
        self._formats: dict[int, FormatCheck] = {}
        self._lengths: np.ndarray | None = None
        self._keeps: Any = None  # a temporary folder, which must not go before

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lengths": None, "_keeps": None, "_formats": {}}

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return what ``Template.encode`` makes of a row, and under ``row`` where it comes from.

        A row that cannot be used gives ``{"error": why, "row": where}``.
        """
        place = self.origin(index)
        try:
            return self._encoder.encode(self.conversation(index)) | {"row": place}
        except MMToolError as error:
            return {"error": f"{place}: {error.message.removeprefix(f'{place}: ')}", "row": place}

    @property
    def lengths(self) -> np.ndarray | None:
        """How many positions each row takes, as int32 in a file; None where rows were not checked."""
        if not self._counted or not self._size:
            return None
        if self._lengths is None:
            self._lengths = np.memmap(self._table.with_suffix(".lengths"), np.int32, mode="r")
        return self._lengths

    def origin(self, index: int) -> str:
        """Return file and line of a row, ``my.jsonl:17``."""
        _, _, number, _, file, _ = self._entry(index)
        return self._files[file].file.source.place(number)

    def conversation(self, index: int) -> Conversation:
        """Return a row as it is in its file.

        Raises:
            DataError: where it cannot be read.
        """
        start, length, number, _, file, format_index = self._entry(index)
        row = self._files[file].row(self._reader, start, length, number)
        name = self._format_of(file, row) if format_index == UNKNOWN_FORMAT else FORMAT_NAMES[format_index]
        return self._files[file].conversation(row, name)

    def write_jsonl(self, path: Path) -> None:
        """Write the rows to a file that ``--val_dataset`` reads: messages, with the paths of media absolute.

        Rows that cannot be used, and complete prompts and texts, which have no question, are left out.
        """
        left_out = 0
        with Path(path).open("w", encoding="utf-8") as file:
            for index in range(len(self)):
                try:
                    conversation = self.conversation(index)
                except DataError:
                    left_out += 1
                    continue
                if conversation.raw or len(conversation.messages) == 1:
                    left_out += 1
                    continue
                messages = [_message_json(message) for message in conversation.messages]
                row = {**conversation.extra, "row": self.origin(index), "messages": messages}
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        if left_out:
            logger.warning("%s: %s without a question to ask", path, counted(left_out, "row"))

    def _entry(self, index: int) -> tuple[int, int, int, int, int, int]:
        if not 0 <= index < self._size:
            raise IndexError(f"row {index} of {self._size}")
        return ROW.unpack(self._reader.read(self._table, ROW.size * index, ROW.size))  # type: ignore[return-value]

    def _format_of(self, index: int, row: Row) -> str:
        """Return the format of a row that was not checked: that of the file's first row must fit."""
        if index not in self._formats:
            check = FormatCheck(self._files[index].format)
            first = self._files[index].file.first
            try:
                check.format_of(self._files[index].row(self._reader, *first))
            except DataError:
                check = FormatCheck(self._files[index].format)  # the first row is a bad one
            self._formats[index] = check
        return copy.copy(self._formats[index]).format_of(row)


def _message_json(message: Message) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part.text}
        if isinstance(part, Text)
        else {"type": type(part).__name__.lower(), type(part).__name__.lower(): _reference(part.source)}
        for part in message.parts
    ]
    return {"role": message.role, "content": content} | ({} if message.train else {"loss": False})


def _reference(source: Any) -> str:
    if isinstance(source, bytes):
        return f"data:application/octet-stream;base64,{base64.b64encode(source).decode()}"
    return str(source.absolute()) if isinstance(source, Path) else source


@dataclass
class TrainingData:
    """What a run trains on.

    Attributes:
        train: rows in the order of the files.
        eval: rows to evaluate on, None where there are none.
        report: what the check found, for people.
        summary: the same as JSON data.
    """

    train: EncodedRows
    eval: EncodedRows | None
    report: str
    summary: dict[str, Any] = field(default_factory=dict)


def load_training_data(
    options: SftDataArgs,
    template: Template,
    spec: ModelSpec,
    *,
    system: str | None = None,
    shared: Path | None = None,
    is_main: bool = True,
    barrier: Callable[[], None] = lambda: None,
) -> TrainingData:
    """Find the rows, check them as ``--check_dataset`` says, and split off those to evaluate on.

    Args:
        options: what was asked for.
        template: of the model, with its ``max_length``.
        spec: of the model.
        system: the system text of rows that bring none; None for the template's own.
        shared: a folder that all processes of this machine see. What is found out goes to ``data`` in it, and is taken
            from there where options, template and files are the same. None: a temporary one.
        is_main: whether this process does the work; the others read its result.
        barrier: called once by every process, after the work.

    Raises:
        MMToolError: what the user can put right: options, files, rows. Every process raises it.
    """
    owner = _TemporaryFolder() if shared is None else None
    folder = owner.path if owner is not None else Path(shared) / "data"  # type: ignore[arg-type]
    encoder = Encoder(template, UrlCache(folder / "media", template.media_limits), system)
    if is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _FAILURE).unlink(missing_ok=True)
        try:
            Preparation(options, spec, encoder, folder, temporary=owner is not None).run()
        except Exception as error:
            known = isinstance(error, MMToolError)
            failure = {"message": error.message, "hint": error.hint} if known else {"message": repr(error)}  # type: ignore[attr-defined]
            (folder / _FAILURE).write_text(json.dumps(failure), encoding="utf-8")
            barrier()
            raise
    barrier()
    failed = folder / _FAILURE
    if failed.exists():
        raise MMToolError(**json.loads(failed.read_text(encoding="utf-8")))
    return _open(folder, encoder, owner)


class _TemporaryFolder:
    """A folder that goes when nobody holds this object; a process that was forked meanwhile leaves it alone."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="mmtool-data-"))
        weakref.finalize(self, _remove_folder, self.path, os.getpid())


def _remove_folder(path: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)


def _open(folder: Path, encoder: Encoder, owner: Any) -> TrainingData:
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except OSError as error:
        raise MMToolError(
            f"{folder}: the result of the check is not there ({error.strerror})",
            "All processes of a machine must see the same output folder.",
        ) from None
    files = [_file_from_json(file) for file in result["files"]]
    splits: list[EncodedRows | None] = []
    for name in SPLITS:
        rows = EncodedRows(
            folder / f"{name}.rows", files, encoder, result["fingerprints"][name], result["summary"]["check"] != "off"
        )
        rows._keeps = owner
        splits.append(rows if len(rows) else None)
    train, evaluation = splits
    assert train is not None
    return TrainingData(train, evaluation, result["report"], result["summary"])


def _file_from_json(data: dict[str, Any]) -> TrainFile:
    file = data.pop("file")
    paths = {"path": Path(file.pop("path")), "stored": Path(file.pop("stored"))}
    header, first = tuple(file.pop("header")), tuple(file.pop("first"))
    return TrainFile(file=IndexedFile(**paths, **file, header=header, first=first), **data)
