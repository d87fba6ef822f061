"""The table of a split on disk: 24 bytes a row say where it lies in its file, and how long it is once encoded."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import numpy as np

from mmtool.data.check import Task
from mmtool.data.formats import FORMATS
from mmtool.data.sampling import Permutation

SPLITS = ("train", "eval")
FORMAT_NAMES = tuple(FORMATS)
UNKNOWN_FORMAT = 255

# Start, bytes, number, positions (0: not counted), file, format, nothing.
ROW = struct.Struct("<QIIIHBx")
_ROW_TYPE = np.dtype((np.void, ROW.size))
_COLUMNS = np.dtype(
    [
        ("start", "<u8"),
        ("length", "<u4"),
        ("number", "<u4"),
        ("tokens", "<u4"),
        ("file", "<u2"),
        ("format", "u1"),
        ("", "u1"),
    ]
)
_BLOCK = 1 << 14


class RowTable:
    """The rows of a split while it is written: one file of places, one of lengths, and what they hold as a number."""

    def __init__(self, path: Path, encoding: str) -> None:
        self._path = path
        self._file = path.open("w+b")
        self._lengths = path.with_suffix(".lengths")
        self._digest = hashlib.blake2b(encoding.encode(), digest_size=16)
        self._block = bytearray()
        self._num_rows = self._part = 0

    def add(self, task: Task, tokens: int, digest: bytes) -> None:
        """Append a row; ``digest`` is of its content."""
        format_index = FORMAT_NAMES.index(task.format) if task.format else UNKNOWN_FORMAT
        self._block += ROW.pack(task.start, task.length, task.number, tokens, task.file, format_index)
        self._digest.update(digest + task.format.encode())
        self._num_rows += 1
        if len(self._block) > 1 << 20:
            self._flush()

    def add_unchecked(self, file: int, entries: np.ndarray, size: int) -> None:
        """Append rows of which only the place is known: entries of the index of a file of ``size`` bytes."""
        rows = np.zeros(len(entries), _COLUMNS)
        for name in ("start", "length", "number"):
            rows[name] = entries[name]
        rows["file"], rows["format"] = file, UNKNOWN_FORMAT
        self._block += rows.tobytes()
        self._digest.update(f"{size} ".encode() + entries.tobytes())
        self._num_rows += len(entries)
        self._flush()

    def begin_part(self) -> None:
        """Say that the rows from here on are of the next source."""
        self._part = self._num_rows

    def repeat(self, wanted: int, seed: int) -> None:
        """Append rows of this part again until there are ``wanted``: all as often as that goes, then some."""
        self._flush()
        size = self._num_rows - self._part
        if not size:
            return
        again, rest = divmod(wanted - size, size)
        order = Permutation(size, seed)
        for turn in range(again + 1):
            for start in range(0, size, _BLOCK):
                block = self._read(self._part + start, min(size - start, _BLOCK))
                if turn == again:
                    block = block[order.block(np.arange(start, start + len(block))) < rest]
                self._file.seek(0, os.SEEK_END)
                self._file.write(block.tobytes())
                self._num_rows += len(block)
        self._digest.update(f"repeat {wanted} {seed}".encode())

    def close(self, limit: int | None, seed: int) -> None:
        """Leave ``limit`` rows at most, and write the lengths."""
        self._flush()
        if limit is not None and limit < self._num_rows:
            order, kept = Permutation(self._num_rows, seed), 0
            for start in range(0, self._num_rows, _BLOCK):
                block = self._read(start, min(self._num_rows - start, _BLOCK))
                block = block[order.block(np.arange(start, start + len(block))) < limit]
                self._file.seek(kept * ROW.size)
                self._file.write(block.tobytes())
                kept += len(block)
            self._num_rows = kept
            self._file.truncate(kept * ROW.size)
            self._digest.update(f"limit {limit} {seed}".encode())
        self._file.flush()
        with self._lengths.open("wb") as file:
            for start in range(0, self._num_rows, _BLOCK):
                block = self._read(start, min(self._num_rows - start, _BLOCK))
                file.write(block.view(np.uint8).reshape(-1, ROW.size)[:, 16:20].tobytes())
        self._file.close()

    @property
    def fingerprint(self) -> str:
        """Another one where the rows, their order or their encoding differ."""
        return self._digest.hexdigest()

    def _read(self, start: int, size: int) -> np.ndarray:
        self._file.seek(start * ROW.size)
        return np.frombuffer(self._file.read(size * ROW.size), _ROW_TYPE)

    def _flush(self) -> None:
        self._file.seek(0, os.SEEK_END)
        self._file.write(self._block)
        self._block.clear()
