"""Which model a folder holds, and how it is put into memory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmtool import loader
from mmtool.errors import CheckpointError, MMToolError
from mmtool.registry import get_model_spec

SPEC = get_model_spec("yi-vl-6b-chat")


@pytest.fixture
def folder(golden: Callable[[str], Path], copy_of: Callable[[Path, str], Path]) -> Path:
    """A copy of the golden Yi-VL checkpoint that a test may change."""
    return copy_of(golden("yi-vl") / "checkpoint", "model")


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


@pytest.mark.parametrize(
    "changes, model_type",
    [
        ({}, "yi-vl-6b-chat"),
        ({"hidden_size": 7168, "num_hidden_layers": 60}, "yi-vl-34b-chat"),
        ({"mm_projector_type": ...}, "yi-vl-6b-chat"),
        ({"mm_projector_type": ..., "mm_vision_tower": ...}, "yi-vl-6b-chat"),
        ({"architectures": ["SomethingElse"]}, "yi-vl-6b-chat"),
        ({"mmtool_model_type": "tiny"}, "tiny"),
    ],
)
def test_a_folder_says_what_it_holds(folder: Path, changes: dict, model_type: str) -> None:
    change_config(folder, **changes)
    spec, found = loader.open_folder(None, folder)
    assert (spec.model_type, found) == (model_type, folder)


@pytest.mark.parametrize(
    ("changes", "readable"),
    [
        ({"mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}, False),
        ({"mm_projector_type": ..., "mm_vision_tower": "openai/clip-vit-large-patch14"}, False),
        ({"architectures": ["LlavaForConditionalGeneration"], "text_config": {}, "mm_projector_type": ...}, True),
    ],
)
def test_other_models_of_the_llava_kind_are_not_taken_for_yi_vl(folder: Path, changes: dict, readable: bool) -> None:
    change_config(folder, **changes)
    if readable:
        assert loader.open_folder(None, folder)[0].model_type == "auto"
    else:
        with pytest.raises(CheckpointError, match="layout of LLaVA's own code"):
            loader.open_folder(None, folder)
    with pytest.raises(CheckpointError, match="holds a 'llava' model of transformers") as caught:
        loader.open_folder("yi-vl-6b-chat", folder)
    assert caught.value.hint == "Pass --model_type auto, or leave it out."


def test_a_size_may_be_called_by_the_name_of_another(folder: Path) -> None:
    assert loader.open_folder("yi-vl-34b-chat", folder)[0].model_type == "yi-vl-34b-chat"


def test_the_wrong_family_is_an_error_that_says_what_the_folder_is(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a yi-vl-6b-chat model") as caught:
        loader.open_folder("tiny", folder)
    assert caught.value.hint == "Pass --model_type yi-vl-6b-chat, or leave it out."


def test_without_a_name_it_is_the_embedded_model() -> None:
    spec, found = loader.open_folder()
    assert spec.model_type == "tiny"
    assert found.name == "checkpoint"


def test_a_model_comes_in_evaluation_mode_with_its_processor_and_template(folder: Path) -> None:
    model, processor = loader.load_model(SPEC, folder, device_map="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert next(model.parameters()).device.type == "cpu"
    assert model.generation_config.eos_token_id == 2
    assert model.config.name_or_path == str(folder)
    template = loader.get_template(SPEC, processor, system="")
    assert template.template_type == "yi-vl"
    assert template.processor is processor


def test_a_processor_that_is_there_is_not_read_again(folder: Path) -> None:
    processor = loader.load_processor(SPEC, folder)
    (folder / "tokenizer.model").unlink()
    assert loader.load_model(SPEC, folder, processor=processor, device_map="cpu")[1] is processor
    assert loader.load_processor(SPEC, folder, tokenizer=processor.tokenizer).tokenizer is processor.tokenizer


@pytest.mark.parametrize("name, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("float16", torch.float16)])
def test_the_dtype_asked_for_is_the_dtype_in_memory(folder: Path, name: str, dtype: torch.dtype) -> None:
    model, _ = loader.load_model(SPEC, folder, dtype=name, attn_impl="eager", device_map="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "stored, dtype", [("float16", torch.float32), (..., torch.float32), ("float32", torch.float32)]
)
def test_auto_dtype_on_a_cpu(folder: Path, stored: str, dtype: torch.dtype) -> None:
    change_config(folder, torch_dtype=stored)
    assert loader.load_model(SPEC, folder, device_map="cpu")[0].dtype == dtype


@pytest.mark.parametrize("capable, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_dtype_keeps_bfloat16_where_the_cpu_has_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capable: bool, dtype: torch.dtype
) -> None:
    change_config(folder, torch_dtype="bfloat16")
    monkeypatch.setattr(loader, "_cpu_has_bf16", lambda: capable)
    assert loader.load_model(SPEC, folder, device_map="cpu")[0].dtype == dtype


def test_model_kwargs_win(folder: Path) -> None:
    model, _ = loader.load_model(
        SPEC, folder, dtype="bf16", model_kwargs={"dtype": "float32", "attn_implementation": "eager"}, device_map="cpu"
    )
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "eager"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error(folder: Path) -> None:
    with pytest.raises(MMToolError, match="--device_map cuda:0, but torch sees no GPU"):
        loader.load_model(SPEC, folder, device_map="cuda:0")


def test_an_attention_that_is_not_installed_is_an_error(folder: Path) -> None:
    with pytest.raises(MMToolError, match="FlashAttention2"):
        loader.load_model(SPEC, folder, attn_impl="flash_attention_2", device_map="cpu")


def test_a_tokenizer_larger_than_the_embeddings_is_an_error(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["added_tokens_decoder"]["1088"] = {"content": "<s>", "special": True}
    path.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="has 1089 tokens, but the model knows 1088"):
        loader.load_model(SPEC, folder, device_map="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_gpu_is_used_where_there_is_one(folder: Path) -> None:
    for device_map in (None, "cuda:0", "auto"):
        model, _ = loader.load_model(SPEC, folder, device_map=device_map)
        assert model.device.type == "cuda"
