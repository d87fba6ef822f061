import errno
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmtool.errors import CheckpointError, MMToolError
from mmtool.finetuned import TRAINER_STATE, checkpoint_steps, open_finetuned
from mmtool.sft.checkpoint import discard, record, rotate, tidy, whole_or_not
from mmtool.sft.places import find_resumed, make_run_folder, only_run_in, run_folder


def nothing() -> None:
    pass


def make(run: Path, step: int, resumable: bool = True) -> Path:
    with whole_or_not(run / f"checkpoint-{step}", True, nothing) as folder:
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
        if resumable:
            (folder / TRAINER_STATE).write_text("{}")
    return run / f"checkpoint-{step}"


def test_a_checkpoint_appears_when_it_is_whole(tmp_path: Path) -> None:
    with whole_or_not(tmp_path / "checkpoint-5", True, nothing) as folder:
        (folder / "weights").write_text("half")
        assert checkpoint_steps(tmp_path) == []
    assert [step for step, _ in checkpoint_steps(tmp_path)] == [5]
    assert (tmp_path / "checkpoint-5" / "weights").read_text() == "half"


def test_a_kill_while_saving_leaves_nothing_that_counts(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_or_not(tmp_path / "checkpoint-5", True, nothing) as folder:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt
    assert checkpoint_steps(tmp_path) == []
    assert list(tmp_path.iterdir()) != []
    tidy(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_that_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, 5)
    with pytest.raises(MMToolError) as caught, whole_or_not(tmp_path / "checkpoint-10", True, nothing) as folder:
        (folder / "weights").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "No space left on device" in caught.value.message
    assert "checkpoint-5 is intact" in (caught.value.hint or "")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_another_error_while_saving_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"), whole_or_not(tmp_path / "checkpoint-1", True, nothing):
        raise RuntimeError("a bug")


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    make(tmp_path, 5)
    make(tmp_path, 5, resumable=False)
    assert not (tmp_path / "checkpoint-5" / TRAINER_STATE).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_old_checkpoints_go_and_the_best_one_stays(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100):
        make(tmp_path, step)
    rotate(tmp_path, 2, tmp_path / "checkpoint-5")
    assert [step for step, _ in checkpoint_steps(tmp_path)] == [5, 15, 100]
    rotate(tmp_path, 0, None)
    assert len(checkpoint_steps(tmp_path)) == 3
    discard(tmp_path / "checkpoint-15")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-5"]


def test_runs_are_numbered(tmp_path: Path) -> None:
    assert run_folder(tmp_path, "tiny", True, "now") == tmp_path / "tiny" / "v0-now"
    for name in ("v0-then", "v9-then", "v10-then", "vx"):
        (tmp_path / "tiny" / name).mkdir(parents=True)
    assert run_folder(tmp_path, "tiny", True, "now").name == "v11-now"
    assert run_folder(tmp_path, "tiny", False, "now") == tmp_path


def test_last_means_the_newest_checkpoint_of_the_newest_run(tmp_path: Path) -> None:
    old, new = tmp_path / "tiny" / "v0-x", tmp_path / "tiny" / "v1-y"
    for index, (run, step) in enumerate(((old, 50), (new, 5), (new, 10))):
        os.utime(make(run, step) / TRAINER_STATE, ns=(index * 10**9, index * 10**9))
    (tmp_path / "tiny" / "v2-empty").mkdir()
    assert find_resumed("last", tmp_path, "tiny") == new / "checkpoint-10"
    assert find_resumed(str(old), tmp_path, "tiny") == old / "checkpoint-50"
    assert find_resumed(str(new / "checkpoint-5"), tmp_path, "tiny") == new / "checkpoint-5"


def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        find_resumed("last", tmp_path, "tiny")
    path = make(tmp_path, 5, resumable=False)
    with pytest.raises(CheckpointError, match="is no checkpoint that can be resumed"):
        find_resumed(str(path), tmp_path, "tiny")


def test_runs_that_start_together_have_a_folder_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: make_run_folder(tmp_path, "tiny", True, "now"), range(8)))
    assert sorted(run.name for run in runs) == [f"v{number}-now" for number in range(8)]
    assert make_run_folder(tmp_path / "own", "tiny", False, "now") == tmp_path / "own"
    assert make_run_folder(tmp_path / "own", "tiny", False, "now") == tmp_path / "own"
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        make_run_folder(tmp_path / "file", "tiny", True, "now")


HOLD = """
import os, sys, time
from pathlib import Path
from mmtool.sft.places import only_run_in

with only_run_in(Path(sys.argv[1])):
    if os.fork() == 0:  # as a data process, which may outlive a killed run for a while
        time.sleep(60)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_run_at_a_time_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(MMToolError, match="another run is training in"), only_run_in(tmp_path):
            pass
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        with only_run_in(tmp_path):
            pass
        os.killpg(other.pid, signal.SIGKILL)


def test_a_run_folder_opens_at_its_best_checkpoint(tmp_path: Path) -> None:
    for step in (5, 10):
        make(tmp_path, step)
    assert open_finetuned(tmp_path).folder.name == "checkpoint-10"
    record(tmp_path, tmp_path / "checkpoint-10", tmp_path / "checkpoint-5", 0.5)
    assert json.loads((tmp_path / "checkpoints.json").read_text())["best_eval_loss"] == 0.5
    opened = open_finetuned(tmp_path)
    assert (opened.folder.name, opened.is_adapter) == ("checkpoint-5", True)
    assert opened.options == {"model_id_or_path": "base"}


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither adapter_config"):
        open_finetuned(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_finetuned(tmp_path / "gone")


def test_a_folder_of_runs_names_the_newest_one(tmp_path: Path) -> None:
    old, new = tmp_path / "output" / "tiny" / "v0-then", tmp_path / "output" / "tiny" / "v1-now"
    for run in (old, new):
        make(run, 5)
    os.utime(old, (1, 1))
    for folder in (tmp_path / "output", tmp_path / "output" / "tiny"):
        with pytest.raises(CheckpointError) as caught:
            open_finetuned(folder)
        assert caught.value.hint == f"Give a run in it: --ckpt_dir {new}, the newest of 2."


def test_a_run_that_saved_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "sft_args.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        open_finetuned(tmp_path)
