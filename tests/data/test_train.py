"""Rows for training: checked and split before, encoded one by one later."""

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from mmtool.data.dataset import read_conversations
from mmtool.data.train import EncodedRows, TrainingData, load_training_data
from mmtool.errors import DataError, MMToolError
from mmtool.groups.sft import SftDataArgs

Load = Callable[..., TrainingData]


@pytest.fixture
def load(tiny) -> Load:
    """``load("rows.jsonl", dataset_seed=1)``; settings of the template under ``template``."""
    spec, make = tiny

    def load_rows(*dataset: str | Path, template: dict | None = None, **given: Any) -> TrainingData:
        call = {name: given.pop(name) for name in ("system", "shared", "is_main", "barrier") if name in given}
        given = {"dataset_test_ratio": 0.0} | given
        options = SftDataArgs(dataset=[str(entry) for entry in dataset], **given)
        return load_training_data(options, make(**(template or {})), spec, **call)

    return load_rows


def text_rows(number: int, start: int = 0) -> list[dict[str, str]]:
    return [{"query": f"number {index}", "response": f"answer {index}"} for index in range(start, start + number)]


def origins(rows: EncodedRows | None) -> list[str]:
    return [] if rows is None else [rows.origin(index) for index in range(len(rows))]


def labels(rows: EncodedRows | None) -> list[str | None]:
    return [] if rows is None else [rows.conversation(index).label for index in range(len(rows))]


def learned_text(rows: EncodedRows, index: int, tiny) -> str:
    ids = [label for label in rows[index]["labels"] if label != -100]
    return tiny[1]().tokenizer.decode(ids)


def test_without_a_name_the_embedded_set_is_taken(load: Load, caplog) -> None:
    with caplog.at_level(logging.INFO):
        data = load(dataset_test_ratio=0.1)
    assert (len(data.train), len(data.eval)) == (144 - 14, 14)
    assert not set(origins(data.train)) & set(origins(data.eval))
    item = data.train[0]
    assert item["row"] == data.train.origin(0)
    assert len(item["input_ids"]) == len(item["labels"]) == data.train.lengths[0]
    assert item["pixel_values"].shape[0] == len(item["media"]) == 1
    assert data.summary["media"]["image"]["positions_per_row"] == {"min": 64, "mean": 64.0, "max": 64}
    assert data.summary["tokens"]["min"] == min(*data.train.lengths, *data.eval.lengths)
    assert "130 rows to train on, 14 to evaluate on; from tiny-shapes (144 of 144)" in data.report
    assert all(line in caplog.messages for line in data.report.splitlines())


def test_rows_come_in_the_order_of_the_files_and_lengths_are_those_of_encoding(load: Load, write, picture) -> None:
    picture("a.png")
    picture("b.png", (300, 20))
    rows = [
        {"query": "q", "response": "r", "images": ["a.png"]},
        {"query": "q" * 9, "response": "r", "history": [["1", "2"]], "images": ["b.png", "a.png"]},
        {"response": "text to go on with"},
    ]
    one, two = write("one.jsonl", *rows), write("two.json", json.dumps(text_rows(2)))
    three = write("three.csv", "query,response,images", "why,because,a.png", 'why,"be\ncause",')
    data = load(one, two, three)
    assert origins(data.train) == [
        "one.jsonl:1", "one.jsonl:2", "one.jsonl:3", "two.json: record 1", "two.json: record 2", "three.csv:2",
        "three.csv:3",
    ]  # fmt: skip
    assert [len(data.train[index]["input_ids"]) for index in range(7)] == data.train.lengths.tolist()
    assert data.eval is None
    assert [len(data.train[index]["media"]) for index in range(7)] == [1, 2, 0, 0, 0, 1, 0]
    with pytest.raises(IndexError):
        data.train[7]


