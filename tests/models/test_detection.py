"""Which model a folder holds: found from the folder alone, and a wrong explicit type is told so."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mmtool.errors import CheckpointError
from mmtool.loader import open_folder
from mmtool.registry import MODELS

# What a folder is, and the types of the same network and prompts that it may be called by as well.
FOLDERS = {
    "fm9g/gqa": ("fm9g-4b-chat", "fm9g-"),
    "fm9g/mha": ("fm9g-7b-chat", "fm9g-"),
    "fm9g/mla": ("fm9g-4b-chat", "fm9g-"),
    "fm9g4b-v": ("fm9g4b-v-chat", "fm9g4b-v"),
    "internlm-xcomposer2": ("internlm-xcomposer2-7b-chat", ("internlm-xcomposer2-7b", "internlm-xcomposer2-vl")),
    "internlm-xcomposer2/variant_4khd": ("internlm-xcomposer2-4khd-7b-chat", "internlm-xcomposer2-4khd"),
    "internlm-xcomposer2_5": ("internlm-xcomposer2_5-7b-chat", "internlm-xcomposer2_5"),
    "megrez-3b-instruct": ("megrez-3b-instruct", "megrez-3b-instruct"),
    "megrez-3b-omni": ("megrez-3b-omni", "megrez-3b-omni"),
    "yi-vl": ("yi-vl-6b-chat", "yi-vl-"),
}


@pytest.mark.parametrize("family", FOLDERS)
def test_a_folder_tells_its_type_and_refuses_others(family: str, golden: Callable[[str], Path]) -> None:
    checkpoint = golden(family) / "checkpoint"
    found, alike = FOLDERS[family]
    assert open_folder(None, checkpoint)[0].model_type == found
    for model_type in MODELS:
        if model_type.startswith(alike):
            assert open_folder(model_type, checkpoint)[0].model_type == model_type
            continue
        with pytest.raises(CheckpointError) as error:
            open_folder(model_type, checkpoint)
        assert f"--model_type {model_type}" in str(error.value)
        assert f"holds a {found} model" in str(error.value)
        assert error.value.hint == f"Pass --model_type {found}, or leave it out."


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "llama", "hidden_size": "wide"}, "expected int, got str"),
        ({"mm_projector_type": "mlp2x_gelu_Norm", "hidden_size": "wide"}, "a value of the wrong kind"),
        ({"model_type": "llava", "mm_projector_type": "linear", "mm_vision_tower": "openai/clip"}, "LLaVA's own code"),
    ],
)
def test_a_config_that_nothing_can_be_made_of_is_an_error(config: dict, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=reason):
        open_folder(None, tmp_path)
