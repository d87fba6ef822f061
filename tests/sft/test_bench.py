"""The comparison with the peers runs, as far as the peers need no environment of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "bench" / "sft" / "compare.py"


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["vlm", "text"])
def test_both_sides_train_and_are_compared(workload: str, tmp_path: Path) -> None:
    words = ["--folder", str(tmp_path), "--workloads", workload, "--rows", "8", "--batch_size", "4", "--rounds", "1"]
    command = [
        sys.executable,
        str(SCRIPT),
        *words,
        "--candidates",
        "mmtool",
        "trainer",
        "--json",
        str(tmp_path / "all"),
    ]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "mmtool / trainer: samples/s" in ran.stdout
    ours, theirs = map(json.loads, (tmp_path / "all").read_text().splitlines())
    assert abs(ours["loss"] - theirs["loss"]) < 0.3, "the same work"


@pytest.mark.slow
def test_a_peer_that_is_not_installed_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--folder", str(tmp_path), "--candidates", "mmtool", "swift"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "swift cannot run here" in ran.stderr
    assert "--install" in ran.stderr
