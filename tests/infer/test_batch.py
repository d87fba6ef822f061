import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import PIL.Image
import pytest

import mmtool
from mmtool.data.dataset import read_conversations
from mmtool.data.registry import DatasetSpec
from mmtool.errors import DataError, MMToolError
from mmtool.groups.infer import InferDataArgs
from mmtool.infer import batch
from mmtool.infer.batch import DatasetRun, count_rows
from mmtool.messages import Text

QUESTIONS = ("one", "what is in the picture?", "数字?", "a longer question, " * 6, "c d e", "123", "how many", "b")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a picture; the current one."""
    monkeypatch.chdir(tmp_path)
    PIL.Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    return tmp_path


@pytest.fixture(scope="module")
def batched(load_small):
    return load_small(8)


@pytest.fixture
def log_lines(caplog):
    """What was logged so far."""
    caplog.set_level("INFO", logger="mmtool")
    return lambda: [record.getMessage() for record in caplog.records]


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def questions(count):
    """Rows of all kinds: with and without a picture, a history, a label, a system text, other fields."""
    rows = []
    for index in range(count):
        row = {
            "id": f"row-{index}",
            "query": f"{QUESTIONS[index % len(QUESTIONS)]} {index}",
            "response": f"label {index}",
        }
        if index % 2:
            row["images"] = ["a.png"]
        if index % 3 == 2:
            row |= {"history": [["before", "answered"]], "images": ["a.png", ""]}
        if index % 5 == 4:
            row["system"] = "Be brief."
        rows.append(row)
    return rows


def answer(model, val_dataset, system=None, **options):
    with DatasetRun(InferDataArgs(val_dataset=val_dataset, **options), model.spec, system) as run:
        if not run.finished:
            run.answer(model)
    return read(run.results.path)


def test_every_row_has_its_line_in_input_order(model, folder):
    dataset = write_rows(folder / "rows.jsonl", questions(3))
    records = answer(model, dataset)
    assert [record.pop("response") for record in records] == [
        model.engine.answer(model.request(messages)).text
        for messages in (
            [{"role": "user", "content": "one 0"}],
            [{"role": "user", "content": [IMAGE, {"type": "text", "text": "what is in the picture? 1"}]}],
            [
                {"role": "user", "content": [IMAGE, {"type": "text", "text": "before"}]},
                {"role": "assistant", "content": "answered"},
                {"role": "user", "content": "数字? 2"},
            ],
        )
    ]
    assert all(record.pop("finish_reason") in ("length", "stop") for record in records)
    assert records == [
        {"line": 1, "id": "row-0", "query": "one 0", "label": "label 0", "history": [], "images": [], "audios": []},
        {
            "line": 2,
            "id": "row-1",
            "query": "what is in the picture? 1",
            "label": "label 1",
            "history": [],
            "images": [str(folder / "a.png")],
            "audios": [],
        },
        {
            "line": 3,
            "id": "row-2",
            "query": "数字? 2",
            "label": "label 2",
            "history": [["<image>before", "answered"]],
            "images": [str(folder / "a.png")],
            "audios": [],
        },
    ]
    assert (folder / "rows.yi-vl-6b-chat.jsonl").exists()


IMAGE = {"type": "image", "image": "a.png"}


def test_many_at_once_give_the_lines_of_one_by_one(model, batched, folder):
    dataset = write_rows(folder / "rows.jsonl", questions(24))
    alone = answer(model, dataset, result_path="alone.jsonl")
    together = answer(batched, dataset, result_path="together.jsonl", max_batch_size=8)
    assert together == alone
    assert [record["line"] for record in alone] == list(range(1, 25))


@pytest.mark.parametrize(
    ("row", "query", "history"),
    [
        ({"query": "one", "images": ["a.png", "b.png"]}, "one", []),
        ({"query": "<image>one<image>two", "images": ["a.png", "b.png"]}, "<image>one<image>two", []),
        ({"query": "one", "images": [None, "b.png"], "history": [["a", "b"]]}, "<image>one", [["a", "b"]]),
        (
            {"query": "one", "images": ["a.png", "b.png", "b.png"], "history": [["a", "b"]]},
            "one",
            [["<image>" * 3 + "a", "b"]],
        ),
    ],
)
def test_a_line_can_be_read_as_the_row_it_answers(model, folder, row, query, history):
    PIL.Image.new("RGB", (60, 40), "blue").save(folder / "b.png")
    dataset = write_rows(folder / "rows.jsonl", [row])
    ((_, asked),) = read_conversations(dataset)
    (record,) = answer(model, dataset, result_path="out.jsonl")
    assert (record["query"], record["history"]) == (query, history)
    ((_, again),) = read_conversations("out.jsonl")
    assert [(message.role, *map(located, message.parts)) for message in again.prompt()] == [
        (message.role, *map(located, message.parts)) for message in asked.prompt()
    ]


def located(part):
    return part if isinstance(part, Text) else type(part)(Path(part.source))


def test_the_system_option_is_for_rows_without_one(model, folder):
    rows = [{"query": "one"}, {"query": "one", "system": "Be a pirate."}, {"query": "one", "system": ""}]
    records = answer(model, write_rows(folder / "rows.jsonl", rows), system="Be brief.")
    assert [record["system"] for record in records] == ["Be brief.", "Be a pirate.", ""]
    assert len({record["response"] for record in records}) == 3


BAD_ROWS = [
    {"query": "one", "id": "good"},
    "{ no json",
    {"query": "two", "images": ["missing.png"]},
    {"query": "three", "images": ["broken.png"], "id": "broken"},
    {"text": "nothing to answer"},
    {"query": "a long question " * 2000},
    {"query": "four"},
]


def test_bad_rows_are_skipped_told_and_counted(model, folder, log_lines):
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    records = answer(model, write_rows(folder / "rows.jsonl", BAD_ROWS))
    assert [record["line"] for record in records] == [1, 2, 3, 4, 5, 6, 7]
    assert ["error" in record for record in records] == [False, True, True, True, True, True, False]
    assert records[3]["id"] == "broken"
    assert records[3]["query"] == "three"
    for place, text in zip(range(2, 7), ("JSON", "missing.png", "broken.png", "format", "positions"), strict=True):
        assert any(line.startswith(f"rows.jsonl:{place}: ") and text in line for line in log_lines()), (place, text)
    assert "7 rows" in log_lines()[-1]
    assert "(5 failed)" in log_lines()[-1]


def test_only_the_first_bad_rows_are_told(model, folder, log_lines):
    answer(model, write_rows(folder / "rows.jsonl", [{"query": "one"}] + ["broken"] * 50))
    assert len(log_lines()) < 10
    assert "(50 failed)" in log_lines()[-1]


@pytest.mark.parametrize("bad", [1, 2, 3, 4, 5])
def test_a_bad_row_may_stop_the_run_when_the_rows_before_it_are_done(batched, folder, bad):
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    rows = [{"query": "one"}, {"query": "two"}, BAD_ROWS[bad], {"query": "three"}]
    dataset = write_rows(folder / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"^rows\.jsonl:3: ") as error:
        answer(batched, dataset, result_path="out.jsonl", max_batch_size=8, on_error="stop")
    assert "--resume true" in error.value.hint
    assert [record["line"] for record in read("out.jsonl")] == [1, 2]

    rows[2] = {"query": "corrected"}
    write_rows(folder / "rows.jsonl", rows)
    resumed = answer(batched, dataset, result_path="out.jsonl", max_batch_size=8, on_error="stop", resume=True)
    assert resumed == answer(batched, dataset, result_path="whole.jsonl", max_batch_size=8)


def test_a_file_that_breaks_off_keeps_what_came_before(model, folder):
    (folder / "rows.json").write_text('[{"query": "one"}, {"query": "two"}, {"query": ')
    with pytest.raises(DataError, match=r"rows\.json: record 3"):
        answer(model, "rows.json", result_path="out.jsonl")
    assert [record["query"] for record in read("out.jsonl")] == ["one", "two"]


@pytest.mark.parametrize("left", [0, 1, 5, 9])
@pytest.mark.parametrize("torn", [b"", b'{"line": 6, "id": "ro'])
def test_going_on_gives_the_file_of_an_unbroken_run(batched, folder, left, torn):
    rows = [*questions(4), "broken", *questions(4)]
    dataset = write_rows(folder / "rows.jsonl", rows)
    answer(batched, dataset, result_path="whole.jsonl")
    whole = (folder / "whole.jsonl").read_bytes()
    begun = b"".join(whole.splitlines(keepends=True)[:left])
    (folder / "out.jsonl").write_bytes(begun + torn)
    before = batched.engine.stats.requests
    answer(batched, dataset, result_path="out.jsonl", resume=True)
    assert (folder / "out.jsonl").read_bytes() == whole
    assert batched.engine.stats.requests - before == sum(row != "broken" for row in rows[left:])


def test_going_on_draws_as_an_unbroken_run(model, folder):
    dataset = write_rows(folder / "rows.jsonl", [{"query": "one"}] * 4)
    drawing = dataclasses.replace(model, sampling=dataclasses.replace(model.sampling, do_sample=True, seed=5))
    whole = answer(drawing, dataset, result_path="whole.jsonl")
    assert len({record["response"] for record in whole}) > 1
    answer(drawing, dataset, result_path="out.jsonl", val_dataset_sample=2)
    assert answer(drawing, dataset, result_path="out.jsonl", resume=True) == whole


def test_going_on_with_other_rows_is_refused_and_changes_nothing(model, folder):
    rows = questions(4)
    answer(model, write_rows(folder / "rows.jsonl", rows), result_path="out.jsonl", val_dataset_sample=3)
    before = (folder / "out.jsonl").read_bytes()
    for other in (rows[1:], [rows[0], {"query": "else"}, *rows[2:]], rows[:2]):
        dataset = write_rows(folder / "other.jsonl", other)
        with pytest.raises(MMToolError, match=r"--result_path out\.jsonl"):
            answer(model, dataset, result_path="out.jsonl", resume=True)
    write_rows(folder / "rows.jsonl", rows)
    with pytest.raises(MMToolError, match="3 rows or more, and there are only 2"):
        answer(model, "rows.jsonl", result_path="out.jsonl", resume=True, val_dataset_sample=2)
    (folder / "notes.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(MMToolError, match="kind of file"):
        answer(model, "rows.jsonl", result_path="notes.jsonl", resume=True)
    assert (folder / "out.jsonl").read_bytes() == before
    assert (folder / "notes.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'


def test_a_dataset_that_cannot_be_read_does_not_cost_the_result_file(model, folder):
    (folder / "out.jsonl").write_text('{"line": 1}\n')
    with pytest.raises(DataError, match="no such file"):
        answer(model, "missing.jsonl", result_path="out.jsonl", overwrite=True)
    assert (folder / "out.jsonl").read_text() == '{"line": 1}\n'


def test_a_sample_is_the_rows_at_the_start(model, folder):
    dataset = write_rows(folder / "rows.jsonl", questions(5))
    two = answer(model, dataset, val_dataset_sample=2)
    assert [record["line"] for record in two] == [1, 2]
    assert answer(model, f"{dataset}#2", result_path="two.jsonl") == two
    Path(dataset).rename("rows#1.jsonl")  # a name is a name
    assert len(answer(model, "rows#1.jsonl", result_path="five.jsonl")) == 5


def test_a_dataset_may_have_a_name(model, folder, monkeypatch):
    dataset = write_rows(folder / "rows.jsonl", questions(2))
    monkeypatch.setitem(batch.DATASETS, "shapes", DatasetSpec(name="shapes", source=dataset, format="swift"))
    assert answer(model, "shapes", result_path="named.jsonl") == answer(model, dataset)
    with pytest.raises(MMToolError, match="--val_dataset shape: there is no such file and no dataset") as caught:
        answer(model, "shape")
    assert caught.value.hint == "Did you mean shapes?"


def test_rows_are_counted_without_blank_lines(folder):
    (folder / "rows.jsonl").write_text('{"query": "one"}\n\n  \n{"query": "two"}')
    assert count_rows(folder / "rows.jsonl", None) == 2
    assert count_rows(folder / "rows.jsonl", 1) == 1
    (folder / "rows.json").write_text('[{"query": "one"}, {"query": "two"}]')
    assert count_rows(folder / "rows.json", None) == 2
    (folder / "rows.json").write_text('[{"query": "one"}, {"query"')
    assert count_rows(folder / "rows.json", None) is None


def test_rows_are_read_and_prepared_only_a_little_ahead(model, folder, monkeypatch):
    """Memory must not grow with the file."""
    dataset = write_rows(folder / "rows.jsonl", questions(30))
    ahead = []
    with DatasetRun(InferDataArgs(val_dataset=dataset), model.spec) as run:
        add = run.results.add

        def count_ahead(index, record):
            time.sleep(0.02)  # let the thread run as far as it can
            ahead.append(encoded[-1] - index)
            return add(index, record)

        encoded = []
        request = type(model).request
        monkeypatch.setattr(
            type(model), "request", lambda self, messages: encoded.append(len(encoded)) or request(self, messages)
        )
        monkeypatch.setattr(run.results, "add", count_ahead)
        run.answer(model)
    assert max(ahead) <= 6


def test_a_killed_run_goes_on_exactly(checkpoint, folder):
    """One run stopped by Ctrl-C, then killed, then finished; against one in one piece."""
    rows = questions(80)
    dataset = write_rows(folder / "rows.jsonl", rows)
    command = [
        *(sys.executable, "-m", "mmtool", "infer", "--model_id_or_path", checkpoint, "--val_dataset", dataset),
        *("--max_batch_size", "4", "--max_new_tokens", "60", "--resume", "true", "--result_path", "out.jsonl"),
    ]
    env = os.environ | {"PYTHONPATH": str(Path(mmtool.__file__).parents[1])}

    stopped = start_until(command, env, lines=10)
    stopped.send_signal(signal.SIGINT)
    _, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 130
    assert "--resume true" in err
    assert "Traceback" not in err
    begun = (folder / "out.jsonl").read_bytes()
    assert begun.endswith(b"\n")

    killed = start_until(command, env, lines=begun.count(b"\n") + 10)
    killed.kill()
    killed.communicate()
    assert (folder / "out.jsonl").read_bytes().startswith(begun)
    with open(folder / "out.jsonl", "ab") as file:
        file.write(b'{"line": 99, "torn')

    finished = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0
    assert finished.stdout == ""
    assert len(finished.stderr.splitlines()) <= 10
    records = read("out.jsonl")
    assert [record["line"] for record in records] == list(range(1, 81))
    assert [record["id"] for record in records] == [row["id"] for row in rows]


def test_a_finished_run_needs_no_model(model, folder):
    dataset = write_rows(folder / "rows.jsonl", questions(2))
    records = answer(model, dataset)
    with DatasetRun(InferDataArgs(val_dataset=dataset, resume=True), model.spec) as run:
        assert run.finished
    assert read("rows.yi-vl-6b-chat.jsonl") == records


def start_until(command, env, lines):
    """Start a run and return it when the result file has this many lines."""
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    path = Path("out.jsonl")
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return process
