"""Several processes: the losses are those of one at the same global batch, and nothing hangs. Kills, too."""

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
from mmtool.sft.progress import read_log

SCRIPT = Path(__file__).parent / "two_ranks.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
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


@pytest.fixture(scope="module")
def singles(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs of one process that others are compared with."""
    folder = tmp_path_factory.mktemp("one")
    return {
        name: one_process(data_file, folder / name, *more)
        for name, more in {"lora": [], "full": FULL, "vision": VISION}.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "default-zero2", "default-zero3", "fsdp"])
def test_two_processes_have_the_losses_of_one(
    way: str, singles: dict[str, Path], data_file: Path, tmp_path: Path
) -> None:
    """LoRA, full, and full with the tower: batches in which one process has no picture are among them."""
    if way.startswith("default"):
        pytest.importorskip("deepspeed")
    extra = {"ddp": [], "fsdp": ["--fsdp", "full_shard"]}.get(way, ["--deepspeed", way])
    kinds = {"lora": [], "full": FULL, "vision": VISION}
    scenarios = [
        [free_port(), *words(data_file, tmp_path / name, "--batch_size", "2", *more, *extra)]
        for name, more in kinds.items()
    ]
    (tmp_path / "scenarios.json").write_text(json.dumps(scenarios))
    files = [(tmp_path / f"rank{rank}").open("w") for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path / "scenarios.json")],
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
    told = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert [process.returncode for process in processes] == [0, 0], told[0][-3000:] + told[1][-3000:]
    for name in kinds:
        assert_same_losses(tmp_path / name, singles[name])
        found, expected = (
            {p.name: load_file(p) for p in (run / "checkpoint-4").glob("*.safetensors")}
            for run in (tmp_path / name, singles[name])
        )
        assert found.keys() == expected.keys()
        for file, tensors in expected.items():
            assert found[file].keys() == tensors.keys()
            worst = max(
                float((found[file][key].float() - tensor.float()).abs().max()) for key, tensor in tensors.items()
            )
            assert worst < 2e-3, f"{name}: {worst}"  # Adam makes steps of 1e-4 of gradients that are noise


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.3])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
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
