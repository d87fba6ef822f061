"""Pictures to pixels, bit-identical to the release for every mode and shape; the processor as transformers sees it."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from mmtool.errors import CheckpointError, MediaError
from mmtool.models.yi_vl import processing_yi_vl
from mmtool.models.yi_vl.processing_yi_vl import YiVLImageProcessor, YiVLProcessor, pad_to_square, resize_padded

COLOR = (122, 116, 104)
NAMES = ["exif6", "grey", "palette", "rgba", "square", "tall", "tiny", "wide"]


@pytest.fixture(scope="module")
def recorded(yi_vl: Path) -> dict:
    return json.loads((yi_vl / "preprocess" / "preprocess.json").read_text())


@pytest.fixture(scope="module")
def tensors(yi_vl: Path) -> dict[str, torch.Tensor]:
    path = yi_vl / "preprocess" / "preprocess.safetensors"
    if not path.exists():
        pytest.skip("the selection in the repository has no tensors of single pictures")
    return load_file(path)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_at_448_pixels_have_the_recorded_checksum(yi_vl: Path, recorded: dict, name: str) -> None:
    picture = Image.open(yi_vl / recorded[name]["file"])
    found = YiVLImageProcessor()(picture, do_rescale=False, do_normalize=False)["pixel_values"][0].astype(np.uint8)
    assert found.shape == (3, 448, 448)
    assert hashlib.sha256(found.tobytes()).hexdigest() == recorded[name]["real_448"]["uint8_chw_sha256"]
    pixels = YiVLImageProcessor()(picture, return_tensors="pt")["pixel_values"].double()
    assert pixels.mean().item() == pytest.approx(recorded[name]["real_448"]["mean"], abs=1e-6)
    assert pixels.std(correction=0).item() == pytest.approx(recorded[name]["real_448"]["std"], abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_pixel_values_are_those_of_the_release(
    yi_vl: Path, recorded: dict, tensors: dict, processor: YiVLProcessor, name: str
) -> None:
    picture = Image.open(yi_vl / recorded[name]["file"])
    prepare = processor.image_processor
    assert torch.equal(prepare(picture, return_tensors="pt")["pixel_values"][0], tensors[f"{name}.pad"])
    large = YiVLImageProcessor()(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(large[0, :, ::16, ::16], tensors[f"{name}.real448_stride16"])
    if f"{name}.nopad" in tensors:  # the release cannot do pictures of 1 or 3 pixels height
        cropped = prepare(picture, return_tensors="pt", image_aspect_ratio="square")["pixel_values"]
        assert torch.equal(cropped[0], tensors[f"{name}.nopad"])


def test_the_folder_decides_about_padding(release: Path, yi_vl: Path, processor: YiVLProcessor) -> None:
    path = release / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_aspect_ratio": "square"}))
    picture = Image.open(yi_vl / "media" / "wide.jpg")
    found = YiVLProcessor.from_pretrained(release).image_processor(picture, return_tensors="pt")["pixel_values"]
    wanted = processor.image_processor(picture, return_tensors="pt", image_aspect_ratio="square")["pixel_values"]
    assert torch.equal(found, wanted)


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([7, 56, 112]), st.sampled_from([1, 3000, 1 << 24]))
@settings(max_examples=60, deadline=None)
def test_padding_while_resizing_equals_padding_first(width: int, height: int, side: int, strip: int) -> None:
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processing_yi_vl, "_STRIP_PIXELS", strip)
        found = resize_padded(picture, side, COLOR, Image.Resampling.BICUBIC)
    wanted = pad_to_square(picture, COLOR).resize((side, side), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_a_picture_that_no_memory_holds_is_refused(aspect: str) -> None:
    with pytest.raises(MediaError, match="too long and thin"):
        YiVLImageProcessor(image_aspect_ratio=aspect)(Image.new("RGB", (200_000, 1)))


def test_arrays_and_tensors_are_pictures_too(yi_vl: Path, processor: YiVLProcessor) -> None:
    picture = Image.open(yi_vl / "media" / "wide.jpg")
    array = np.asarray(picture)
    wanted = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    for same in (array, array.transpose(2, 0, 1), torch.tensor(array), [array], [[picture]]):
        assert torch.equal(processor.image_processor(same, return_tensors="pt")["pixel_values"], wanted)
    with pytest.raises(ValueError, match="uint8"):
        processor.image_processor(array / 255.0)


def test_what_a_picture_gives_does_not_depend_on_its_neighbours(yi_vl: Path, processor: YiVLProcessor) -> None:
    pictures = [Image.open(yi_vl / "media" / name) for name in ("wide.jpg", "tiny.png", "rgba.png")]
    together = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    alone = [processor.image_processor(picture, return_tensors="pt")["pixel_values"] for picture in pictures]
    assert torch.equal(together, torch.cat(alone))


def test_the_processor_works_as_one_of_transformers(yi_vl: Path, processor: YiVLProcessor) -> None:
    picture = Image.open(yi_vl / "media" / "wide.jpg")
    inputs = processor(text=[f"a {processor.image_token}\nb", "c"], images=[picture], return_tensors="pt", padding=True)
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert set(processor.model_input_names) == set(inputs)
    assert inputs["input_ids"][0].tolist() == [940, 937, *[9] * 16, 144, 957]
    assert (inputs["input_ids"][1] == 9).sum() == 0
    assert processor.image_token_id == 9
    expansion = processor.replace_image_token({}, 0)
    assert processor.tokenizer.encode(expansion, media_tokens=[processor.image_token]) == [9] * 16


def test_how_many_positions_a_picture_takes_is_known_without_it(processor: YiVLProcessor) -> None:
    sizes = processor._get_num_multimodal_tokens(image_sizes=[(10000, 10000), (1, 7)])
    assert sizes.num_image_tokens == [16, 16]
    assert sizes.num_image_patches == [1, 1], "rows of pixel_values"
    assert processor.num_image_tokens({}, 0) == 16


def test_a_processor_saved_alone_loads_again(yi_vl: Path, processor: YiVLProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = YiVLProcessor.from_pretrained(tmp_path)
    picture = Image.open(yi_vl / "media" / "tall.png")
    one, other = (p(text=p.image_token, images=picture, return_tensors="pt") for p in (processor, again))
    assert torch.equal(one["pixel_values"], other["pixel_values"])
    assert torch.equal(one["input_ids"], other["input_ids"])


def test_settings_of_another_picture_size_are_refused(release: Path) -> None:
    path = next((release / "vit").iterdir()) / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": 28, "crop_size": {"height": 28, "width": 28}}))
    with pytest.raises(CheckpointError, match="28x28 pixels, but the vision tower takes 56"):
        YiVLProcessor.from_pretrained(release)


def test_without_settings_pictures_are_made_for_the_tower(release: Path, yi_vl: Path, processor: YiVLProcessor) -> None:
    (next((release / "vit").iterdir()) / "preprocessor_config.json").unlink()
    picture = Image.open(yi_vl / "media" / "wide.jpg")
    found = YiVLProcessor.from_pretrained(release).image_processor(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(found, processor.image_processor(picture, return_tensors="pt")["pixel_values"])


def test_a_placeholder_that_can_be_typed_is_refused(release: Path) -> None:
    path = release / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_token_id": 425}))
    with pytest.raises(CheckpointError, match="'###' is no control piece"):
        YiVLProcessor.from_pretrained(release)
