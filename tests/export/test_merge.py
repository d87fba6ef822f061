"""Adapters of every kind that training can make, merged into models that store their weights in different ways."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mmtool.errors import CheckpointError, MMToolError
from mmtool.export import convert, verify
from mmtool.export.merge_lora import Adapter
from mmtool.finetuned import attach_adapter
from mmtool.loader import load_model, open_folder

LLM = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
VISION = r"model\.vision_tower\..*\.(q_proj|fc1)"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors below a folder by the file's folder and name."""
    return {
        f"{path.parent.relative_to(folder)}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def row(text: str, title: str) -> str:
    """A row of the table at the end."""
    return next(line for line in text.splitlines() if line.startswith(title))


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", "mmtool")
    return caplog


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("tiny", {"target_modules": LLM, "use_dora": True}),
        ("tiny", {"target_modules": LLM, "use_rslora": True, "r": 16}),
        ("tiny", {"target_modules": LLM, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r".*\.mlp\.\w+": 3}}),
        ("tiny", {"target_modules": f"{LLM}|{VISION}"}),
        ("tiny", {"target_modules": LLM, "modules_to_save": ["multi_modal_projector", "embed_tokens", "lm_head"]}),
        ("tiny", {"target_modules": LLM, "init_lora_weights": "olora"}),
        ("tiny", {"target_modules": LLM, "init_lora_weights": "pissa"}),
        ("tiny", {"target_modules": ["embed_tokens", "patch_embedding", "q_proj"]}),
        ("tiny", {"target_modules": VISION, "lora_bias": True}),
        ("tiny", {"target_modules": LLM, "bias": "all"}),
        ("llama", {"target_modules": "all-linear"}),
        ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("qwen2_vl", {"target_modules": ["q_proj", "down_proj", "qkv"]}),
        ("gemma3", {"target_modules": ["q_proj", "o_proj"]}),
        ("qwen3_vl", {"target_modules": ["q_proj", "gate_proj"], "use_dora": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value)[15:60],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_every_kind_of_adapter_is_merged(
    base: str,
    settings: dict[str, Any],
    released: Callable[[str], Path],
    adapter: Callable[..., Path],
    export: Callable[..., None],
    tmp_path: Path,
    said: pytest.LogCaptureFixture,
) -> None:
    folder = None if base == "tiny" else released(base)
    trained = adapter(folder, **settings)
    words = ["--model_id_or_path", folder] if folder else ["--model_type", "tiny"]
    output = ["--dtype", "fp32", "--output_dir", tmp_path / "merged"]
    export(*words, "--ckpt_dir", trained, "--merge_lora", "true", *output)
    assert "in memory" not in said.text
    assert "100.00 %" in row(said.text, "verified")
    stored = tensors(tmp_path / "merged")
    before = tensors(folder or open_folder("tiny")[1])
    assert any(not torch.equal(stored[name], before[name].to(stored[name].dtype)) for name in before)
    assert set(before) <= set(stored)
    if folder is not None:  # transformers alone loads it, and agrees with peft on the base
        spec, _ = open_folder(None, folder)
        auto = transformers.AutoModelForImageTextToText if spec.modalities else transformers.AutoModelForCausalLM
        plain = auto.from_pretrained(tmp_path / "merged").eval()
        model = attach_adapter(load_model(spec, folder, dtype="fp32")[0], trained)
        ids = torch.arange(10, 40).unsqueeze(0)
        with torch.no_grad():
            expected, found = model(input_ids=ids).logits, plain(input_ids=ids).logits
        torch.testing.assert_close(found, expected, atol=2e-4 * float(expected.std()) + 1e-5, rtol=0)


def test_a_tower_changes_in_both_places_where_a_release_stores_it(
    golden: Callable[[str], Path], adapter: Callable[..., Path], export: Callable[..., None], tmp_path: Path
) -> None:
    base = golden("yi-vl") / "checkpoint"
    trained = adapter(base, target_modules=VISION)
    export("--model_id_or_path", base, "--ckpt_dir", trained, "--merge_lora", "true", "--max_shard_size", "300KB")
    stored = tensors(trained.with_name("adapter-merged"))
    assert [name for name in stored if name.startswith("vit/")]
    inner = "encoder.layers.0.self_attn.q_proj.weight"
    copies = [tensor for name, tensor in stored.items() if name.endswith(inner)]
    assert len(copies) == 2
    assert torch.equal(*copies)


def bf16_base(folder: Path, source: Path) -> Path:
    """A copy of a model in bfloat16."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: t.bfloat16() for name, t in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return folder


def test_a_bf16_base_is_merged_in_float32_and_rounded_once(
    released: Callable[[str], Path],
    adapter: Callable[..., Path],
    export: Callable[..., None],
    tmp_path: Path,
    said: pytest.LogCaptureFixture,
) -> None:
    base = bf16_base(tmp_path / "base", released("llama"))
    trained = adapter(base, target_modules=["q_proj"], r=8)
    export("--model_id_or_path", base, "--ckpt_dir", trained, "--merge_lora", "true")
    merged = tensors(trained.with_name("adapter-merged"))
    deltas = load_file(trained / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    down, up = (deltas[f"base_model.model.{name}.lora_{letter}.weight"].float() for letter in "AB")
    weight = tensors(base)[f"./{name}.weight"]
    assert torch.equal(merged[f"./{name}.weight"], (weight.float() + up @ down * (8 / 8)).bfloat16())
    assert "verified" in said.text
    wide = ["--dtype", "fp32", "--output_dir", tmp_path / "wide"]
    export("--model_id_or_path", base, "--ckpt_dir", trained, "--merge_lora", "true", *wide)
    assert {tensor.dtype for tensor in tensors(tmp_path / "wide").values()} == {torch.float32}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("dora", [False, True])
def test_several_adapters_count_as_they_are_told(
    dora: bool, adapter: Callable[..., Path], export: Callable[..., None], tmp_path: Path, said: Any
) -> None:
    whole = {"modules_to_save": ["multi_modal_projector"]}
    first = adapter(None, name="first", target_modules=LLM, use_dora=dora, **whole)
    second = adapter(None, name="second", target_modules=r".*language_model.*q_proj", r=2, **whole)
    output = ["--dtype", "fp32", "--output_dir", tmp_path / "mixed"]
    export("--model_type", "tiny", "--adapters", f"{first}:0.7", f"{second}:0.3", "--merge_lora", "true", *output)
    assert "100.00 %" in row(said.text, "verified")
    base, mixed = tensors(open_folder("tiny")[1]), tensors(tmp_path / "mixed")
    alone = []
    for folder in (first, second):
        export("--model_type", "tiny", "--ckpt_dir", folder, "--merge_lora", "true", "--dtype", "fp32")
        alone.append(tensors(folder.with_name(f"{folder.name}-merged-fp32")))
    for name in base:
        base[name] = base[name].float()
        expected = base[name] + 0.7 * (alone[0][name] - base[name]) + 0.3 * (alone[1][name] - base[name])
        torch.testing.assert_close(mixed[name], expected, atol=1e-5, rtol=0)


def test_kinds_that_no_stream_can_merge_are_merged_in_memory(
    released: Callable[[str], Path], adapter: Callable[..., Path], export: Callable[..., None], said: Any
) -> None:
    base = released("llama")
    trained = adapter(base, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 6]})
    export("--model_id_or_path", base, "--ckpt_dir", trained, "--merge_lora", "true")
    assert "merging in memory" in said.text
    assert "100.00 %" in row(said.text, "verified")
    changed = tensors(trained.with_name("adapter-merged"))["./model.embed_tokens.weight"]
    assert set((changed != tensors(base)["./model.embed_tokens.weight"]).any(1).nonzero().flatten().tolist()) == {5, 6}


# Converting -----------------------------------------------------------------------------------------------------------


def test_bin_weights_become_safetensors_bit_for_bit(
    golden: Callable[[str], Path], export: Callable[..., None], tmp_path: Path, said: Any
) -> None:
    base = golden("yi-vl") / "checkpoint"
    export("--model_id_or_path", base, "--to_safetensors", "true", "--output_dir", tmp_path / "new")
    assert "difference 0 " in row(said.text, "verified")
    assert not list((tmp_path / "new").rglob("*.bin"))
    stored = tensors(tmp_path / "new")
    vit = next((base / "vit").iterdir())
    for path in (*base.glob("*.bin"), vit / "pytorch_model.bin"):
        for name, tensor in torch.load(path, weights_only=True).items():
            assert torch.equal(stored[f"{path.parent.relative_to(base)}/{name}"], tensor)
    assert (tmp_path / "new" / "vit" / vit.name / "preprocessor_config.json").is_file()


def test_another_number_format(export: Callable[..., None], tmp_path: Path, said: Any) -> None:
    export("--model_type", "tiny", "--dtype", "bf16", "--output_dir", tmp_path / "new")
    floats = {tensor.dtype for tensor in tensors(tmp_path / "new").values() if tensor.is_floating_point()}
    assert floats == {torch.bfloat16}
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert "bfloat16" in (config.get("torch_dtype"), config.get("dtype"))


# What goes wrong ------------------------------------------------------------------------------------------------------


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_existing_folder_is_replaced_only_where_that_is_asked_for(
    adapter: Callable[..., Path], export: Callable[..., None], tmp_path: Path
) -> None:
    trained = adapter(None, target_modules=LLM)
    (tmp_path / "adapter-merged").mkdir()
    (tmp_path / "adapter-merged" / "mine.txt").write_text("keep")
    command = ["--model_type", "tiny", "--ckpt_dir", trained, "--merge_lora", "true", "--verify", "false"]
    with pytest.raises(MMToolError, match="exists already"):
        export(*command)
    assert left(tmp_path / "adapter-merged") == {"mine.txt"}
    export(*command, "--overwrite", "true")
    assert "mine.txt" not in left(tmp_path / "adapter-merged")
    assert left(tmp_path) == {"adapter", "adapter-merged"}


def test_nothing_is_left_where_the_answers_differ(
    adapter: Callable[..., Path], export: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, other = adapter(None, target_modules=LLM), adapter(None, name="other one", target_modules=LLM)
    attach = verify.attach_adapters
    monkeypatch.setattr(verify, "attach_adapters", lambda model, adapters: attach(model, [Adapter(other)]))
    with pytest.raises(MMToolError, match="does not answer as its source does: largest logit difference"):
        export("--model_type", "tiny", "--ckpt_dir", trained, "--merge_lora", "true")
    assert left(tmp_path) == {"adapter", "other one"}


def test_the_wrong_merge_of_a_weak_adapter_is_found_beside_the_rounding(
    adapter: Callable[..., Path], export: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weak = {"target_modules": LLM, "r": 4, "lora_alpha": 1}
    trained, other = adapter(None, **weak), adapter(None, name="other one", **weak)
    attach = verify.attach_adapters
    monkeypatch.setattr(verify, "attach_adapters", lambda model, adapters: attach(model, [Adapter(other)]))
    monkeypatch.setattr(verify, "BOUNDS", dict.fromkeys(verify.BOUNDS, 1e9))  # of rounding alone
    with pytest.raises(MMToolError, match="against peft's own merge"):
        export("--model_type", "tiny", "--ckpt_dir", trained, "--merge_lora", "true")
    assert left(tmp_path) == {"adapter", "other one"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_nothing_is_left_where_writing_fails(
    number: int, adapter: Callable[..., Path], export: Callable[..., None], tmp_path: Path, monkeypatch: Any
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        (tmp_path / ".unfinished-adapter-merged" / "half").write_text("half")
        raise OSError(number, os.strerror(number))

    trained = adapter(None, target_modules=LLM)
    monkeypatch.setattr(convert, "write_shards", fail)
    with pytest.raises(MMToolError, match=os.strerror(number)):
        export("--model_type", "tiny", "--ckpt_dir", trained, "--merge_lora", "true")
    assert left(tmp_path) == {"adapter"}


def test_a_full_disk_is_noticed_before_anything_is_written(
    adapter: Callable[..., Path], export: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = adapter(None, target_modules=LLM)
    usage = shutil.disk_usage(tmp_path)._replace(free=(64 << 20) + (8 << 20))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MMToolError, match=r"has 0\.08 GB left, but 0\.08 GB are needed"):
        export("--model_type", "tiny", "--ckpt_dir", trained, "--merge_lora", "true")
    assert left(tmp_path) == {"adapter"}


def test_an_interrupt_leaves_nothing(
    adapter: Callable[..., Path], export: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    trained = adapter(None, target_modules=LLM)
    monkeypatch.setattr(convert, "write_shards", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export("--model_type", "tiny", "--ckpt_dir", trained, "--merge_lora", "true")
    assert left(tmp_path) == {"adapter"}


def test_an_adapter_of_another_model_is_refused(
    released: Callable[[str], Path], adapter: Callable[..., Path], export: Callable[..., None], tmp_path: Path
) -> None:
    trained = adapter(released("llama"), target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match="does not fit the model"):
        export("--model_id_or_path", released("gpt2"), "--ckpt_dir", trained, "--merge_lora", "true")
    assert left(tmp_path) == {"adapter"}


def test_a_whole_model_has_nothing_to_merge(export: Callable[..., None]) -> None:
    _, folder = open_folder("tiny")
    with pytest.raises(CheckpointError, match="--merge_lora true needs a LoRA checkpoint"):
        export("--ckpt_dir", folder, "--merge_lora", "true")


# Neither this package nor anything of it is imported: the folder is all there is.
PLAIN = """
import sys
import torch, transformers
folder, kind, ids, out = sys.argv[1:]
model = getattr(transformers, kind).from_pretrained(folder).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
batch = torch.load(ids)
with torch.no_grad():
    logits = model(input_ids=batch["input_ids"]).logits
greedy = model.generate(input_ids=batch["input_ids"], max_new_tokens=8, do_sample=False)
assert not [name for name in sys.modules if name.partition(".")[0] == "mmtool"]
torch.save({"logits": logits, "greedy": greedy, "text_ids": tokenizer("Hello, 你好 12")["input_ids"]}, out)
"""


@pytest.mark.parametrize(
    "base",
    [
        "megrez-3b-instruct",
        "qwen2_vl",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama-tied", "qwen3")),
    ],
)
def test_plain_transformers_loads_what_it_knows(
    base: str,
    golden: Callable[[str], Path],
    released: Callable[[str], Path],
    adapter: Callable[..., Path],
    export: Callable[..., None],
    tmp_path: Path,
) -> None:
    folder = golden(base) / "checkpoint" if base.startswith("megrez") else released(base)
    trained = adapter(folder, target_modules=["q_proj", "down_proj"])
    export("--model_id_or_path", folder, "--ckpt_dir", trained, "--merge_lora", "true", "--max_shard_size", "500KB")
    spec, merged = open_folder(None, trained.with_name("adapter-merged"))
    base_model, processor = load_model(spec, folder, dtype="fp32")
    model = attach_adapter(base_model, trained)
    ids = torch.tensor([processor.tokenizer("Hello, 你好 12")["input_ids"]])
    torch.save({"input_ids": ids}, tmp_path / "ids.pt")
    kind = "AutoModelForImageTextToText" if spec.modalities else "AutoModelForCausalLM"
    words = [sys.executable, "-c", PLAIN, merged, kind, tmp_path / "ids.pt", tmp_path / "out.pt"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt")
    assert found["text_ids"] == ids[0].tolist()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(found["logits"], expected, atol=2e-5 * float(expected.std()), rtol=0)
    alone, _ = load_model(spec, merged, dtype="fp32")
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], alone(input_ids=ids).logits, atol=0, rtol=0)
    greedy = alone.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(found["greedy"], greedy)


def test_what_a_killed_run_has_left_is_put_right(export: Callable[..., None], tmp_path: Path) -> None:
    command = ["--model_type", "tiny", "--dtype", "fp32", "--verify", "false", "--output_dir", tmp_path / "new"]
    for name in (".unfinished-new", ".replaced-new"):  # killed between the two renames
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("of the first run")
    with pytest.raises(MMToolError, match="exists already"):
        export(*command)
    assert (tmp_path / "new" / "mine.txt").is_file()
    export(*command, "--overwrite", "true")
    assert left(tmp_path) == {"new"}
    assert "config.json" in left(tmp_path / "new")


def test_only_folders_are_replaced_and_not_the_one_that_one_is_in(
    export: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--model_type", "tiny", "--dtype", "fp32", "--verify", "false", "--overwrite", "true", "--output_dir"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MMToolError, match="is no folder"):
        export(*command, tmp_path / "file")
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    for place in (".", "..", tmp_path):
        with pytest.raises(MMToolError, match="holds the folder you are in"):
            export(*command, place)
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    export(*command, tmp_path / "link")
    assert (tmp_path / "target" / "config.json").is_file()
    assert left(tmp_path) == {"file", "inside", "link", "target"}


@pytest.mark.parametrize("weight", ["abc", "nan", "inf", ""])
def test_the_weight_of_an_adapter_is_a_number(
    weight: str, adapter: Callable[..., Path], export: Callable[..., None]
) -> None:
    trained = adapter(None, target_modules=LLM)
    with pytest.raises(MMToolError, match=f"--adapters {trained}:{weight}: '{weight}' is no weight"):
        export("--model_type", "tiny", "--adapters", f"{trained}:{weight}", "--merge_lora", "true")
    with pytest.raises(CheckpointError, match="--adapters nowhere: no such folder"):
        export("--model_type", "tiny", "--adapters", "nowhere:0.5", "--merge_lora", "true")


def test_an_adapter_that_is_cut_off_is_refused(adapter: Callable[..., Path], export: Callable[..., None]) -> None:
    trained = adapter(None, target_modules=LLM)
    data = (trained / "adapter_model.safetensors").read_bytes()
    (trained / "adapter_model.safetensors").write_bytes(data[:-50])
    with pytest.raises(CheckpointError, match="cannot read the adapter in"):
        export("--model_type", "tiny", "--ckpt_dir", trained, "--merge_lora", "true")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        attach_adapter(load_model(*open_folder("tiny"))[0], trained)


@pytest.mark.parametrize("merge", [False, True])
def test_numbers_that_a_format_cannot_hold_are_refused(
    merge: bool,
    released: Callable[[str], Path],
    adapter: Callable[..., Path],
    export: Callable[..., None],
    tmp_path: Path,
) -> None:
    shutil.copytree(released("llama"), tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name][0, 0] = 1e5
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    words = ["--model_id_or_path", tmp_path / "base", "--dtype", "fp16", "--verify", "false"]
    if merge:
        words += ["--ckpt_dir", adapter(tmp_path / "base", target_modules=["up_proj"]), "--merge_lora", "true"]
    with pytest.raises(MMToolError, match=f"{name} has numbers that float16 cannot hold"):
        export(*words)
    assert left(tmp_path) - {"adapter"} == {"base"}
