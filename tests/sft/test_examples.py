"""The scripts in examples/sft run: on the embedded model, or on a golden checkpoint of their family."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "sft"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.sh"))
GOLDEN = {
    "yi_vl": "yi-vl",
    "internlm_xcomposer2": "internlm-xcomposer2",
    "internlm_xcomposer2_5": "internlm-xcomposer2_5",
    "megrez_omni": "megrez-3b-omni",
    "megrez_instruct": "megrez-3b-instruct",
    "fm9g4b_v": "fm9g4b-v",
    "fm9g": "fm9g/mla",
}
# What `mmtool` is for the scripts: it tells how it was called.
TELL = """#!/bin/sh
exec "$PYTHON" -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@"
"""


def words_of(script: str, data_file: Path, folder: Path, golden: Callable[[str], Path]) -> list[str] | None:
    """Return the command that a script comes to, with a checkpoint of its family; None where there is none here."""
    family = script.rpartition("_")[0]
    try:
        model = {} if family == "tiny" else {"MODEL": str(golden(GOLDEN[family]) / "checkpoint")}
    except pytest.skip.Exception:
        return None
    (folder / "mmtool").write_text(TELL)
    (folder / "mmtool").chmod(0o755)
    environment = os.environ | model | {"DATASET": str(data_file), "PYTHON": sys.executable}
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    more = ["--max_steps", "1", "--output_dir", str(folder / script), "--add_output_dir_suffix", "false"]
    more += ["--dtype", "fp32", "--dataloader_num_workers", "0", "--gradient_accumulation_steps", "1"]
    told = subprocess.run(
        ["sh", str(EXAMPLES / f"{script}.sh"), *more], env=environment, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout)


@pytest.fixture(scope="module")
def ran(data_file: Path, golden: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The exit code, words and folder of every script; all in children of one process, for imports take longest."""
    folder = tmp_path_factory.mktemp("scripts")
    found = {script: words_of(script, data_file, folder, golden) for script in SCRIPTS}
    commands = {script: words for script, words in found.items() if words is not None}
    (folder / "commands.json").write_text(json.dumps(list(commands.values())))
    command = [sys.executable, str(Path(__file__).with_name("forked.py")), str(folder / "commands.json")]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    codes = [int(line) for line in ran.stdout.split()]
    return {
        script: (code, (folder / f"{number}.log").read_text(), folder / script)
        for number, (script, code) in enumerate(zip(commands, codes, strict=True))
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_train(script: str, ran: dict[str, Any]) -> None:
    if script not in ran:
        pytest.skip("no golden data of the family")
    if script.endswith("deepspeed"):
        pytest.importorskip("deepspeed")
    code, told, folder = ran[script]
    assert code == 0, told[-3000:]
    files = {path.name for path in (folder / "checkpoint-1").iterdir()}
    assert ("config.json" if script.endswith("full") else "adapter_config.json") in files
    assert "mmtool infer --ckpt_dir" in told


def test_every_family_has_the_three() -> None:
    assert set(SCRIPTS) == {f"{family}_{way}" for family in (*GOLDEN, "tiny") for way in ("lora", "full", "deepspeed")}
