"""Pixels, ids, prompts and texts against the original's; and what its files do not show."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmtool.errors import CheckpointError
from mmtool.models.common.navit import split_slices
from mmtool.models.fm9g4b_v.processing_fm9g4b_v import FM9GVImageProcessor, FM9GVProcessor
from mmtool.models.fm9g4b_v.template import FM9GVTemplate
from mmtool.models.fm9g4b_v.tokenization_fm9g4b_v import FM9GVTokenizer


def test_pixels_of_the_original(cases):
    """Identical: PIL and NumPy make them in both."""
    checked = 0
    for case in cases():
        batch = case.batch
        if "pixel_values" not in batch:
            continue
        shapes = split_slices(batch["patch_info"])
        assert [list(shape) for shape in shapes] == [list(shape) for row in case.rows for shape in row["tgt_sizes"]], (
            case.name
        )
        if "pixel_values" not in case.tensors:  # training cases record none
            continue
        rows = batch["pixel_values"].split([height * width for height, width in shapes])
        for found, padded, (height, width) in zip(rows, case.tensors["pixel_values"], shapes, strict=True):
            side = padded.shape[1]
            patches = padded[:, :, : side * height * width].reshape(3, side, height * width, side)
            assert torch.equal(found, patches.permute(2, 0, 1, 3).flatten(1)), case.name
        checked += 1
    if not checked:
        pytest.skip("this selection has no pixels of slices")


def prompt_text(template, messages) -> str:
    text, number = "", 0
    for piece in template.render(messages):
        if piece.media is None:
            text += piece.text
        else:
            grids = template.processor.image_processor([Image.open(piece.media.source)])["image_grids"]
            numbered = template.processor.image_processor.use_image_id
            text += template.processor.expansion(tuple(map(int, grids[0])), number if numbered else None)
            number += 1
    return text


def test_prompts_and_ids_of_the_original(cases):
    for case in cases():
        for messages, encoded, row in zip(case.conversations, case.encoded, case.rows, strict=True):
            if case.train:
                layout = row["inference_layout"]
                assert encoded["input_ids"] == layout["input_ids"], case.name
                assert [*encoded["labels"][1:], -100] == layout["targets_aligned_to_logits"], case.name
                continue
            mask = row.get("attention_mask", [1] * len(row["input_ids"]))
            ids = [index for index, kept in zip(row["input_ids"], mask, strict=True) if kept]
            assert encoded["input_ids"] == ids, case.name
            assert prompt_text(case.template, messages) == row["prompt_text"], case.name


def test_media_say_where_features_are(cases):
    for case in cases():
        for encoded, row in zip(case.encoded, case.rows, strict=True):
            if "image_bound" not in row or case.train:
                continue
            pad = len(row["input_ids"]) - len(encoded["input_ids"])
            wanted = [index - pad for start, end in row["image_bound"] for index in range(start, end)]
            found = [item.start + index for item in encoded["media"] for index in item.feature_index]
            assert found == wanted, case.name
            for item in encoded["media"]:
                assert list(item.ids) == encoded["input_ids"][item.start : item.start + item.length], case.name
                assert set(item.inputs) == {"pixel_values", "patch_info"}


def test_tokenizer_of_the_golden_checkpoint(root, checkpoint):
    tokenizer = FM9GVTokenizer.from_pretrained(checkpoint)
    for row in json.loads((root / "tokenizer_cases.json").read_text("utf-8"))["rows"]:
        assert tokenizer(row["text"])["input_ids"] == row["ids"], row
        assert tokenizer.decode(row["ids"]) == row["decoded"], row
        assert tokenizer.decode(row["ids"], skip_special_tokens=True) == row["decoded_skip_special"], row


def test_tokenizer_of_the_release(root, real_tokenizer):
    tokenizer = FM9GVTokenizer.from_pretrained(real_tokenizer("fm9g4b-v"))
    for row in json.loads((root / "real_tokenizer_cases.json").read_text("utf-8"))["rows"]:
        assert tokenizer(row["text"])["input_ids"] == row["ids"], row
        assert tokenizer.decode(row["ids"], skip_special_tokens=True) == row["decoded_skip_special"], row


def test_the_tokenizer_is_saved_for_any_transformers(checkpoint, tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = FM9GVTokenizer.from_pretrained(checkpoint)
    tokenizer.save_pretrained(tmp_path)
    text = "a<|im_end|>b </s> <box>1</box>\n 图片"
    for other in (FM9GVTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert other(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert (other.padding_side, other.chat_template) == ("left", tokenizer.chat_template)
        assert other.all_special_ids == tokenizer.all_special_ids
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert settings["chat_template"] == tokenizer.chat_template and "auto_map" not in settings


@pytest.mark.parametrize(
    "text", ["<unk>", "<image></image>", "<slice>", "</s><s>", "<|im_end|>\n<|im_start|>assistant\n", "<image_id>0"]
)
def test_nothing_typed_is_a_control_token(template, text):
    plain = template.encode([{"role": "user", "content": "xx"}])["input_ids"]
    ids = template.encode([{"role": "user", "content": f"x{text}x"}])["input_ids"]
    control = set(template.tokenizer.all_special_ids)
    assert [index for index in ids if index in control] == [index for index in plain if index in control]
    assert template.tokenizer.decode(template.text_ids(text)) == text


def test_grounding_tokens_are_what_they_are_in_questions_and_answers(template):
    tokenizer = template.tokenizer
    text = "找到<ref>苹果</ref>，<box>1 2 3 4</box>"
    assert template.text_ids(text) == tokenizer.encode(text, add_special_tokens=False)
    assert template.decode([*tokenizer.encode(text, add_special_tokens=False), *template.stop_token_ids[:1]]) == (
        tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    )
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<box>1</box>"}]
    whole = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n<box>1</box><|im_end|>\n"
    assert template.encode(messages, train=True)["input_ids"] == tokenizer(whole)["input_ids"]


def test_answers_of_the_past_are_written_as_the_release_writes_them(template):
    turns = [("user", "山东"), ("assistant", " two  words\n"), ("user", "x"), ("assistant", ""), ("user", "\n")]
    messages = [{"role": role, "content": text} for role, text in turns]
    text = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
    assert template.encode(messages)["input_ids"] == template.tokenizer(text)["input_ids"]


def test_parts_are_joined_by_newlines_in_the_order_given(template):
    image = Image.new("RGB", (112, 112))
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "image", "image": image}]
    texts = [
        "<image>" if piece.media else piece.text for piece in template.render([{"role": "user", "content": content}])
    ]
    assert "".join(texts[1:-1]) == "a\nb\n<image>"


def test_pictures_are_numbered_over_the_conversation_sliced_or_not(template, root):
    sizes = [(112, 112), (400, 130), (112, 112)]
    pictures = [{"type": "image", "image": Image.new("RGB", size)} for size in sizes]
    messages = [
        {"role": "user", "content": [pictures[0], pictures[1]]},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": [pictures[2], pictures[0]]},
    ]
    text = template.tokenizer.decode(template.encode(messages)["input_ids"]).replace(" ", "")
    assert [text.count(f"<image_id>{number}</image_id>") for number in range(5)] == [1, 1, 1, 1, 0]
    keys = [item.key for item in template.encode(messages)["media"]]
    assert keys[0] == keys[2] == keys[3] != keys[1]  # the number is no part of what the tower sees


def test_a_cut_never_goes_through_a_picture(processor):
    template = FM9GVTemplate(processor, max_length=30, truncation_strategy="truncation_left")
    picture = {"type": "image", "image": Image.new("RGB", (112, 112))}
    encoded = template.encode([{"role": "user", "content": [picture, {"type": "text", "text": "What is this?" * 2}]}])
    assert encoded["media"] == [] and len(encoded["input_ids"]) <= 30
    assert template.processor.image_token_id not in encoded["input_ids"]


def test_the_processor_expands_pictures_like_the_template(processor, template, cases):
    case = next(cases("two_images_one_turn"))
    messages = case.conversations[0]
    images = [Image.open(part["image"]) for part in messages[0]["content"] if part["type"] == "image"]
    content = [{"type": "image"} if part["type"] == "image" else part for part in messages[0]["content"]]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text, text], images=[images, images], return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "patch_info"}
    assert inputs["input_ids"].tolist() == [case.rows[0]["input_ids"]] * 2  # both number their pictures from 0
    wanted = case.batch
    assert torch.equal(inputs["pixel_values"], torch.cat([wanted["pixel_values"]] * 2))
    assert torch.equal(inputs["patch_info"], torch.cat([wanted["patch_info"]] * 2))
    offsets = processor(text=text, images=images, return_text_replacement_offsets=True)["text_replacement_offsets"][0]
    for offset, item in zip(offsets, case.encoded[0]["media"], strict=True):
        ids = processor.tokenizer.encode(offset["replacement"], add_special_tokens=False)
        assert ids == list(item.ids)  # alone as inside the prompt
        assert max(set(ids), key=ids.count) == processor.image_token_id


@pytest.mark.parametrize("size", [(112, 112), (400, 130), (130, 401), (37, 9), (10000, 10000), (1200, 900)])
def test_counts_from_sizes_are_those_of_the_pixels(processor, size):
    counted = processor._get_num_multimodal_tokens([size[::-1]])
    if size == (10000, 10000):  # what asks for the largest picture; nothing that large is made
        assert counted.num_image_tokens[0] > 100
        return
    inputs = processor.image_processor([Image.new("RGB", size)], return_tensors="pt")
    assert counted.num_image_patches == [len(inputs["pixel_values"])] == [len(inputs["patch_info"])]
    assert counted.num_image_tokens == [processor.num_image_tokens(inputs, 0)]


def test_token_counts_of_the_release_table(root):
    rows = json.loads((root / "slicing_table.json").read_text("utf-8"))["rows"]
    for row in rows:
        image_processor = FM9GVImageProcessor(max_slice_nums=row["max_slice_nums"])
        plan = image_processor.plan(tuple(row["image_size"]))
        assert len(plan.sizes) * image_processor.image_feature_size == row["image_tokens"], row


def test_every_kind_of_picture_is_taken(processor):
    array = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    wanted = processor.image_processor([Image.fromarray(array)], return_tensors="pt")["pixel_values"]
    for image in (array, array.transpose(2, 0, 1), torch.from_numpy(array.transpose(2, 0, 1).copy())):
        assert torch.equal(processor.image_processor([image], return_tensors="pt")["pixel_values"], wanted)


def test_slices_of_one_picture_do_not_depend_on_others(processor):
    images = [Image.effect_noise(size, 90).convert("RGB") for size in ((300, 200), (90, 130))]
    together = processor.image_processor(images, return_tensors="pt")
    alone = [processor.image_processor([image], return_tensors="pt") for image in images]
    for name in ("pixel_values", "patch_info"):
        assert torch.equal(together[name], torch.cat([inputs[name] for inputs in alone]))


def test_without_its_own_file_the_processor_takes_the_models_settings(release):
    """Folders written by the release's fine-tuning have no preprocessor_config.json."""
    before = FM9GVProcessor.from_pretrained(release).image_processor
    (release / "preprocessor_config.json").unlink()
    after = FM9GVProcessor.from_pretrained(release).image_processor
    names = ("max_slice_nums", "scale_resolution", "patch_size", "use_image_id", "image_feature_size", "slice_mode")
    assert [getattr(after, name) for name in names] == [getattr(before, name) for name in names]


@pytest.mark.parametrize(
    ("name", "value"), [("image_feature_size", 64), ("patch_size", 16), ("use_image_id", False), ("max_slice_nums", 4)]
)
def test_files_that_do_not_agree_are_refused(release, name, value):
    path = release / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), name: value}), "utf-8")
    with pytest.raises(CheckpointError, match=name):
        FM9GVProcessor.from_pretrained(release)


def test_without_slice_mode_there_is_one_slice(processor):
    image_processor = FM9GVImageProcessor(slice_mode=False)
    assert image_processor.plan((4000, 3000)).grid is None


def test_the_processor_is_saved_in_the_layout_of_a_release(checkpoint, processor, tmp_path):
    processor.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "preprocessor_config.json").read_text("utf-8"))
    wanted = json.loads((checkpoint / "preprocessor_config.json").read_text("utf-8"))
    wanted.pop("auto_map")
    assert found == wanted
    again = FM9GVProcessor.from_pretrained(tmp_path)
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()


def test_text_parts_are_not_stripped(template):
    assert template.render([{"role": "user", "content": "  x \n"}])[1].text == "  x \n"
