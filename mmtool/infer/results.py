"""The result file of a dataset run: one JSON line per row, in input order, and every line whole.

A kill may leave a torn last line; going on cuts it off, so that no row is lost or there twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from mmtool.errors import MMToolError
from mmtool.log import get_logger

try:
    import fcntl
except ImportError:  # not part of Python on Windows: two runs into one file are then not told apart
    fcntl = None

logger = get_logger(__name__)


def check_result_path(path: Path, dataset: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a result path that would lose something or cannot be written, before any work is done.

    Raises:
        MMToolError: the file is there and neither ``resume`` nor ``overwrite`` is asked for, or is the dataset itself.
    """
    if path.is_dir():
        raise MMToolError(
            f"--result_path {path} is a folder", f"Give a file, such as --result_path {path / 'answers.jsonl'}"
        )
    if path.exists() and dataset.exists() and path.samefile(dataset):
        raise MMToolError(f"--result_path {path} is the dataset itself", "Give another file.")
    if path.exists() and path.stat().st_size and not (resume or overwrite):
        raise MMToolError(
            f"--result_path {path} exists already",
            "Go on with it by --resume true, replace it by --overwrite true, or give another file.",
        )
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise MMToolError(f"--result_path {path} cannot be written", "Give a file in a folder of yours.")


class ResultFile:
    """Writes records in the order of their index, each as soon as it and all before it are there.

    Args:
        path: the file; its folder is made if need be. A pipe or a device will do where there is nothing to go on with.
        resume: keep the lines that are there, and count on from them.

    Raises:
        MMToolError: where the file cannot be written, or another process is writing it.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path = path
        self.written = 0
        self._waiting: dict[int, Mapping[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a line that was added is out of this process, and survives its end.
            self._file = FileIO(os.open(path, os.O_CREAT | os.O_RDWR, 0o666), "r+")
            self._is_file = stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
            if self._is_file:
                self._lock()
                if not resume:
                    self._file.truncate(0)
        except OSError as error:
            raise self._error(error) from error
        self._end = 0  # of the last whole line that is known
        self._writing = False

    def done(self) -> Iterator[dict[str, Any]]:
        """Give the records that are there, oldest first; to be read to the end before the first ``add``.

        Raises:
            MMToolError: for a line, other than a torn last one, that is not a JSON object.
        """
        if not self._is_file:
            return
        with open(self.path, "rb") as file:
            for raw in file:
                record = _parse(raw)
                if record is None:
                    if file.read(1):
                        raise MMToolError(
                            f"{self.path}:{self.written + 1} is not a line of JSON",
                            "Give the result file of an earlier run.",
                        )
                    break
                self._end += len(raw)
                self.written += 1
                yield record
        self._file.truncate(self._end)

    def add(self, index: int, record: Mapping[str, Any]) -> int:
        """Take the record of row ``index``, counted from 0, and return how many lines could be written."""
        self._waiting[index] = record
        before = self.written
        while self.written in self._waiting:
            self._write(self._waiting.pop(self.written))
            self.written += 1
        return self.written - before

    def close(self) -> None:
        """Close the file, its last line whole."""
        if self._writing and self._is_file:  # others have no lines to keep whole
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
        self._file.close()

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        line = _line(record)
        rest = memoryview(line)
        self._writing = True
        try:
            if self._is_file:
                self._file.seek(self._end)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise self._error(error) from error
        self._end += len(line)
        self._writing = False

    def _lock(self) -> None:
        """Keep other runs out until this process ends, however it does."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise MMToolError(
                f"--result_path {self.path} is being written by another run",
                "Wait until that one has ended, or give another file.",
            ) from None
        except OSError as error:  # a network file system without locks
            logger.warning("%s cannot be locked (%s): let no other run write to it", self.path, error.strerror)

    def _error(self, error: OSError) -> MMToolError:
        return MMToolError(
            f"cannot write --result_path {self.path}: {error.strerror}",
            "Make room or give another folder; what is written stays, and --resume true goes on from there.",
        )


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can name but UTF-8 cannot hold
        return json.dumps(record).encode() + b"\n"


def _parse(raw: bytes) -> dict[str, Any] | None:
    if not raw.endswith(b"\n"):
        return None
    try:
        record = json.loads(raw)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
