"""What an entry of --dataset means."""

import doctest
from pathlib import Path

import pytest

from mmtool.data import fetch, index, sampling, sources
from mmtool.data.registry import DATASETS, DatasetSpec
from mmtool.data.sources import find_sources, single_file
from mmtool.errors import MMToolError


def found(text: str, known: dict[str, DatasetSpec] = DATASETS) -> list[tuple[str, list[str], int | None]]:
    return [(s.name, [file.name for file in s.files], s.sample) for s in find_sources(text, known, "ms")]


def test_names_files_and_numbers_of_rows(write) -> None:
    path = write("rows.jsonl", {})
    assert found("tiny-shapes") == [("tiny-shapes", ["rows.jsonl"], None)]
    assert found("tiny_shapes#5") == [("tiny_shapes", ["rows.jsonl"], 5)]
    assert found(f"{path}#700") == [(str(path), ["rows.jsonl"], 700)]
    assert found(f"{path}#-1") == [(str(path), ["rows.jsonl"], None)]
    odd = write("odd#3.jsonl", {})
    assert found(str(odd)) == [(str(odd), ["odd#3.jsonl"], None)]
    assert found(f"{odd}#2")[0][2] == 2


def test_entries_may_be_joined_by_commas_and_say_their_hub(monkeypatch, write) -> None:
    path = write("a,b.jsonl", {})
    assert found(str(path))[0][1] == ["a,b.jsonl"]
    assert found("tiny-shapes#5, tiny_shapes") == [
        ("tiny-shapes", ["rows.jsonl"], 5),
        ("tiny_shapes", ["rows.jsonl"], None),
    ]
    with pytest.raises(MMToolError, match=r"--dataset gone\.jsonl: there is no such file"):
        found("tiny-shapes,gone.jsonl")
    asked = []
    monkeypatch.setattr(sources, "fetch_files", lambda spec, hub: asked.append((spec.name, hub)) or (path,))
    assert found("HF::coco-en-mini#3")[0][2] == 3
    found("MS::owner/name")
    assert asked == [("coco-en-mini", "hf"), ("owner/name", "ms")]


def test_a_folder_is_its_data_files_by_name(write, tmp_path: Path) -> None:
    for name in ("set/b.jsonl", "set/a.csv", "set/readme.md", "set/inner/c.jsonl"):
        write(name, {})
    assert found(f"{tmp_path}/set#9") == [(f"{tmp_path}/set", ["a.csv", "b.jsonl"], 9)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(MMToolError, match="the folder has no data file"):
        found(f"{tmp_path}/empty")


def test_a_list_of_files_says_thousands_of_rows(write, tmp_path: Path) -> None:
    write("a b.json", {})
    write("c.jsonl", {})
    path = write("list.txt", "a b.json 0.02", "", "c.jsonl 1.5", "c.jsonl")
    names = [("a b.json", ["a b.json"], 20), ("c.jsonl", ["c.jsonl"], 1500), ("c.jsonl", ["c.jsonl"], None)]
    assert found(str(path)) == names
    for line, message in (("gone.json 1", "no such file 'gone.json'"), ("c.jsonl 0", "0 thousand rows")):
        write("list.txt", line)
        with pytest.raises(MMToolError, match=rf"list\.txt:1: {message}"):
            found(str(path))


def test_an_id_on_a_hub_is_fetched(monkeypatch, write) -> None:
    path = write("train.jsonl", {})
    asked = []
    monkeypatch.setattr(sources, "fetch_files", lambda spec, hub: asked.append((spec.ms, hub)) or (path,))
    assert found("owner/name:train#3") == [("owner/name:train", ["train.jsonl"], 3)]
    ((place, hub),) = asked
    assert (place.repo, hub) == ("owner/name", "ms")
    assert "data/train*.parquet" in place.files


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("tiny-shape", "no such file and no dataset", "Did you mean tiny-shapes?"),
        ("gone.jsonl", "no such file and no dataset", None),
        ("some/gone.jsonl", "no such file and no dataset", None),
        ("tiny-shapes#0", "0 rows", None),
    ],
)
def test_what_is_none_of_these_is_an_error(text: str, message: str, hint: str | None) -> None:
    with pytest.raises(MMToolError, match=message) as caught:
        found(text)
    assert caught.value.hint
    assert hint in (None, caught.value.hint)


def test_where_one_file_is_needed_a_set_of_several_is_refused(write, tmp_path: Path) -> None:
    assert single_file(DATASETS["tiny-shapes"]).name == "rows.jsonl"
    write("set/a.jsonl", {})
    write("set/b.jsonl", {})
    with pytest.raises(MMToolError, match="has 2 files"):
        single_file(DatasetSpec(name="x", source=str(tmp_path / "set")))


@pytest.mark.parametrize("module", [sources, sampling, index, fetch])
def test_examples_in_docstrings_are_true(module) -> None:
    assert doctest.testmod(module).failed == 0
