"""InternLM-XComposer2, 4KHD and 2.5 against recorded runs of the original, from messages to greedy ids."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from mmtool.engine.base import Sampling, request_from
from mmtool.engine.pt import PtEngine
from mmtool.models.internlm_xcomposer2.processing_internlm_xcomposer2 import (
    OFFICIAL_TRAINING_TILING,
    XComposer2Processor,
)

# Absolute, float32, sdpa. Eager attention gives all recorded values bit for bit. Measured here over all cases:
# pixels 0, features and embeddings 1.2e-5, logits 1.2e-5, loss 1.9e-6 (one thread).
EMBEDS, LOGITS, LOSS = 5e-5, 1e-4, 1e-5
SLOW = ("image_large_nine_tiles", "image_two_text_hd6", "image_four_tiles")
# peft asks transformers by a name that is going away.
PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ELSEWHERE = ("batch", "train_batch", "lora", "infer_task_lora", "train_optional")  # kinds with a test of their own


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)


@torch.no_grad()
def check(golden: Any, case_dir: Path, wanted_ids: Any) -> None:
    case, expected = golden.case(case_dir.name)
    if case["kind"] in ELSEWHERE:
        pytest.skip("has a test of its own")
    train = case["kind"] == "train"
    encoded = golden.encode(case, train)
    # Of several recorded readings: prompts of 2.0 without a picture have one BOS, and it is trained in the layout of
    # its prompts.
    reading = "_single_bos" if "input_ids_single_bos" in expected else ""
    if train and golden.template(case).bos_in_every_part:
        reading, expected = "_of_prompts", expected | expected["variants"]["swift_style_bos_after_each_image"]
        expected["input_ids_of_prompts"] = expected["input_ids"]
    assert encoded["input_ids"] == wanted_ids(expected, f"input_ids{reading}")
    assert [item.length for item in encoded["media"]] == expected["num_image_tokens"]
    if train:
        labels = zip(encoded["labels"], encoded["input_ids"], strict=True)
        assert [label for label, token in labels if token != 258] == expected["labels"]
    tensors = load_file(case_dir / "tensors.safetensors")
    check_pixels(encoded, tensors)
    batch = golden.batch(encoded)
    output = golden.model(**batch)
    if train:
        assert abs(output.loss.item() - expected["loss"]) < LOSS
    if not reading:
        check_tensors(golden.model, batch, output, tensors)
    if reading == "_single_bos":
        recorded = torch.tensor([expected["input_ids"]])
        check_tensors(golden.model, {"input_ids": recorded}, golden.model(recorded), tensors)
    if "generated_ids" in expected:
        (found,) = golden.generate({name: value for name, value in batch.items() if name != "labels"})
        assert found == expected[f"generated_ids{reading}"]
        if "generated_text" in expected and not reading:
            assert golden.processor.tokenizer.decode(found, skip_special_tokens=True) == expected["generated_text"]


def check_pixels(encoded: dict, tensors: dict[str, torch.Tensor]) -> None:
    pixels = encoded.get("pixel_values")
    if "pixel_values" in tensors:
        assert torch.equal(pixels, tensors["pixel_values"])
    if "pixel_values_stride8" in tensors:
        assert torch.equal(pixels[:, :, ::8, ::8], tensors["pixel_values_stride8"])
    for index, item in enumerate(encoded["media"]):
        views = item.inputs["pixel_values"]
        for stride in (8, 16):
            if (wanted := tensors.get(f"pixel_values_{index}_stride{stride}")) is not None:
                assert torch.equal(views[:, :, ::stride, ::stride], wanted)
                assert_close(views.mean((2, 3)), tensors[f"pixel_values_{index}_mean"], 2e-5)
                assert_close(views.std((2, 3)), tensors[f"pixel_values_{index}_std"], 2e-5)
        if "pixel_full_stride8" in tensors:
            assert torch.equal(whole(item.inputs)[:, ::8, ::8], tensors["pixel_full_stride8"])


def whole(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Put the tiles of a picture together again."""
    _, rows, columns = inputs["view_layout"][0].tolist()
    tiles = inputs["pixel_values"][1:].unflatten(0, (rows, columns))
    return tiles.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def check_tensors(model: Any, batch: dict, output: Any, tensors: dict[str, torch.Tensor]) -> None:
    embeds = model.get_input_embeddings()(batch["input_ids"])
    places = batch["input_ids"] == 258
    if "image_mask" in tensors:
        assert torch.equal(places[0].long(), tensors["image_mask"].long())
    if output.image_hidden_states is not None:
        embeds[places] = torch.cat(output.image_hidden_states)
        if "vision_features" in tensors:
            features = torch.cat(output.image_hidden_states)
            assert_close(features, tensors["vision_features"].reshape(features.shape), EMBEDS)
    if "inputs_embeds" in tensors:
        assert_close(embeds[0], tensors["inputs_embeds"], EMBEDS)
    if "inputs_embeds_stride8" in tensors:
        assert_close(embeds[0, ::8], tensors["inputs_embeds_stride8"], EMBEDS)
    if "logits" in tensors:
        assert_close(output.logits[0], tensors["logits"], LOGITS)
    if "logits_last8" in tensors:
        assert_close(output.logits[0, -8:], tensors["logits_last8"], LOGITS)


