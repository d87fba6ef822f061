"""Weights in 4 and 8 bits through bitsandbytes, which runs on the CPU as well.

transformers and peft load bitsandbytes at every start where they find it, so it lies in a folder of its own (`make
setup`), and commands run in a process that looks there.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BESIDE = Path(sys.prefix) / "bnb"
has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None or (BESIDE / "bitsandbytes").is_dir()
pytestmark = pytest.mark.skipif(not has_bitsandbytes, reason="bitsandbytes is not installed")
PICTURE = Path(__file__).parents[2] / "examples" / "pictures" / "shapes.png"
FAMILIES = [
    *("yi-vl", "internlm-xcomposer2", "internlm-xcomposer2/variant_4khd", "internlm-xcomposer2_5", "megrez-3b-omni"),
    *("megrez-3b-instruct", "fm9g4b-v", "fm9g/gqa", "fm9g/mla", "fm9g/mha", "llama-tied", "gpt2", "qwen2_vl"),
]


def python(*words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(BESIDE)}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def export(*words: object) -> str:
    done = python("-m", "mmtool", "export", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


# What transformers makes of the same model in memory has the same weights, to the last bit.
AS_IN_MEMORY = """
import sys
from pathlib import Path
import torch
from mmtool.loader import load_model, open_folder
from mmtool.sft.network import quantization
spec, base = open_folder("tiny")
_, folder = open_folder(None, Path(sys.argv[1]))
ours, _ = load_model(spec, folder, dtype="fp32")
theirs, _ = load_model(spec, base, dtype="fp32", model_kwargs={"quantization_config": quantization(sys.argv[2], spec)})
ours, theirs = ours.state_dict(), theirs.state_dict()
assert any(".absmax" in name or ".SCB" in name for name in ours)
for name, tensor in theirs.items():
    if "quant_state" not in name:  # text, that is longer here
        assert torch.equal(ours[name], tensor.to(ours[name].dtype)), name
assert ours.keys() == theirs.keys()
"""


@pytest.mark.parametrize("bits", ["4", pytest.param("8", marks=pytest.mark.slow)])
def test_the_embedded_model_in_few_bits(bits: str, tmp_path: Path) -> None:
    words = ["--model_type", "tiny", "--quant_method", "bnb", "--quant_bits", bits]
    said = export(*words, "--output_dir", tmp_path / "new", "--max_shard_size", "3MB")
    assert float(re.search(r"agreement +([\d.]+) %", said)[1]) >= 95.0  # type: ignore[index]
    assert int(re.search(r"size .* (\d+) %", said)[1]) < 85  # type: ignore[index]
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    done = python("-c", AS_IN_MEMORY, tmp_path / "new", bits)
    assert done.returncode == 0, done.stderr[-3000:]
    question = ["--query", "How many shapes are there?", "--images", PICTURE]
    asked = python("-m", "mmtool", "infer", "--ckpt_dir", tmp_path / "new", *question)
    assert asked.returncode == 0, asked.stderr[-3000:]
    assert "3" in asked.stdout


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", ["4", "8"])
def test_every_family_in_few_bits(
    family: str,
    bits: str,
    golden: Callable[[str], Path],
    released: Callable[[str], Path],
    adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    root, _, inner = family.partition("/")
    base = golden(root) / inner / "checkpoint" if (root + inner)[:4] in ("yi-v", "inte", "megr", "fm9g") else None
    base = base or released(family)
    targets = {"gpt2": ["c_attn"]}.get(family, ["o_proj", "wo"])
    trained = adapter(base, target_modules=targets, size=0.02)
    words = ["--model_id_or_path", base, "--ckpt_dir", trained, "--merge_lora", "true", "--quant_method", "bnb"]
    done = python("-m", "mmtool", "export", *words, "--quant_bits", bits)
    if family == "gpt2":  # has its matrices the other way round
        assert (done.returncode, "no layer can be quantised" in done.stderr) == (2, True)
        return
    assert done.returncode == 0, done.stderr[-3000:]
    new = trained.with_name(f"adapter-merged-bnb-int{bits}")
    stored = json.loads((new / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored[f"load_in_{bits}bit"]) == ("bitsandbytes", True)
    assert int(re.search(r"quantised +(\d+) layers", done.stderr)[1]) > 3  # type: ignore[index]
    asked = python("-m", "mmtool", "infer", "--ckpt_dir", new, "--query", "Hello", "--max_new_tokens", "3")
    assert asked.returncode == 0, asked.stderr[-3000:]


PLAIN = """
import sys
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert not [name for name in sys.modules if name.partition(".")[0] == "mmtool"]
import bitsandbytes
assert isinstance(model.model.layers[0].self_attn.o_proj, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))
from mmtool.loader import load_model, open_folder
ours, _ = load_model(*open_folder(None, sys.argv[1]))
ids = torch.arange(10, 40).unsqueeze(0)
with torch.no_grad():
    assert torch.equal(model(input_ids=ids).logits, ours(input_ids=ids).logits)
"""


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4", "8"])
@pytest.mark.parametrize("base", ["megrez-3b-instruct", "llama-tied"])
def test_plain_transformers_loads_the_files(
    base: str, bits: str, golden: Callable[[str], Path], released: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = golden(base) / "checkpoint" if base.startswith("megrez") else released(base)
    words = ["--quant_method", "bnb", "--quant_bits", bits, "--output_dir", tmp_path / "new"]
    export("--model_id_or_path", folder, *words)
    done = python("-c", PLAIN, tmp_path / "new")
    assert done.returncode == 0, done.stderr[-3000:]
