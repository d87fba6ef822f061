"""Pictures and sounds to tensors, counts of positions, and the processor as serving engines use it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.whisper.feature_extraction_whisper import WhisperFeatureExtractor

from mmtool.errors import CheckpointError
from mmtool.media import load_audio
from mmtool.models.common.navit import bucket_positions, split_slices
from mmtool.models.megrez.processing_megrez import MegrezFeatureExtractor, MegrezOProcessor


@pytest.mark.golden_cases("megrez-3b-omni")
def test_pixels_of_the_original(case_dir: Path, expected: dict, processor: MegrezOProcessor) -> None:
    if "pixel_u8_sha256" not in expected:
        pytest.skip("no single conversation with pictures")
    case = json.loads((case_dir / "case.json").read_text("utf-8"))
    parts = [part for message in case["messages"] for part in message["content"] if part["type"] == "image"]
    pictures = [Image.open(case_dir.parents[1] / part["image"]) for part in parts]
    made = processor.image_processor(pictures, return_tensors="pt")
    assert [tuple(grid) if any(grid) else None for grid in made["image_grids"].tolist()] == [
        grid and tuple(grid) for grid in expected["image_grids"]
    ]
    lengths = [rows * columns for rows, columns in split_slices(made["patch_info"])]
    for rows, wanted in zip(made["pixel_values"].split(lengths), expected["pixel_u8_sha256"], strict=True):
        values = (rows * 127.5 + 127.5).round().to(torch.uint8).view(-1, 3, 14, 14)
        flat = values.permute(1, 2, 0, 3).reshape(3, 14, -1).contiguous()
        assert hashlib.sha256(flat.numpy().tobytes()).hexdigest() == wanted


def test_how_pictures_are_cut(omni: Path, processor: MegrezOProcessor) -> None:
    rows = json.loads((omni / "slicing_table.json").read_text("utf-8"))["rows"]
    assert len(rows) >= 40
    for row in rows:
        width, height = row["image_wh"]
        plan = processor.image_processor.plan((width, height))
        assert (plan.grid and list(plan.grid)) == row["grid_cols_rows"], row
        assert (list(plan.overview), plan.tile and list(plan.tile)) == (row["source_wh"], row["slice_wh"]), row
        ids, index = processor.image_ids((width, height))
        assert len(index) == row["feature_tokens"]
        assert len(ids) == len(index) + row["wrapper_tokens"] + row["row_newline_tokens"]
        counts = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        assert counts.num_image_tokens == [len(ids)]
        assert counts.num_image_patches == [sum(w * h // 196 for w, h in plan.sizes)]


def test_positions_of_patches(omni: Path) -> None:
    table = json.loads((omni / "position_buckets.json").read_text("utf-8"))
    for count, buckets in table["buckets"].items():
        assert bucket_positions(int(count), table["num_patches_per_side"]).tolist() == buckets


def test_how_many_positions_sounds_take(omni: Path, processor: MegrezOProcessor) -> None:
    extractor = processor.feature_extractor
    for row in json.loads((omni / "audio_token_table.json").read_text("utf-8")):
        samples = row["n_samples_16k"]
        assert extractor.num_positions(samples) == row["len_after_conv"], row
        ids, index = processor.audio_ids(extractor.num_positions(samples))
        assert (len(index), len(ids)) == (row["span_tokens"], row["span_tokens"] + 2)
        assert processor._get_num_multimodal_tokens(audio_lengths=[samples]).num_audio_tokens == [len(ids)]


@pytest.mark.parametrize("samples", [0, 1, 300, 16000, 480_000, 500_000])
def test_frames_are_those_of_whisper(samples: int) -> None:
    sound = (np.random.default_rng(0).integers(-3000, 3000, samples) / 32768).astype(np.float32)
    made = MegrezFeatureExtractor()(sound, sampling_rate=16000, return_tensors="pt")
    wanted = WhisperFeatureExtractor(feature_size=128)([sound], sampling_rate=16000, return_tensors="pt")
    assert torch.equal(made["input_features"], wanted["input_features"].float())
    assert made["input_features"].shape == (1, 128, 3000)
    assert made["input_features_mask"].sum().item() == 2 * (-(-(min(samples, 480_000) // 160) // 2))
    with pytest.raises(ValueError, match="sampling rate"):
        MegrezFeatureExtractor()(sound, sampling_rate=8000)


def test_what_media_give_does_not_depend_on_their_neighbours(omni: Path, processor: MegrezOProcessor) -> None:
    pictures = [Image.open(omni / "media" / name) for name in ("grey_640x480.png", "tiny_40x30.png")]
    sounds = [load_audio(omni / "media" / name) for name in ("short_50ms_16k.wav", "speech_16k_mono.wav")]
    for make, media in ((processor.image_processor, pictures), (processor.feature_extractor, sounds)):
        together = make(media, return_tensors="pt")
        alone = [make([medium], return_tensors="pt") for medium in media]
        for name in make.model_input_names:
            assert torch.equal(together[name], torch.cat([one[name] for one in alone])), name


def test_the_processor_works_as_one_of_transformers(omni: Path, processor: MegrezOProcessor) -> None:
    picture = Image.open(omni / "media" / "grey_640x480.png")
    sound = load_audio(omni / "media" / "speech_16k_mono.wav")
    text = f"{processor.image_token}\nAudio 1: {processor.audio_token}\nhello"
    inputs = processor(text=text, images=[picture], audio=[sound], return_tensors="pt")
    fields = {"pixel_values", "patch_info", "input_features", "input_features_mask"}
    assert set(inputs) == {"input_ids", "attention_mask"} | fields
    assert fields <= set(processor.model_input_names)
    ids = inputs["input_ids"][0].tolist()
    image_ids, _ = processor.image_ids(picture.size)
    audio_ids, _ = processor.audio_ids(processor.feature_extractor.num_positions(len(sound)))
    feature = processor.token_ids["feature"]

    def named(found: list[int], token: int) -> list[int]:
        return [token if index == feature else index for index in found]

    assert ids[: len(image_ids)] == named(image_ids, processor.image_token_id)
    start = ids.index(processor.token_ids["audio_start"])
    assert ids[start : start + len(audio_ids)] == named(audio_ids, processor.audio_token_id)
    for expansion, token in (
        (processor.replace_image_token(processor.image_processor([picture]), 0), processor.image_token_id),
        (processor.replace_audio_token(processor.feature_extractor(sound), 0), processor.audio_token_id),
    ):
        alone = processor.tokenizer.encode(expansion)
        assert max(alone, key=alone.count) == token
        assert expansion in processor.tokenizer.decode(ids), "it encodes alone as it does in the prompt"


@torch.no_grad()
def test_a_prompt_of_the_processor_gives_the_logits_of_one_of_the_template(omni, processor, template, model) -> None:
    picture, sound = omni / "media" / "tiny_40x30.png", omni / "media" / "short_50ms_16k.wav"
    parts = [{"type": "image", "image": picture}, {"type": "audio", "audio": sound}, {"type": "text", "text": "Hm?"}]
    encoded = template.encode([{"role": "user", "content": parts}])
    text = template.tokenizer.apply_chat_template(
        [{"role": "user", "content": {"image": "", "audio": "", "text": "Hm?"}}],
        tokenize=False,
        add_generation_prompt=True,
    )
    text = text.replace("(<image>./</image>)", processor.image_token)
    text = text.replace("(<audio>./</audio>)", processor.audio_token)
    inputs = processor(text=text, images=[Image.open(picture)], audio=[load_audio(sound)], return_tensors="pt")
    assert inputs["input_ids"].shape[1] == len(encoded["input_ids"])
    torch.testing.assert_close(model(**inputs).logits, model(**template.collate([encoded])).logits, rtol=0, atol=1e-6)


def test_huge_pictures_can_be_counted(processor: MegrezOProcessor) -> None:
    counts = processor._get_num_multimodal_tokens(image_sizes=[(10000, 10000), (1, 7)])
    assert counts.num_image_tokens == [10 * 66 + 2, 66]
    assert processor._get_num_multimodal_tokens().num_image_tokens is None


def test_arrays_and_tensors_are_pictures_too(omni: Path, processor: MegrezOProcessor) -> None:
    picture = Image.open(omni / "media" / "photo_500x305.png")
    array = np.asarray(picture)
    wanted = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    for same in (array, array.transpose(2, 0, 1), torch.tensor(array)):
        assert torch.equal(processor.image_processor(same, return_tensors="pt")["pixel_values"], wanted)
    with pytest.raises(ValueError, match="uint8"):
        processor.image_processor(array / 255.0)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (
            "preprocessor_config.json",
            {"im_start": "<image>"},
            r"'<image>', which stands for 'image_start'.*not one token",
        ),
        ("preprocessor_config.json", {"image_feature_size": 32}, "image_feature_size .* is 32, but .* takes 64"),
        ("preprocessor_config.json", {"patch_size": 16}, "patch_size .* is 16, but .* takes 14"),
        ("preprocessor_config.json", {"feature_size": 80}, "feature_size .* is 80, but .* takes 128"),
        ("config.json", {"patch_size": 16}, "patch_size is 16, but vision_config.patch_size is 14"),
        ("config.json", {"hidden_size": 256}, "output_dim is 128, but hidden_size is 256"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    release: Path, edit: Callable[..., None], file: str, values: dict, message: str
) -> None:
    edit(release / file, **values)
    with pytest.raises(CheckpointError, match=message):
        MegrezOProcessor.from_pretrained(release)


def test_token_names_come_from_the_folder(release: Path, edit: Callable[..., None]) -> None:
    edit(release / "preprocessor_config.json", slice_start="<|video_start|>", slice_end=None)
    edit(release / "tokenizer_config.json", slice_end={"content": "<|video_end|>"}, audio_start="<|diff_start|>")
    processor = MegrezOProcessor.from_pretrained(release)
    assert [processor.token_ids[part] for part in ("slice_start", "slice_end", "audio_start")] == [1009, 1010, 1002]


def test_without_preprocessor_settings_the_usual_ones_hold(release: Path, processor: MegrezOProcessor) -> None:
    (release / "preprocessor_config.json").unlink()
    again = MegrezOProcessor.from_pretrained(release)
    assert again.token_texts == processor.token_texts
    assert again.image_ids((720, 1480)) == processor.image_ids((720, 1480))
