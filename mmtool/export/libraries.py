"""Quantisation with a whole model in memory: GPTQ and AWQ through llm-compressor, which look at rows; bitsandbytes.

What llm-compressor makes is stored as torchao's weights are, so that it loads and runs in the same way.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from mmtool.errors import MMToolError
from mmtool.export.layout import read_release
from mmtool.export.merge_lora import Adapter
from mmtool.export.output import copy_beside_weights
from mmtool.export.quantise import WeightQuantiser
from mmtool.export.rows import Rows
from mmtool.export.shards import Entry
from mmtool.export.source import Source
from mmtool.finetuned import attach_adapter
from mmtool.loader import load_model
from mmtool.log import get_logger
from mmtool.models.common.quantised import Numbers
from mmtool.models.common.release import ReleaseModel
from mmtool.spec import ModelSpec
from mmtool.utils import import_object

logger = get_logger(__name__)

PACKAGES = {"bnb": "bitsandbytes", "gptq": "llmcompressor", "awq": "llmcompressor"}
_BLOCK = 64  # weights that share a scale in bitsandbytes' 4 bits; narrower rows it cannot pack on a CPU
_EXTRAS = {"bitsandbytes": "quant", "llmcompressor": "compress"}


def check_library(method: str) -> None:
    """Raise MMToolError where the package of a method, or the GPU that it needs, is missing."""
    package = PACKAGES[method]
    if importlib.util.find_spec(package) is None:
        raise MMToolError(
            f"--quant_method {method} needs the package {package}", f"pip install 'mmtool[{_EXTRAS[package]}]'"
        )
    if method == "awq" and not torch.cuda.is_available():
        raise MMToolError(
            "--quant_method awq needs a GPU: llm-compressor looks for scales on one, and torch sees none",
            "On a CPU use --quant_method gptq or torchao.",
        )


def check_bitsandbytes(spec: ModelSpec, has_adapters: bool) -> None:
    """Raise MMToolError for what bitsandbytes cannot store."""
    if issubclass(import_object(spec.model_class), ReleaseModel):
        raise MMToolError(
            f"--quant_method bnb: {spec.model_type} is stored as its release is, for which bitsandbytes has no files",
            "Use --quant_method torchao; for training in 4 bits there is `mmtool sft --quantization_bit 4`.",
        )
    if has_adapters:
        raise MMToolError(
            "--quant_method bnb takes a whole model",
            "Merge first, and quantise what comes out with --model_id_or_path FOLDER.",
        )


def write_bitsandbytes(
    folder: Path, source: Source, layers: Mapping[str, nn.Linear], bits: str, device_map: Any, max_bytes: int
) -> int:
    """Quantise a model of transformers and let it write itself; return how many layers were quantised."""
    keywords: dict[str, Any] = {"load_in_8bit": True}
    if bits == "4":
        keywords = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        layers = {name: layer for name, layer in layers.items() if layer.in_features % _BLOCK == 0}
    network = read_release(source.spec, source.folder).network
    kept = [name for name, module in network.named_modules() if type(module) is nn.Linear and name not in layers]
    config = BitsAndBytesConfig(**keywords, llm_int8_skip_modules=kept)
    model, _ = load_model(
        source.spec,
        source.folder,
        device_map=device_map,
        model_kwargs={**(source.model_kwargs or {}), "quantization_config": config},
    )
    model.save_pretrained(folder, max_shard_size=max_bytes)
    copy_beside_weights(source.folder, folder)
    return len(layers)


class Calibrated(WeightQuantiser):
    """Weights that a library has rounded, and all others as it left them.

    Attributes:
        names: every parameter of the network: AWQ moves factors from one into another.
    """

    keeps_tie = True

    def calibrate(self, model: Any, method: str, layers: Mapping[str, nn.Linear], rows: Rows) -> None:
        """Let llm-compressor round the layers of a model with what it sees of some rows.

        Raises:
            MMToolError: where it cannot.
        """
        from llmcompressor import oneshot
        from loguru import logger as its_logger

        for name in ("llmcompressor", "compressed_tensors"):  # lines per layer; what counts stands in our table
            its_logger.disable(name)
        logger.info("calibrating on %d %s", len(rows.encoded), rows.origin)
        batches = [rows.template.collate([row]) for row in rows.encoded]
        for batch in batches:
            batch.pop("labels", None)
        self._model = model.eval()
        self._parameters = dict(model.named_parameters())
        self.names = frozenset(self._parameters)
        try:
            oneshot(
                model=model,
                dataset=torch.utils.data.DataLoader(batches, batch_size=None),
                recipe=[self._recipe(method, layers)],
                pipeline="basic",
                num_calibration_samples=len(batches),
            )
        except (ValueError, RuntimeError) as error:
            first = " ".join(str(error).split())[:300]
            raise MMToolError(
                f"--quant_method {method}: llm-compressor cannot quantise this model: {first}",
                "Use --quant_method torchao, which needs no calibration.",
            ) from error
        self._parameters = dict(model.named_parameters())

    def _recipe(self, method: str, layers: Mapping[str, nn.Linear]) -> Any:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor.modifiers.awq import AWQModifier
        from llmcompressor.modifiers.quantization import GPTQModifier

        by_size: dict[int, list[str]] = {}
        for name in layers:
            size = self.group_sizes.get(f"{name}.weight")
            if size is not None:
                by_size.setdefault(size, []).append(name)
        groups = {
            f"group_{size}": QuantizationScheme(
                targets=names,
                weights=QuantizationArgs(
                    num_bits=self.bits, type="int", symmetric=True, strategy="group", group_size=size
                ),
            )
            for size, names in by_size.items()
        }
        modifier = {"gptq": GPTQModifier, "awq": AWQModifier}[method]
        return modifier(config_groups=groups, ignore=[])

    def merged(self, name: str, read: Callable[[], Tensor]) -> Tensor:
        """Return a weight as the library left it; ``read`` is not needed."""
        return self._parameters[name].detach().float().cpu()

    def entries(self, name: str, parameter: str, shape: torch.Size, read: Callable[[], Tensor]) -> list[Entry]:
        """Return what is stored of a matrix."""
        return self.pieces(name, parameter, shape, lambda: self._numbers(parameter))

    def _numbers(self, parameter: str) -> Numbers:
        """Return a rounded matrix as whole numbers."""
        layer = self._model.get_submodule(parameter.rpartition(".")[0])
        size = self.group_sizes[parameter]
        scale = layer.weight_scale.detach().float().cpu()
        wide = scale.repeat_interleave(size, dim=1)
        lowest, highest = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        data = (layer.weight.detach().float().cpu() / wide).round().clamp(lowest, highest).to(torch.int8)
        return Numbers(data, scale, torch.zeros(scale.shape, dtype=torch.int8), self.bits)


def with_adapters(model: Any, adapters: Sequence[Adapter]) -> Any:
    """Return a model with its adapter folded in.

    Raises:
        MMToolError: for several adapters.
    """
    if not adapters:
        return model
    if len(adapters) > 1 or adapters[0].weight != 1:
        raise MMToolError(
            "this --quant_method takes one adapter", "Merge them first, and quantise what comes out: --ckpt_dir FOLDER."
        )
    return attach_adapter(model, adapters[0].folder, merge=True)
