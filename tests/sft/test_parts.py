from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmtool.errors import MMToolError
from mmtool.groups.sft import PartArgs
from mmtool.models.common.layout import PARTS
from mmtool.sft.parts import PartNames, choose_ways, count_parts, format_table, matches_name, set_trainable


class Net(nn.Module):
    """The module names of a family, with one layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "language_model": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])}),
                "vision_tower": nn.Linear(4, 4),
                "multi_modal_projector": nn.Linear(4, 4),
                "extra": nn.Linear(2, 2),
            }
        )
        self.lm_head = nn.Linear(4, 5, bias=False)


def trained(given: PartArgs, sft_type: str = "full") -> set[str]:
    net = Net()
    set_trainable(net, choose_ways(given, sft_type, PARTS), PartNames(PARTS), given)
    return {name for name, parameter in net.named_parameters() if parameter.requires_grad}


LLM = {f"model.language_model.layers.{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")}
LLM |= {"lm_head.weight"}
VISION = {"model.vision_tower.weight", "model.vision_tower.bias"}
PROJECTOR = {"model.multi_modal_projector.weight", "model.multi_modal_projector.bias"}


def test_full_trains_language_model_and_projector_and_leaves_the_tower() -> None:
    assert trained(PartArgs()) == LLM | PROJECTOR


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (PartArgs(tune_vision_encoder="true"), LLM | PROJECTOR | VISION),
        (PartArgs(freeze_vit=False), LLM | PROJECTOR | VISION),
        (PartArgs(freeze_vit=True), LLM | PROJECTOR),
        (PartArgs(tune_llm="false"), PROJECTOR),
        (PartArgs(tune_llm="false", tune_vision_proj="false", tune_vision_encoder="full"), VISION),
        (PartArgs(freeze_parameters=["model.language_model.layers.0", "lm_head"]), LLM - {*LLM} | PROJECTOR | LLM),
        (PartArgs(additional_trainable_parameters=["model.extra"]), LLM | PROJECTOR | {"model.extra.weight"}),
    ],
    ids=["vision", "freeze_vit false", "freeze_vit true", "projector", "vision alone", "freeze", "additional"],
)
def test_options_choose_what_trains(given: PartArgs, expected: set[str]) -> None:
    if given.freeze_parameters:
        expected = {name for name in LLM if ".layers.1" in name} | PROJECTOR
    if given.additional_trainable_parameters:
        expected = expected | {"model.extra.bias"}
    assert trained(given) == expected


def test_frozen_names_may_be_expressions_and_end_at_dots() -> None:
    assert matches_name("model.layers.10.weight", ["model.layers.10"])
    assert not matches_name("model.layers.10.weight", ["model.layers.1"])
    assert matches_name("model.layers.10.bias", [r".*\.bias"])
    assert not matches_name("model.layers.10.weight", [r".*\.bias"])


def test_ways_of_lora() -> None:
    ways = choose_ways(PartArgs(), "lora", PARTS)
    assert ways == {"llm": "lora", "vision_encoder": "frozen", "vision_proj": "frozen"}
    ways = choose_ways(PartArgs(tune_vision_encoder="true", tune_vision_proj="true", tune_llm="full"), "lora", PARTS)
    assert ways == {"llm": "full", "vision_encoder": "lora", "vision_proj": "full"}


@pytest.mark.parametrize(
    ("given", "sft_type", "said"),
    [
        (PartArgs(tune_audio_proj="true"), "full", "--tune_audio_proj true: this model has no such part"),
        (PartArgs(tune_vision_encoder="lora"), "full", "--tune_vision_encoder lora needs --sft_type lora"),
        (PartArgs(tune_llm="false"), "lora", "nothing would be trained"),
    ],
)
def test_what_cannot_be_is_refused(given: PartArgs, sft_type: str, said: str) -> None:
    with pytest.raises(MMToolError, match=said):
        choose_ways(given, sft_type, PARTS)


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    with pytest.raises(MMToolError, match="fits no parameter"):
        trained(PartArgs(freeze_parameters=["model.langage_model"]))


def test_freeze_vit_and_tune_vision_encoder_must_agree() -> None:
    with pytest.raises(MMToolError, match="--freeze_vit true contradicts --tune_vision_encoder true"):
        PartArgs(freeze_vit=True, tune_vision_encoder="true")
    assert PartArgs(freeze_vit=False, tune_vision_encoder="lora").tune_vision_encoder == "lora"


def test_the_table_counts_per_part() -> None:
    net = Net()
    set_trainable(net, choose_ways(PartArgs(), "full", PARTS), PartNames(PARTS), PartArgs())
    rows = {row.part: row for row in count_parts(net, PartNames(PARTS))}
    assert (rows["llm"].way, rows["llm"].trained, rows["llm"].total) == ("full", 60, 60)
    assert (rows["vision_encoder"].way, rows["vision_encoder"].trained) == ("frozen", 0)
    assert rows["other"].total == 6
    table = format_table(list(rows.values())).splitlines()
    assert table[0].split() == ["part", "trains", "trained", "parameters", "share"]
    assert table[-1].split() == ["total", "80", "106", "75.47", "%"]


def test_whole_numbers_never_train() -> None:
    net = Net()
    net.register_parameter("count", nn.Parameter(torch.zeros(1, dtype=torch.int8), requires_grad=False))
    set_trainable(net, {}, PartNames({}), PartArgs(additional_trainable_parameters=["count", "lm_head"]))
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["lm_head.weight"]


def test_what_the_network_itself_does_not_train_stays_frozen() -> None:
    net = Net()
    net.model["language_model"]["layers"][0].lora_task_A = nn.Linear(4, 2, bias=False).requires_grad_(False)
    name = "model.language_model.layers.0.lora_task_A"
    ways = choose_ways(PartArgs(), "full", PARTS)
    set_trainable(net, ways, PartNames(PARTS), PartArgs())
    assert not net.get_parameter(f"{name}.weight").requires_grad
    rows = {row.part: row for row in count_parts(net, PartNames(PARTS))}
    assert (rows["llm"].way, rows["llm"].trained, rows["llm"].total) == ("partly", 60, 68), "and is no adapter"
    set_trainable(net, ways, PartNames(PARTS), PartArgs(additional_trainable_parameters=[name]))
    assert net.get_parameter(f"{name}.weight").requires_grad


def test_weights_packed_into_four_bits_count_whole() -> None:
    net = Net()
    net.lm_head.weight = nn.Parameter(torch.zeros(10, 1, dtype=torch.uint8), requires_grad=False)
    net.lm_head.weight.quant_state = SimpleNamespace(shape=(5, 4))
    rows = {row.part: row for row in count_parts(net, PartNames(PARTS))}
    assert rows["llm"].total == 60
