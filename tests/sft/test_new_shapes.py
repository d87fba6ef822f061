"""The embedded model learns something it could not do, from a few hundred rows; `make test-learning` runs this."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "sft" / "new_shapes.py"


# Measured: 0 % before, 100 % after; the loss on what it knew before 0.0001, then 0.002.
@pytest.mark.slow
def test_the_embedded_model_learns_new_shapes_and_keeps_the_old(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--folder", str(tmp_path)]
    # One thread for arithmetic and one process for pictures are what two cores do best with a model of this size.
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    report = json.loads(ran.stdout.splitlines()[-1])
    print(report)
    assert report["accuracy_before"] < 0.2
    assert report["accuracy_after"] > 0.9
    assert report["accuracy_served"] > 0.9
    assert report["old_loss_after"] < report["old_loss_before"] + 0.1
