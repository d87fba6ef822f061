"""GPTQ and AWQ through llm-compressor, on the CPU.

It takes an older transformers than the other tests, so these run in an environment of its own:
``pip install -e '.[dev,quant,compress]'`` and ``pytest -m slow tests/export/test_compress.py``.
"""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llmcompressor", "torchao")),
        reason="llmcompressor and torchao are not installed",
    ),
]
PICTURE = Path(__file__).parents[2] / "examples" / "pictures" / "shapes.png"


def mmtool(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmtool", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize(("bits", "least"), [("8", 99.0), ("4", 95.0)])
def test_the_embedded_model_is_calibrated_on_rows_with_pictures(
    method: str, bits: str, least: float, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    words = ["--model_type", "tiny", "--quant_method", method, "--quant_bits", bits, "--quant_n_samples", "8"]
    if bits == "8":
        trained = adapter(None, target_modules=r".*language_model.*(q|v)_proj", size=0.01)
        words += ["--ckpt_dir", trained, "--merge_lora", "true"]
    done = mmtool("export", *words, "--output_dir", tmp_path / "new")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stdout
    assert "8 images" in done.stderr
    assert "calibrating on 8 rows of the embedded set" in done.stderr
    assert float(re.search(r"agreement +([\d.]+) %", done.stderr)[1]) >= least  # type: ignore[index]
    assert re.search(r"answers +1[3-6] of 16 the same", done.stderr)
    question = ["--query", "How many shapes are there?", "--images", PICTURE]
    asked = mmtool("infer", "--ckpt_dir", tmp_path / "new", *question)
    assert asked.returncode == 0, asked.stderr[-3000:]
    assert "3" in asked.stdout


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", ["fm9g/mla", "internlm-xcomposer2_5", "megrez-3b-omni", "qwen2_vl", "llama-tied"])
def test_families_keep_their_answers_in_eight_bits(
    family: str, method: str, golden: Callable[[str], Path], released: Callable[[str], Path], tmp_path: Path
) -> None:
    root, _, inner = family.partition("/")
    base = released(family) if family in ("qwen2_vl", "llama-tied") else golden(root) / inner / "checkpoint"
    words = ["--model_id_or_path", base, "--quant_method", method, "--quant_bits", "8"]
    done = mmtool("export", *words, "--output_dir", tmp_path / "new")
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(re.search(r"agreement +([\d.]+) %", done.stderr)[1]) >= 75.0  # type: ignore[index]
