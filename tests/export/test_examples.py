"""The scripts in examples/export run on the embedded model, or on a golden checkpoint where they need another one."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "export"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.sh"))


def test_every_script_is_tried() -> None:
    assert SCRIPTS == ["gguf", "merge", "merge_several", "push", "quantise", "to_safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "push"])  # that one: test_push.py
def test_scripts_export(name: str, golden: Callable[[str], Path], adapter: Callable[..., Path], tmp_path: Path) -> None:
    beside = Path(sys.prefix) / "quant"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    more = ["--output_dir", str(tmp_path / "new")]
    if name in ("merge", "merge_several", "quantise"):
        targets = {"target_modules": r".*language_model.*q_proj"}
        environment["CKPT"] = str(adapter(None, name="one", **targets))
        environment["OTHER_CKPT"] = str(adapter(None, name="other", **targets))
        more += ["--model_type", "tiny"]
    else:
        environment["MODEL"] = str(golden("megrez-3b-instruct" if name == "gguf" else "yi-vl") / "checkpoint")
    if name == "quantise":
        if not (beside / "torchao").is_dir():
            pytest.skip("torchao is not installed")
        environment["PYTHONPATH"] = str(beside)
    ran = subprocess.run(["sh", str(EXAMPLES / f"{name}.sh"), *more], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert any((tmp_path / "new").iterdir())
