import re
from typing import Any

import pytest
import torch

from mmtool.errors import MMToolError
from mmtool.groups.sft import PartArgs, TunerArgs
from mmtool.loader import load_model, open_folder
from mmtool.sft.lora import PEFT_PREFIX, add_adapters, find_targets, lora_modules, targets_pattern
from mmtool.sft.parts import PartNames, choose_ways, count_parts

SPEC, FOLDER = open_folder("tiny")
QKV = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module")
def plain() -> Any:
    return load_model(SPEC, FOLDER)[0]


@pytest.fixture
def model() -> Any:
    return load_model(SPEC, FOLDER)[0]


def targets(model: Any, *asked: str, **parts: Any) -> list[str]:
    return find_targets(model, SPEC, choose_ways(PartArgs(**parts), "lora", SPEC.parts), asked)


def part_names(names: list[str]) -> set[str]:
    return {PartNames(SPEC.parts)(name) for name in names}


def test_the_default_is_the_qkv_of_the_language_model(plain: Any) -> None:
    found = targets(plain)
    assert part_names(found) == {"llm"}
    assert {name.rpartition(".")[2] for name in found} == set(QKV)
    assert len(found) == 3 * plain.config.get_text_config().num_hidden_layers


def test_all_takes_every_linear_layer_of_the_parts_that_train_but_not_the_head(plain: Any) -> None:
    found = targets(plain, "ALL")
    assert part_names(found) == {"llm"}
    assert {name.rpartition(".")[2] for name in found} == {*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"}
    both = targets(plain, "all", tune_vision_encoder="true")
    assert part_names(both) == {"llm", "vision_encoder"}
    assert {"fc1", "fc2", "out_proj"} <= {name.rpartition(".")[2] for name in both}


def test_a_suffix_never_hits_the_tower_by_accident(plain: Any) -> None:
    tower = [n for n, _ in plain.named_modules() if n.endswith("q_proj") and "vision" in n]
    assert tower, "the tower has a q_proj, or this test shows nothing"
    assert part_names(targets(plain, "q_proj")) == {"llm"}
    assert part_names(targets(plain, r".*\.q_proj")) == {"llm"}
    assert part_names(targets(plain, "q_proj", tune_vision_encoder="lora")) == {"llm", "vision_encoder"}


def test_lists_and_expressions(plain: Any) -> None:
    assert {name.rpartition(".")[2] for name in targets(plain, "q_proj", "down_proj")} == {"q_proj", "down_proj"}
    assert targets(plain, r".*layers\.1\.self_attn\.[qk]_proj") == [
        f"model.language_model.layers.1.self_attn.{name}_proj" for name in "qk"
    ]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("q_prj", "fits no linear layer"),
        ("fc1", "fits layers of vision_encoder only"),
        ("(q_proj", "is no regular expression"),
    ],
)
def test_what_fits_nothing_is_refused(plain: Any, asked: str, said: str) -> None:
    with pytest.raises(MMToolError, match=said):
        targets(plain, asked)


def test_the_pattern_fits_the_targets_and_nothing_else(plain: Any) -> None:
    names = [name for name, _ in plain.named_modules()]
    for chosen in (targets(plain), targets(plain, "ALL", tune_vision_encoder="true"), ["lm_head"], names[3:4]):
        pattern = targets_pattern(chosen)
        assert [name for name in names if re.fullmatch(pattern, name)] == [n for n in names if n in set(chosen)]
    assert len(targets_pattern(targets(plain))) < 400


def test_adapters_sit_where_they_were_asked_for_and_the_rest_is_frozen(model: Any) -> None:
    wanted = targets(model)
    ways = choose_ways(PartArgs(), "lora", SPEC.parts)
    adapted = add_adapters(model, SPEC, ways, TunerArgs(lora_rank=4), PartArgs())
    assert lora_modules(adapted) == wanted
    assert all((".lora_" in name) == p.requires_grad for name, p in adapted.named_parameters())
    rows = {row.part: row for row in count_parts(adapted, PartNames(SPEC.parts), PEFT_PREFIX)}
    assert rows["llm"].way == "lora"
    assert rows["vision_encoder"].trained == rows["vision_proj"].trained == 0


def test_projector_and_named_modules_train_as_a_whole_beside_the_adapters(model: Any) -> None:
    parts = PartArgs(tune_vision_proj="true")
    ways = choose_ways(parts, "lora", SPEC.parts)
    adapted = add_adapters(model, SPEC, ways, TunerArgs(modules_to_save=["embed_tokens"]), parts)
    whole = {name.partition(".modules_to_save.")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    whole = {name.removeprefix(PEFT_PREFIX) for name in whole if ".lora_" not in name}
    assert whole == {"model.multi_modal_projector", "model.language_model.embed_tokens"}
    rows = {row.part: row for row in count_parts(adapted, PartNames(SPEC.parts), PEFT_PREFIX)}
    assert rows["vision_proj"].way == "full"


def test_the_tower_can_have_adapters(model: Any) -> None:
    parts = PartArgs(tune_vision_encoder="lora", tune_llm="false")
    adapted = add_adapters(model, SPEC, choose_ways(parts, "lora", SPEC.parts), TunerArgs(), parts)
    assert part_names(lora_modules(adapted)) == {"vision_encoder"}


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}])
def test_other_kinds_of_adapters_leave_the_answer_as_it_was(model: Any, kind: dict[str, Any]) -> None:
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        ways = choose_ways(PartArgs(), "lora", SPEC.parts)
        after = add_adapters(model, SPEC, ways, TunerArgs(**kind), PartArgs()).eval()(input_ids=ids).logits
    torch.testing.assert_close(after, before, atol=2e-4, rtol=0)


def test_an_unknown_initialisation_is_refused(model: Any) -> None:
    ways = choose_ways(PartArgs(), "lora", SPEC.parts)
    with pytest.raises(MMToolError, match="--init_lora_weights best: there is no such way"):
        add_adapters(model, SPEC, ways, TunerArgs(init_lora_weights="best"), PartArgs())