def test_bad_rows_are_left_out_and_told_by_reason_with_their_lines(
    load: Load, write, picture, tmp_path, caplog
) -> None:
    picture("a.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    path = write(
        "rows.jsonl",
        {"query": "1", "response": "a", "images": ["a.png"]},
        "oops",
        {"query": "2", "response": "b", "images": ["gone.png"]},
        {"query": "3", "response": "b", "images": ["missing.png"]},
        {"query": "4"},
        {"query": "5", "response": "c", "images": ["half.png"]},
        {"query": "6", "response": "d " * 300},
        {"query": "7", "response": ""},
        {"query": "8", "response": "e", "audios": ["a.png"]},
        {"query": "9", "response": "f"},
    )
    data = load(path, template={"max_length": 200}, shared=tmp_path / "run")
    assert origins(data.train) == ["rows.jsonl:1", "rows.jsonl:8", "rows.jsonl:10"]
    reasons = data.summary["dropped_by_reason"]
    assert reasons["images[…]: no such file …"]["rows"] == 2
    assert [example["row"] for example in reasons["longer than --max_length"]["examples"]] == ["rows.jsonl:7"]
    assert data.summary["dropped"] == 7
    assert "left out: 7 rows of 10 (70.0%)" in data.report
    assert "2 x images[…]: no such file …: rows.jsonl:3, rows.jsonl:4" in data.report
    assert "1 x is not JSON: Expecting value (column 1): rows.jsonl:2" in data.report
    dropped = [json.loads(line) for line in (tmp_path / "run/data/dropped.jsonl").read_text().splitlines()]
    assert [row["row"].split(":")[1] for row in dropped] == ["2", "3", "4", "5", "6", "7", "9"]
    assert "broken picture" in dropped[4]["reason"]
    assert "audio" in dropped[6]["reason"]


def test_strict_stops_at_bad_rows_but_not_at_those_that_are_too_long(load: Load, write) -> None:
    long = {"query": "q " * 500, "response": "r"}
    path = write("rows.jsonl", *text_rows(2), long)
    assert len(load(path, check_dataset="strict", template={"max_length": 100}).train) == 2
    path = write("rows.jsonl", *text_rows(2), {"query": "no"}, "oops", long)
    with pytest.raises(
        DataError, match=r"rows\.jsonl:3: the record has no answer to learn \(and 1 more row\)"
    ) as caught:
        load(path, check_dataset="strict", template={"max_length": 100})
    assert "--check_dataset warn" in caught.value.hint


def test_too_long_rows_stop_the_run_or_are_cut_where_that_is_asked_for(load: Load, write) -> None:
    path = write("rows.jsonl", *text_rows(2), {"query": "q " * 500, "response": "r"})
    with pytest.raises(
        DataError, match=r"rows\.jsonl:3: the conversation takes \d+ positions, more than the max_length"
    ):
        load(path, template={"max_length": 100, "truncation_strategy": "raise"})
    data = load(path, template={"max_length": 100, "truncation_strategy": "truncation_left"})
    assert data.train.lengths[2] == len(data.train[2]["input_ids"]) <= 100


def test_no_row_left_is_an_error_in_every_mode(load: Load, write) -> None:
    path = write("rows.jsonl", "oops", {"query": "1"})
    with pytest.raises(DataError, match="no row is left to train on"):
        load(path)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: is not JSON"):
        load(path, check_dataset="strict")


def test_unchecked_rows_are_met_when_they_are_asked_for(load: Load, write, picture) -> None:
    picture("a.png")
    llava = [
        {"image": "a.png", "conversations": [{"from": "human", "value": "x"}, {"from": "bot", "value": "a"}]},
        {"image": "a.png", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "b"}]},
    ]
    path = write("rows.jsonl", *llava, "oops", {"query": "q", "response": "r"}, llava[0])
    data = load(path, check_dataset="off")
    assert len(data.train) == 5
    assert data.train.lengths is None
    assert data.train[2] == {"error": "rows.jsonl:3: is not JSON: Expecting value (column 1)", "row": "rows.jsonl:3"}
    assert "the file is in 'xcomposer'" in data.train[3]["error"]
    # The second row alone looks like LLaVA, which puts a line break behind the picture.
    checked = load(write("fine.jsonl", *llava))
    for index in (1, 0):
        assert data.train[index]["input_ids"] == checked.train[index]["input_ids"]
    assert len(load(path, check_dataset="off", template={"max_length": 60}).train) == 5


def test_a_picture_that_breaks_after_the_check_is_an_error_of_its_row(load: Load, write, picture, tmp_path) -> None:
    rows = [{"query": "q", "response": "r", "images": [picture(name)]} for name in ("a.png", "b.png")]
    data = load(write("rows.jsonl", *rows))
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "b.png").unlink()
    assert data.train[0]["error"].startswith("rows.jsonl:1: cannot open image")
    assert data.train[1]["error"] == "rows.jsonl:2: images[0]: no such file 'b.png'"
    write("rows.jsonl", *rows[:1])
    changed = load(write("other.jsonl", *text_rows(3)))
    write("other.jsonl", *text_rows(2))
    assert "has changed since it was checked" in changed.train[0]["error"]


