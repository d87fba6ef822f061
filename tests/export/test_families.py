"""Every family: an adapter is trained for two steps, merged, verified, loaded again, and answers as before."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mmtool.args import InferArgs
from mmtool.engine.base import Sampling, request_from
from mmtool.engine.create import create_engine
from mmtool.export.layout import read_release
from mmtool.export.verify import conversations
from mmtool.finetuned import attach_adapter, open_finetuned
from mmtool.infer.answer import stream_answer
from mmtool.infer.main import infer_main
from mmtool.loader import get_template, load_model, open_folder
from mmtool.models.common.weights import read_weights
from mmtool.options import read_args
from mmtool.spec import ModelSpec

FAMILIES = [
    "yi-vl",
    "internlm-xcomposer2",
    "internlm-xcomposer2/variant_4khd",
    "internlm-xcomposer2_5",
    "megrez-3b-omni",
    "megrez-3b-instruct",
    "fm9g4b-v",
    "fm9g/gqa",
    "fm9g/mla",
    "fm9g/mha",
]


def answers(spec: ModelSpec, folder: Path, adapter: Path | None = None) -> list[tuple[int, ...]]:
    """Greedy ids of the answers to the questions that `--verify` asks."""
    model, processor = load_model(spec, folder, dtype="fp32")
    if adapter is not None:
        model = attach_adapter(model, adapter)
    template = get_template(spec, processor)
    engine = create_engine(model, processor, "pt", max_batch_size=1)
    requests = [
        request_from(template, messages[:-1], Sampling(max_new_tokens=12)) for messages in conversations(spec, None)
    ]
    return [stream_answer(engine, request, lambda text: None).token_ids for request in requests]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_adapter_answers_as_before(
    family: str,
    golden: Callable[[str], Path],
    train: Callable[..., Path],
    export: Callable[..., None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "mmtool")
    root, _, inner = family.partition("/")
    base = golden(root) / inner / "checkpoint"
    spec, _ = open_folder(None, base)
    checkpoint = train(base, *spec.modalities)
    export("--ckpt_dir", checkpoint, "--merge_lora", "true", "--max_shard_size", "1MB")
    assert "top-1 agreement 100.00 %" in caplog.text
    assert "in memory" not in caplog.text
    merged = checkpoint.with_name("checkpoint-2-merged")

    # the layout of the release: the same tensors, and files of the same kind beside them
    theirs, ours = read_release(spec, base), read_release(spec, merged)
    assert {(item.group, item.name) for item in ours.tensors} == {(item.group, item.name) for item in theirs.tensors}
    assert all(item.tensor.path.suffix == ".safetensors" for item in ours.tensors)
    assert max(path.stat().st_size for path in merged.rglob("*.safetensors")) < 1_100_000
    others = {path.name for path in base.iterdir() if path.suffix in (".json", ".model") and "index" not in path.name}
    assert others <= {path.name for path in merged.iterdir()}
    assert json.loads((merged / "config.json").read_text()) == json.loads((base / "config.json").read_text())

    # it answers as base and adapter do, and not as the base
    spec, folder = open_folder(None, merged)
    expected = answers(spec, base, checkpoint)
    assert answers(spec, folder) == expected
    assert answers(spec, base) != expected

    # the guides' next command
    assert open_finetuned(merged).options["model_type"] == spec.model_type
    result = tmp_path / "answers.jsonl"
    words = ["--ckpt_dir", str(merged), "--load_dataset_config", "true", "--result_path", str(result)]
    infer_main(read_args(InferArgs, [*words, "--max_new_tokens", "2"], "mmtool infer"))
    kept = (merged / "val_dataset.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(result.read_text(encoding="utf-8").splitlines()) == len(kept) > 0
    assert read_weights(merged)
    elsewhere = merged.rename(tmp_path / "elsewhere")
    assert open_finetuned(elsewhere).val_dataset.parent == elsewhere
