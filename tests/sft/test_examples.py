"""The scripts in examples/sft run: on the embedded model, or on a golden checkpoint of their family."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "sft"
GOLDEN = {
    "yi_vl": "yi-vl",
    "internlm_xcomposer2": "internlm-xcomposer2",
    "internlm_xcomposer2_5": "internlm-xcomposer2_5",
    "megrez_omni": "megrez-3b-omni",
    "megrez_instruct": "megrez-3b-instruct",
    "fm9g4b_v": "fm9g4b-v",
    "fm9g": "fm9g/mla",
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.stem)
def test_scripts_train(script: Path, golden: Callable[[str], Path], data_file: Path, tmp_path: Path) -> None:
    family = script.stem.rpartition("_")[0]
    model = {} if family == "tiny" else {"MODEL": str(golden(GOLDEN[family]) / "checkpoint")}
    more = ["--max_steps", "1", "--output_dir", str(tmp_path), "--add_output_dir_suffix", "false", "--dtype", "fp32"]
    environment = ENVIRONMENT | model | {"DATASET": str(data_file)}
    ran = subprocess.run(["sh", str(script), *more], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert (tmp_path / "checkpoint-1").is_dir()


@pytest.mark.slow
def test_the_embedded_model_learns_new_shapes(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "new_shapes.py"), "--folder", str(tmp_path)]
    ran = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    report = json.loads(ran.stdout.splitlines()[-1])
    assert report["accuracy_before"] < 0.2
    assert report["accuracy_after"] > 0.9