def test_samples_and_splits_depend_on_the_seed_alone(load: Load, write) -> None:
    path = write("rows.jsonl", *text_rows(100))

    def split(**given: Any) -> tuple[list[str], list[str]]:
        data = load(f"{path}#40", **({"dataset_test_ratio": 0.1} | given))
        return origins(data.train), origins(data.eval)

    train, evaluation = split()
    assert (len(train), len(evaluation)) == (36, 4)
    assert not set(train) & set(evaluation)
    assert train == sorted(train, key=lambda place: int(place.split(":")[1]))
    assert split() == split(dataset_num_proc=2) == split(check_dataset="off") == (train, evaluation)
    assert split(dataset_seed=7) != (train, evaluation)
    assert split(train_dataset_sample=10)[0] != train[:10]
    assert set(split(train_dataset_sample=10)[0]) < set(train)
    assert (len(split(train_dataset_sample=10)[0]), len(split(val_dataset_sample=3)[1])) == (10, 3)
    assert split(dataset_test_ratio=0.0) == (sorted(train + evaluation, key=lambda p: int(p[11:])), [])


def test_more_rows_than_there_are_come_again(load: Load, write) -> None:
    path = write("rows.jsonl", *text_rows(10))
    data = load(f"{path}#25", dataset_test_ratio=0.2)
    times = [origins(data.train).count(f"rows.jsonl:{number}") for number in range(1, 11)]
    assert sorted(times) == [0, 0, 2, 3, 3, 3, 3, 3, 3, 3]
    assert len(data.train) == 23
    assert len(data.eval) == 2
    assert len(data.train.lengths) == 23
    assert len(load(f"{path}#25", train_dataset_sample=12).train) == 12


def test_sets_are_mixed_and_val_dataset_is_apart(load: Load, write) -> None:
    one, two = write("one.jsonl", *text_rows(10)), write("two.jsonl", *text_rows(5, 100))
    data = load(f"{one}#3", two, val_dataset=[f"{two}#2", str(one)], dataset_test_ratio=0.5)
    assert len([place for place in origins(data.train) if place.startswith("one")]) == 3
    assert len(data.train) == 8
    assert len(data.eval) == 12
    assert data.summary["sources"][0]["taken"] == 3


def test_a_small_set_still_gives_a_row_to_evaluate_on(load: Load, write) -> None:
    assert len(load(write("two.jsonl", *text_rows(2)), dataset_test_ratio=0.01).eval) == 1
    assert load(write("one.jsonl", *text_rows(1)), dataset_test_ratio=0.01).eval is None


def test_several_processes_find_what_one_does(load: Load, write, picture, tmp_path) -> None:
    picture("a.png")
    rows: list[Any] = [{"query": str(i), "response": "r", "images": ["a.png"] * (i % 3 == 0)} for i in range(150)]
    rows[7], rows[70] = "oops", {"query": "x"}
    path = write("rows.jsonl", *rows)
    one, two = load(path), load(path, dataset_num_proc=2)
    assert origins(one.train) == origins(two.train)
    assert one.train.lengths.tolist() == two.train.lengths.tolist()
    assert one.train.fingerprint == two.train.fingerprint
    assert one.report == two.report


def test_fingerprints_tell_rows_order_and_encoding_apart(load: Load, write, tmp_path) -> None:
    rows = text_rows(4)
    first = load(write("a.jsonl", *rows)).train.fingerprint
    assert load(write("copy/a.jsonl", *rows)).train.fingerprint == first  # whatever its place and time
    others = [
        load(write("b.jsonl", *rows[::-1])),
        load(write("b.jsonl", *rows[:3])),
        load(write("b.jsonl", *rows), system="Be brief."),
        load(write("b.jsonl", *rows), template={"max_length": 100}),
    ]
    assert len({first, *(data.train.fingerprint for data in others)}) == 5


def test_complete_prompts_get_no_template_and_only_the_answer_is_learned(load: Load, write, tiny) -> None:
    rows = [
        {"input": "<用户>Name a river.<AI>", "output": "The Yangtze."},
        {"input": "", "output": "Running text."},
        {"input": "Name a river.", "output": "The Rhine."},
    ]
    train = load(write("rows.jsonl", *rows)).train
    tokenizer = tiny[1]().tokenizer
    raw = tokenizer.decode(train[0]["input_ids"])
    assert "<用户>Name a river.<AI>" in raw
    assert "<|user|>" not in raw
    assert learned_text(train, 0, tiny).strip() == "The Yangtze.<|end|>"
    assert train[0]["input_ids"][-1] == train[1]["input_ids"][-1] == tokenizer.eos_token_id
    assert learned_text(train, 1, tiny).strip().startswith("Running text.")
    assert "<|user|>" in tokenizer.decode(train[2]["input_ids"])
    assert [len(train[index]["input_ids"]) for index in range(3)] == train.lengths.tolist()
    yi = load(write("yi.jsonl", {"prompt": "Human: Hi Assistant:", "chosen": "Hello"})).train
    assert tokenizer.decode(yi[0]["input_ids"]).strip().startswith("Human: Hi Assistant:Hello")


