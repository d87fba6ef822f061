"""Megrez against the original's golden numbers: towers, logits, answers, losses, gradients."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmtool.engine.base import Sampling, request_from
from mmtool.engine.pt import PtEngine
from mmtool.models.common.navit import split_slices
from mmtool.models.megrez.modeling_megrez import MegrezInstructForCausalLM, MegrezOmniForConditionalGeneration
from mmtool.models.megrez.template import MegrezOmniTemplate, MegrezTemplate

Model = MegrezOmniForConditionalGeneration
Read = Callable[[Path], list[list[dict]]]

# Measured with eager attention on one thread: vision 1.9e-6, tower 2.7e-6, audio 1.3e-6, logits 8.1e-6, loss 1.9e-6.
# The sound at 44.1 kHz comes through a resampler that differs by 1/32768 in one sample of 2000: mel 1.6e-3 (in frames
# near silence), audio features 8.6e-5, logits 3.2e-5; the golden tolerances hold for what comes behind the frames.
TOLERANCE = 1e-5
GOLDEN = {"audio": 1e-4, "logits": 5e-4}


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


def tolerances(case_dir: Path) -> tuple[float, float, float]:
    """Return those of mel frames, audio features and logits."""
    return (2e-3, GOLDEN["audio"], GOLDEN["logits"]) if "44k" in case_dir.name else (1e-6, TOLERANCE, 2e-5)


def batch_of(template: MegrezTemplate, case_dir: Path, expected: dict, read: Read) -> dict[str, Tensor]:
    train = "labels" in expected
    rows = [template.encode(messages, train=train) for messages in read(case_dir)]
    if case_dir.name in ("special_token_injection", "injection"):  # the original lets people type control tokens
        return {"input_ids": torch.tensor([expected["input_ids"]])}
    return template.collate(rows)


@pytest.mark.golden_cases("megrez-3b-omni")
@torch.no_grad()
def test_media_become_the_features_of_the_original(
    case_dir: Path, expected: dict, model: Model, template: MegrezOmniTemplate, read_case: Read
) -> None:
    tensors = load_file(case_dir / "tensors.safetensors")
    batch = batch_of(template, case_dir, expected, read_case)
    mel_tolerance, audio_tolerance, _ = tolerances(case_dir)
    if "vision_features" in tensors:
        pixels, info = batch["pixel_values"], batch["patch_info"]
        output = model.get_image_features(pixels, info)
        assert_close(torch.cat(output.pooler_output), tensors["vision_features"].flatten(0, 1), TOLERANCE)
        lengths = [rows * columns for rows, columns in split_slices(info)]
        assert [list(shape) for shape in split_slices(info)] == tensors["tgt_sizes"].tolist()
        for number, (patches, seen) in enumerate(
            zip(pixels.split(lengths), output.last_hidden_state.split(lengths), strict=True)
        ):
            index = tensors["patch_sample_index"][number].long()
            wanted = tensors["pixel_values_patch_sample"][number].flatten(1)
            assert torch.equal(patches[index], wanted), "to the last bit"
            assert_close(seen[index], tensors["vision_tower_patch_sample"][number], TOLERANCE)
    if "audio_features" in tensors:
        frames = batch["input_features"]
        if "input_features" in tensors:
            wanted = tensors["input_features"]
            assert_close(frames[..., : wanted.shape[-1]], wanted, mel_tolerance)
        else:
            assert_close(frames[..., :64], tensors["input_features_head64"], mel_tolerance)
            assert_close(frames[..., -64:], tensors["input_features_tail64"], mel_tolerance)
        features = model.get_audio_features(frames, batch["input_features_mask"]).pooler_output
        assert [len(rows) for rows in features] == expected["audio_span_tokens"]
        assert_close(torch.cat(features), tensors["audio_features"], audio_tolerance)


@pytest.mark.golden_cases("megrez-3b-omni")
@torch.no_grad()
def test_logits_and_answers_of_the_original(
    case_dir: Path, expected: dict, model: Model, template: MegrezOmniTemplate, read_case: Read
) -> None:
    tensors = load_file(case_dir / "tensors.safetensors")
    batch = batch_of(template, case_dir, expected, read_case)
    labels = batch.get("labels")
    output = model(**batch)
    if labels is not None:
        assert output.loss.item() == pytest.approx(expected["loss"], abs=1e-5)
        for found, wanted in zip(labels.tolist(), np.atleast_2d(expected["labels"]).tolist(), strict=True):
            assert found[: len(wanted)] == wanted
            assert set(found[len(wanted) :]) <= {-100}
    for row, length in enumerate(expected.get("lengths", [batch["input_ids"].shape[1]])):
        last = "logits_last8" if "lengths" not in expected else f"logits_last8_{row}"
        if "logits" in tensors:
            assert_close(output.logits[row], tensors["logits"], tolerances(case_dir)[2])
        else:
            assert_close(output.logits[row, length - 8 : length], tensors[last], tolerances(case_dir)[2])
    if "generated_ids" in expected:
        answer = model.generate(**batch, max_new_tokens=16, do_sample=False)[0, batch["input_ids"].shape[1] :]
        assert answer.tolist() == expected["generated_ids"]
        assert template.decode(answer.tolist()) == expected["generated_text"]


@pytest.mark.golden_cases("megrez-3b-omni")
def test_gradients_of_the_original(
    case_dir: Path, expected: dict, omni: Path, template: MegrezOmniTemplate, read_case: Read
) -> None:
    if "grad_norms" not in expected:
        pytest.skip("no training case with one sample")
    model = Model.from_pretrained(omni / "checkpoint", attn_implementation="eager")
    model(**batch_of(template, case_dir, expected, read_case)).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for released, wanted in expected["grad_norms"].items():
        assert gradients[Model.our_name(released)].norm().item() == pytest.approx(wanted, rel=1e-4), released


@pytest.mark.golden_cases("megrez-3b-instruct")
@torch.no_grad()
def test_the_text_model(
    case_dir: Path,
    expected: dict,
    text_model: MegrezInstructForCausalLM,
    text_template: MegrezTemplate,
    read_case: Read,
) -> None:
    tensors = load_file(case_dir / "tensors.safetensors")
    batch = batch_of(text_template, case_dir, expected, read_case)
    output = text_model(**batch)
    if "logits_last" in tensors:
        assert_close(output.logits[:, -1], tensors["logits_last"], 2e-5)  # measured 6.2e-6 over all cases
    else:
        assert_close(output.logits[0, -8:], tensors["logits_last8"], 2e-5)
    if "loss" in expected:
        assert output.loss.item() == pytest.approx(expected["loss"], abs=1e-5)
        return
    answers = text_model.generate(**batch, max_new_tokens=16, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert answers.tolist() in (expected["generated_ids"], [expected["generated_ids"]])


@pytest.mark.parametrize("max_batch_size", [1, 4])
def test_the_engine_answers_as_the_original(
    omni: Path, model: Model, template: MegrezOmniTemplate, read_case: Read, max_batch_size: int
) -> None:
    requests, wanted = [], []
    for case_dir in sorted((omni / "cases").iterdir()):
        expected = json.loads((case_dir / "expected.json").read_text("utf-8"))
        if "generated_ids" in expected and case_dir.name != "special_token_injection":
            requests.append(request_from(template, read_case(case_dir)[0], Sampling(max_new_tokens=16), case_dir.name))
            wanted.append(expected)
    assert requests
    engine = PtEngine(model, template.tokenizer, max_batch_size=max_batch_size)
    ids, texts = [[] for _ in requests], [""] * len(requests)
    for delta in engine.generate(requests):
        ids[delta.index] += delta.token_ids
        texts[delta.index] += delta.text
    for request, found, text, expected in zip(requests, ids, texts, wanted, strict=True):
        assert found == expected["generated_ids"], request.id
        assert text == expected["generated_text"], request.id
    shown = [item.key for request in requests for item in request.media]
    assert engine.stats.feature_hits > 0 or len(set(shown)) == len(shown), "several cases show the same picture"


@torch.no_grad()
def test_a_batch_of_all_kinds_equals_the_rows_alone(
    omni: Path, model: Model, template: MegrezOmniTemplate, read_case: Read
) -> None:
    names = ("text_only", "image_slices_padded_batch", "audio_short", "image_audio_text", "multi_turn_audio")
    rows = [template.encode(read_case(omni / "cases" / name)[0]) for name in names]
    together = template.collate(rows)
    logits = model(**together).logits
    answers = model.generate(**together, max_new_tokens=8, do_sample=False)[:, together["input_ids"].shape[1] :]
    for row, found, answer in zip(rows, logits, answers, strict=True):
        alone = template.collate([row])
        assert_close(found[-len(row["input_ids"]) :], model(**alone).logits[0], 2e-5)  # measured 1e-5
        ids = model.generate(**alone, max_new_tokens=8, do_sample=False)[0, len(row["input_ids"]) :]
        assert answer.tolist() == ids.tolist()


@torch.no_grad()
def test_decoding_with_a_cache_equals_the_full_forward(
    omni: Path, model: Model, template: MegrezOmniTemplate, read_case: Read
) -> None:
    inputs = template.collate([template.encode(read_case(omni / "cases" / "image_audio_text")[0])])
    full = model(**inputs).logits
    ids = inputs["input_ids"]
    cut = ids.shape[1] - 5
    media = {key: inputs[key] for key in ("pixel_values", "patch_info", "input_features", "input_features_mask")}
    first = model(ids[:, :cut], **media, use_cache=True)
    steps, cache = [first.logits], first.past_key_values
    for position in range(cut, ids.shape[1]):
        steps.append(model(ids[:, position : position + 1], past_key_values=cache, use_cache=True).logits)
    assert_close(torch.cat(steps, dim=1), full, TOLERANCE)


@torch.no_grad()
def test_fused_attention_equals_eager(omni: Path, model: Model, template: MegrezOmniTemplate, read_case: Read) -> None:
    fused = Model.from_pretrained(omni / "checkpoint", attn_implementation="sdpa")
    assert {module.config._attn_implementation for module in fused.modules() if hasattr(module, "config")} == {"sdpa"}
    for name in ("image_slices_padded_batch", "multi_turn_audio"):
        inputs = template.collate([template.encode(read_case(omni / "cases" / name)[0])])
        assert_close(fused(**inputs).logits, model(**inputs).logits, 2e-5)  # measured 7e-6


@torch.no_grad()
def test_a_shorter_sound_hears_the_silence_behind_it_only_beside_a_longer_one(
    omni: Path, model: Model, template: MegrezOmniTemplate, read_case: Read
) -> None:
    encoded = template.encode(read_case(omni / "cases" / "multi_turn_audio")[0])
    both = [item.inputs for item in encoded["media"]]
    frames, mask = (torch.cat([item[key] for item in both]) for key in ("input_features", "input_features_mask"))
    assert mask.sum(dim=1).tolist() == [7, 322], "three positions and one frame more; 161 positions"
    short, long = model.get_audio_features(frames, mask).pooler_output
    alone = model.get_audio_features(frames[:1], mask[:1]).pooler_output[0]
    assert_close(alone, short, TOLERANCE)  # the mask says it all: no neighbour in the call is needed
    mask[0, 6] = 0
    apart, same = model.get_audio_features(frames, mask).pooler_output
    assert_close(same, long, 0.0)
    assert (apart - short).abs().max() > 1e-3


@torch.no_grad()
def test_a_sound_without_a_position_is_its_two_marks(model: Model) -> None:
    table = model.model.audio_projector.audio_bos_eos_token.weight
    frames, mask = torch.randn(2, 128, 3000), torch.zeros(2, 3000, dtype=torch.long)
    (nothing,) = model.get_audio_features(frames[:1], mask[:1]).pooler_output
    assert torch.equal(nothing, table)
    mask[1, :8] = 1
    nothing, sound = model.get_audio_features(frames, mask).pooler_output
    assert torch.equal(nothing, table)
    assert sound.shape == (4, 128)
    assert sound.isfinite().all()
    (whole,) = model.get_audio_features(frames[:1]).pooler_output
    assert whole.shape == (752, 128), "without a mask all frames are seen"


@torch.no_grad()
def test_features_come_one_tensor_per_medium_and_media_may_come_as_lists(
    omni: Path, model: Model, template: MegrezOmniTemplate, read_case: Read
) -> None:
    encoded = template.encode(read_case(omni / "cases" / "image_slices_padded_batch")[0])
    together = model.get_image_features(encoded["pixel_values"], encoded["patch_info"]).pooler_output
    assert [tuple(rows.shape) for rows in together] == [(192, 128), (64, 128)]
    lists = [[item.inputs[name] for item in encoded["media"]] for name in ("pixel_values", "patch_info")]
    for one, other in zip(together, model.get_image_features(*lists).pooler_output, strict=True):
        assert_close(one, other, TOLERANCE)
    with pytest.raises(ValueError, match=r"256 media positions.* 192 features"):
        model(torch.tensor([encoded["input_ids"]]), lists[0][0], lists[1][0])


def test_training_with_gradient_checkpoints_gives_the_same_gradients(
    omni: Path, template: MegrezOmniTemplate, read_case: Read
) -> None:
    model = Model.from_pretrained(omni / "checkpoint").train()
    batch = template.collate([template.encode(read_case(omni / "cases" / "train_image_audio")[0], train=True)])

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its newer name first
    for name, gradient in gradients().items():
        assert_close(gradient, plain[name], 1e-5)
    assert "model.audio_tower.positional_embedding" not in plain, "it is never trained"


@torch.no_grad()
def test_bfloat16_is_near(omni: Path, model: Model, template: MegrezOmniTemplate, read_case: Read) -> None:
    half = Model.from_pretrained(omni / "checkpoint", dtype="bfloat16")
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    inputs = template.collate([template.encode(read_case(omni / "cases" / "image_audio_text")[0])])
    logits = half(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert_close(logits.float(), model(**inputs).logits, 0.35)  # logits reach 6


def test_a_model_from_a_configuration_is_whole_and_close_to_the_position_table_of_whisper(model: Model) -> None:
    fresh = Model(model.config)
    assert all(tensor.isfinite().all() for tensor in fresh.state_dict().values())
    table = fresh.model.audio_tower.positional_embedding
    stored = model.model.audio_tower.positional_embedding
    kept = stored.any(dim=1)  # a selection of golden data has the rows that its cases read
    assert kept.any()
    assert_close(table[kept], stored[kept], 0.2)  # the stored one has noise on it


def test_chat_takes_the_messages_of_the_release(omni: Path, model: Model) -> None:
    expected = json.loads((omni / "cases" / "image_audio_text" / "expected.json").read_text("utf-8"))
    content = {
        "text": "Please answer.",
        "audio": str(omni / "media" / "speech_16k_mono.wav"),
        "image": str(omni / "media" / "square_448.png"),
    }

    class Streamer:
        ids, ended = [], False

        def put(self, ids: Tensor) -> None:
            self.ids += ids.tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    answer = model.chat([{"role": "user", "content": content}], sampling=False, max_new_tokens=16, streamer=streamer)
    assert answer == expected["generated_text"]
    assert (streamer.ids, streamer.ended) == (expected["generated_ids"], True)
    text = model.chat([{"role": "user", "content": {"text": "How many shapes do you see?"}}], max_new_tokens=16)
    again = model.chat([{"role": "user", "content": "How many shapes do you see?"}], max_new_tokens=16)
    assert text == again
