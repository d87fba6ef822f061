"""`import mmtool` teaches the Auto classes our models, in either order of imports, and takes nothing away from them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# deepspeed, where it is installed, writes to stdout as soon as a model is saved: what is said here is marked.
SAY = """
def say(*words):
    print(">", *words)
"""
MMTOOL = """
import sys
before = set(sys.modules)
import mmtool
heavy = {"torch", "transformers", "numpy", "PIL"} & {name.partition(".")[0] for name in set(sys.modules) - before}
assert not heavy, heavy
"""
TRANSFORMERS = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
"""
OURS = """
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
say(type(model).__name__, type(AutoProcessor.from_pretrained(sys.argv[1])).__name__)
"""
MORE_OF_OURS = """
say(type(AutoModel.from_pretrained(sys.argv[1])).__name__)
say(type(AutoModelForCausalLM.from_config(model.config)).__name__, type(AutoConfig.for_model("yi_vl")).__name__)
"""
THEIRS = """
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
parts = dict(vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=14))
built = LlavaForConditionalGeneration(LlavaConfig(text_config=LlamaConfig(**sizes, vocab_size=99), **parts))
built.save_pretrained(sys.argv[2])
say(type(AutoConfig.from_pretrained(sys.argv[2])).__name__, type(AutoConfig.for_model("llava")).__name__)
loaded = AutoModelForImageTextToText.from_pretrained(sys.argv[2])
say(type(loaded).__name__, all((a == b).all() for a, b in zip(built.parameters(), loaded.parameters())))
"""


def run(script: str, *arguments: Path) -> list[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-c", SAY + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("> ") for line in done.stdout.splitlines() if line.startswith("> ")]


def test_auto_classes_load_ours_and_theirs(golden: Callable[[str], Path], tmp_path: Path) -> None:
    script = MMTOOL + TRANSFORMERS + OURS + MORE_OF_OURS + THEIRS
    assert run(script, golden("yi-vl") / "checkpoint", tmp_path) == [
        "YiVLForConditionalGeneration YiVLProcessor",
        "YiVLModel",
        "YiVLForConditionalGeneration YiVLConfig",
        "LlavaConfig LlavaConfig",
        "LlavaForConditionalGeneration True",
    ]


def test_the_order_of_the_imports_does_not_matter(golden: Callable[[str], Path]) -> None:
    script = TRANSFORMERS + MMTOOL + OURS
    assert run(script, golden("yi-vl") / "checkpoint") == ["YiVLForConditionalGeneration YiVLProcessor"]


@pytest.mark.parametrize(
    ("family", "auto_class", "found"),
    [
        ("fm9g4b-v", "AutoProcessor", "FM9GVProcessor"),
        ("fm9g4b-v", "AutoImageProcessor", "FM9GVImageProcessor"),
        ("megrez-3b-omni", "AutoProcessor", "MegrezOProcessor"),
        ("megrez-3b-omni", "AutoImageProcessor", "MegrezOImageProcessor"),
        ("megrez-3b-omni", "AutoFeatureExtractor", "MegrezFeatureExtractor"),
        ("internlm-xcomposer2/variant_4khd", "AutoTokenizer", "InternLMXComposer2Tokenizer"),
    ],
)
def test_the_very_first_call_finds_ours_by_the_names_in_a_folder(
    family: str, auto_class: str, found: str, golden: Callable[[str], Path]
) -> None:
    """The files name the release's own code as well: nobody is asked for it, and it does not run where it may."""
    first = f"from transformers import {auto_class}\nsay(type({auto_class}.from_pretrained(sys.argv[1])).__name__)\n"
    again = first.replace("sys.argv[1]", "sys.argv[1], trust_remote_code=True")
    assert run(MMTOOL + first + again, golden(family) / "checkpoint") == [found, found]
