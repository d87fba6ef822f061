"""Files to rows: numbers, broken places, and memory."""

import csv
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtool.data import dataset
from mmtool.data.dataset import read_rows
from mmtool.errors import DataError


@pytest.fixture
def write(tmp_path: Path):
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return write_file


def told(path: Path) -> list[tuple[int, Any]]:
    return [(number, str(row) if isinstance(row, DataError) else row) for number, row in read_rows(path)]


def test_jsonl_counts_lines_and_skips_blank_ones(write) -> None:
    path = write("a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n \t\r\n{"a": "x\\r\\ny"}\n{"a": "\xe2\x80\xa8"}')
    assert told(path) == [(1, {"a": 1}), (4, {"a": "x\r\ny"}), (5, {"a": "\u2028"})]


def test_bad_lines_come_one_by_one_and_reading_goes_on(write) -> None:
    lines = [b'{"a": 1', b"[1]", b'"x"', b'{"a": "\xff"}', b"{'a': 1}", b'{"a": 1} {}', b"[" * 9999, b'{"a": 2}']
    path = write("a.jsonl", b"\n".join(lines))
    *bad, good = list(read_rows(path))
    assert good == (8, {"a": 2})
    assert [error.line for _, error in bad] == [number for number, _ in bad] == [1, 2, 3, 4, 5, 6, 7]
    assert [str(error) for _, error in bad][:6] == [
        "a.jsonl:1: is not JSON: Expecting ',' delimiter (column 8)",
        "a.jsonl:2: expected an object, got list",
        "a.jsonl:3: expected an object, got str",
        "a.jsonl:4: is not UTF-8 (byte 8 of the line)",
        "a.jsonl:5: is not JSON: Expecting property name enclosed in double quotes (column 2)",
        "a.jsonl:6: is not JSON: Extra data (column 10)",
    ]
    assert str(bad[6][1]).startswith("a.jsonl:7: is not JSON")


def test_endless_numbers_are_a_bad_line(write) -> None:
    assert "a.jsonl:1: is not JSON that can be read" in told(write("a.jsonl", '{"a": ' + "1" * 9999 + "}"))[0][1]


def test_array_counts_records(write) -> None:
    path = write("a.json", b'\xef\xbb\xbf [ {"a": 1},\r\n 7, {"a": [2, {}]}, "x" ]\n')
    assert told(path) == [
        (1, {"a": 1}),
        (2, "a.json: record 2: expected an object, got int"),
        (3, {"a": [2, {}]}),
        (4, "a.json: record 4: expected an object, got str"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"a": }]', "a.json: record 2: is not JSON: Expecting value (line 2, column 8)"),
        ('[{"a": 1},\n]', "a.json: record 2: is not JSON: Expecting value (line 2, column 1)"),
        ('[{"a": 1}\n {"a": 2}]', "a.json: record 1: is not JSON: expected ']' (line 2, column 2)"),
        ('[{"a": 1}', "a.json: record 1: is not JSON: expected ']' (line 1, column 10)"),
        ('[{"a": 1}, {"a', "a.json: record 2: is not JSON: Unterminated string starting at (line 1, column 13)"),
        ('[{"a": 1}] x', "a.json: record 1: is not JSON: expected nothing behind the array (line 1, column 12)"),
        ("hello", "a.json: is not JSON: expected '[' (line 1, column 1)"),
        (b'[{"a": "\xff"}]', "a.json: is not UTF-8"),
        ('[{"a": ' + "1" * 9999 + "}]", "a.json: record 1: is not JSON that can be read"),
        ("[" * 99999, "a.json: record 1: is not JSON that can be read"),
    ],
)
@pytest.mark.parametrize("chunk", [1 << 18, 7])
def test_a_broken_array_ends_the_file(monkeypatch, write, text: str | bytes, message: str, chunk: int) -> None:
    monkeypatch.setattr(dataset, "_CHUNK", chunk)
    with pytest.raises(DataError) as caught:
        list(read_rows(write("a.json", text)))
    assert str(caught.value).startswith(message)


def test_what_stands_before_the_broken_place_is_handed_out(write) -> None:
    rows = read_rows(write("a.json", '[{"a": 1}, {"a": 2}, oops]'))
    assert [next(rows), next(rows)] == [(1, {"a": 1}), (2, {"a": 2})]
    with pytest.raises(DataError, match="record 3"):
        next(rows)


def test_json_may_hold_an_object_per_line(write) -> None:
    assert told(write("a.json", '\n{"a": 1}\noops\n')) == [
        (2, {"a": 1}),
        (3, "a.json:3: is not JSON: Expecting value (column 1)"),
    ]
    with pytest.raises(DataError, match="is neither an array nor an object per line"):
        list(read_rows(write("b.json", '{\n"a": 1\n}')))


