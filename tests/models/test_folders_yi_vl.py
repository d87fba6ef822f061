"""The layouts in which a Yi-VL release may lie on disk, what is wrong with a folder, and writing one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from mmtool.errors import CheckpointError
from mmtool.models.common.layout import LLM_QKV
from mmtool.models.common.weights import read_weights
from mmtool.models.yi_vl.configuration_yi_vl import YiVLConfig
from mmtool.models.yi_vl.modeling_yi_vl import YiVLForConditionalGeneration, YiVLModel
from mmtool.models.yi_vl.processing_yi_vl import YiVLProcessor

Model = YiVLForConditionalGeneration
Edit = Callable[[Path], None]


def main_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in read_weights(folder).items()}


def vit(folder: Path) -> Path:
    return next((folder / "vit").iterdir())


def remove_weights(folder: Path) -> None:
    for path in [*folder.glob("*.bin"), *folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()


def edit_json(path: Path, **changes: object) -> None:
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


def write_main(folder: Path, weights: dict[str, torch.Tensor], name: str) -> None:
    remove_weights(folder)
    (save_file if name.endswith(".safetensors") else torch.save)(weights, folder / name)


def one_bin_file(folder: Path) -> None:
    write_main(folder, main_weights(folder), "pytorch_model.bin")


def one_safetensors_file(folder: Path) -> None:
    write_main(folder, main_weights(folder), "model.safetensors")


def safetensors_shards(folder: Path) -> None:
    weights = main_weights(folder)
    remove_weights(folder)
    names, places = sorted(weights), {}
    for part in range(3):
        shard = f"model-0000{part + 1}-of-00003.safetensors"
        save_file({name: weights[name] for name in names[part::3]}, folder / shard)
        places |= dict.fromkeys(names[part::3], shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def no_tower_in_the_main_shards(folder: Path) -> None:
    weights = {name: tensor for name, tensor in main_weights(folder).items() if "vision_tower" not in name}
    write_main(folder, weights, "pytorch_model.bin")


def tower_only_in_the_main_shards(folder: Path) -> None:
    tower = {f"model.vision_tower.vision_tower.{name}": t for name, t in main_weights(vit(folder)).items()}
    write_main(folder, main_weights(folder) | tower, "pytorch_model.bin")
    remove_weights(vit(folder))


def another_tower_in_the_main_shards(folder: Path) -> None:
    weights = main_weights(folder)
    copy = {f"model.vision_tower.vision_tower.{name}": t + 1 for name, t in main_weights(vit(folder)).items()}
    write_main(folder, weights | copy, "pytorch_model.bin")


def tower_as_safetensors(folder: Path) -> None:
    write_main(vit(folder), main_weights(vit(folder)), "model.safetensors")


def tower_without_prefix(folder: Path) -> None:
    weights = {name.removeprefix("vision_model."): tensor for name, tensor in main_weights(vit(folder)).items()}
    write_main(vit(folder), weights, "model.safetensors")


def tower_in_a_whole_clip(folder: Path) -> None:
    text = {"text_model.embeddings.token_embedding.weight": torch.zeros(3, 2), "logit_scale": torch.zeros(())}
    text |= {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}
    text |= {"visual_projection.weight": torch.zeros(2, 2), "text_projection.weight": torch.zeros(2, 2)}
    write_main(vit(folder), main_weights(vit(folder)) | text, "pytorch_model.bin")
    path = vit(folder) / "config.json"
    vision = json.loads(path.read_text())
    whole = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": 32,
        "text_config": {"hidden_size": 2},
    }
    path.write_text(json.dumps(whole | {"vision_config": vision, "torch_dtype": "float32"}))


def stale_buffers(folder: Path) -> None:
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in range(3)}
    write_main(folder, main_weights(folder) | buffers, "pytorch_model.bin")
    ids = {"vision_model.embeddings.position_ids": torch.zeros(1, 17, dtype=torch.long)}
    write_main(vit(folder), main_weights(vit(folder)) | ids, "pytorch_model.bin")


def tower_path_of_another_machine(folder: Path) -> None:
    edit_json(folder / "config.json", mm_vision_tower=f"/home/someone/models/Yi-VL-6B/vit/{vit(folder).name}")


def tower_path_that_is_wrong(folder: Path) -> None:
    edit_json(folder / "config.json", mm_vision_tower="openai/clip-vit-large-patch14-336")


def no_mm_keys(folder: Path) -> None:
    keys = [key for key in json.loads((folder / "config.json").read_text()) if key.startswith("mm_")]
    edit_json(folder / "config.json", **dict.fromkeys([*keys, "image_aspect_ratio", "tune_mm_mlp_adapter"], ...))


def null_keys(folder: Path) -> None:
    edit_json(folder / "config.json", mm_hidden_size=None, image_aspect_ratio=None, mm_vision_select_feature=None)


def no_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()


LAYOUTS = [
    *(one_bin_file, one_safetensors_file, safetensors_shards, no_tower_in_the_main_shards, tower_as_safetensors),
    *(tower_only_in_the_main_shards, another_tower_in_the_main_shards, tower_without_prefix, tower_in_a_whole_clip),
    *(
        stale_buffers,
        tower_path_of_another_machine,
        tower_path_that_is_wrong,
        no_mm_keys,
        null_keys,
        no_generation_config,
    ),
]


def assert_same(found: Model, wanted: Model) -> None:
    left, right = found.state_dict(), wanted.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert found.config.num_vision_layers == wanted.config.num_vision_layers
    assert found.generation_config.eos_token_id == wanted.generation_config.eos_token_id


@pytest.mark.parametrize("edit", LAYOUTS, ids=lambda edit: edit.__name__)
def test_a_layout_gives_the_same_model(release: Path, model: Model, edit: Edit) -> None:
    edit(release)
    assert_same(Model.from_pretrained(release), model)
    processor = YiVLProcessor.from_pretrained(release)
    assert processor.num_tokens_per_image == 16
    assert processor.image_processor.image_aspect_ratio == "pad"


def test_dimensions_come_from_the_folder(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 5, "num_attention_heads": 2}
    text = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = YiVLConfig(
        text_config=text | {"num_key_value_heads": 1, "vocab_size": 300},
        vision_config=vision | {"image_size": 42, "patch_size": 7},
        mm_vision_select_layer=-3,
        mm_vision_select_feature="cls_patch",
    )
    built = Model(config).eval()
    built.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path)
    assert_same(loaded, built)
    pixels = torch.rand(2, 3, 42, 42)
    features = loaded.get_image_features(pixels).pooler_output
    assert [tuple(feature.shape) for feature in features] == [(37, 24)] * 2
    assert torch.equal(torch.stack(features), torch.stack(built.get_image_features(pixels).pooler_output))


def test_saving_writes_the_layout_of_the_release(release: Path, checkpoint: Path, model: Model, tmp_path: Path) -> None:
    edit_json(release / "config.json", a_key_of_someone={"kept": True})
    saved = tmp_path / "saved"
    Model.from_pretrained(release).save_pretrained(saved, max_shard_size="300KB")
    YiVLProcessor.from_pretrained(release).save_pretrained(saved)
    assert_same(Model.from_pretrained(saved), model)
    assert len(list(saved.glob("model-*.safetensors"))) > 3
    assert len(list(vit(saved).glob("model-*.safetensors"))) > 1
    tower = {f"model.vision_tower.vision_tower.{name}" for name in read_weights(vit(checkpoint))}
    assert set(read_weights(saved)) == set(read_weights(checkpoint)) | tower
    assert set(read_weights(vit(saved))) == set(read_weights(vit(checkpoint)))
    assert vit(saved).name == vit(checkpoint).name
    assert {path.name for path in vit(saved).glob("*.json")} >= {"config.json", "preprocessor_config.json"}
    before = json.loads((release / "config.json").read_text())
    after = json.loads((saved / "config.json").read_text())
    changed = {key for key in before if before[key] != after.get(key)}
    assert changed == {"_name_or_path", "transformers_version"}
    assert after["a_key_of_someone"] == {"kept": True}
    pixels = json.loads((vit(saved) / "preprocessor_config.json").read_text())
    assert (pixels["size"], pixels["crop_size"], pixels["resample"]) == (56, 56, 3)


def test_saving_keeps_trained_weights_and_a_changed_dtype(model: Model, checkpoint: Path, tmp_path: Path) -> None:
    trained = Model.from_pretrained(checkpoint, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    trained.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path)
    assert_same(loaded, trained)
    assert loaded.dtype == torch.bfloat16
    copy = load_file(tmp_path / "model.safetensors")["model.vision_tower.vision_tower.vision_model.post_layernorm.bias"]
    assert torch.equal(copy, trained.model.vision_tower.post_layernorm.bias)


def test_the_headless_class_reads_and_writes_the_same_folders(checkpoint: Path, model: Model, tmp_path: Path) -> None:
    headless = YiVLModel.from_pretrained(checkpoint)
    assert all(torch.equal(tensor, model.model.state_dict()[name]) for name, tensor in headless.state_dict().items())
    headless.save_pretrained(tmp_path)
    assert set(read_weights(tmp_path)) | {"lm_head.weight"} >= set(read_weights(checkpoint))
    again = YiVLModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, headless.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_an_adapter_is_saved_without_the_model(checkpoint: Path, tmp_path: Path) -> None:
    adapted = Model.from_pretrained(checkpoint)
    adapted.add_adapter(LoraConfig(target_modules=LLM_QKV))
    adapted.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert len(names) == 3 * 3 * 2, "layers, projections, halves"
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    assert not (tmp_path / "vit").exists()
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(checkpoint)


def test_parts_may_stay_on_disk(checkpoint: Path, model: Model, tmp_path: Path) -> None:
    places = {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu", "model.language_model": "cpu"}
    spread = Model.from_pretrained(checkpoint, device_map=places | {"lm_head": "disk"}, offload_folder=tmp_path)
    ids, pixels = torch.tensor([[7] + [9] * 16 + [8]]), torch.rand(1, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(spread(ids, pixels).logits, model(ids, pixels).logits, atol=1e-4, rtol=0)


def test_a_config_survives_a_dictionary(checkpoint: Path) -> None:
    config = YiVLConfig.from_pretrained(checkpoint)
    again = YiVLConfig.from_dict(config.to_dict())
    assert again.to_release_dict() == config.to_release_dict()
    assert config.to_dict()["model_type"] == "yi_vl"
    assert config.freeze_mm_mlp_adapter is False, "an unknown key"


def cut(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def drop(folder: Path, name: str) -> None:
    weights = main_weights(folder)
    del weights[name]
    write_main(folder, weights, "pytorch_model.bin")


def misshape(folder: Path) -> None:
    weights = main_weights(folder)
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].clone()
    write_main(folder, weights, "pytorch_model.bin")


def add(folder: Path, *names: str) -> None:
    write_main(folder, main_weights(folder) | {name: torch.zeros(2) for name in names}, "pytorch_model.bin")


def shard(folder: Path, number: int) -> Path:
    return folder / f"pytorch_model-0000{number}-of-00002.bin"


def index(folder: Path, text: str) -> None:
    (folder / "pytorch_model.bin.index.json").write_text(text)


def cut_safetensors(folder: Path, keep: float) -> None:
    one_safetensors_file(folder)
    cut(folder / "model.safetensors", keep)


FAULTS: dict[str, tuple[Edit, str]] = {
    "missing": (lambda f: drop(f, "model.norm.weight"), r"1 missing \(model\.language_model\.norm\.weight\)"),
    "missing in the tower": (
        lambda f: drop(vit(f), "vision_model.pre_layrnorm.bias"),
        r"vision_tower\.pre_layrnorm\.bias",
    ),
    "unexpected": (lambda f: add(f, "a.b", "c", "d", "e"), r"4 unexpected \(.*, .*, .* and 1 more\)"),
    "shape": (misshape, r"lm_head\.weight is \[1087, 64\] instead of \[1088, 64\]"),
    "no weights": (remove_weights, "has no weights"),
    "no tower weights": (lambda f: (no_tower_in_the_main_shards(f), remove_weights(vit(f))), "hold no copy"),
    "no tower folder": (lambda f: shutil.rmtree(f / "vit"), "no vision tower"),
    "no tower config": (lambda f: (vit(f) / "config.json").unlink(), r"has no config\.json"),
    "shard cut off": (lambda f: cut(shard(f, 2), 0.5), "not a readable PyTorch file"),
    "shard empty": (lambda f: cut(shard(f, 2), 0), "not a readable PyTorch file"),
    "shard a pointer": (lambda f: shard(f, 2).write_text("version https://git-lfs\n"), "a pointer of git-lfs"),
    "shard missing": (lambda f: shard(f, 2).unlink(), "is missing, but"),
    "shard of another": (lambda f: shutil.copy(shard(f, 1), shard(f, 2)), "but it is not"),
    "index empty": (lambda f: index(f, '{"weight_map": {}}'), "names no weights"),
    "index without a map": (lambda f: index(f, "{}"), "names no weights"),
    "index broken": (lambda f: index(f, "{"), "cannot read"),
    "index outside": (lambda f: index(f, '{"weight_map": {"a": "../x.bin"}}'), "outside its folder"),
    "safetensors cut off": (lambda f: cut_safetensors(f, 0.5), "cut off"),
    "safetensors header cut off": (lambda f: cut_safetensors(f, 0.001), "not a readable safetensors file"),
    "safetensors empty": (lambda f: cut_safetensors(f, 0), "not a readable safetensors file"),
    "another projector": (lambda f: edit_json(f / "config.json", mm_projector_type="linear"), "mm_projector_type"),
    "another layer": (lambda f: edit_json(f / "config.json", mm_vision_select_layer=-9), "mm_vision_select_layer"),
    "wrong size": (lambda f: edit_json(f / "config.json", hidden_size=128), "instead of"),
    "wrong tower size": (lambda f: edit_json(vit(f) / "config.json", hidden_size=96), "instead of"),
    "contradiction": (lambda f: edit_json(f / "config.json", num_attention_heads=7), "contradicts itself: The hidden"),
    "not JSON": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_folder_is_an_error_that_names_the_fault(release: Path, fault: str) -> None:
    edit, message = FAULTS[fault]
    edit(release)
    with pytest.raises(CheckpointError, match=message):
        Model.from_pretrained(release)


class Harmful:
    """Would create a file if it was unpickled freely."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (str(self.path), "w"))


def test_a_file_that_would_run_code_is_refused(release: Path, tmp_path: Path) -> None:
    remove_weights(release)
    torch.save({"lm_head.weight": Harmful(tmp_path / "harm")}, release / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a readable PyTorch file") as caught:
        Model.from_pretrained(release)
    assert "weights_only" not in caught.value.message  # torch's own advice is to run what is in the file
    assert not (tmp_path / "harm").exists()


def test_a_name_that_is_no_folder_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor"):
        Model.from_pretrained(str(tmp_path / "nothing" / "here"))
