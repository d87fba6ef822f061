"""Records read alone are the records read in a row."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtool.data import dataset
from mmtool.data.dataset import read_rows
from mmtool.data.index import RecordReader, entries, index_file, pack_row, unpack_row
from mmtool.errors import DataError


def told(rows: Any) -> list[tuple[int, Any]]:
    return [(number, str(row) if isinstance(row, DataError) else row) for number, row in rows]


def by_index(path: Path) -> list[tuple[int, Any]]:
    """All records through the index, the last one first, then put in order."""
    index = path.with_name(f"{path.name}.index")
    file = index_file(path, index, path.with_name(f"{path.name}.packed"))
    reader = pickle.loads(pickle.dumps(RecordReader()))
    places = [entry for block in entries(index) for entry in block.tolist()]
    assert len(places) == file.num_rows
    assert file.first == places[0]
    rows = []
    for start, length, number in reversed(places):
        record = reader.read(file.stored, start, length, (file.size, file.modified))
        rows.append((number, file.parse(record, number)))
    reader.close()
    return told(reversed(rows))


FILES = {
    "plain.jsonl": b'{"a": 1}\n{"a": "\xe4\xbd\xa0"}\n',
    "marked.jsonl": b'\xef\xbb\xbf{"a": 1}\r\n\r\n \t\r\n{"a": "x\\r\\ny"}\n\x0c\n{"a": "\xe2\x80\xa8"}',
    "marked-blank.jsonl": b'\xef\xbb\xbf\r\n{"a": 1}\n',
    "bad.jsonl": b'{"a": 1\n[1]\n{"a": "\xff"}\n{"a": 2}\n',
    "array.json": b'\xef\xbb\xbf [ {"a": "\xe4\xbd\xa0"},\r\n 7,\r\n\r\n {"a": [2, {}]}, "x" ]\n',
    "lines.json": b'\n{"a": 1}\noops\n',
    "plain.csv": b"query,response\na,b\nc,\n",
    "marked.csv": '\ufeffquery,response\r\n"你\r\nb","c ""d"""\r\n\r\n,x\r\n1,\n'.encode(),
    "bad.csv": b'a,b\n1\n1,2,3\n"x"y,2\n\xff,2\n1,2\n"open,2\n',
    "old-mac.csv": b"a,b\r1,2\r3,4",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("chunk", [1 << 18, 7])
def test_records_are_the_same_alone_and_in_a_row(monkeypatch, tmp_path: Path, name: str, chunk: int) -> None:
    monkeypatch.setattr(dataset, "_CHUNK", chunk)
    path = tmp_path / name
    path.write_bytes(FILES[name])
    assert by_index(path) == told(read_rows(path))


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(st.lists(st.dictionaries(texts, texts | st.integers(), max_size=3), min_size=1, max_size=5), st.integers(1, 30))
def test_any_array_is_indexed_in_any_pieces(monkeypatch, tmp_path: Path, rows: list[dict], chunk: int) -> None:
    monkeypatch.setattr(dataset, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8", newline="\r\n")
    assert by_index(path) == list(enumerate(rows, 1))


def test_parquet_rows_are_copied_with_their_bytes(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"query": f"q{i}", "images": [{"bytes": bytes([i]) * i, "path": None}], "n": i / 2} for i in range(100)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    assert by_index(tmp_path / "a.parquet") == list(enumerate(rows, 1))


def test_packed_rows_keep_json_and_bytes_and_write_the_rest_as_text() -> None:
    import datetime

    row = {"a": [b"", b"xy", {"b": b"z"}], "c": None, "d": float("inf"), "你": "好"}
    assert unpack_row(pack_row(row)) == row
    assert unpack_row(pack_row({"day": datetime.date(2024, 1, 2)})) == {"day": "2024-01-02"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"\n \n", "the file has no records"),
        ("a.csv", b"a,b\n", "the file has no records"),
        ("a.json", b'[{"a": 1}', r"record 1: is not JSON: expected '\]'"),
        ("a.json", b'{\n"a": 1\n}', "neither an array nor an object per line"),
        ("a.txt", b"x", "unknown kind"),
    ],
)
def test_files_that_cannot_be_indexed_are_an_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        index_file(tmp_path / name, tmp_path / "index", tmp_path / "packed")


def test_a_file_that_changed_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    file = index_file(path, tmp_path / "index", tmp_path / "packed")
    reader = RecordReader()
    path.write_text('{"a": 1}\n')
    os.utime(path, ns=(file.modified, file.modified))
    with pytest.raises(DataError, match="has changed since it was checked"):
        reader.read(path, 0, 9, (file.size, file.modified))
    with pytest.raises(DataError, match="is shorter than before"):
        reader.read(path, 9, 9)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        RecordReader().read(path, 0, 9)


def test_many_files_do_not_use_up_descriptors(tmp_path: Path) -> None:
    reader = RecordReader()
    before = len(os.listdir("/proc/self/fd"))
    for index in range(100):
        (tmp_path / str(index)).write_bytes(b"ab%03d" % index)
    assert [reader.read(tmp_path / str(index), 2, 3) for index in range(100)] == [b"%03d" % i for i in range(100)]
    assert len(os.listdir("/proc/self/fd")) - before <= 32
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_index_is_16_bytes_a_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' * 70_000)
    file = index_file(path, tmp_path / "index", tmp_path / "packed")
    assert (tmp_path / "index").stat().st_size == 16 * file.num_rows == 16 * 70_000
    blocks = list(entries(tmp_path / "index"))
    assert [len(block) for block in blocks] == [65536, 70_000 - 65536]
    assert (np.concatenate(blocks)["start"] == np.arange(70_000) * 9).all()
