"""Files to conversations: what a caller sees of good and bad records."""

import doctest
import json
import logging
from importlib import import_module
from pathlib import Path

import pytest

from mmtool.data.dataset import read_conversations
from mmtool.data.formats import FORMATS, detect_format
from mmtool.errors import DataError, MMToolError


def write(folder: Path, *rows: dict | str, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def told(path: Path, **options: object) -> list[tuple[int, str | None]]:
    """Line and error, or line and label."""
    found = read_conversations(path, **options)
    return [(line, str(item) if isinstance(item, DataError) else item.label) for line, item in found]


def test_bad_records_come_in_their_place(folder: Path) -> None:
    path = write(
        folder,
        {"query": "1", "response": "a", "images": ["a.png"]},
        "oops",
        "",
        {"query": "2", "response": "b", "images": ["gone.png"]},
        {"messages": [{"role": "user", "content": "3"}]},
        {"query": "4", "response": "d"},
    )
    assert told(path) == [
        (1, "a"),
        (2, "rows.jsonl:2: is not JSON: Expecting value (column 1)"),
        (4, "rows.jsonl:4: images[0]: no such file 'gone.png'"),
        (5, "rows.jsonl:5: the record is in the format 'messages', but the file is in 'swift'"),
        (6, "d"),
    ]
    errors = [item for _, item in read_conversations(path) if isinstance(item, DataError)]
    assert [error.line for error in errors] == [2, 4, 5]
    assert str(folder) in errors[1].hint


def test_arrays_name_the_record(folder: Path) -> None:
    path = write(folder, '[{"query": "1"}, {"query": "2", "images": ["gone.png"]}]', name="rows.json")
    assert told(path) == [(1, None), (2, "rows.json: record 2: images[0]: no such file 'gone.png'")]


def test_csv_cells_may_hold_lists(folder: Path) -> None:
    path = write(
        folder,
        "query,response,history,images",
        '''2,b,"[['1', 'a']]","[""a.png"", null]"''',
        "3,,,a.png",
        name="rows.csv",
    )
    (_, two), (_, three) = read_conversations(path)
    assert [message.text for message in two.messages] == ["1", "a", "2", "b"]
    assert [len(message.media) for message in two.messages] == [1, 0, 0, 0]
    assert three.label is None
    assert three.media[0].source == folder / "a.png"


def test_media_root_and_media_style_are_handed_on(folder: Path) -> None:
    row = {"query": "2", "response": "b", "history": [["1", "a"]], "images": ["a.png", "c.png"]}
    path = write(folder, row)
    ((_, conversation),) = read_conversations(path, media_root=folder / "pics", media_style="inline")
    assert [len(message.media) for message in conversation.messages] == [2, 0, 0, 0]
    assert conversation.media[0].source == folder / "pics" / "a.png"


def test_columns_are_renamed_before_detection(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(folder, {"caption": "A cup.", "what": "q"}, {"caption": "A spoon.", "what": "q"})
    with caplog.at_level(logging.WARNING):
        assert told(path, columns={"caption": "response", "what": "query"}) == [(1, "A cup."), (2, "A spoon.")]
        assert not caplog.messages
        told(path, columns={"caption": "response", "what": "query", "pics": "images"})
    assert caplog.messages == ["rows.jsonl:1: --columns renames 'pics', which is no key of the record"]


def test_a_named_format_is_used_for_every_record(folder: Path) -> None:
    path = write(folder, {"conversations": [{"from": "human", "value": "<img>gone.png</img>"}]})
    assert "no such file" in told(path)[0][1]
    assert told(path, format="sharegpt") == [(1, None)]
    with pytest.raises(MMToolError, match="unknown dataset format"):
        read_conversations(path, format="sharegp")


def test_new_names_of_columns_must_be_names(folder: Path) -> None:
    path = write(folder, {"a": "b"})
    with pytest.raises(MMToolError, match="--columns: expected a name for 'a', got 3"):
        read_conversations(path, columns={"a": 3})


def test_the_purpose_decides_what_a_record_must_have(folder: Path) -> None:
    path = write(folder, {"query": "q"}, {"response": "text"}, {"query": "q", "response": "r"})
    assert told(path, purpose="infer") == [
        (1, None),
        (2, "rows.jsonl:2: the record has no question, only text to learn"),
        (3, "r"),
    ]
    assert told(path, purpose="train") == [
        (1, "rows.jsonl:1: the record has no answer to learn"),
        (2, "text"),
        (3, "r"),
    ]


def test_a_record_whose_answers_are_all_switched_off_teaches_nothing(folder: Path) -> None:
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "a", "loss": False}]
    assert told(write(folder, {"messages": messages}), purpose="train")[0][1].endswith("no answer to learn")


def test_files_that_cannot_be_read_are_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_conversations(tmp_path / "gone.jsonl")


@pytest.mark.parametrize("module", ["dataset", "formats", "records", "references"])
def test_examples_in_docstrings_are_true(module: str) -> None:
    assert doctest.testmod(import_module(f"mmtool.data.{module}")).failed == 0


DOCS = Path(__file__).parents[2] / "docs" / "datasets.md"


def documented_formats() -> list[tuple[str, str]]:
    sections = DOCS.read_text(encoding="utf-8").split("\n### ")[1:]
    return [
        (section[1 : section.index("`", 1)], section.split("```jsonl\n")[1].split("```")[0]) for section in sections
    ]


@pytest.mark.parametrize(("format", "example"), documented_formats())
def test_examples_in_the_docs_are_read(folder: Path, format: str, example: str) -> None:
    (folder / "q.wav").touch()
    rows = [json.loads(line) for line in example.splitlines()]
    assert {detect_format(row) for row in rows} == {format}
    assert not [found for _, found in told(write(folder, *rows), purpose="train") if "rows.jsonl" in found]


def test_the_docs_have_every_format() -> None:
    assert [format for format, _ in documented_formats()] == list(FORMATS)
