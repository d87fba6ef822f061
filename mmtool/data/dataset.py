"""Data files -> rows -> conversations, one at a time: memory does not grow with the file.

A bad record is handed out as a ``DataError`` in its place, so that the caller can skip it or stop.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TextIO, TypeAlias

from mmtool.data.formats import FormatCheck, rename_columns, row_to_messages
from mmtool.data.records import Conversation
from mmtool.errors import DataError, MMToolError
from mmtool.log import get_logger
from mmtool.utils import counted

Row: TypeAlias = dict[str, Any]

Rows: TypeAlias = Iterator[tuple[int, Row | DataError]]

_CHUNK = 1 << 18  # characters that a JSON array is read by; a longer record doubles it
_BLANK = re.compile(r"[ \t\n\r]*")
_log = get_logger(__name__)


@dataclass(frozen=True)
class Source:
    """A data file, whether its records count by line, and another name for messages where its own is not enough."""

    path: Path
    by_line: bool
    label: str | None = None

    def place(self, number: int) -> str:
        """Return the name of record ``number``, of the file for 0."""
        name = self.label or self.path.name
        if number == 0:
            return name
        return f"{name}:{number}" if self.by_line else f"{name}: record {number}"

    def error(self, number: int, reason: str, hint: str | None = None) -> DataError:
        """Return the error of record ``number``."""
        return DataError(f"{self.place(number)}: {reason}", hint, line=number or None)


def read_conversations(
    path: str | Path,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    media_root: str | Path | None = None,
    media_style: str = "round",
    purpose: Literal["infer", "train"] = "infer",
) -> Iterator[tuple[int, Conversation | DataError]]:
    """Read a data file record by record, each with its number (see ``read_rows``).

    A record that cannot be used comes as a ``DataError`` that names file, number and field, and reading goes on. What
    only looks wrong is in ``Conversation.warnings``, for the caller to tell::

        for line, found in read_conversations("rows.jsonl"):
            if isinstance(found, DataError):
                raise found  # or count it, and continue
            answer(found.prompt())

    Args:
        path: a file of one of ``SUFFIXES``.
        format: a name in ``FORMATS``; None detects it from the first record, which the others must fit.
        columns: new names of keys, ``{"caption": "response"}``; applied first.
        media_root: the folder where relative media paths are looked for before the folder of the file.
        media_style: see ``row_to_messages``.
        purpose: ``infer`` wants a question in every record, ``train`` an answer.

    Raises:
        DataError: for a file that cannot be read (any further), while iterating or before.
        MMToolError: for an unknown ``format``, or ``columns`` that are no names.
    """
    source, rows = _open_rows(Path(path))
    check = FormatCheck(format)
    for old, new in (columns or {}).items():
        if not isinstance(new, str):
            raise MMToolError(f"--columns: expected a name for {old!r}, got {new!r}", 'Write {"caption": "response"}.')

    def read(row: Row) -> Conversation:
        row = rename_columns(row, columns) if columns else row
        conversation = row_to_messages(
            row, check.format_of(row), base_dir=source.path.parent, media_root=media_root, media_style=media_style
        )
        check_purpose(conversation, purpose)
        return conversation

    return _read_each(source, _check_columns(source, rows, columns or {}), read)


def _read_each(
    source: Source, rows: Rows, read: Callable[[Row], Conversation]
) -> Iterator[tuple[int, Conversation | DataError]]:
    for number, row in rows:
        if isinstance(row, DataError):
            yield number, row
            continue
        try:
            conversation = read(row)
        except DataError as error:
            yield number, source.error(number, error.message, error.hint)
        else:
            yield number, conversation


def _check_columns(source: Source, rows: Rows, columns: Mapping[str, str]) -> Rows:
    """Hand on ``rows``; warn where the first one lacks a key that ``--columns`` renames."""
    checked = False
    for number, row in rows:
        if not checked and not isinstance(row, DataError):
            checked = True
            for key in columns.keys() - row.keys():
                _log.warning("%s: --columns renames %r, which is no key of the record", source.place(number), key)
        yield number, row


def check_purpose(conversation: Conversation, purpose: str) -> None:
    """Raise DataError for a record without a question to ask (``infer``), or an answer to learn (``train``)."""
    learned = [message for message in conversation.messages if message.role == "assistant" and message.train]
    if purpose == "train" and (conversation.label is None or not learned):
        raise DataError("the record has no answer to learn", "Records with a question only are for `mmtool infer`.")
    if purpose == "infer" and all(message.role != "user" for message in conversation.messages):
        raise DataError("the record has no question, only text to learn", "Give it a 'query' to be answered.")


def read_rows(path: str | Path) -> Rows:
    """Read the objects of a data file, each with its number from 1: the line in .jsonl and .csv, else the record.

    Blank lines are skipped, a byte order mark is allowed, a csv record counts by its first line and an empty cell is
    null. An array in .json is read piece by piece, never as a whole; a .json file that starts with ``{`` is read as
    .jsonl. A line that holds no object comes as a ``DataError`` in its place::

        >>> list(read_rows("rows.jsonl"))  # doctest: +SKIP
        [(1, {'query': 'Hi'}), (2, DataError('rows.jsonl:2: ...')), (4, {'query': 'Bye'})]

    Raises:
        DataError: for a missing, empty or unknown file at once; while iterating where nothing behind the bad place
            can be read (a broken array, a damaged parquet file).
    """
    return _open_rows(Path(path))[1]


def _open_rows(path: Path) -> tuple[Source, Rows]:
    source, read = open_source(path)
    return source, _check_filled(source, read(source))


def open_source(path: Path) -> tuple[Source, Callable[[Source], Rows]]:
    """Return a data file and the reader of its kind.

    Raises:
        DataError: for a file that is missing, empty, or of no known kind.
    """
    read = SUFFIXES.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{path}: unknown kind of data file {path.suffix!r}", f"Use one of {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise DataError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}", "Name a data file.")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    if read is _read_array and _starts_with_object(path):
        read = _read_json_lines
    return Source(path, by_line=read in (_read_jsonl, _read_json_lines, _read_csv)), read


def _starts_with_object(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")


def _check_filled(source: Source, rows: Rows) -> Rows:
    number = 0
    for number, row in rows:
        yield number, row
    if number == 0:
        raise DataError(f"{source.path}: the file has no records")


def _read_jsonl(source: Source) -> Rows:
    with source.path.open("rb") as file:  # bytes: a line with a wrong encoding must not end the iteration
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, parse_line(source, number, line.rstrip(b"\r\n"))


def parse_line(source: Source, number: int, line: bytes) -> Row | DataError:
    """Return the object that the bytes of one line or array element hold."""
    try:
        return check_object(source, number, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return source.error(number, f"is not UTF-8 (byte {error.start + 1} of the line)", "Save the file as UTF-8.")
    except json.JSONDecodeError as error:
        return source.error(number, f"is not JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:  # an endless number; brackets nested too deep
        return source.error(number, f"is not JSON that can be read: {error}")


def check_object(source: Source, number: int, value: Any) -> Row | DataError:
    """Return ``value``, or the error of a record that is no object."""
    if isinstance(value, dict):
        return value
    hint = "A file that holds one array is named .json." if isinstance(value, list) else None
    return source.error(number, f"expected an object, got {type(value).__name__}", hint)


def _read_json_lines(source: Source) -> Rows:
    """Read a .json file that holds an object per line."""
    rows = _read_jsonl(source)
    first = next(rows, None)
    if first is not None and isinstance(first[1], DataError):
        raise DataError(f"{source.path}: is neither an array nor an object per line", "Put the records into [ and ].")
    yield from chain([first] if first else [], rows)


def _read_array(source: Source) -> Rows:
    for number, value, _, _ in scan_array(source):
        yield number, check_object(source, number, value)


def scan_array(source: Source) -> Iterator[tuple[int, Any, int, int]]:
    """Give every value of an array with its number, the byte it starts at, and how many bytes it takes.

    Raises:
        DataError: while iterating, at a place behind which nothing can be read.
    """
    number = 0
    with source.path.open("rb") as raw:
        marked = 3 * raw.read(3).startswith(b"\xef\xbb\xbf")
    with source.path.open(encoding="utf-8-sig", newline="") as file:  # newline: bytes must be countable
        array = _ArrayText(file, marked)
        try:
            array.expect("[")
            more = array.peek() != "]"
            while more:
                number += 1
                array.peek()
                start = array.tell()
                value = array.read_value()
                yield number, value, start, array.tell() - start
                more = array.peek() == ","
                if more:
                    array.expect(",")
            array.expect("]")
            array.expect("")
        except json.JSONDecodeError as error:
            line, column = array.locate(error.pos)
            raise source.error(number, f"is not JSON: {error.msg} (line {line}, column {column})") from None
        except UnicodeDecodeError:
            raise source.error(number, "is not UTF-8", "Save the file as UTF-8.") from None
        except (ValueError, RecursionError) as error:
            raise source.error(number, f"is not JSON that can be read: {error}") from None


class _ArrayText:
    """The text of a JSON array, of which only the piece that is being parsed is in memory."""

    def __init__(self, file: TextIO, start: int = 0) -> None:
        self._file = file
        self._text = ""
        self._at = 0
        self._counted = 0  # up to here in _text, the file has _bytes bytes
        self._bytes = start
        self._line = 1  # of the first character in _text
        self._column = 1
        self._decoder = json.JSONDecoder()

    def tell(self) -> int:
        """Return how many bytes of the file stand before the next character."""
        self._bytes += len(self._text[self._counted : self._at].encode())
        self._counted = self._at
        return self._bytes

    def peek(self) -> str:
        """Return the next character that is not blank, "" at the end."""
        while True:
            self._at = _BLANK.match(self._text, self._at).end()  # type: ignore[union-attr]  # matches anywhere
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def expect(self, sign: str) -> None:
        """Step over ``sign``; "" stands for the end of the file."""
        if self.peek() != sign:
            wanted = f"expected {sign!r}" if sign else "expected nothing behind the array"
            raise json.JSONDecodeError(wanted, self._text, self._at)
        self._at += len(sign)

    def read_value(self) -> Any:
        """Parse the value that comes next; what looks broken may only be cut off, so more is read first."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                if not self._read_more():
                    raise
                continue
            if end < len(self._text) or not self._read_more():
                self._at = end
                return value

    def locate(self, position: int) -> tuple[int, int]:
        """Return line and column of a position in the piece in memory."""
        line = self._line + self._text.count("\n", 0, position)
        newline = self._text.rfind("\n", 0, position)
        return line, position - newline if newline >= 0 else self._column + position

    def _read_more(self) -> bool:
        more = self._file.read(max(_CHUNK, len(self._text) - self._at))
        if not more:
            return False
        self._line, self._column = self.locate(self._at)
        self.tell()
        self._text, self._at, self._counted = self._text[self._at :] + more, 0, 0
        return True


def _read_csv(source: Source) -> Rows:
    header: list[str] = []
    for number, cells, _, _ in scan_csv(source):
        if header:
            yield number, csv_row(source, number, cells, header)
        else:
            header = csv_header(source, number, cells)


def scan_csv(source: Source) -> Iterator[tuple[int, list[str] | DataError, int, int]]:
    """Give every record that is not blank, the header first, with its line, its first byte and how many it takes."""
    # The limit is one of the process: 128 KiB by default, less than a picture in a data URI.
    csv.field_size_limit(2**31 - 1)
    with source.path.open("rb") as raw:
        marked = 3 * raw.read(3).startswith(b"\xef\xbb\xbf")
    with source.path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        lines = _CountedLines(file, marked)
        reader = csv.reader(lines, strict=True)
        while True:
            number, start = reader.line_num + 1, lines.byte
            try:
                cells = _next_cells(source, number, reader)
            except StopIteration:
                return
            if isinstance(cells, DataError) or any(cell.strip() for cell in cells):
                yield number, cells, start, lines.byte - start


def parse_csv(source: Source, number: int, record: bytes, header: list[str]) -> Row | DataError:
    """Return the row that the bytes of one csv record hold."""
    csv.field_size_limit(2**31 - 1)
    lines = io.StringIO(record.decode("utf-8", "surrogateescape"), newline="")
    return csv_row(source, number, _next_cells(source, number, csv.reader(lines, strict=True)), header)


class _CountedLines:
    """Lines of a text file; ``byte`` is where in the file the next one starts."""

    def __init__(self, file: TextIO, start: int) -> None:
        self._file = file
        self.byte = start

    def __iter__(self) -> _CountedLines:
        return self

    def __next__(self) -> str:
        line = next(self._file)
        self.byte += len(line) if line.isascii() else len(line.encode("utf-8", "surrogateescape"))
        return line


def _next_cells(source: Source, number: int, reader: Any) -> list[str] | DataError:
    try:
        cells = next(reader)
        "".join(cells).encode("utf-8")
    except csv.Error as error:
        return source.error(number, f"is not csv: {error}")
    except UnicodeEncodeError:
        return source.error(number, "is not UTF-8", "Save the file as UTF-8.")
    return cells


def csv_row(source: Source, number: int, cells: list[str] | DataError, header: list[str]) -> Row | DataError:
    """Return the row of a csv record; an empty cell is null."""
    if isinstance(cells, DataError):
        return cells
    if len(cells) != len(header):
        return source.error(number, f"has {counted(len(cells), 'cell')}, the header has {len(header)}")
    return {key: cell or None for key, cell in zip(header, cells, strict=True)}


def csv_header(source: Source, number: int, header: list[str] | DataError) -> list[str]:
    """Return the first record of a csv file as names.

    Raises:
        DataError: where it cannot be read, or has a name twice.
    """
    if isinstance(header, DataError):
        raise header
    twice = [name for name, times in Counter(header).items() if times > 1]
    if twice:
        raise source.error(number, f"the header has {twice[0]!r} twice")
    return header


def _read_parquet(source: Source) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{source.path}: reading parquet needs pyarrow", "Install it: pip install 'mmtool[parquet]'"
        ) from None
    number = 0
    try:
        # buffer_size: a row group may be as large as the file, and is then not read in one piece
        with pyarrow.parquet.ParquetFile(source.path, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(batch_size=64, use_threads=False):  # rows may hold pictures
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise source.error(number + 1, f"is no readable parquet: {error}") from None


SUFFIXES: Mapping[str, Callable[[Source], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_array,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""Readers by the ending of the file's name."""
