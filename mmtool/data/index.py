"""Where the records of a data file lie, so that each can be read alone: 16 bytes a record, on disk.

Records of .jsonl, .csv and .json files stay where they are. A parquet table cannot be read by row at a bearable price,
so its rows are copied into a file of ours, once.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np

from mmtool.data.dataset import (
    Row,
    Source,
    check_object,
    csv_header,
    open_source,
    parse_csv,
    parse_line,
    read_rows,
    scan_array,
    scan_csv,
)
from mmtool.errors import DataError

Kind: TypeAlias = Literal["lines", "array", "csv", "packed"]

ENTRY = np.dtype([("start", "<u8"), ("length", "<u4"), ("number", "<u4")])
"""First byte, bytes, and number (see ``read_rows``) of a record."""

BLOCK = 1 << 16
"""Records that are worked on at a time."""

_BYTES_KEY = "\0bytes"  # stands for bytes in a packed row, which is JSON


@dataclass(frozen=True)
class IndexedFile:
    """A data file whose records can be read one by one; picklable, nothing is open.

    Attributes:
        path: the file that was named, for messages and as the folder of relative media.
        stored: the file that the positions are of: ``path``, or our copy of a table.
        kind: how a record is stored.
        num_rows: how many records it has.
        size: bytes of ``stored`` when it was indexed.
        modified: when ``stored`` was last written to, in nanoseconds, when it was indexed.
        header: the column names of a csv file.
        first: start, bytes and number of its first record.
        label: its name in messages, where that of ``path`` is not enough.
    """

    path: Path
    stored: Path
    kind: Kind
    num_rows: int
    size: int
    modified: int
    header: tuple[str, ...] = ()
    first: tuple[int, int, int] = (0, 0, 0)
    label: str | None = None

    @property
    def source(self) -> Source:
        """The file by which a record is named in messages."""
        return Source(self.path, by_line=self.kind in ("lines", "csv"), label=self.label)

    def parse(self, record: bytes, number: int) -> Row | DataError:
        """Return the row that the bytes of a record hold, as ``read_rows`` gives it."""
        if self.kind == "csv":
            return parse_csv(self.source, number, record, list(self.header))
        if self.kind == "packed":
            return check_object(self.source, number, unpack_row(record))
        record = record.removeprefix(b"\xef\xbb\xbf") if number == 1 else record
        return parse_line(self.source, number, record.rstrip(b"\r\n"))


def index_file(path: Path, index: Path, packed: Path) -> IndexedFile:
    """Write where the records of ``path`` lie to ``index``, as an array of ``ENTRY``.

    Args:
        path: a data file.
        index: the file to write.
        packed: where the rows of a table are copied to.

    Raises:
        DataError: for a file that cannot be read to its end.
    """
    source, read = open_source(path)
    kind: Kind = {"_read_array": "array", "_read_csv": "csv", "_read_parquet": "packed"}.get(read.__name__, "lines")  # type: ignore[assignment]
    header: list[str] = []
    stored = packed if kind == "packed" else path
    before = os.stat(path)
    with index.open("wb") as file:
        if kind == "packed":
            places = _pack_rows(path, packed)
        elif kind == "array":
            places = ((start, length, number) for number, _, start, length in scan_array(source))
        elif kind == "csv":
            places = _scan_csv_rows(source, header)
        else:
            if path.suffix.lower() == ".json":
                next(read(source))  # raises where it is neither an array nor lines
            places = _scan_lines(path)
        num_rows = _write_entries(source, places, file)
    if num_rows == 0:
        raise DataError(f"{path}: the file has no records")
    status = os.stat(packed) if kind == "packed" else before
    first = np.fromfile(index, ENTRY, 1)[0].item()
    return IndexedFile(path, stored, kind, num_rows, status.st_size, status.st_mtime_ns, tuple(header), first)


def entries(index: Path) -> Iterator[np.ndarray]:
    """Give the records of an index file, ``BLOCK`` at a time."""
    with index.open("rb") as file:
        while len(block := np.fromfile(file, ENTRY, BLOCK)):
            yield block


def _write_entries(source: Source, places: Iterator[tuple[int, int, int]], file: BinaryIO) -> int:
    pack, num_rows, block = struct.Struct("<QII").pack, 0, bytearray()
    for start, length, number in places:
        if length >= 1 << 32 or number >= 1 << 32:
            raise source.error(number, f"is too long: {length} bytes")
        block += pack(start, length, number)
        num_rows += 1
        if len(block) >= 16 * BLOCK:
            file.write(block)
            block.clear()
    file.write(block)
    return num_rows


def _scan_lines(path: Path) -> Iterator[tuple[int, int, int]]:
    start = 0
    with path.open("rb", buffering=1 << 20) as file:
        for number, line in enumerate(file, 1):
            if not line.isspace() and (number > 1 or line.removeprefix(b"\xef\xbb\xbf").strip()):
                yield start, len(line), number
            start += len(line)


def _scan_csv_rows(source: Source, header: list[str]) -> Iterator[tuple[int, int, int]]:
    for number, cells, start, length in scan_csv(source):
        if header:
            yield start, length, number
        else:
            header += csv_header(source, number, cells)


def _pack_rows(path: Path, packed: Path) -> Iterator[tuple[int, int, int]]:
    start = 0
    with packed.open("wb") as file:
        for number, row in read_rows(path):
            record = pack_row(row)
            file.write(record)
            yield start, len(record), number
            start += len(record)


def pack_row(row: Any) -> bytes:
    """Return a row of a table as bytes: JSON, and behind it the bytes that are in it, as they are.

    >>> unpack_row(pack_row({"query": "Hi", "images": [{"bytes": b"PNG", "path": None}]}))
    {'query': 'Hi', 'images': [{'bytes': b'PNG', 'path': None}]}
    """
    blobs: list[bytes] = []

    def stand_in(value: Any) -> Any:
        if isinstance(value, bytes | bytearray | memoryview):
            blobs.append(bytes(value))
            return {_BYTES_KEY: len(blobs) - 1}
        return str(value)  # dates, decimals

    text = json.dumps(row, default=stand_in).encode()
    lengths = struct.pack(f"<{2 + len(blobs)}I", len(text), len(blobs), *map(len, blobs))
    return b"".join([lengths, text, *blobs])


def unpack_row(record: bytes) -> Any:
    """Return what ``pack_row`` packed."""
    size, num_blobs = struct.unpack_from("<2I", record)
    lengths = struct.unpack_from(f"<{num_blobs}I", record, 8)
    start = 8 + 4 * num_blobs
    ends = [start + size]
    for length in lengths:
        ends.append(ends[-1] + length)

    def restore(value: dict[str, Any]) -> Any:
        index = value.get(_BYTES_KEY)
        return value if index is None else record[ends[index] : ends[index + 1]]

    return json.loads(record[start : ends[0]], object_hook=restore)


class RecordReader:
    """Reads pieces of files by position; opens what it needs in each process anew, so it can be pickled and forked."""

    _MOST_OPEN = 32

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": {}, "_process": 0}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that this process opened."""
        if self._process == os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)
        self._open.clear()

    def read(self, path: Path, start: int, length: int, status: tuple[int, int] | None = None) -> bytes:
        """Return ``length`` bytes of a file.

        Raises:
            DataError: where it cannot be read, or has not the size and time of change in ``status`` any more.
        """
        try:
            data = os.pread(self._descriptor(path, status), length, start)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read: {error.strerror}", "Check that the file is still there."
            ) from None
        if len(data) != length:
            raise DataError(f"{path}: is shorter than before", "Do not change data files while they are in use.")
        return data

    def _descriptor(self, path: Path, status: tuple[int, int] | None) -> int:
        if self._process != os.getpid():  # after a fork the descriptors belong to the parent, too
            self._open, self._process = {}, os.getpid()
        if path not in self._open:
            if len(self._open) >= self._MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            found = os.fstat(descriptor)
            if status is not None and status != (found.st_size, found.st_mtime_ns):
                os.close(descriptor)
                raise DataError(
                    f"{path}: has changed since it was checked", "Do not change data files while they are in use."
                )
            self._open[path] = descriptor
        return self._open[path]
