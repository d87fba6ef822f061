"""Compare `mmtool sft` with what people use today, side by side in one run.

    python examples/bench/sft/compare.py --folder /tmp/bench_sft
    python examples/bench/sft/compare.py --folder /tmp/bench_sft --install swift llamafactory  # makes their venvs
    python examples/bench/sft/compare.py --folder /tmp/bench_sft --workloads vlm --candidates mmtool trainer --rounds 5

Same model folder, same rows, same hyper-parameters, in float32 on the CPU: LoRA of rank 8 without dropout, AdamW, a
constant learning rate, every step logged. All candidates are measured in the same way, from outside: each runs as the
command its users type, and the lines it writes per step are timed as they come. They take turns, because a shared
machine changes its speed; read the ratios.

samples/s counts the rows between the first and the last logged step; "first step" is the time from the start of the
command to the first of these lines; "peak" is the largest resident memory of a process of the command; "tree" that of
all its processes together, pages that they share counted once. "per CPU s" counts the CPU seconds of all processes: it
says something on a machine that is busy with other work, but hides what runs at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from workloads import WORKLOADS, Workload, make

HERE = Path(__file__).parent
PEERS = {"swift": "ms-swift==4.6.0", "llamafactory": "llamafactory==0.9.5"}
# A line that reports a step: mmtool's own, or the dictionary that Trainer prints.
STEP = re.compile(rb"mmtool: step \d+ of|\{'loss':")
LOSS = re.compile(rb"(?:loss |'loss': '?)([0-9.]+)")
LAYERS = {"all": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj", "qkv": "q_proj k_proj v_proj"}


@dataclass(frozen=True)
class Result:
    """One run: speed from the first step to the last, seconds to the first, MB, mean of the last losses."""

    samples_per_second: float
    samples_per_cpu_second: float
    first_step: float
    peak: float
    tree: float
    loss: float


@dataclass(frozen=True)
class Job:
    """A workload with a batch size, in its folder."""

    workload: Workload
    batch_size: int
    folder: Path

    @property
    def model(self) -> str:
        """Folder of the model."""
        return str(self.folder / "model")

    @property
    def rows(self) -> str:
        """File of the rows."""
        return str(self.folder / "rows.jsonl")


def mmtool_command(job: Job, output: Path) -> list[str]:
    """Return the command line of mmtool."""
    return [
        *(sys.executable, "-m", "mmtool", "sft", "--model_id_or_path", job.model, "--dataset", job.rows),
        *("--dataset_test_ratio", "0", "--lora_target_modules", *LAYERS[job.workload.targets].split()),
        *("--lora_rank", "8", "--lora_alpha", "16", "--lora_dropout", "0", "--learning_rate", "1e-3"),
        *("--lr_scheduler_type", "constant", "--warmup_ratio", "0", "--weight_decay", "0"),
        *("--batch_size", str(job.batch_size), "--gradient_accumulation_steps", "1"),
        *("--num_train_epochs", str(job.workload.epochs), "--logging_steps", "1", "--save_steps", "100000"),
        *("--output_dir", str(output), "--add_output_dir_suffix", "false"),
    ]


def trainer_command(job: Job, output: Path, python: str = sys.executable, workers: int = 0) -> list[str]:
    """Return the command line of the plain script."""
    return [
        *(python, str(HERE / "plain.py"), job.model, job.rows, "--output_dir", str(output)),
        *("--batch_size", str(job.batch_size), "--epochs", str(job.workload.epochs)),
        *("--targets", job.workload.targets, "--workers", str(workers)),
    ]


def swift_command(job: Job, output: Path, venv: Path) -> list[str]:
    """Return the command line of ms-swift, with its call to the hub off."""
    return [
        *(str(venv / "bin" / "swift"), "sft", "--model", job.model, "--model_type", "llava1_5_hf"),
        *("--dataset", job.rows, "--check_model", "false", "--torch_dtype", "float32", "--tuner_type", "lora"),
        *("--lora_rank", "8", "--lora_alpha", "16", "--lora_dropout", "0"),
        # Names would also reach the layers of the tower that are called so.
        *("--target_regex", rf".*language_model.*\.({LAYERS[job.workload.targets].replace(' ', '|')})"),
        *("--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--warmup_ratio", "0", "--weight_decay", "0"),
        *("--per_device_train_batch_size", str(job.batch_size), "--gradient_accumulation_steps", "1"),
        *("--num_train_epochs", str(job.workload.epochs), "--logging_steps", "1", "--save_strategy", "no"),
        *("--gradient_checkpointing", "false", "--vit_gradient_checkpointing", "false", "--split_dataset_ratio", "0"),
        *("--dataloader_num_workers", "0", "--dataset_num_proc", "1", "--report_to", "none", "--use_cpu", "true"),
        *("--output_dir", str(output)),
    ]


def llamafactory_command(job: Job, output: Path, venv: Path) -> list[str]:
    """Return the command line of LLaMA-Factory."""
    settings = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": job.model,
        "template": "llava",
        "dataset_dir": str(job.folder),
        "dataset": "rows",
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_target": LAYERS[job.workload.targets].replace(" ", ","),
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": job.batch_size,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": job.workload.epochs,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_gradient_checkpointing": True,
        "use_cpu": True,
        "bf16": False,
        "pure_bf16": False,
        "overwrite_cache": True,
        "preprocessing_num_workers": 1,
        "report_to": "none",
        "cutoff_len": 2048,
        "output_dir": str(output),
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / "train.yaml"  # JSON is YAML, and its own JSON reader fails
    path.write_text(json.dumps(settings), encoding="utf-8")
    return [str(venv / "bin" / "llamafactory-cli"), "train", str(path)]


def install(name: str, venv: Path) -> None:
    """Make the environment of a peer, with the torch of this one and without torch's companions.

    The index may have those only as builds for CUDA, which do not go with a CPU build of torch.
    """
    import torch

    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", f"torch=={torch.__version__}", PEERS[name]], check=True)
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"], check=True)
    if name == "llamafactory":  # imports it at the start, for sounds only
        (site,) = (venv / "lib").glob("python*/site-packages")
        (site / "torchaudio.py").write_text('__version__ = "0"\n', encoding="utf-8")


def measure(command: Sequence[str], job: Job, threads: int, log: Path) -> Result:
    """Run a command and time its steps.

    Raises:
        RuntimeError: where it fails, or reports fewer than two steps.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DISABLE_VERSION_CHECK": "0",
    }
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=job.folder
    )
    tree = _Tree(process.pid)
    times: list[float] = []
    cpu: list[float] = []
    losses: list[float] = []
    with log.open("wb") as file:
        for line in process.stdout:
            file.write(line)
            if STEP.search(line):
                times.append(time.perf_counter() - started)
                cpu.append(tree.cpu_seconds())
                found = LOSS.search(line)
                losses += [float(found[1])] if found else []
    peak = _wait(process)
    tree.stop()
    if process.returncode or len(times) < 2:
        raise RuntimeError(f"{command[0]} ended with {process.returncode} after {len(times)} steps; see {log}")
    rows = (len(times) - 1) * job.batch_size
    return Result(
        samples_per_second=rows / (times[-1] - times[0]),
        samples_per_cpu_second=rows / max(cpu[-1] - cpu[0], 1e-9),
        first_step=times[0],
        peak=peak,
        tree=max(tree.peak, peak),
        loss=statistics.mean(losses[-8:]),
    )


