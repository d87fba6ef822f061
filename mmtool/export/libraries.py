"""Quantisation that needs a whole model in memory: bitsandbytes, and GPTQ and AWQ through llm-compressor."""

from __future__ import annotations

import importlib.util

import torch

from mmtool.errors import MMToolError

PACKAGES = {"bnb": "bitsandbytes", "gptq": "llmcompressor", "awq": "llmcompressor"}
_EXTRAS = {"bitsandbytes": "quant", "llmcompressor": "compress"}


def check_library(method: str) -> None:
    """Raise MMToolError where the package of a method, or the GPU that it needs, is missing."""
    package = PACKAGES[method]
    if importlib.util.find_spec(package) is None:
        raise MMToolError(
            f"--quant_method {method} needs the package {package}", f"pip install 'mmtool[{_EXTRAS[package]}]'"
        )
    if not torch.cuda.is_available():
        raise MMToolError(
            f"--quant_method {method} needs a GPU, and torch sees none", "On a CPU use --quant_method torchao."
        )