@pytest.mark.golden_cases("internlm-xcomposer2")
def test_2_0(case_dir: Path, plain: Any, wanted_ids: Any) -> None:
    check(plain, case_dir, wanted_ids)


@pytest.mark.golden_cases("internlm-xcomposer2/variant_4khd")
def test_4khd(case_dir: Path, hd: Any, wanted_ids: Any) -> None:
    check(hd, case_dir, wanted_ids)


@pytest.mark.golden_cases("internlm-xcomposer2_5")
def test_2_5(case_dir: Path, tiled: Any, wanted_ids: Any) -> None:
    check(tiled, case_dir, wanted_ids)


@pytest.mark.parametrize("family", ["internlm-xcomposer2", "internlm-xcomposer2_5"])
@torch.no_grad()
def test_a_left_padded_batch(family: str, xcomposer: Any, wanted_ids: Any) -> None:
    golden = xcomposer(family)
    case, expected = golden.case("batch_left_pad")
    encoded = [golden.encode(row) for row in case["batch"]]
    assert [row["input_ids"] for row in encoded] == [wanted_ids(row) for row in expected["rows"]]
    batch = golden.batch(*encoded)
    tensors = load_file(golden.root / "cases" / "batch_left_pad" / "tensors.safetensors")
    assert torch.equal(batch["attention_mask"], tensors["attention_mask"].long())
    assert_close(golden.model(**batch).logits[:, -1], tensors["last_logits"], LOGITS)
    assert golden.generate(batch) == [row["generated_ids"] for row in expected["rows"]]


@torch.no_grad()
def test_a_right_padded_batch_of_training_rows(tiled: Any) -> None:
    case, expected = tiled.case("train_batch")
    encoded = [tiled.encode(tiled.case(name)[0], train=True) for name in case["members"]]
    assert [sum(label != -100 for label in row["labels"]) for row in encoded] == expected["supervised_tokens"]
    assert abs(tiled.model(**tiled.batch(*encoded)).loss.item() - expected["loss"]) < LOSS


@torch.no_grad()
def test_pictures_prepared_as_in_the_official_training(tiled: Any) -> None:
    case, expected = tiled.case("train_official_image_prep")
    processor = XComposer2Processor.from_pretrained(tiled.checkpoint, **OFFICIAL_TRAINING_TILING)
    template = type(tiled.template({}))(processor, system="")
    encoded = template.encode(tiled.messages(case), train=True)
    tensors = load_file(tiled.root / "cases" / "train_official_image_prep" / "tensors.safetensors")
    assert torch.equal(whole(encoded["media"][0].inputs)[:, ::8, ::8], tensors["pixel_full_stride8"])
    assert abs(tiled.model(**template.collate([encoded])).loss.item() - expected["loss"]) < LOSS


