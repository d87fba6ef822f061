"""Several processes: the losses are those of one at the same global batch, and nothing hangs. Kills, too."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmtool.args import SftArgs
from mmtool.finetuned import checkpoint_steps
from mmtool.options import read_args
from mmtool.sft.main import sft_main
from mmtool.sft.places import with_saved_options
from mmtool.sft.progress import read_log

SCRIPT = Path(__file__).parent / "two_ranks.py"
ENVIRONMENT = os.environ | {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
FULL = ["--sft_type", "full", "--learning_rate", "1e-4"]
VISION = [*FULL, "--tune_vision_encoder", "true"]
# Measured maxima of the differences of losses to one process: DDP 2e-6 (LoRA).
TOLERANCE = 1e-3


def words(data_file: Path, run: Path, *more: str) -> list[str]:
    """Options of a run of four steps whose order does not depend on lengths: pictures and text get mixed."""
    return [
        *("--dataset", str(data_file), "--dataset_test_ratio", "0.2", "--max_steps", "4", "--save_steps", "4"),
        *("--logging_steps", "1", "--output_dir", str(run), "--add_output_dir_suffix", "false"),
        *("--dataloader_num_workers", "0", "--group_by_length", "false", "--lora_dropout", "0"),
        *("--lr_scheduler_type", "constant", "--warmup_ratio", "0", "--tensorboard", "false", *more),
    ]


def losses(run: Path) -> dict[tuple[int, str], float]:
    lines = read_log(run / "logging.jsonl")
    return {(line["step"], name): line[name] for line in lines for name in ("loss", "eval_loss") if name in line}


def assert_same_losses(found: Path, expected: Path) -> None:
    ours, theirs = losses(found), losses(expected)
    assert ours.keys() == theirs.keys()
    assert len(theirs) == 5
    worst = max(abs(ours[key] - theirs[key]) for key in theirs)
    assert worst < TOLERANCE, f"{found.name}: {worst}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def one_process(data_file: Path, run: Path, *more: str) -> Path:
    sft_main(read_args(SftArgs, words(data_file, run, "--batch_size", "4", *more), "mmtool sft"))
    return run


def test_two_processes_by_one_option_have_the_losses_of_one(data_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "two"
    command = [sys.executable, "-m", "mmtool", "sft", *words(data_file, run, "--batch_size", "2")]
    ran = subprocess.run([*command, "--nproc_per_node", "2"], env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stderr.count("what trains") == 1, "one process talks"
    assert_same_losses(run, one_process(data_file, tmp_path / "one"))


def test_an_error_in_several_processes_is_two_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mmtool", "sft", "--dataset", str(tmp_path / "gone.jsonl"), "--nproc_per_node=2"]
    command += ["--output_dir", str(tmp_path)]
    ran = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 2
    assert "error: " in ran.stderr
    assert "Traceback" not in ran.stderr


KINDS = {"lora": [], "full": FULL, "vision": VISION}
# In this order: DeepSpeed leaves variables in the environment which FSDP does not like.
WAYS = {
    "ddp": [],
    "fsdp": ["--fsdp", "full_shard"],
    "zero2": ["--deepspeed", "default-zero2"],
    "zero3": ["--deepspeed", "default-zero3"],
}


@pytest.fixture(scope="module")
def singles(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs of one process that others are compared with."""
    folder = tmp_path_factory.mktemp("one")
    return {name: one_process(data_file, folder / name, *more) for name, more in KINDS.items()}


@pytest.fixture(scope="module")
def pairs(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """The runs of two processes, all of them in the same two, since imports take longer than the trainings."""
    folder = tmp_path_factory.mktemp("two")
    ways = WAYS if importlib.util.find_spec("deepspeed") else {way: WAYS[way] for way in ("ddp", "fsdp")}
    runs = {(way, kind): folder / f"{way}-{kind}" for way in ways for kind in KINDS}
    scenarios = [
        [free_port(), *words(data_file, run, "--batch_size", "2", *KINDS[kind], *WAYS[way])]
        for (way, kind), run in runs.items()
    ]
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    files = [(folder / f"rank{rank}").open("w") for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder / "scenarios.json")],
            env=ENVIRONMENT | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.DEVNULL,
            stderr=file,
        )
        for rank, file in enumerate(files)
    ]
    try:
        for process in processes:
            process.wait(timeout=1800)
    finally:
        for process, file in zip(processes, files, strict=True):
            process.kill()
            file.close()
    told = [(folder / f"rank{rank}").read_text() for rank in range(2)]
    assert [process.returncode for process in processes] == [0, 0], told[0][-3000:] + told[1][-3000:]
    return runs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_losses_of_one(
    way: str, kind: str, singles: dict[str, Path], pairs: dict[tuple[str, str], Path]
) -> None:
    """LoRA, full, and full with the tower: batches in which one process has no picture are among them."""
    if (way, kind) not in pairs:
        pytest.skip("needs the package deepspeed")
    run = pairs[way, kind]
    assert_same_losses(run, singles[kind])
    found, expected = (
        {p.name: load_file(p) for p in (folder / "checkpoint-4").glob("*.safetensors")}
        for folder in (run, singles[kind])
    )
    assert found.keys() == expected.keys()
    for file, tensors in expected.items():
        assert found[file].keys() == tensors.keys()
        worst = max(float((found[file][key].float() - tensor.float()).abs().max()) for key, tensor in tensors.items())
        assert worst < 2e-3, f"{kind}: {worst}"  # Adam makes steps of 1e-4 of gradients that are noise


