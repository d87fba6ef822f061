"""Megrez folders: the layouts they come in, what they are taken for, and that writing one gives a release again."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import mmtool  # noqa: F401 - makes the Auto classes know the family
from mmtool.errors import CheckpointError
from mmtool.loader import open_folder
from mmtool.models.common.weights import read_weights
from mmtool.models.megrez.configuration_megrez import MegrezOmniConfig
from mmtool.models.megrez.modeling_megrez import (
    MegrezInstructForCausalLM,
    MegrezOmniForConditionalGeneration,
    MegrezOmniModel,
)
from mmtool.models.megrez.processing_megrez import (
    MegrezFeatureExtractor,
    MegrezInstructProcessor,
    MegrezOImageProcessor,
    MegrezOProcessor,
)

Model = MegrezOmniForConditionalGeneration


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in read_weights(folder).items()}


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def one_file(folder: Path, change: Callable[[dict], dict] = dict, name: str = "model.safetensors") -> None:
    """Put the weights of a folder into one file, as ``change`` makes them."""
    weights = change(weights_of(folder))
    for path in folder.glob("model*"):
        path.unlink()
    save = torch.save if name.endswith(".bin") else save_file
    save(weights, folder / name)


def test_omni_is_written_as_a_release(omni: Path, model: Model, processor: MegrezOProcessor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    released, written = weights_of(omni / "checkpoint"), weights_of(tmp_path)
    assert released.keys() == written.keys()
    assert all(torch.equal(released[name], written[name]) for name in released)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (omni / "checkpoint", tmp_path))
    ours = {"special_token_ids", "image_token_id", "audio_token_id"}
    assert new.keys() - ours == old.keys() - {"_name_or_path"}
    differ = {key for key in new if key in old and new[key] != old[key]}
    assert differ <= {"transformers_version", "vision_config"}
    assert old["vision_config"].items() >= new["vision_config"].items()
    again = Model.from_pretrained(tmp_path)
    assert same(model, again)
    assert again.generation_config.eos_token_id == [997, 992]
    processor_again = MegrezOProcessor.from_pretrained(tmp_path)
    assert processor_again.token_ids == processor.token_ids
    assert processor_again.tokenizer.chat_template == processor.tokenizer.chat_template
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    released_settings = json.loads((omni / "checkpoint" / "preprocessor_config.json").read_text())
    del released_settings["auto_map"]
    assert {**settings, "norm_mean": list(settings["norm_mean"])}.items() >= released_settings.items()
    assert open_folder(None, tmp_path)[0].model_type == "megrez-3b-omni"


def test_instruct_is_written_as_a_release(
    instruct: Path, text_model: MegrezInstructForCausalLM, tmp_path: Path
) -> None:
    text_model.save_pretrained(tmp_path)
    MegrezInstructProcessor.from_pretrained(instruct / "checkpoint").save_pretrained(tmp_path)
    assert weights_of(instruct / "checkpoint").keys() == weights_of(tmp_path).keys()
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (instruct / "checkpoint", tmp_path))
    assert {key for key in old if new.get(key) != old[key]} == {"_name_or_path", "transformers_version"}
    assert new.keys() <= old.keys()
    assert same(text_model, MegrezInstructForCausalLM.from_pretrained(tmp_path))
    assert open_folder(None, tmp_path)[0].model_type == "megrez-3b-instruct"
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert plain.encode("你好 hello<|turn_end|>") == AutoTokenizer.from_pretrained(instruct / "checkpoint").encode(
        "你好 hello<|turn_end|>"
    )


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_one_file_with_computed_tables_in_it(release: Path, model: Model, name: str) -> None:
    leftovers = {
        "llm.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "vision.resampler.pos_embed": torch.zeros(70, 70, 128),
    }
    one_file(release, lambda weights: weights | leftovers, name)
    assert same(model, Model.from_pretrained(release))


def test_the_headless_model_loads_the_same_folder(omni: Path, model: Model) -> None:
    assert same(MegrezOmniModel.from_pretrained(omni / "checkpoint"), model.model)


def test_weights_that_do_not_fit_are_refused(release: Path) -> None:
    def change(weights: dict) -> dict:
        weights["audio.audio.extra"] = torch.zeros(1)
        weights["vision.resampler.query"] = torch.zeros(3, 128)
        del weights["audio.audio.positional_embedding"]
        return weights

    one_file(release, change)
    with pytest.raises(CheckpointError, match=r"audio_tower\.positional_embedding.*audio\.audio\.extra.*\[3, 128\]"):
        Model.from_pretrained(release)


def test_the_stored_position_table_is_loaded(release: Path) -> None:
    one_file(release, lambda weights: weights | {"audio.audio.positional_embedding": torch.full((1500, 32), 0.25)})
    assert Model.from_pretrained(release).model.audio_tower.positional_embedding.eq(0.25).all()


@pytest.mark.parametrize("kept", [False, True])
def test_a_vision_layer_that_is_dropped(release: Path, edit: Callable[..., None], model: Model, kept: bool) -> None:
    edit(release / "config.json", drop_vision_last_layer=True)
    if not kept:
        one_file(release, lambda weights: {k: v for k, v in weights.items() if "vpm.encoder.layers.1." not in k})
    loaded = Model.from_pretrained(release)
    assert len(loaded.model.vision_tower.encoder.layers) == 1
    loaded.save_pretrained(release / "again")
    config = json.loads((release / "again" / "config.json").read_text())
    assert (config["drop_vision_last_layer"], config["vision_config"]["num_hidden_layers"]) == (True, 2)


def test_a_folder_from_before_the_release(release: Path, edit: Callable[..., None], model: Model) -> None:
    audio = json.loads((release / "config.json").read_text())["audio_config"] | {"audio_start_id": 7}
    edit(release / "config.json", model_type="llama", audio=audio, audio_config=None, pad_token_id=0)
    assert open_folder(None, release)[0].model_type == "megrez-3b-omni"
    assert same(model, Model.from_pretrained(release))


def test_folders_are_told_apart(omni: Path, instruct: Path, release: Path, edit: Callable[..., None]) -> None:
    assert open_folder(None, omni / "checkpoint")[0].model_type == "megrez-3b-omni"
    assert open_folder(None, instruct / "checkpoint")[0].model_type == "megrez-3b-instruct"
    with pytest.raises(CheckpointError, match="holds a megrez-3b-omni model"):
        open_folder("yi-vl-6b-chat", omni / "checkpoint")
    edit(release / "config.json", architectures=["LlamaForCausalLM"], model_type="llama", max_sequence_length=None)
    assert open_folder(None, release)[0].model_type == "auto", "a Llama as there are many"


def test_a_configuration_without_tokenizer_files_keeps_its_ids(model: Model, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    config = MegrezOmniConfig.from_pretrained(tmp_path)
    assert config.special_token_ids == model.config.special_token_ids
    assert (config.image_token_id, config.audio_token_id) == (1008, 1014)
    assert config.get_text_config() is config.text_config


def test_the_auto_classes_know_the_family(omni: Path, model: Model, processor: MegrezOProcessor) -> None:
    folder = omni / "checkpoint"
    assert isinstance(AutoConfig.from_pretrained(folder), MegrezOmniConfig)
    assert isinstance(AutoModel.from_pretrained(folder), MegrezOmniModel)
    assert same(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), model)
    assert isinstance(AutoProcessor.from_pretrained(folder), MegrezOProcessor)
    assert isinstance(AutoFeatureExtractor.from_pretrained(folder), MegrezFeatureExtractor)
    assert isinstance(AutoImageProcessor.from_pretrained(folder), MegrezOImageProcessor)
    assert AutoTokenizer.from_pretrained(folder).encode("a 你好") == processor.tokenizer.encode("a 你好")


def test_the_golden_shards_are_the_files_of_a_release(omni: Path) -> None:
    shards = sorted((omni / "checkpoint").glob("model-*.safetensors"))
    assert len(shards) == 2
    assert len(load_file(shards[0])) + len(load_file(shards[1])) == len(weights_of(omni / "checkpoint"))
