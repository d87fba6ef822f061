"""The loss that trains is that of the model itself, and of the recorded runs of the original."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtool.loader import get_template, load_model, load_processor, open_folder
from mmtool.messages import Message
from mmtool.sft import learner as learner_module
from mmtool.sft.batches import Collator
from mmtool.sft.features import DiskFeatures, MemoryFeatures
from mmtool.sft.learner import Learner
from mmtool.sft.network import _dummy

SPEC, FOLDER = open_folder("tiny")


@pytest.fixture(scope="module")
def template() -> Any:
    return get_template(SPEC, load_processor(SPEC, FOLDER))


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(SPEC, FOLDER)[0]


@pytest.fixture(scope="module")
def rows(template: Any, conversations: list[list[Message]]) -> list[dict]:
    return [template.encode(messages, train=True) for messages in conversations]


def loss_of(learner: Learner, items: list[Any], template: Any, **more: Any) -> torch.Tensor:
    batch = Collator(template)(items)
    return learner(**{name: value for name, value in batch.items() if name not in ("errors", "origins")}, **more)[
        "loss"
    ]


def gradients(learner: Learner, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    learner.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    worst = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    scale = max(float(value.abs().max()) for value in expected.values())
    assert worst <= atol * scale, f"{worst} of {scale}"


def test_loss_and_gradients_are_those_of_the_model(model: Any, template: Any, rows: list[dict]) -> None:
    learner = Learner(model)
    found = loss_of(learner, rows, template)
    expected = model(**template.collate(rows)).loss
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    of_model = gradients(learner, expected)
    assert_same(gradients(learner, loss_of(learner, rows, template)), of_model, 1e-4)


def test_pieces_of_logits_change_nothing(
    model: Any, template: Any, rows: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(model)
    whole = loss_of(learner, rows, template)
    grads = gradients(learner, whole)
    monkeypatch.setattr(learner_module, "LOGITS_AT_ONCE", 3 * 1200)
    pieces = loss_of(learner, rows, template)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=0)
    assert_same(gradients(learner, pieces), grads, 1e-5)


def test_rows_that_share_one_have_the_loss_they_have_alone(model: Any, template: Any, rows: list[dict]) -> None:
    learner = Learner(model)
    assert learner.keeps_packed_rows_apart()
    apart = loss_of(learner, rows, template)
    grads = gradients(learner, apart)
    packed = loss_of(learner, [[rows[1], rows[0]], [rows[2]]], template)
    torch.testing.assert_close(packed, apart, atol=1e-4, rtol=0)
    assert_same(gradients(learner, packed), grads, 1e-3)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_frozen_tower_runs_once_per_picture(
    model: Any, template: Any, rows: list[dict], kind: str, tmp_path: Path
) -> None:
    plain = loss_of(Learner(model), rows, template)
    cache = MemoryFeatures(2**30) if kind == "memory" else DiskFeatures(tmp_path)
    learner = Learner(model, frozen_kinds=["image"], cache=cache)
    torch.testing.assert_close(loss_of(learner, rows, template), plain, atol=1e-6, rtol=0)
    assert learner.towers_run == len(cache) == 2, "the red picture is there twice"
    torch.testing.assert_close(loss_of(learner, rows, template), plain, atol=1e-6, rtol=0)
    assert learner.towers_run == 2


def test_features_beyond_the_limit_are_not_kept(model: Any, template: Any, rows: list[dict]) -> None:
    learner = Learner(model, frozen_kinds=["image"], cache=MemoryFeatures(1))
    loss_of(learner, rows, template)
    loss_of(learner, rows, template)
    assert (learner.towers_run, len(learner.cache)) == (4, 0)


def test_a_batch_without_pictures_gives_towers_a_gradient_of_nothing(
    model: Any, template: Any, rows: list[dict]
) -> None:
    learner = Learner(model, dummies={"image": _dummy(template, "image")})
    torch.testing.assert_close(
        loss_of(learner, rows[:1], template), loss_of(Learner(model), rows[:1], template), atol=1e-6, rtol=0
    )
    grads = gradients(learner, loss_of(learner, rows[:1], template))
    tower = [grad for name, grad in grads.items() if "multi_modal_projector" in name]
    assert tower
    assert all(not grad.any() for grad in tower)


def test_a_batch_with_nothing_to_learn_has_a_loss_of_nothing(model: Any, template: Any) -> None:
    learner = Learner(model)
    loss = loss_of(learner, [{"error": "gone"}], template)
    assert float(loss.detach()) == 0.0
    grads = gradients(learner, loss)
    assert any("lm_head" in name for name in grads)
    assert not any(grad.any() for grad in grads.values())


def test_the_loss_is_divided_by_the_tokens_of_the_whole_step(model: Any, template: Any, rows: list[dict]) -> None:
    learner = Learner(model)
    counts = [sum(label != -100 for label in row["labels"]) for row in rows]
    apart = sum(loss_of(learner, [row], template, num_items_in_batch=sum(counts)) for row in rows)
    torch.testing.assert_close(apart, loss_of(learner, rows, template), atol=1e-5, rtol=0)


def test_frozen_towers_stay_in_evaluation_mode(model: Any) -> None:
    tower = model.get_submodule("model.vision_tower")
    learner = Learner(model, frozen_modules=[tower]).train()
    assert not any(module.training for module in tower.modules())
    assert model.get_decoder().training
    learner.eval()


# Measured maximum: 2e-6.
def test_losses_are_those_of_the_original(golden: Callable[[str], Path]) -> None:
    folder = golden("yi-vl")
    spec, checkpoint = open_folder(None, folder / "checkpoint")
    network, processor = load_model(spec, checkpoint, dtype="fp32")
    template = get_template(spec, processor)
    cases = sorted((folder / "cases").glob("train_*"))
    assert cases
    for case in cases:
        messages = json.loads((case / "case.json").read_text(encoding="utf-8"))["messages"]
        for part in (part for message in messages for part in message["content"] if isinstance(part, dict)):
            if part["type"] == "image":
                part["image"] = str(folder / part["image"])
        expected = json.loads((case / "expected.json").read_text(encoding="utf-8"))["loss"]
        found = float(loss_of(Learner(network), [template.encode(messages, train=True)], template).detach())
        assert found == pytest.approx(expected, abs=1e-4), case.name