ENDINGS = [("pass", 0), ("raise SystemExit(3)", 3), ("raise MMToolError('no')", 2), ("1 / 0", 1)]


@pytest.mark.parametrize(("what", "code"), ENDINGS)
def test_a_process_among_others_ends_with_its_own_code(what: str, code: int) -> None:
    """Whatever its threads are doing: here, what the interpreter would do last makes it fail."""
    script = f"""
import atexit, os
from mmtool.errors import MMToolError
from mmtool.sft.launch import ending_with_its_own_code
atexit.register(os._exit, 77)  # runs after what is registered later
try:
    with ending_with_its_own_code():
        print("here")
        {what}
except MMToolError:
    raise SystemExit(2)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == code
    assert ran.stdout == "here\n"
    assert ("ZeroDivisionError" in ran.stderr) == (code == 1)


# Where a run is killed, at which step, and the checkpoint that is the last good one then.
KILLS = [
    ("after a step", 3, 2),
    ("in the backward pass", 4, 4),
    ("half the weights", 4, 2),
    ("before the optimizer", 4, 2),
    ("before the name", 4, 2),
    ("before the record", 4, 4),
    ("deleting the old", 2, 4),
    ("half a line", 5, 4),
]


def killed_words(data_file: Path, run: Path) -> list[str]:
    return [
        *("--dataset", str(data_file), "--dataset_test_ratio", "0", "--max_steps", "6", "--save_steps", "2"),
        *("--save_total_limit", "1", "--batch_size", "2", "--lora_dropout", "0.1", "--dataloader_num_workers", "1"),
        *("--logging_steps", "1", "--output_dir", str(run), "--add_output_dir_suffix", "false"),
    ]


@pytest.fixture(scope="module")
def killed(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that were killed, and one that was not."""
    folder = tmp_path_factory.mktemp("killed")
    runs = {place: folder / place.replace(" ", "-") for place, _, _ in KILLS}
    scenarios = [[place, step, *killed_words(data_file, runs[place])] for place, step, _ in KILLS]
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    command = [sys.executable, str(SCRIPT.with_name("killed.py")), str(folder / "scenarios.json")]
    ran = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.stdout.split() == [str(int(signal.SIGKILL))] * len(KILLS), ran.stderr[-3000:]
    whole = folder / "whole"
    sft_main(read_args(SftArgs, killed_words(data_file, whole), "mmtool sft"))
    return {**runs, "whole": whole}


@pytest.mark.parametrize(("place", "step", "last"), KILLS)
def test_a_run_killed_anywhere_goes_on_to_the_last_bit(
    killed: dict[str, Path], place: str, step: int, last: int
) -> None:
    run, whole = killed[place], killed["whole"]
    found = checkpoint_steps(run)
    assert found[-1][0] == last
    files = {path.name for path in checkpoint_steps(whole)[-1][1].iterdir()}
    assert all({path.name for path in checkpoint.iterdir()} == files for _, checkpoint in found)
    resume = ["--resume_from_checkpoint", "last", "--output_dir", str(run)]
    sft_main(with_saved_options(read_args(SftArgs, resume, "mmtool sft")))
    assert losses(run) == losses(whole)
    assert len(losses(whole)) == 6
    ours, theirs = (load_file(folder / "checkpoint-6" / "adapter_model.safetensors") for folder in (run, whole))
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.3])
def test_a_run_killed_at_any_time_goes_on_as_if_nothing_had_happened(
    data_file: Path, tmp_path: Path, sft_args: Callable[..., SftArgs], delay: float
) -> None:
    """Killed while it trains or saves: what is on disk is whole, and the losses and weights end up the same."""
    run, options = tmp_path / "killed", {"max_steps": 8, "save_steps": 2, "batch_size": 2, "lora_dropout": 0.1}
    listed = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    listed += ["--dataset", str(data_file), "--dataset_test_ratio", "0", "--dataloader_num_workers", "1"]
    listed += ["--logging_steps", "1", "--output_dir", str(run), "--add_output_dir_suffix", "false"]
    command = [sys.executable, "-m", "mmtool", "sft", *listed]
    child = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    log = run / "logging.jsonl"
    while not (log.is_file() and len(read_log(log)) >= 4) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    child.wait()
    for _, checkpoint in checkpoint_steps(run):
        assert {path.name for path in checkpoint.iterdir()} >= {"adapter_model.safetensors", "trainer_state.json"}
    resume = ["--resume_from_checkpoint", "last"]
    ran = subprocess.run([*command, *resume], env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    sft_main(sft_args(**options, dataset=[str(data_file)], dataloader_num_workers=1))
    unbroken = tmp_path / "run"
    assert losses(run) == losses(unbroken)
    found, expected = (load_file(folder / "checkpoint-8" / "adapter_model.safetensors") for folder in (run, unbroken))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