def test_the_system_text_is_for_rows_that_bring_none(load: Load, write, tiny) -> None:
    rows = [*text_rows(1), {"query": "q", "response": "r", "system": "My own."}, {"response": "text"}]
    train = load(write("rows.jsonl", *rows), system="Be brief.").train
    decoded = [tiny[1]().tokenizer.decode(train[index]["input_ids"]) for index in range(3)]
    assert ["Be brief." in text for text in decoded] == [True, False, False]
    assert "My own." in decoded[1]


def test_columns_formats_and_media_roots_are_used(load: Load, write, picture, tmp_path) -> None:
    picture("pics/p.png")
    path = write("rows.jsonl", {"caption": "A cup.", "what": "q", "pic": "p.png"})
    columns = {"caption": "response", "what": "query", "pic": "images"}
    assert labels(load(path, columns=columns, media_root=str(tmp_path / "pics")).train) == ["A cup."]
    info = {"mine": {"path": "rows.jsonl", "columns": columns, "media_root": "pics", "constants": {"system": "S"}}}
    registered = load("mine#1", custom_dataset_info=str(write("info.json", info))).train
    assert registered.conversation(0).system == "S"
    with pytest.raises(MMToolError, match="unknown dataset format 'swif'"):
        load(path, dataset_format="swif")
    with pytest.raises(MMToolError, match="--columns: expected a name for 'a'"):
        load(path, columns={"a": 1})


def test_tables_hold_pictures(load: Load, picture, tmp_path, cache) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    content = (tmp_path / picture("a.png")).read_bytes()
    rows = [{"query": f"q{i}", "response": f"r{i}", "images": [{"bytes": content, "path": None}]} for i in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    data = load(tmp_path / "a.parquet")
    assert labels(data.train) == ["r0", "r1", "r2", "r3", "r4"]
    assert data.train.origin(4) == "a.parquet: record 5"
    assert len(data.train[4]["media"]) == 1
    copies = sorted((path.name, path.stat().st_mtime_ns) for path in (cache / "tables").iterdir())
    assert load(tmp_path / "a.parquet").train.fingerprint == data.train.fingerprint
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (cache / "tables").iterdir()) == copies


def test_files_of_one_name_are_told_apart(load: Load, write) -> None:
    data = load(write("x/rows.jsonl", *text_rows(1)), write("y/rows.jsonl", "oops", *text_rows(1)))
    assert origins(data.train) == ["x/rows.jsonl:1", "y/rows.jsonl:2"]
    assert "1 x is not JSON: Expecting value (column 1): y/rows.jsonl:1" in data.report


def test_a_result_is_taken_again_until_something_changes(load: Load, write, tmp_path, caplog) -> None:
    path = write("rows.jsonl", *text_rows(3))
    shared = tmp_path / "run"
    first = load(path, shared=shared)
    with caplog.at_level(logging.INFO):
        again = load(path, shared=shared)
        assert "checked before and unchanged since" in caplog.text
        assert (again.train.fingerprint, again.report, again.summary) == (
            first.train.fingerprint, first.report, first.summary,
        )  # fmt: skip
        caplog.clear()
        assert len(load(write("rows.jsonl", *text_rows(4)), shared=shared).train) == 4
        load(path, shared=shared, template={"max_length": 90})
        load(path, shared=shared, check_dataset="strict")
        assert "checked before" not in caplog.text


def test_other_processes_take_the_result_of_the_main_one(load: Load, write, tmp_path) -> None:
    path, shared, waits = write("rows.jsonl", *text_rows(3)), tmp_path / "run", []
    main = load(path, shared=shared, barrier=lambda: waits.append("main"))
    other = load(path, shared=shared, is_main=False, barrier=lambda: waits.append("other"))
    assert waits == ["main", "other"]
    assert other.train.fingerprint == main.train.fingerprint
    assert other.train[2]["input_ids"] == main.train[2]["input_ids"]
    write("rows.jsonl", "oops")
    for is_main in (True, False):
        with pytest.raises(MMToolError, match="no row is left"):
            load(path, shared=shared, is_main=is_main, barrier=lambda: waits.append("again"))
    assert waits[2:] == ["again", "again"]
    with pytest.raises(MMToolError, match="the result of the check is not there"):
        load(path, shared=tmp_path / "elsewhere", is_main=False)


