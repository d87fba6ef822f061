"""Every native family trains: the losses of the originals, adapters where they belong, gradients that arrive."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmtool.groups.sft import PartArgs, TunerArgs
from mmtool.loader import fit_layout, get_template, load_model, open_folder
from mmtool.sft.batches import Collator, pack_rows
from mmtool.sft.learner import Learner
from mmtool.sft.lora import add_adapters, lora_modules
from mmtool.sft.parts import PartNames, choose_ways, set_trainable

# The folder of golden data, and where the loss is recorded that is ours; None where the tests of the family know how
# the recorded layouts and ours differ.
FAMILIES: dict[str, tuple[str, ...] | None] = {
    "yi-vl": ("loss",),
    "internlm-xcomposer2": None,
    "internlm-xcomposer2_5": None,
    "megrez-3b-omni": ("loss",),
    "megrez-3b-instruct": ("loss",),
    "fm9g4b-v": ("inference_layout", "loss"),
    "fm9g/gqa": None,
    "fm9g/mla": None,
}
# Cases that prepare pictures in a way that is not that of inference.
OTHERWISE = {"train_official_image_prep"}


def conversations(folder: Path) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Return the training cases: messages with the paths of their media, and what was recorded."""
    found = []
    for path in sorted((folder / "cases").glob("train_*")):
        case = json.loads((path / "case.json").read_text(encoding="utf-8"))
        if "messages" not in case or path.name in OTHERWISE:
            continue
        for part in (part for message in case["messages"] for part in message["content"]):
            if part["type"] != "text":
                part[part["type"]] = str(folder / part[part["type"]])
        found.append((case["messages"], json.loads((path / "expected.json").read_text(encoding="utf-8"))))
    turns = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "Here it is."}]
    return found or [(turns, {}), (turns * 2, {})]


def loss_of(learner: Learner, rows: list[Any], template: Any) -> torch.Tensor:
    batch = Collator(template)(rows)
    return learner(**{name: value for name, value in batch.items() if name not in ("errors", "origins")})["loss"]


@pytest.mark.parametrize("sft_type", ["lora", "full"])
def test_the_task_paths_of_a_release_stay_frozen(sft_type: str, golden: Callable[[str], Path]) -> None:
    spec, checkpoint = open_folder(None, golden("internlm-xcomposer2_5") / "checkpoint")
    model, _ = load_model(spec, checkpoint, dtype="fp32")
    assert [name for name, _ in model.named_parameters() if "lora_sft" in name]
    ways = choose_ways(PartArgs(), sft_type, spec.parts)
    if sft_type == "lora":
        trained: Any = add_adapters(model, spec, ways, TunerArgs(lora_target_modules=["ALL"]), PartArgs())
        assert not any("lora_sft" in name or "lora_dpo" in name for name in lora_modules(trained))
    else:
        trained = model
        set_trainable(model, ways, PartNames(spec.parts), PartArgs())
    training = {name for name, p in trained.named_parameters() if p.requires_grad}
    assert training
    assert not any(re.search(r"\.lora_(sft|dpo|web)_", name) for name in training)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_as_its_original(family: str, golden: Callable[[str], Path]) -> None:
    root, _, inner = family.partition("/")
    folder = golden(root) / inner
    spec, checkpoint = open_folder(None, folder / "checkpoint")
    model, processor = load_model(spec, checkpoint, dtype="fp32")
    spec = fit_layout(spec, model)
    template = get_template(spec, processor)
    cases = conversations(folder)
    rows = [template.encode(messages, train=True) for messages, _ in cases]
    learner, losses = Learner(model), []
    with torch.no_grad():
        for (_, expected), row in zip(cases, rows, strict=True):
            losses.append(float(loss_of(learner, [row], template)))
            assert losses[-1] == pytest.approx(float(model(**template.collate([row])).loss), abs=1e-5)
            if FAMILIES[family] is not None:
                for name in FAMILIES[family] or ():
                    expected = expected[name]
                assert losses[-1] == pytest.approx(expected, abs=1e-4)
        counts = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
        mean = sum(count * loss for count, loss in zip(counts, losses, strict=True)) / sum(counts)
        assert float(loss_of(learner, rows, template)) == pytest.approx(mean, abs=1e-4), "all cases in one batch"
        assert learner.keeps_packed_rows_apart()
        packs = pack_rows(np.array([len(row["input_ids"]) for row in rows]), learner.config.max_position_embeddings, 0)
        packed = [[rows[row] for row in packs[number]] for number in range(len(packs))]
        assert float(loss_of(learner, packed, template)) == pytest.approx(mean, abs=1e-4), "cases that share rows"
    adapted = add_adapters(model, spec, choose_ways(PartArgs(), "lora", spec.parts), TunerArgs(), PartArgs())
    assert {PartNames(spec.parts)(name) for name in lora_modules(adapted)} == {"llm"}
    loss_of(Learner(adapted), rows, template).backward()
    without = [
        name
        for name, p in adapted.named_parameters()
        if p.requires_grad and (p.grad is None or (".lora_B." in name and not p.grad.any()))
    ]
    assert without == []
