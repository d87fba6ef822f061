"""What a machine cannot do is said before anything loads."""

import importlib.util
from collections.abc import Callable

import pytest

from mmtool.args import SftArgs
from mmtool.errors import MMToolError
from mmtool.sft.network import check_kernels

HERE = importlib.util.find_spec


@pytest.mark.parametrize(
    ("option", "use_cpu", "words"),
    [
        ("use_liger_kernel", True, "--use_liger_kernel true needs a GPU"),
        ("use_liger_kernel", False, "--use_liger_kernel true needs the package liger-kernel"),
        ("torch_compile", False, "--torch_compile true needs the package triton"),
        ("torch_compile", True, "needs a C\\+\\+ compiler; there is no compiler-that-is-not-there"),
    ],
)
def test_missing_kernels_are_named(
    sft_args: Callable[..., SftArgs], monkeypatch: pytest.MonkeyPatch, option: str, use_cpu: bool, words: str
) -> None:
    monkeypatch.setenv("CXX", "compiler-that-is-not-there")
    missing = ("liger_kernel", "triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else HERE(name))
    with pytest.raises(MMToolError, match=words) as error:
        check_kernels(sft_args(**{option: True}), use_cpu)
    assert error.value.hint


def test_nothing_is_asked_for_nothing_is_missing(sft_args: Callable[..., SftArgs]) -> None:
    check_kernels(sft_args(), use_cpu=True)
    check_kernels(sft_args(), use_cpu=False)