@pytest.mark.parametrize("mode", ["write", "web"])
@pytest.mark.parametrize("prompt", ["image_one", "text_only"])
@torch.no_grad()
def test_the_task_modes(tiled: Any, mode: str, prompt: str) -> None:
    case, expected = tiled.case(f"mode_{mode}_{prompt}")
    batch = tiled.batch(tiled.encode(case))
    model = tiled.load(task_mode=mode)
    tensors = load_file(tiled.root / "cases" / f"mode_{mode}_{prompt}" / "tensors.safetensors")
    logits = model(**batch).logits[0]
    wanted = tensors["logits"] if "logits" in tensors else tensors["logits_last8"]
    assert_close(logits[-len(wanted) :], wanted, LOGITS)
    answer = model.generate(**batch, max_new_tokens=16, do_sample=False)[0, len(logits) :]
    assert answer.tolist() == expected["generated_ids"]


@PEFT
@pytest.mark.parametrize("family", ["internlm-xcomposer2", "internlm-xcomposer2_5"])
@torch.no_grad()
def test_an_adapter_made_for_the_release_attaches_and_merges(family: str, xcomposer: Any, tmp_path: Path) -> None:
    golden = xcomposer(family)
    folder = golden.root / "cases" / "lora_image_middle"
    case, expected = golden.case("lora_image_middle")
    tensors = load_file(folder / "tensors.safetensors")
    batch = golden.batch(golden.encode(case))
    adapted = PeftModel.from_pretrained(golden.load(), folder / "adapter")
    assert_close(adapted(**batch).logits[0, -8:], tensors["logits_last8"], LOGITS)
    answer = adapted.generate(**batch, max_new_tokens=16, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert answer.tolist() == expected["generated_ids"]

    merged = adapted.merge_and_unload()
    assert_close(merged(**batch).logits[0, -8:], tensors["logits_merged_last8"], LOGITS)
    merged.save_pretrained(tmp_path / "merged")
    written, released = weights_in(tmp_path / "merged"), weights_in(golden.checkpoint)
    assert written.keys() == released.keys()
    name = "model.layers.0.attention.wqkv.weight"
    assert_close(written[name], tensors[f"merged.{name}"], 1e-6)
    touched = {name for name in written if not torch.equal(written[name], released[name])}
    matrices = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    assert touched == {f"model.layers.{layer}.{matrix}.weight" for layer in (0, 1) for matrix in matrices}


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    files = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
    read = load_file if files[0].suffix == ".safetensors" else torch.load
    return {name: tensor for file in files for name, tensor in read(file).items()}


@pytest.mark.parametrize("max_batch_size", [1, 4])
@pytest.mark.parametrize("family", ["internlm-xcomposer2", "internlm-xcomposer2_5"])
def test_the_engine_answers_as_the_original(family: str, max_batch_size: int, xcomposer: Any) -> None:
    """All conversations at once, one of them longer than the positions: its angles are nobody else's."""
    golden = xcomposer(family)
    names = sorted(path.name for path in (golden.root / "cases").iterdir())
    requests, wanted = [], []
    for name in names:
        case, expected = golden.case(name)
        too_slow = family.endswith("_5") and name in (
            "image_large_nine_tiles",
            "image_two_text_hd6",
            "image_four_tiles",
        )
        if not case["kind"].startswith("infer") or case["kind"] == "infer_task_lora" or too_slow:
            continue
        request = request_from(golden.template(case), golden.messages(case), Sampling(max_new_tokens=16), id=name)
        requests.append(dataclasses.replace(request, stop_words=(), stop_token_ids=()))
        reading = "_single_bos" if "generated_ids_single_bos" in expected else ""
        wanted.append(expected[f"generated_ids{reading}"])
    assert any(request.id == "long_dynamic_ntk" for request in requests)
    requests, wanted = requests + requests[:2], wanted + wanted[:2]  # again, behind the long one
    engine = PtEngine(golden.model, golden.processor.tokenizer, max_batch_size=max_batch_size)
    assert engine.max_model_len == json.loads((golden.checkpoint / "config.json").read_text())["max_length"]
    found: dict[int, list[int]] = {}
    for delta in engine.generate(requests):
        found.setdefault(delta.index, []).extend(delta.token_ids)
    for index, request in enumerate(requests):
        assert found[index] == wanted[index], request.id