def _wait(process: subprocess.Popen) -> float:
    """Wait for the end and return the peak resident memory of its largest process, in MB."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss / 1024


class _Tree:
    """Watches a process and its children: memory twice a second, CPU time when asked."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak = pid, 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            self.peak = max(self.peak, sum(map(_proportional_mb, self._pids())))

    def stop(self) -> None:
        """Stop watching."""
        self._done.set()
        self._thread.join()

    def cpu_seconds(self) -> float:
        """Return the CPU seconds of the processes that are there, and of their children that have ended."""
        return sum(map(_cpu_seconds, self._pids()))

    def _pids(self) -> list[int]:
        found = [self.pid]
        for pid in found:
            try:
                tasks = Path(f"/proc/{pid}/task").iterdir()
                found += [int(child) for task in tasks for child in (task / "children").read_text().split()]
            except OSError:  # it has ended
                continue
        return found


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _proportional_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def candidates(names: Sequence[str], folder: Path) -> dict[str, Callable[[Job, Path], list[str]]]:
    """Return what makes the command line of each candidate that can run here."""
    known: dict[str, Callable[[Job, Path], list[str]]] = {
        "mmtool": mmtool_command,
        "trainer": trainer_command,
        "trainer+worker": lambda job, output: trainer_command(job, output, workers=1),
    }
    for name, command in (("swift", swift_command), ("llamafactory", llamafactory_command)):
        venv = folder / f"venv-{name}"
        if (venv / "bin").is_dir():
            known[name] = lambda job, output, command=command, venv=venv: command(job, output, venv)
            known[f"trainer@{name}"] = lambda job, output, venv=venv: trainer_command(
                job, output, str(venv / "bin" / "python")
            )
    missing = [name for name in names if name not in known]
    if missing:
        raise SystemExit(f"error: {', '.join(missing)} cannot run here\nhint: pass --install {' '.join(PEERS)}")
    return {name: known[name] for name in names or ["mmtool", "trainer", *(n for n in PEERS if n in known)]}


