"""What vLLM is told about our models; vLLM itself is not needed. With it: tests/vllm."""

import importlib.metadata
import os
import sys

import pytest

from mmtool.auto import families
from mmtool.cli import main
from mmtool.engine.vllm import import_vllm
from mmtool.errors import MMToolError
from mmtool.spec import AutoClasses
from mmtool.utils import import_object
from mmtool.vllm_plugin import MEDIA_CLASS, TEXT_CLASS, architectures, register


@pytest.fixture
def no_vllm(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "vllm", None)


def test_the_entry_point_is_the_plugin():
    (found,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="mmtool")
    assert found.load() is register


@pytest.mark.parametrize("classes", families(), ids=lambda classes: classes.config_class.rpartition(":")[2])
def test_every_family_can_be_served(classes: AutoClasses):
    network = import_object(classes.model_class)
    path = MEDIA_CLASS if hasattr(network, "get_image_features") else TEXT_CLASS
    assert {architectures()[name] for name in (network.__name__, *classes.architectures)} == {path}
    # What vLLM's Transformers backend asks of a network without its head.
    headless = import_object(classes.base_model_class)
    assert headless._supports_attention_backend
    assert headless.base_model_prefix == "model"


def test_names_of_networks_that_vllm_has_itself_are_left_alone():
    assert not {"LlamaForCausalLM", "InternLM2ForCausalLM"} & architectures().keys()


def test_without_vllm_the_error_says_how_to_install_it(no_vllm):
    with pytest.raises(MMToolError, match="needs the package vllm") as caught:
        import_vllm()
    assert "mmtool[vllm]" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--infer_backend", "vllm"], "needs the package vllm"),
        (["--infer_backend", "vllm", "--device_map", "cpu"], "--device_map is not for --infer_backend vllm"),
        (["--infer_backend", "vllm", "--merge_lora", "true", "--ckpt_dir", "x"], "--merge_lora true is not for"),
        (["--vllm_args", "{}"], "--vllm_args needs --infer_backend vllm"),
        (["--tensor_parallel_size", "2"], "--tensor_parallel_size needs --infer_backend vllm"),
        (
            ["--infer_backend", "vllm", "--gpu_memory_utilization", "1.5"],
            "--gpu_memory_utilization 1.5 is out of range",
        ),
        (["--max_model_len", "1"], "--max_model_len 1 is out of range"),
    ],
)
def test_options_that_cannot_be(options, said, no_vllm, capsys):
    assert main(["infer", "--query", "x", *options]) == 2
    assert said in capsys.readouterr().err
