import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmtool.errors import MMToolError
from mmtool.infer.results import ResultFile, check_result_path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_records_are_written_in_order_as_soon_as_those_before_them_are_there(tmp_path):
    path = tmp_path / "new folder" / "out.jsonl"
    with ResultFile(path) as results:
        assert results.add(1, {"line": 2}) == 0
        assert path.read_bytes() == b""
        assert results.add(2, {"line": 3}) == 0
        assert results.add(0, {"line": 1}) == 3
        assert lines(path) == [{"line": 1}, {"line": 2}, {"line": 3}]  # before the file is closed


@pytest.mark.parametrize("torn", [b"", b"{", b'{"line": 3, "resp', b'{"line": 3}', b"\xe4\xb8", b"\0\0\0\n"])
def test_going_on_drops_a_torn_last_line_and_no_other(tmp_path, torn):
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"line": 1}\n{"line": 2, "response": "\xe4\xb8\xad"}\n' + torn)
    with ResultFile(path, resume=True) as results:
        assert [record["line"] for record in results.done()] == [1, 2]
        results.add(2, {"line": 3})
    assert [record["line"] for record in lines(path)] == [1, 2, 3]


def test_going_on_without_a_file_starts_one(tmp_path):
    with ResultFile(tmp_path / "out.jsonl", resume=True) as results:
        assert list(results.done()) == []
        results.add(0, {"line": 1})
    assert lines(tmp_path / "out.jsonl") == [{"line": 1}]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"line": 1}\nno json\n{"line": 3}\n')
    with (
        ResultFile(path, resume=True) as results,
        pytest.raises(MMToolError, match=r"out\.jsonl:2 is not a line of JSON"),
    ):
        list(results.done())
    assert path.read_text() == '{"line": 1}\nno json\n{"line": 3}\n'


def test_text_that_utf8_cannot_hold_is_escaped(tmp_path):
    with ResultFile(tmp_path / "out.jsonl") as results:
        results.add(0, {"query": "中 \ud800"})
    assert lines(tmp_path / "out.jsonl") == [{"query": "中 \ud800"}]


FILL_UP = """
import resource, signal, sys
from pathlib import Path
from mmtool.errors import MMToolError
from mmtool.infer.results import ResultFile

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with ResultFile(Path(sys.argv[1])) as results:
    for index in range(100):
        results.add(index, {"line": index + 1, "response": "x" * 50})
"""


def test_a_full_disk_leaves_whole_lines_and_says_so(tmp_path):
    path = tmp_path / "out.jsonl"
    run = subprocess.run([sys.executable, "-c", FILL_UP, str(path)], capture_output=True, text=True)
    assert f"MMToolError: cannot write --result_path {path}: File too large" in run.stderr
    written = lines(path)
    assert [record["line"] for record in written] == list(range(1, len(written) + 1))
    assert len(written) > 5
    assert path.read_bytes().endswith(b"\n")


HOLD = """
import sys
from pathlib import Path
from mmtool.infer.results import ResultFile

results = ResultFile(Path(sys.argv[1]), resume=True)
list(results.done())
results.add(1, {"line": 2})
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("resume", [True, False])
def test_a_file_has_one_run_at_a_time(tmp_path, resume):
    path = tmp_path / "out.jsonl"
    path.write_text('{"line": 1}\n')
    words = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(MMToolError, match="is being written by another run"):
            ResultFile(path, resume=resume)
        other.kill()  # no end that could be prepared for
    assert lines(path) == [{"line": 1}, {"line": 2}]
    with ResultFile(path, resume=True) as results:
        assert len(list(results.done())) == 2


def test_a_pipe_takes_answers(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    for resume in (False, True):  # nothing is there to go on with, and reading would wait forever
        with ResultFile(path, resume=resume) as results:
            assert list(results.done()) == []
            results.add(0, {"line": 1})
            results.add(1, {"line": 2})
        assert os.read(reader, 1000) == b'{"line": 1}\n{"line": 2}\n'
    os.close(reader)


def test_a_device_that_is_full_says_so_too():
    with pytest.raises(MMToolError, match="No space left on device"), ResultFile(Path("/dev/full")) as results:
        results.add(0, {"line": 1})


def test_an_existing_file_is_only_touched_when_asked(tmp_path):
    path, dataset = tmp_path / "out.jsonl", tmp_path / "rows.jsonl"
    dataset.write_text("{}")
    check_result_path(path, dataset, resume=False, overwrite=False)
    path.touch()
    check_result_path(path, dataset, resume=False, overwrite=False)  # nothing in it to lose
    path.write_text("{}\n")
    with pytest.raises(MMToolError, match="exists already") as error:
        check_result_path(path, dataset, resume=False, overwrite=False)
    assert "--resume true" in error.value.hint
    check_result_path(path, dataset, resume=True, overwrite=False)
    check_result_path(path, dataset, resume=False, overwrite=True)


def test_the_dataset_itself_and_folders_are_refused(tmp_path):
    dataset = tmp_path / "rows.jsonl"
    dataset.write_text("{}")
    with pytest.raises(MMToolError, match="is the dataset itself"):
        check_result_path(tmp_path / "." / "rows.jsonl", dataset, resume=False, overwrite=True)
    with pytest.raises(MMToolError, match="is a folder"):
        check_result_path(tmp_path, dataset, resume=False, overwrite=True)