def report(job: Job, results: dict[str, list[Result]]) -> list[str]:
    """Return the lines of a table: medians over the rounds, and mmtool's ratio to each of the others."""
    lines = [
        f"{job.workload.name}, batch {job.batch_size}",
        f"  {'':16}{'samples/s':>10}{'per CPU s':>11}{'first step s':>14}{'peak MB':>9}{'tree MB':>9}{'loss':>9}",
    ]
    middle = {}
    for name, runs in results.items():
        fields = Result.__dataclass_fields__
        middle[name] = Result(**{field: statistics.median(getattr(run, field) for run in runs) for field in fields})
        row = middle[name]
        lines.append(
            f"  {name:16}{row.samples_per_second:10.2f}{row.samples_per_cpu_second:11.2f}{row.first_step:14.2f}"
            f"{row.peak:9.0f}{row.tree:9.0f}{row.loss:9.4f}"
        )
    if "mmtool" in results:
        for name in results:
            if name != "mmtool":
                lines.append(f"  mmtool / {name}: {_ratios(results['mmtool'], results[name])}")
    return lines


def _ratios(ours: Sequence[Result], theirs: Sequence[Result]) -> str:
    """Return the medians of the ratios of neighbouring runs."""

    def middle(field: str) -> float:
        return statistics.median(getattr(a, field) / getattr(b, field) for a, b in zip(ours, theirs, strict=True))

    return (
        f"samples/s {middle('samples_per_second'):.2f}, per CPU second {middle('samples_per_cpu_second'):.2f}, "
        f"first step {middle('first_step'):.2f}, peak {middle('peak'):.2f}, tree {middle('tree'):.2f}"
    )


def main() -> None:
    """Run all candidates on all workloads, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for workloads, environments, runs and logs")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument(
        "--candidates", nargs="+", default=[], help="default: mmtool, trainer and the peers that are installed"
    )
    parser.add_argument("--install", nargs="+", choices=list(PEERS), default=[], help="make the environments of peers")
    parser.add_argument("--batch_size", type=int, help="only this one")
    parser.add_argument("--rows", type=int, help="fewer rows than the workload has")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the process that computes")
    parser.add_argument("--json", type=Path, help="also write every run there, one line each")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.install:
        if not (folder / f"venv-{name}").is_dir():
            install(name, folder / f"venv-{name}")
    chosen = candidates(args.candidates, folder)
    for name in args.workloads:
        workload = replace(WORKLOADS[name], num_rows=args.rows or WORKLOADS[name].num_rows)
        place = make(workload, folder)
        for batch_size in workload.batch_sizes:
            if args.batch_size not in (None, batch_size):
                continue
            job = Job(workload, batch_size, place)
            results: dict[str, list[Result]] = {candidate: [] for candidate in chosen}
            for number in range(args.rounds):
                for candidate, command in chosen.items():
                    run = folder / "runs" / f"{name}-{batch_size}-{candidate}-{number}-{time.time_ns()}"
                    run.mkdir(parents=True)
                    result = measure(command(job, run / "output"), job, args.threads, run / "log")
                    results[candidate].append(result)
                    if args.json is not None:
                        line = {"workload": name, "batch_size": batch_size, "candidate": candidate}
                        with args.json.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(line | result.__dict__) + "\n")
            print("\n".join(report(job, results)), flush=True)


if __name__ == "__main__":
    main()
