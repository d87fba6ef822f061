"""Near misses, class paths, seeds and number formats."""

import gc
import random

import numpy as np
import pytest
import torch

from mmtool.errors import MMToolError
from mmtool.utils import collection_paused, did_you_mean, import_object, resolve_dtype, seed_everything, suggest

TYPES = ("tiny", "yi-vl-6b-chat", "yi-vl-34b-chat")


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("yi_vl_6b_chat", "yi-vl-6b-chat"),
        ("YI-VL-34B", "yi-vl-34b-chat"),
        ("tinny", "tiny"),
        ("yi", None),
        ("yi-vl", "yi-vl-6b-chat"),
        ("qwen", None),
        ("", None),
        ("--", None),
    ],
)
def test_suggest_finds_what_was_meant(word: str, near: str | None) -> None:
    assert suggest(word, TYPES) == near


def test_did_you_mean_falls_back() -> None:
    assert did_you_mean("tinny", TYPES, "See the list.") == "Did you mean tiny?"
    assert did_you_mean("qwen", TYPES, "See the list.") == "See the list."
    assert did_you_mean("qwen", TYPES) is None


def test_import_object_takes_a_class_path() -> None:
    assert import_object("mmtool.errors:MMToolError") is MMToolError
    with pytest.raises(ValueError, match=r"package\.module:Name"):
        import_object("mmtool.errors.MMToolError")


def test_a_seed_repeats_every_generator() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert seed_everything(2) == 2
    first = draw()
    seed_everything(2**40 + 2)
    assert draw() != first
    seed_everything(2)
    assert draw() == first


def test_a_deterministic_run_can_be_asked_for() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    try:
        seed_everything(1, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def test_the_collector_pauses_and_goes_on() -> None:
    assert gc.isenabled()
    try:
        gc.unfreeze()
        with collection_paused():
            with collection_paused():
                assert not gc.isenabled()
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() == 0
        with collection_paused(freeze=True):
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("AUTO", "auto"),
        ("auto", "auto"),
        ("fp32", torch.float32),
        ("BF16", torch.bfloat16),
        ("fp16", torch.float16),
        ("float16", torch.float16),
    ],
)
def test_dtype_names(name: str, dtype: object) -> None:
    assert resolve_dtype(name) == dtype


def test_an_unknown_dtype_gets_a_suggestion() -> None:
    with pytest.raises(MMToolError, match="unknown dtype 'bf61'") as caught:
        resolve_dtype("bf61")
    assert caught.value.hint == "Did you mean bf16?"