def test_csv_counts_first_lines_through_quoted_line_breaks(write) -> None:
    path = write("a.csv", '\ufeffquery,response\r\n"a\r\nb","c ""d"""\r\n\r\n,x\r\n1,\n')
    assert told(path) == [
        (2, {"query": "a\r\nb", "response": 'c "d"'}),
        (5, {"query": None, "response": "x"}),
        (6, {"query": "1", "response": None}),
    ]


def test_bad_csv_records_come_one_by_one(write) -> None:
    path = write("a.csv", b'a,b\n1\n1,2,3\n"x"y,2\n\xff,2\n1,2\n"open,2\n')
    assert told(path) == [
        (2, "a.csv:2: has 1 cell, the header has 2"),
        (3, "a.csv:3: has 3 cells, the header has 2"),
        (4, "a.csv:4: is not csv: ',' expected after '\"'"),
        (5, "a.csv:5: is not UTF-8"),
        (6, {"a": "1", "b": "2"}),
        (7, "a.csv:7: is not csv: unexpected end of data"),
    ]


def test_csv_cells_may_be_long(write) -> None:
    assert told(write("a.csv", "a,b\n" + "x" * 200_000 + ",1")) == [(2, {"a": "x" * 200_000, "b": "1"})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.jsonl", "\n \n", "a.jsonl: the file has no records"),
        ("a.json", "[]", "a.json: the file has no records"),
        ("a.json", " \n", "a.json: is not JSON: expected '['"),
        ("a.csv", "a,b\n", "a.csv: the file has no records"),
        ("a.csv", "a,a\n1,2\n", "a.csv:1: the header has 'a' twice"),
        ("a.csv", b"\xff\n1\n", "a.csv:1: is not UTF-8"),
        ("a.tsv", "a\tb\n", "a.tsv: unknown kind of data file '.tsv'"),
        ("noend", "{}", "noend: unknown kind of data file ''"),
    ],
)
def test_files_without_records_are_an_error(write, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        list(read_rows(write(name, content)))
    assert message in str(caught.value)


def test_the_hint_lists_the_known_kinds(write) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(write("a.txt", "x"))  # at once, not with the first row
    assert caught.value.hint == "Use one of .jsonl, .json, .csv, .parquet."


def test_missing_files_and_folders_are_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        read_rows(tmp_path / "gone.jsonl")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DataError, match=r"folder\.json: is a folder"):
        read_rows(tmp_path / "folder.json")


def test_endings_are_read_in_any_case(write) -> None:
    assert told(write("A.JSONL", "{}")) == [(1, {})]


def test_parquet_without_pyarrow_names_the_install_line(monkeypatch, write) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a\.parquet: reading parquet needs pyarrow") as caught:
        list(read_rows(write("a.parquet", b"PAR1")))
    assert caught.value.hint == "Install it: pip install 'mmtool[parquet]'"


def test_parquet_rows(tmp_path: Path, write) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"query": f"q{index}", "images": [{"bytes": b"x", "path": None}]} for index in range(100)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == list(enumerate(rows, 1))
    with pytest.raises(DataError, match=r"b\.parquet: record 1: is no readable parquet"):
        list(read_rows(write("b.parquet", b"no parquet")))


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
objects = st.lists(
    st.dictionaries(texts, texts | st.integers() | st.lists(texts, max_size=2), max_size=3), min_size=1, max_size=5
)
reading = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


@reading
@given(objects, st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_arrays_read_in_any_pieces(
    monkeypatch, tmp_path: Path, rows: list[dict], chunk: int, indent: int | None, ascii_only: bool
) -> None:
    monkeypatch.setattr(dataset, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    assert list(read_rows(path)) == list(enumerate(rows, 1))


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@reading
@given(st.lists(st.tuples(cells, cells).filter(lambda row: any(cell.strip() for cell in row)), min_size=1, max_size=5))
def test_csv_written_by_python_is_read_back(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([("a", "b"), *rows])
    path = tmp_path / "a.csv"
    path.write_bytes(buffer.getvalue().encode("utf-8"))
    assert [row for _, row in read_rows(path)] == [{"a": a or None, "b": b or None} for a, b in rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_memory_does_not_grow_with_the_file(monkeypatch, write, suffix: str) -> None:
    monkeypatch.setattr(dataset, "_CHUNK", 1 << 12)
    lines = [json.dumps({"query": f"{index:0100}"}) for index in range(20_000)]
    csv_lines = ["query", *(f"{index:0100}" for index in range(20_000))]
    content = {".jsonl": "\n".join(lines), ".json": f"[{','.join(lines)}]", ".csv": "\n".join(csv_lines)}[suffix]
    path = write(f"a{suffix}", content)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(path)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 500_000  # bytes; the file has 2.2 million
    finally:
        tracemalloc.stop()
