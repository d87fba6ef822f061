"""A .gguf file, loaded by llama.cpp itself: the same ids for texts, the same greedy answers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtool.errors import MMToolError
from mmtool.export import gguf_check, gguf_tokenizer
from mmtool.loader import get_template, load_model, open_folder

pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(gguf_check.binding() is None, reason="no package that runs llama.cpp")


def with_config(golden_folder: Path, folder: Path, **changed: object) -> Path:
    shutil.copytree(golden_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    return folder


def cut_as_qwen2(source: Path, folder: Path) -> Path:
    """A copy of a model whose tokenizer cuts text as those of Qwen2 do, which llama.cpp knows."""
    shutil.copytree(source, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = gguf_tokenizer.QWEN2
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@needs_llama_cpp
@pytest.mark.parametrize("family", ["megrez-3b-instruct", "fm9g/gqa", "fm9g/mla", "fm9g/mha", "llama", "qwen3"])
def test_llama_cpp_answers_as_the_model(
    family: str,
    golden: Callable[[str], Path],
    released: Callable[[str], Path],
    export: Callable[..., None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "mmtool")
    root, _, inner = family.partition("/")
    if root in ("megrez-3b-instruct", "fm9g"):
        base = golden(root) / inner / "checkpoint"
    else:
        base = cut_as_qwen2(released(family), tmp_path / "base")
    export("--model_id_or_path", base, "--to_gguf", "true", "--gguf_type", "f32", "--output_dir", tmp_path / "new")
    (path,) = (tmp_path / "new").iterdir()
    spec, folder = open_folder(None, base)
    model, processor = load_model(spec, folder, dtype="fp32")
    template = get_template(spec, processor)
    with gguf_check.opened(path) as llama_cpp:
        for question in ("say 1", "请说。"):
            ids = template.encode([{"role": "user", "content": question}])["input_ids"]
            mask = torch.ones(1, len(ids), dtype=torch.long)
            expected = model.generate(torch.tensor([ids]), attention_mask=mask, max_new_tokens=12, do_sample=False)
            assert llama_cpp.greedy(ids, 12) == expected[0, len(ids) :].tolist()


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_adapters_are_merged_into_the_file(
    kind: str,
    golden: Callable[[str], Path],
    adapter: Callable[..., Path],
    export: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "mmtool")
    base = golden("megrez-3b-instruct") / "checkpoint"
    trained = adapter(base, target_modules=["q_proj", "down_proj"])
    words = ["--model_id_or_path", base, "--ckpt_dir", trained, "--merge_lora", "true", "--to_gguf", "true"]
    export(*words, "--gguf_type", kind)
    assert "ids of 5 texts the same" in caplog.text
    assert (trained.parent / "adapter-merged-gguf" / f"adapter-{kind}.gguf").is_file()


@needs_llama_cpp
def test_a_file_that_answers_otherwise_is_not_kept(
    golden: Callable[[str], Path],
    adapter: Callable[..., Path],
    export: Callable[..., None],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    base = golden("megrez-3b-instruct") / "checkpoint"
    trained = adapter(base, target_modules=["q_proj", "down_proj"], size=0.3)
    monkeypatch.setattr(gguf_check, "attach_adapters", lambda model, adapters: model)
    words = ["--model_id_or_path", base, "--ckpt_dir", trained, "--merge_lora", "true", "--to_gguf", "true"]
    with pytest.raises(MMToolError, match="answers otherwise than the model"):
        export(*words)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("yi-vl", "takes image: a .gguf file holds a language model alone"),
        ("megrez-3b-omni", "takes image and audio"),
        ("qwen2_vl", "auto takes image"),
        ("cohere", "models of type 'cohere' are not written"),
        ("llama", "its tokenizer cuts text in a way that llama.cpp does not have"),
    ],
)
def test_what_llama_cpp_does_not_know_is_refused_with_the_reason(
    family: str,
    reason: str,
    golden: Callable[[str], Path],
    released: Callable[[str], Path],
    export: Callable[..., None],
    tmp_path: Path,
) -> None:
    base = golden(family) / "checkpoint" if "-" in family else released(family)
    with pytest.raises(MMToolError, match=reason):
        export("--model_id_or_path", base, "--to_gguf", "true", "--output_dir", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_maths_that_llama_cpp_does_not_have_is_refused(
    golden: Callable[[str], Path], export: Callable[..., None], tmp_path: Path
) -> None:
    rope = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    base = with_config(golden("fm9g") / "mla" / "checkpoint", tmp_path / "base", **rope)
    with pytest.raises(MMToolError, match="rotary frequencies change with the length"):
        export("--model_id_or_path", base, "--to_gguf", "true")
