"""Weights in 4 and 8 bits through torchao, which truly runs on the CPU.

transformers loads torchao at every start where it finds it, so it lies in a folder of its own (`make setup`), and the
command runs in a process that looks there.
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
import torch

from mmtool.args import ExportArgs
from mmtool.errors import MMToolError
from mmtool.export.quality import Measured, describe, measure
from mmtool.export.rows import read_rows
from mmtool.export.source import open_source
from mmtool.loader import load_model
from mmtool.models.common.quantised import pack, unpack
from mmtool.models.common.weights import read_weights
from mmtool.options import read_args

BESIDE = Path(sys.prefix) / "quant"
has_torchao = importlib.util.find_spec("torchao") is not None or (BESIDE / "torchao").is_dir()
needs_torchao = pytest.mark.skipif(not has_torchao, reason="torchao is not installed")
PICTURE = Path(__file__).parents[2] / "examples" / "pictures" / "shapes.png"


def mmtool(*words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(BESIDE)}
    command = [sys.executable, "-m", "mmtool", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_two_numbers_share_a_byte() -> None:
    numbers = torch.randint(-8, 8, (6, 32), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = pack(numbers)
    assert packed.shape == (6, 16)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed), numbers)


@needs_torchao
@pytest.mark.parametrize(("bits", "least"), [("8", 99.0), ("4", 90.0)])
def test_the_embedded_model_in_few_bits(bits: str, least: float, tmp_path: Path) -> None:
    words = ["--model_type", "tiny", "--quant_method", "torchao", "--quant_bits", bits]
    done = mmtool("export", *words, "--output_dir", tmp_path / "new")
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(re.search(r"agreement +([\d.]+) %", done.stderr)[1]) >= least  # type: ignore[index]
    before, after = map(float, re.search(r"loss +([\d.]+) before, ([\d.]+) after", done.stderr).groups())  # type: ignore[union-attr]
    assert after < before + 0.1
    assert re.search(r"answers +1[3-6] of 16 the same", done.stderr)
    assert int(re.search(r"size .* (\d+) %", done.stderr)[1]) < 85  # type: ignore[index]
    stored = {tensor.path.name: tensor for tensor in read_weights(tmp_path / "new").values()}
    assert stored
    quantised = {name for name, tensor in read_weights(tmp_path / "new").items() if hasattr(tensor, "bits")}
    assert quantised
    assert all(".layers." in name and "vision" not in name and "mm_projector" not in name for name in quantised)
    asked = mmtool(
        "infer", "--ckpt_dir", tmp_path / "new", "--query", "How many shapes are there?", "--images", PICTURE
    )
    assert asked.returncode == 0, asked.stderr[-3000:]
    assert "3" in asked.stdout


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize("family", ["fm9g/mla", "internlm-xcomposer2_5", "qwen2_vl"])
def test_an_adapter_is_merged_and_quantised_in_one_go(
    family: str,
    golden: Callable[[str], Path],
    released: Callable[[str], Path],
    adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    root, _, inner = family.partition("/")
    base = released(family) if family == "qwen2_vl" else golden(root) / inner / "checkpoint"
    trained = adapter(base, target_modules=["o_proj", "wo"], size=0.2)
    words = ["--model_id_or_path", base, "--ckpt_dir", trained, "--merge_lora", "true", "--quant_method", "torchao"]
    done = mmtool("export", *words, "--quant_bits", "8")
    assert done.returncode == 0, done.stderr[-3000:]
    new = trained.with_name("adapter-merged-torchao-int8")
    assert json.loads((new / "config.json").read_text())["mmtool_quantization"] == {"method": "torchao", "bits": 8}
    assert float(re.search(r"agreement +([\d.]+) %", done.stderr)[1]) >= 80.0  # type: ignore[index]
    again = mmtool("export", "--ckpt_dir", new, "--dtype", "bf16")
    assert again.returncode == 2
    assert "holds quantised weights" in again.stderr


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("torchao", "need the package torchao"),
        ("bnb", "needs the package bitsandbytes"),
        ("gptq", "needs the package llmcompressor"),
        ("awq", "needs the package llmcompressor"),
    ],
)
def test_what_is_missing_is_said(
    method: str, said: str, export: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("torchao", "bitsandbytes", "llmcompressor"):
        if importlib.util.find_spec(package) is not None:
            pytest.skip(f"{package} is installed")
    with pytest.raises(MMToolError, match=said):
        export("--model_type", "tiny", "--quant_method", method, "--output_dir", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@needs_torchao
def test_names_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    words = ["--model_type", "tiny", "--quant_method", "torchao", "--output_dir", tmp_path / "new"]
    done = mmtool("export", *words, "--quant_parts", "vision_encodr")
    assert (done.returncode, "Did you mean vision_encoder?" in done.stderr) == (2, True)
    done = mmtool("export", *words, "--quant_modules_to_not_convert", "q_pro")
    assert (done.returncode, "Did you mean q_proj?" in done.stderr) == (2, True)


def test_the_groups_of_bitsandbytes_are_its_own(export: Callable[..., None]) -> None:
    with pytest.raises(MMToolError, match="the groups of bitsandbytes are fixed"):
        export("--model_type", "tiny", "--quant_method", "bnb", "--quant_group_size", "32")


@pytest.mark.parametrize("bits", [8, 4])
def test_a_damaged_model_is_beyond_the_bounds(bits: int) -> None:
    args = read_args(ExportArgs, ["--model_type", "tiny", "--quant_method", "torchao"], "mmtool export")
    source = open_source(args)
    rows = read_rows(args, source, 3)
    model, _ = load_model(source.spec, source.folder, processor=rows.template.processor)
    before = measure(model, rows, "before")
    table = dict(describe(before, measure(model, rows, "the same", before), rows.origin, bits))
    assert table["agreement"].startswith("100.00 % of ")
    assert "off by 0.000" in table["agreement"]
    matrices = [layer.mlp.down_proj.weight for layer in model.get_decoder().layers]
    with torch.no_grad():
        for matrix in matrices:  # rows change places
            matrix.copy_(matrix.roll(1, 0))
        after = measure(model, rows, "after", before)
        with pytest.raises(MMToolError, match="the quantised model is too far from its source: loss"):
            describe(before, after, rows.origin, bits)
        matrices[0].fill_(torch.nan)
        with pytest.raises(MMToolError, match="computes no finite numbers"):
            measure(model, rows, "after", before)


def test_untrained_models_are_judged_by_what_changes_and_not_by_their_loss() -> None:
    ids = torch.arange(4)
    before, near, far = Measured(8.0, ids, [()]), Measured(8.3, 1 + ids, [()], 0.6), Measured(7.9, 1 + ids, [()], 3.1)
    assert dict(describe(before, near, "rows", 4))["agreement"].startswith("0.00 % of 4 likeliest tokens, off by 0.6")
    for bits, other in ((8, near), (4, far), (8, far)):
        with pytest.raises(MMToolError, match="too far from its source"):
            describe(before, other, "rows", bits)
