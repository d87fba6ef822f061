"""A released folder as a list of stored tensors, each with the parameter of the network that it is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from mmtool.errors import CheckpointError
from mmtool.models.common.release import ReleaseModel
from mmtool.models.common.weights import LazyTensor, read_weights
from mmtool.models.generic.loading import head_class, read_config
from mmtool.spec import ModelSpec
from mmtool.utils import import_object

# Names that releases give to the head's matrix, most usual first.
_HEAD_NAMES = ("lm_head.weight", "output.weight", "llm.lm_head.weight", "language_model.lm_head.weight")


@dataclass(frozen=True)
class Stored:
    """A tensor of a release.

    Attributes:
        group: folder inside the release that its file lies in; ``.`` is the release itself.
        name: its name in the file.
        tensor: where it lies.
        parameter: the parameter of the network that it is, by our name; None where it is not one alone.
    """

    group: PurePosixPath
    name: str
    tensor: LazyTensor
    parameter: str | None


@dataclass(frozen=True)
class Release:
    """A released folder, and its network without weights.

    Attributes:
        folder: the folder.
        network: the network on the meta device.
        tensors: all that is stored, in the order of the files.
        head_name: what the release calls the head's matrix, or would if it stored it.
    """

    folder: Path
    network: Any
    tensors: tuple[Stored, ...]
    head_name: str

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(item.tensor.shape.numel() * item.tensor.stored_dtype.itemsize for item in self.tensors)

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.tied_names[1] in self.network.all_tied_weights_keys

    @property
    def tied_names(self) -> tuple[str, str]:
        """The parameters of the embedding and the head."""
        names = {id(module): name for name, module in self.network.named_modules()}
        embedding, head = self.network.get_input_embeddings(), self.network.get_output_embeddings()
        return f"{names[id(embedding)]}.weight", f"{names[id(head)]}.weight"


def read_release(spec: ModelSpec, folder: Path, model_kwargs: Mapping[str, Any] | None = None) -> Release:
    """Return what a folder stores.

    Args:
        spec: the model type of the folder.
        folder: the folder.
        model_kwargs: keywords that the network was loaded with.

    Raises:
        CheckpointError: where the folder has no weights.
    """
    stored = read_weights(folder)
    if not stored:
        raise CheckpointError(f"{folder} has no weights", "Give a folder with model.safetensors or pytorch_model.bin.")
    model_class = import_object(spec.model_class)
    if issubclass(model_class, ReleaseModel):
        return _read_native(model_class, folder, dict(model_kwargs or {}))
    return _read_generic(folder, stored)


def _read_native(model_class: type[ReleaseModel], folder: Path, keywords: dict[str, Any]) -> Release:
    config, _ = model_class.config_class.from_pretrained(folder, return_unused_kwargs=True, **keywords)
    weights = model_class.read_release(folder, config)  # first: what is stored may complete the configuration
    network = _without_weights(model_class, config)
    known = set(network.state_dict())
    places = {(tensor.path, tensor.offset): model_class.our_name(name) for name, tensor in weights.items()}
    groups = dict.fromkeys([folder, *(tensor.path.parent for tensor in weights.values())])
    tensors = []
    for group in groups:
        inner = PurePosixPath(group.relative_to(folder).as_posix())
        for name, tensor in read_weights(group).items():
            ours = model_class.our_name(name)
            if ours not in known:  # a tower in its own folder, a head that stands for the embedding as well
                ours = places.get((tensor.path, tensor.offset), ours)
            tensors.append(Stored(inner, name, tensor, ours if ours in known else None))
    head = next((name for name in _HEAD_NAMES if model_class.our_name(name) == "lm_head.weight"), "lm_head.weight")
    release = Release(folder, network, tuple(tensors), head)
    embedding, tied_head = release.tied_names
    if release.is_tied and not any(item.parameter == embedding for item in tensors):
        tensors = [replace(item, parameter=embedding) if item.parameter == tied_head else item for item in tensors]
    return replace(release, tensors=tuple(tensors))


def _read_generic(folder: Path, stored: Mapping[str, LazyTensor]) -> Release:
    config = read_config(folder)
    model_class, _ = head_class(config, folder)
    network = _without_weights(model_class, config)
    state = network.state_dict()
    conversions = get_model_conversion_mapping(network)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]

    def ours(name: str) -> str | None:
        renamed, converter = rename_source_key(name, renamings, converters, network.base_model_prefix, state)
        return renamed if converter is None and renamed in state else None

    names = {name: ours(name) for name in sorted(stored, key=dot_natural_key)}  # in the order of loading
    tensors = tuple(Stored(PurePosixPath("."), name, tensor, names[name]) for name, tensor in stored.items())
    release = Release(folder, network, tensors, "lm_head.weight")
    _, head = release.tied_names
    found = [name for name in _HEAD_NAMES if ours(name) == head]
    return Release(folder, network, tensors, found[0] if found else head)


def _without_weights(model_class: Any, config: Any) -> nn.Module:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some classes compute tables, which has no meaning without numbers
        return model_class(config).eval()
