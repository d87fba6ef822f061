"""Which folders become the model type ``auto``, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtool.errors import CheckpointError, MMToolError
from mmtool.llm import chat, get_model_tokenizer, get_template, inference_stream
from mmtool.loader import fit_layout, load_model, open_folder


@pytest.fixture
def folder(checkpoint, tmp_path: Path) -> Path:
    """A Llama folder that a test may change."""
    return shutil.copytree(checkpoint("llama"), tmp_path / "model")


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


@pytest.mark.parametrize(
    ("name", "modalities", "media_style"),
    [
        ("qwen2_vl", ("image",), "inline"),
        ("gemma3", ("image",), "inline"),
        ("qwen2_audio", ("audio",), "inline"),
        ("llama", (), "none"),
    ],
)
def test_a_folder_says_what_it_takes(checkpoint, name, modalities, media_style):
    for model_type in (None, "auto"):
        spec, _ = open_folder(model_type, checkpoint(name))
        assert (spec.model_type, spec.modalities, spec.media_style) == ("auto", modalities, media_style)


def test_a_folder_with_code_of_its_own_is_refused(folder):
    change_config(folder, model_type="marvel", auto_map={"AutoModelForCausalLM": "modeling_marvel.Marvel"})
    with pytest.raises(CheckpointError, match=r"holds a 'marvel' model.*the code in the folder \(auto_map\) is never"):
        open_folder(None, folder)


def test_a_model_that_transformers_does_not_know_is_refused(folder):
    change_config(folder, model_type="marvel")
    with pytest.raises(CheckpointError, match="holds a 'marvel' model, which neither mmtool nor transformers"):
        open_folder(None, folder)


@pytest.mark.parametrize(
    "model_type, reason", [("t5", "an encoder with a decoder"), ("clip", "does not answer in text")]
)
def test_a_model_that_does_not_continue_text_is_refused(tmp_path, model_type, reason):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(CheckpointError, match=reason):
        open_folder(None, tmp_path)


def test_auto_does_not_stand_for_a_registered_family(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"mmtool_model_type": "tiny", "model_type": "llava"}))
    with pytest.raises(CheckpointError, match=r"--model_type auto, but .* holds a tiny model"):
        open_folder("auto", tmp_path)
    with pytest.raises(MMToolError, match="auto is not on the hub"):
        open_folder("auto")


def test_missing_and_misshapen_weights_are_errors(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    lost = weights.pop("model.norm.weight")
    save_file(weights, path, {"format": "pt"})
    spec, _ = open_folder(None, folder)
    with pytest.raises(CheckpointError, match=r"missing: model\.norm\.weight"):
        load_model(spec, folder, device_map="cpu")
    save_file(weights | {"model.norm.weight": lost[:-1].clone()}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="do not fit its config"):
        load_model(spec, folder, device_map="cpu")
    path.unlink()
    with pytest.raises(CheckpointError, match="no file named"):
        load_model(spec, folder, device_map="cpu")


def test_formats_and_attention(checkpoint):
    spec, folder = open_folder(None, checkpoint("qwen2_vl"))
    model, _ = load_model(spec, folder, dtype="bf16", attn_impl="eager", device_map="cpu")
    assert model.dtype == torch.bfloat16
    assert model.config.get_text_config()._attn_implementation == "eager"


def test_an_attention_that_the_model_does_not_have_is_an_error(checkpoint):
    spec, folder = open_folder(None, checkpoint("mamba"))
    with pytest.raises(MMToolError, match="--attn_impl sdpa: MambaForCausalLM does not have it"):
        load_model(spec, folder, attn_impl="sdpa", device_map="cpu")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("qwen2_vl", {"llm", "vision_encoder", "vision_proj"}),
        ("llava_onevision", {"llm", "vision_encoder", "vision_proj"}),
        ("qwen2_audio", {"llm", "audio_encoder", "audio_proj"}),
        ("llama", {"llm"}),
    ],
)
def test_every_weight_belongs_to_one_part(opened, name, parts):
    known = opened(name)
    spec = fit_layout(known.spec, known.model)
    assert set(spec.parts) == parts
    for weight, _ in known.model.named_parameters():
        owners = [
            part
            for part, prefixes in spec.parts.items()
            if any(weight == prefix or weight.startswith(f"{prefix}.") for prefix in prefixes)
        ]
        assert len(owners) == 1, (weight, owners)


def test_lora_targets_are_the_linear_layers_of_the_language_model(opened):
    import re

    known = opened("qwen2_vl")
    pattern = re.compile(fit_layout(known.spec, known.model).lora_target_modules)
    found = {name for name, _ in known.model.named_modules() if pattern.fullmatch(name)}
    assert len(found) == 7 * 3
    assert all(name.startswith("model.language_model.layers.") for name in found)


def test_the_python_api(checkpoint, picture, tmp_path):
    path = tmp_path / "x.png"
    picture(1).save(path)
    model, tokenizer = get_model_tokenizer(None, torch.float32, model_id_or_path=checkpoint("qwen2_vl"))
    template = get_template(None, tokenizer)
    model.generation_config.max_new_tokens = 5
    *_, (response, history) = inference_stream(model, template, f"<img>{path}</img>what?")
    assert history[-1][1] == response
    messages = [{"role": "user", "content": [{"type": "image", "image": str(path)}, {"type": "text", "text": "what?"}]}]
    answer = chat(model, template, messages)
    assert answer.text == response
    assert answer.usage.image_features_computed == 0
