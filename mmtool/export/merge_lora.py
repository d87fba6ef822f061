"""The weights that adapters change, computed one at a time, in float32.

peft itself does the sums: its layers are put into a network without weights, and each gets its matrix only while it is
merged. So whatever peft knows (DoRA, rsLoRA, ranks by pattern, convolutions, embeddings) comes out as peft has it.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, Linear, _ConvNd
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import Tensor, nn

from mmtool.errors import CheckpointError
from mmtool.finetuned import is_of_adapter

NAME = "default"
PREFIX = "base_model.model."
_STREAMED = (Linear, Embedding, _ConvNd)
_WRAPPED = re.compile(r"\.(modules_to_save\.default|original_module|base_layer)\b")
# Ways to begin that take something away from the base weights, and so belong to what was trained.
_CHANGES_BASE = {"pissa": "pissa_init", "olora": "olora_init"}
_NEEDS_DATA = ("corda", "loftq", "lora_ga")


class NotStreamable(Exception):
    """An adapter that reaches into the network in a way that cannot be merged weight by weight."""


@dataclass(frozen=True)
class Adapter:
    """A folder with an adapter, and how much it counts."""

    folder: Path
    weight: float = 1.0


class AdapterWeights:
    """What one adapter makes of the weights of a network.

    Attributes:
        names: the parameters that it changes.
        keeps_tie: whether it trained embedding and head as the one matrix that they are.
    """

    def __init__(self, network: nn.Module, folder: Path) -> None:
        """Put the adapter of a folder into a copy of ``network``, which has no weights.

        Raises:
            CheckpointError: when the adapter does not fit, or is of a kind that is not known here.
            NotStreamable: when it has to be merged in a whole model.
        """
        config = read_config(folder)
        self._init = config.init_lora_weights
        self.keeps_tie = bool(getattr(config, "ensure_weight_tying", False))
        config.init_lora_weights, config.inference_mode = True, True
        try:
            state = {name: tensor.float() for name, tensor in load_peft_weights(str(folder), device="cpu").items()}
        except (SafetensorError, RuntimeError, ValueError, OSError) as error:
            raise CheckpointError(
                f"cannot read the adapter in {folder}: {error}", "Take it from its run again."
            ) from error
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about tied heads: those are looked after when weights are written
                adapted = PeftModel(
                    copy.deepcopy(network), config, autocast_adapter_dtype=False, low_cpu_mem_usage=True
                )
                placeholders = _hollow(adapted)
                result = set_peft_model_state_dict(adapted, state, low_cpu_mem_usage=True)
        except NotImplementedError as error:  # what reads base weights right away
            raise NotStreamable(str(error).splitlines()[0]) from error
        except (ValueError, RuntimeError, KeyError) as error:
            raise _misfit(folder, str(error).splitlines()[0]) from error
        lost = [name for name in result.missing_keys if is_of_adapter(name)]
        if lost or result.unexpected_keys:
            raise _misfit(folder, [*lost, *result.unexpected_keys][0])
        self._layers = _lora_layers(adapted)
        # Modules trained as a whole, and biases where the adapter says so: all that is there now and is no adapter.
        self._replaced = {
            _plain(name): value.detach()
            for name, value in adapted.state_dict(keep_vars=True).items()
            if id(value) not in placeholders and value.device.type != "meta"
            if ".modules_to_save." in name or (isinstance(value, nn.Parameter) and not is_of_adapter(name))
        }
        biased = {f"{name}.bias" for name, layer in self._layers.items() if layer.lora_bias.get(NAME)}
        self._bias_names = biased
        self.names = frozenset({f"{name}.weight" for name in self._layers} | biased | self._replaced.keys())

    def merged(self, name: str, base: Tensor) -> Tensor:
        """Return what becomes of a weight; ``base`` is in float32 and may be changed."""
        if name in self._replaced:
            base = self._replaced[name].to(torch.float32, copy=True)
        layer = self._layers.get(name.rpartition(".")[0])
        if layer is None:
            return base
        if name in self._bias_names:
            return base + layer.lora_B[NAME].bias * layer.scaling[NAME]
        inner = layer.get_base_layer()
        placeholder, inner.weight = inner.weight, nn.Parameter(base, requires_grad=False)
        has_bias, layer.lora_bias[NAME] = layer.lora_bias[NAME], False  # that is another weight, merged in its turn
        try:
            self._take_away(layer)
            with torch.no_grad():
                layer.merge(adapter_names=[NAME])
            return _finite(name, inner.weight.data)
        finally:
            layer.merged_adapters.clear()
            inner.weight = placeholder
            layer.lora_bias[NAME] = has_bias

    def _take_away(self, layer: Any) -> None:
        """Do to the base weight what its way to begin did before training."""
        way = str(self._init).lower()
        method = next((name for prefix, name in _CHANGES_BASE.items() if way.startswith(prefix)), None)
        if method is None:
            return
        trained = [layer.lora_A[NAME].weight.data, layer.lora_B[NAME].weight.data]
        getattr(layer, method)(*([NAME, self._init] if method == "pissa_init" else [NAME]))
        layer.lora_A[NAME].weight.data, layer.lora_B[NAME].weight.data = trained


def read_config(folder: Path) -> Any:
    """Return the settings of an adapter.

    Raises:
        CheckpointError: where it is no LoRA, or one that needs more than its folder.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise CheckpointError(f"{folder} has no readable adapter_config.json: {error}") from error
    if config.peft_type != PeftType.LORA:
        raise CheckpointError(f"{folder} is a {config.peft_type.value} adapter; LoRA adapters can be merged")
    if str(config.init_lora_weights).lower().startswith(_NEEDS_DATA):
        raise CheckpointError(
            f"{folder} began with init_lora_weights={config.init_lora_weights!r}, which changed the base weights in a "
            "way that its folder does not tell",
            "Let peft convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )
    return config


class MergedWeights:
    """What several adapters make of the weights: each adds its share of the change it would make alone.

    Attributes:
        names: the parameters that change.
    """

    def __init__(self, network: nn.Module, adapters: Sequence[Adapter]) -> None:
        self._parts = [(adapter.weight, AdapterWeights(network, adapter.folder)) for adapter in adapters]
        self.names = frozenset(name for _, part in self._parts for name in part.names)
        self.keeps_tie = all(part.keeps_tie for _, part in self._parts)

    def merged(self, name: str, read: Callable[[], Tensor]) -> Tensor:
        """Return what becomes of a weight, in float32; ``read`` gives the base's, fresh and in float32."""
        parts = [(weight, part) for weight, part in self._parts if name in part.names]
        if len(parts) == 1 and parts[0][0] == 1:
            return parts[0][1].merged(name, read())
        total = read()
        for weight, part in parts:
            total += weight * (part.merged(name, read()) - read())
        return total


def _hollow(adapted: nn.Module) -> set[int]:
    """Put placeholders that take no memory where base weights are missing; return their ids.

    peft moves what it loads to the device of the base weight, and on the meta device nothing would be left of it.
    """
    placeholders: list[nn.Parameter] = []
    for module_name, module in adapted.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.device.type == "meta" and (
                ".modules_to_save." in module_name or not is_of_adapter(f"{module_name}.{name}.")
            ):
                value = torch.zeros(()).expand(parameter.shape)
                placeholders.append(nn.Parameter(value, requires_grad=False))
                setattr(module, name, placeholders[-1])
    adapted._placeholders = placeholders  # alive, so that their ids stay theirs
    return {id(placeholder) for placeholder in placeholders}


def _lora_layers(adapted: nn.Module) -> dict[str, Any]:
    """Return the layers with an adapter, by the name of the layer below.

    Raises:
        NotStreamable: for anything else that peft has put into the network.
    """
    layers: dict[str, Any] = {}
    for name, module in adapted.named_modules():
        if isinstance(module, BaseTunerLayer):
            if not isinstance(module, LoraLayer) or not isinstance(module, _STREAMED):
                raise NotStreamable(f"{name} is a {type(module).__name__}")
            layers[_plain(name)] = module
        elif isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
            raise NotStreamable(f"{name} is a {type(module).__name__}")
    return layers


def _finite(name: str, weight: Tensor) -> Tensor:
    if not all(math.isfinite(float(value)) for value in torch.aminmax(weight)):
        raise CheckpointError(
            f"{name}: the merged weight has numbers that are not finite",
            "The run has diverged; export an earlier checkpoint.",
        )
    return weight


def _plain(name: str) -> str:
    """Return the name of a module or parameter before peft wrapped it."""
    return _WRAPPED.sub("", name.removeprefix(PREFIX))


def _misfit(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the adapter in {folder} does not fit the model: {reason}",
        "Give the base model it was trained on with --model_id_or_path.",
    )
