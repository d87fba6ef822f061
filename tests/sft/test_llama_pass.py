"""What trains on a CPU in place of the model's ``forward`` gives its losses and its gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtool.groups.sft import PartArgs, TunerArgs
from mmtool.loader import get_template, load_model, load_processor, open_folder
from mmtool.messages import Message, Text
from mmtool.sft import llama_pass
from mmtool.sft.batches import Collator, split_batch
from mmtool.sft.learner import Learner, _HeadLoss
from mmtool.sft.llama_pass import pass_for
from mmtool.sft.lora import add_adapters

SPEC, FOLDER = open_folder("tiny")
WAYS = {"llm": "lora", "vision_encoder": "frozen", "vision_proj": "frozen"}


@pytest.fixture(scope="module")
def template() -> Any:
    return get_template(SPEC, load_processor(SPEC, FOLDER))


@pytest.fixture(scope="module")
def rows(template: Any, conversations: list[list[Message]]) -> list[dict]:
    """With a long answer too: the last layer is cut short in some rows and not in others."""
    long = [Message("user", (Text("Hi"),)), Message("assistant", (Text("Good day to you. " * 9),))]
    return [template.encode(messages, train=True) for messages in [*conversations, long]]


def network(kind: str) -> Any:
    model = load_model(SPEC, FOLDER)[0]
    if kind == "full":
        return model.train()
    targets = {"all": ["ALL"], "qkv": [], "some": ["q_proj", "up_proj"]}[kind]
    adapted = add_adapters(model, SPEC, WAYS, TunerArgs(lora_target_modules=targets, lora_dropout=0.0), PartArgs())
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return adapted.train()


def decoder_of(model: Any) -> Any:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).get_decoder()


def batch_of(items: list[Any], template: Any) -> dict[str, Any]:
    batch = Collator(template)(items)
    return {name: value for name, value in batch.items() if name not in ("errors", "origins")}


def gradients(learner: Learner, losses: list[Tensor]) -> dict[str, Tensor]:
    learner.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    worst = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    assert worst <= 1e-5 * scale, f"{worst} of {scale}"


# Measured: losses 2e-6, gradients 2e-6 of the largest.
@pytest.mark.parametrize("kind", ["full", "all", "qkv", "some"])
def test_losses_and_gradients_are_those_of_the_model(kind: str, template: Any, rows: list[dict]) -> None:
    model = network(kind)
    plain, fast = Learner(model), Learner(model, layers=pass_for(decoder_of(model)))
    assert fast.layers is not None
    for items in (rows, rows[1:2], rows[3:], [[rows[1], rows[0]], [rows[2]]], [rows[0], {"error": "gone"}]):
        batch = batch_of(items, template)
        expected, found = plain(**batch)["loss"], fast(**batch)["loss"]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert_same(gradients(fast, [found]), gradients(plain, [expected]))


def test_a_batch_may_run_in_pieces(template: Any, rows: list[dict]) -> None:
    model = network("all")
    learner = Learner(model, layers=pass_for(decoder_of(model)))
    batch = batch_of([rows[0], rows[2], rows[1], rows[3]], template)
    count = int((batch["labels"] != -100).sum())
    whole = learner(**batch, num_items_in_batch=count)["loss"]
    expected = gradients(learner, [whole])
    assert len(split_batch(batch, 10_000)) == 1
    sizes = [len(row["input_ids"]) for row in (rows[0], rows[2])]
    for most, count_of_pieces in ((1, 4), (sum(sizes), 2)):
        pieces = split_batch(batch, most)
        assert len(pieces) == count_of_pieces
        losses = [learner(**piece, num_items_in_batch=count)["loss"] for piece in pieces]
        torch.testing.assert_close(sum(losses), whole, atol=1e-5, rtol=0)
        assert_same(gradients(learner, losses), expected)


def test_rows_that_share_one_are_not_split(template: Any, rows: list[dict]) -> None:
    batch = batch_of([[rows[1], rows[0]], [rows[2]]], template)
    assert split_batch(batch, 1) == [batch]


def set_eager(decoder: Any) -> None:
    decoder.config._attn_implementation = "eager"


def add_hook(decoder: Any) -> None:
    decoder.layers[1].mlp.register_forward_hook(lambda *_: None)


def recompute(decoder: Any) -> None:
    decoder.activation_checkpointing_enable()


def halve(decoder: Any) -> None:
    decoder.layers[0].to(torch.bfloat16)


@pytest.mark.parametrize("change", [set_eager, add_hook, recompute, halve])
def test_a_decoder_that_does_more_runs_itself(change: Callable[[Any], None]) -> None:
    decoder = decoder_of(network("full"))
    assert pass_for(decoder) is not None
    change(decoder)
    assert pass_for(decoder) is None


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_adapters_with_something_special_about_them_run_themselves(options: dict[str, Any]) -> None:
    model = load_model(SPEC, FOLDER)[0]
    adapted = add_adapters(model, SPEC, WAYS, TunerArgs(**options), PartArgs())
    assert (pass_for(decoder_of(adapted)) is None) == ("use_dora" in options)


def test_dropout_drops_in_training_alone(template: Any, rows: list[dict]) -> None:
    model = add_adapters(load_model(SPEC, FOLDER)[0], SPEC, WAYS, TunerArgs(lora_dropout=0.5), PartArgs())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    learner, batch = Learner(model, layers=pass_for(decoder_of(model))), batch_of(rows, template)
    learner.train()
    losses = [float(learner(**batch)["loss"].detach()) for _ in range(2)]
    assert losses[0] != losses[1]
    learner.eval()
    expected = Learner(model).eval()(**batch)["loss"]
    torch.testing.assert_close(learner(**batch)["loss"], expected, atol=1e-5, rtol=0)


def numbers(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("with_residual", [True, False])
def test_gradients_of_linear_layers(rate: float, with_residual: bool) -> None:
    torch.manual_seed(1)
    x = numbers(5, 4)
    residual = numbers(5, 3) if with_residual else None
    first = [numbers(3, 4), numbers(3), numbers(2, 4), numbers(3, 2)]
    second = [numbers(6, 4), None, None, None] if not with_residual else []
    scales, rates = [0.7, 1.0][: 1 + bool(second)], [rate, 0.0][: 1 + bool(second)]

    def run(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        torch.manual_seed(2)  # the same positions are dropped each time
        return llama_pass._Linears.apply(*tensors[:2], scales, rates, *tensors[2:])

    assert torch.autograd.gradcheck(run, (x, residual, *first, *second))
    if rate == 0.0 and not second:
        adapted = llama_pass._AdaptedLinears.apply(x, residual, scales, rates, *first)
        torch.testing.assert_close(adapted, run(x, residual, *first))


def test_gradients_of_linear_layers_that_all_have_adapters() -> None:
    torch.manual_seed(1)
    first = [numbers(3, 4), numbers(3), numbers(2, 4), numbers(3, 2)]
    second = [numbers(6, 4), None, numbers(1, 4), numbers(6, 1)]

    def run(x: Tensor, *weights: Tensor | None) -> tuple[Tensor, ...]:
        return llama_pass._AdaptedLinears.apply(x, None, [0.7, 1.5], [0.0, 0.0], *weights)

    assert torch.autograd.gradcheck(run, (numbers(5, 4), *first, *second))


def test_gradients_of_the_other_operations() -> None:
    torch.manual_seed(1)
    check = torch.autograd.gradcheck
    assert check(lambda x, weight: llama_pass._RMSNorm.apply(x, weight, 1e-5), (numbers(4, 6), numbers(6)))
    assert check(llama_pass._GatedUp.apply, (numbers(4, 6), numbers(4, 6)))
    cos, sin = numbers(4, 1, 6, grad=False), numbers(4, 1, 6, grad=False)
    assert check(llama_pass._Turn.apply, (numbers(4, 2, 6), cos, sin))
    targets = torch.tensor([0, 4, 2, 2, 1])
    head = numbers(5, 3), targets, numbers(7, 3), numbers(7)
    for step in (2, 9):
        assert check(lambda *tensors, step=step: _HeadLoss.apply(*tensors, step), head)
    expected = nn.functional.cross_entropy(nn.functional.linear(head[0], head[2], head[3]), targets, reduction="sum")
    torch.testing.assert_close(_HeadLoss.apply(*head, 2), expected)