def test_rows_go_to_worker_processes_without_what_they_hold(load: Load, write, picture) -> None:
    picture("a.png")
    small = load(write("small.jsonl", *text_rows(5))).train
    data = load(write("rows.jsonl", *({**row, "images": ["a.png"]} for row in text_rows(500))))
    data.train[0]
    assert len(pickle.dumps(data.train)) < len(pickle.dumps(small)) + 1000
    copy = pickle.loads(pickle.dumps(data.train))
    assert copy[3]["input_ids"] == data.train[3]["input_ids"]
    loader = DataLoader(data.train, batch_size=None, num_workers=2, sampler=range(0, 40))
    assert [item["row"] for item in loader] == origins(data.train)[:40]


def test_a_temporary_folder_goes_with_the_data(load: Load, write) -> None:
    data = load(write("rows.jsonl", *text_rows(3)))
    rows = data.train
    folder = rows._table.parent
    del data
    assert rows[0]["row"] == "rows.jsonl:1"
    del rows
    assert not folder.exists()


def test_rows_written_for_infer_say_the_same(load: Load, write, picture, tmp_path) -> None:
    picture("a.png")
    rows = [
        {"id": 7, "system": "S", "query": "<image>why?", "response": "r", "images": ["a.png"]},
        {"query": "2", "response": "b", "history": [["1", "a"]]},
        {"response": "text only"},
    ]
    train = load(write("rows.jsonl", *rows)).train
    (tmp_path / "out").mkdir()
    train.write_jsonl(tmp_path / "out" / "val.jsonl")
    found = [conversation for _, conversation in read_conversations(tmp_path / "out" / "val.jsonl")]
    assert [conversation.messages for conversation in found] == [train.conversation(i).messages for i in range(2)]
    assert found[0].extra == {"id": 7, "row": "rows.jsonl:1"}
    assert found[0].media[0].source == tmp_path / "a.png"


def test_urls_are_downloaded_once(load: Load, write, picture, tmp_path, monkeypatch) -> None:
    content = (tmp_path / picture("a.png")).read_bytes()
    asked = []

    def fetch(url: str, *, timeout: float, max_bytes: int) -> bytes:
        asked.append(url)
        if "gone" in url:
            raise MMToolError("no")
        return content

    monkeypatch.setattr("mmtool.download.fetch", fetch)
    rows = [{"query": "q", "response": "r", "images": ["http://host/a.png", "http://host/a.png"]}] * 2
    data = load(write("rows.jsonl", *rows), shared=tmp_path / "run")
    assert len(data.train[0]["media"]) == len(data.train[1]["media"]) == 2
    assert asked == ["http://host/a.png"]
    again = load(write("rows.jsonl", *rows, *text_rows(1)), shared=tmp_path / "run")
    assert len(again.train[0]["media"]) == 2
    assert asked == ["http://host/a.png"]


def test_a_check_that_was_killed_leaves_nothing_that_is_taken_for_whole(
    load: Load, write, tmp_path, monkeypatch
) -> None:
    path, shared = write("rows.jsonl", *text_rows(3)), tmp_path / "run"
    first = load(path, shared=shared).train.fingerprint
    names = {"data.json", "dropped.jsonl", "eval.lengths", "eval.rows", "train.lengths", "train.rows"}
    assert {file.name for file in (shared / "data").iterdir()} == names
    replaced = []

    def stop(self: Path, target: Path) -> Path:
        replaced.append(Path(target).name)
        if replaced[-1] == "data.json":
            raise KeyboardInterrupt
        return replace(self, target)

    replace = Path.replace
    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        load(path, shared=shared, dataset_seed=1, train_dataset_sample=2)
    monkeypatch.undo()
    assert set(replaced) == names
    assert load(path, shared=shared).train.fingerprint == first
    assert {file.name for file in (shared / "data").iterdir()} == names


def test_a_file_or_name_that_is_not_there_is_an_error_before_anything_else(load: Load, tmp_path) -> None:
    with pytest.raises(MMToolError, match="no such file and no dataset of this name"):
        load(tmp_path / "gone.jsonl")
    with pytest.raises(MMToolError, match="--val_dataset nothing"):
        load("tiny-shapes", val_dataset=["nothing"])
