"""Pictures of InternLM-XComposer2: how they are cut, against recorded tables, and the interface of processors."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmtool.errors import MediaError
from mmtool.models.internlm_xcomposer2.processing_internlm_xcomposer2 import (
    OFFICIAL_TRAINING_TILING,
    TILING,
    XComposer2ImageProcessor,
    XComposer2Processor,
    plan_tiles,
)


@pytest.mark.parametrize("family, tile", [("internlm-xcomposer2/variant_4khd", 336), ("internlm-xcomposer2_5", 560)])
def test_the_recorded_sizes(family: str, tile: int, golden: Any) -> None:
    table = json.loads((golden(family) / "size_table.json").read_text("utf-8"))
    limit = TILING["4khd" if tile == 336 else "2.5"]["max_enlargement"]
    assert len(table["rows"]) > 20
    for row in table["rows"]:
        check(row, plan_tiles(tuple(row["size_wh"]), tile, row["hd_num"], limit), tile)
    for row in table.get("finetune_rows", []):
        hd_num, enlargement = OFFICIAL_TRAINING_TILING["hd_num"], OFFICIAL_TRAINING_TILING["max_enlargement"]
        check(row, plan_tiles(tuple(row["size_wh"]), tile, row.get("hd_num", hd_num), enlargement), tile)


def check(row: dict, plan: Any, tile: int) -> None:
    found = {"padded_wh": list(plan.padded), "tiles_hw": list(plan.tiles)}
    found |= {"resized_wh": list(plan.resized), "num_tokens": plan.num_positions(tile // 28)}
    assert {key: row[key] for key in found if key in row} == {key: found[key] for key in found if key in row}, row


def test_a_picture_too_thin_is_refused() -> None:
    with pytest.raises(MediaError, match="15000x1 pixels is too long and thin"):
        plan_tiles((15000, 1), 560, 24, 1.0)
    assert plan_tiles((1, 13440), 560, 24, 1.0).tiles == (24, 1)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (1200, 600), (7, 5), (2000, 90)])
def test_the_counts_that_serving_engines_ask_for_are_those_of_the_real_thing(size: tuple, xcomposer: Any) -> None:
    for family in ("internlm-xcomposer2", "internlm-xcomposer2/variant_4khd", "internlm-xcomposer2_5"):
        processor = xcomposer(family).processor
        fields = processor.image_processor(images=[Image.new("RGB", size)], return_tensors="pt")
        asked = processor._get_num_multimodal_tokens([size[::-1]])
        assert asked.num_image_tokens == [processor.num_image_tokens(fields, 0)]
        assert asked.num_image_patches == [len(fields["pixel_values"])]
        assert all(len(tensor) == len(fields["pixel_values"]) for tensor in fields.values())
        largest = processor._get_num_multimodal_tokens([(10000, 10000)])
        assert largest.num_image_tokens[0] >= 256


def test_views_lie_where_the_picture_has_them(tiled: Any) -> None:
    array = np.random.default_rng(0).integers(0, 256, (560, 1120, 3), dtype=np.uint8)
    fields = tiled.processor.image_processor(images=[Image.fromarray(array)], return_tensors="pt")
    assert fields["view_layout"].tolist() == [[0, 1, 2], [1, 1, 2], [2, 1, 2]]
    mean, std = (torch.tensor(getattr(XComposer2ImageProcessor, key)) for key in ("image_mean", "image_std"))
    pixels = ((torch.from_numpy(array).float() / 255 - mean) / std).permute(2, 0, 1)
    assert torch.equal(fields["pixel_values"][1], pixels[:, :, :560])
    assert torch.equal(fields["pixel_values"][2], pixels[:, :, 560:])


def test_padding_is_white_and_behind_the_picture(tiled: Any) -> None:
    white = (1 - torch.tensor(XComposer2ImageProcessor.image_mean)) / torch.tensor(XComposer2ImageProcessor.image_std)
    for size, free in (((560, 300), (slice(300, None), slice(None))), ((300, 560), (slice(None), slice(300, None)))):
        picture = Image.new("RGB", size)
        tile = tiled.processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"][1]
        assert torch.allclose(tile[:, free[0], free[1]], white.view(3, 1, 1), atol=1e-6)
        assert tile[:, 299, 299].max() < 0
    both = tiled.processor.image_processor(images=[picture], return_tensors="pt", split_padding=True)
    assert torch.allclose(both["pixel_values"][1][:, :, [0, -1]], white.view(3, 1, 1), atol=1e-6)


def test_pictures_may_be_arrays_and_modes_are_converted(plain: Any) -> None:
    picture = Image.open(plain.root / "media" / "shapes.png").convert("RGB")
    wanted = plain.processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
    array = np.asarray(picture)
    for same in (array, torch.from_numpy(array.copy()).permute(2, 0, 1)):
        assert torch.equal(plain.processor.image_processor(images=[same], return_tensors="pt")["pixel_values"], wanted)
    found = plain.processor.image_processor(images=[picture.convert("L"), picture.convert("RGBA")])
    assert np.asarray(found["pixel_values"]).shape == (2, 3, 224, 224)


def test_a_call_of_the_processor_expands_the_placeholders(tiled: Any) -> None:
    processor = tiled.processor
    pictures = [Image.new("RGB", (560, 560)), Image.new("RGB", (560, 1120))]
    text = f"one {processor.image_token} two {processor.image_token}"
    inputs = processor(text=text, images=pictures, return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 841 + 1261
    assert inputs["view_layout"].tolist() == [[0, 1, 1], [1, 1, 1], [0, 2, 1], [1, 2, 1], [2, 2, 1]]
    assert processor.replace_image_token(inputs, 1) == processor.image_token * 1261
    with torch.no_grad():
        assert tiled.model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    fewer = processor(text=processor.image_token, images=[Image.new("RGB", (1680, 560))], hd_num=2)
    assert len(fewer["pixel_values"]) == 3


def test_no_text_becomes_the_placeholder(plain: Any) -> None:
    tokenizer, token = plain.processor.tokenizer, plain.processor.image_token
    for text in (token, f"a{token}b", "\u00ff", "\x00", "\U0010ffff", "<unk>", "\ud7ff\ue000"):
        assert plain.processor.image_token_id not in tokenizer.encode(text, add_special_tokens=False)


def test_a_changed_tiling_is_saved(tiled: Any, release: Any, tmp_path: Any) -> None:
    folder = release(tiled)
    tiled.processor.save_pretrained(folder)
    assert not (folder / "preprocessor_config.json").exists(), "as in the release"
    XComposer2Processor.from_pretrained(folder, **OFFICIAL_TRAINING_TILING).save_pretrained(folder)
    image_processor = XComposer2Processor.from_pretrained(folder).image_processor
    assert {key: getattr(image_processor, key) for key in OFFICIAL_TRAINING_TILING} == OFFICIAL_TRAINING_TILING


def test_text_becomes_the_recorded_ids_and_back(golden: Any) -> None:
    from mmtool.models.internlm_xcomposer2.tokenization_internlm_xcomposer2 import InternLM2Tokenizer

    folder = golden("internlm-xcomposer2_5") / "real_tokenizer"
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    tokenizer = InternLM2Tokenizer(str(folder / "tokenizer.model"), **names)
    recorded = json.loads((folder / "cases.json").read_text("utf-8"))
    assert tokenizer.convert_tokens_to_ids(list(recorded["special_ids"])) == list(recorded["special_ids"].values())
    for row in recorded["rows"]:
        ids = row.get("ids_whitespace_kept", row["ids"])
        assert tokenizer.encode(row["text"], add_special_tokens=False) == ids, row["text"]
        assert tokenizer.decode(row["ids"]) == row["decoded"]
        assert tokenizer.decode(row["ids"], skip_special_tokens=True) == row["decoded_skip_special"]
