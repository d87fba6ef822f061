"""mmtool's networks inside vLLM: its Transformers modelling backend, told how our folders and media are read.

Only vLLM imports this module, in each of its processes, by the names that ``mmtool.vllm_plugin`` registers. The names
it takes from vLLM are internal ones of the version that ``docs/vllm.md`` gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from vllm.config import CompilationMode
from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
    TransformersForCausalLM,
    TransformersMultiModalForCausalLM,
)
from vllm.model_executor.models.transformers.base import Base
from vllm.model_executor.models.transformers.utils import can_enable_torch_compile
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm.multimodal import MULTIMODAL_REGISTRY

from mmtool.auto import families, register_classes
from mmtool.engine.features import TOWERS
from mmtool.models.common.folders import local_folder
from mmtool.models.common.weights import LazyTensor
from mmtool.spec import AutoClasses
from mmtool.utils import import_object

# Among the fields of a medium it says that they come from ``VllmEngine``: each with the rows of this medium alone.
MARK = "mmtool_medium"
# Fields that only the inputs of one kind of media have, and those that vLLM adds for itself.
_FIELDS = {"image": "pixel_values", "audio": "input_features"}
_COUNTS = ("num_image_patches", "num_audio_tokens")


class _Released:
    """Reads a folder as ``from_pretrained`` does: released names and files, in a release's layout or in ours."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        # Reading the headers tells the configuration what a release's config.json leaves out, such as biases.
        _weights(vllm_config.model_config)
        # To a process of another GPU the configuration comes ready made, so that nobody has read the folder there.
        register_classes(_classes(vllm_config.model_config.hf_config))
        _check_heads(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def recursive_replace(self) -> None:
        """Put vLLM's layers in the place of others, cut as the network says."""
        plan = _network(self.config).tensor_parallel_plan
        if plan:
            self.model._tp_plan = {f"language_model.{pattern}": style for pattern, style in plan}
        super().recursive_replace()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the folder's weights; ``weights``, which vLLM would read of it, is not looked at."""
        network = _network(self.config)
        ours = ((network.our_name(name), tensor.read()) for name, tensor in _weights(self.model_config).items())
        # Of vLLM's own renamings, only those of fused layers are left to do.
        mapper = replace(self.hf_to_vllm_mapper, orig_to_new_renaming=[], orig_to_new_regex={})
        return AutoWeightsLoader(self).load_weights(ours, mapper=mapper)

    def _decorate_cls_for_torch_compile(self, cls: type, **settings: Any) -> None:
        """Prepare a class to be compiled; where nothing is, classes of transformers stay as they are for others."""
        if self.compilation_config.mode != CompilationMode.NONE:
            super()._decorate_cls_for_torch_compile(cls, **settings)


class MMToolForCausalLM(_Released, TransformersForCausalLM):
    """A text model."""


@MULTIMODAL_REGISTRY.register_processor(
    MultiModalProcessor, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class MMToolForConditionalGeneration(_Released, TransformersMultiModalForCausalLM):
    """A model with media.

    Media come either as ``VllmEngine`` hands them over, prepared by the template, or from vLLM's own server, prepared
    by the family's processor.
    """

    requires_raw_input_tokens = True  # else a decoder that treats media positions apart would not know where they are

    def embed_multimodal(self, **kwargs: Any) -> Sequence[Tensor]:
        """Return the features of media of one kind, a ``(rows, hidden)`` tensor for each."""
        kind = next(kind for kind, name in _FIELDS.items() if name in kwargs)
        tower = getattr(self.model, TOWERS[kind])
        if MARK not in kwargs:  # from vLLM's own server: joined already, or a list where shapes differ
            kwargs = {name: value for name, value in kwargs.items() if name not in _COUNTS}
            return list(tower(**_cast(kwargs, self.model_config.dtype), return_dict=True).pooler_output)
        count = len(kwargs.pop(MARK))
        items = [
            _cast({name: values[index] for name, values in kwargs.items()}, self.model_config.dtype)
            for index in range(count)
        ]
        features: list[Tensor] = []
        for _, group in groupby(items, key=lambda item: [tensor.shape[1:] for tensor in item.values()]):
            alike = list(group)
            joined = {name: torch.cat([item[name] for item in alike]) for name in alike[0]}
            features += tower(**joined, return_dict=True).pooler_output
        return features

    def _decorate_for_torch_compile(self) -> None:
        self._decorate_cls_for_torch_compile(
            self._pre_trained_model_classes.decoder,
            dynamic_arg_dims={"input_ids": 1, "inputs_embeds": 1, "position_ids": -1}
            | ({} if self._mask_name is None else {self._mask_name: 1}),
            enable_if=can_enable_torch_compile,
            is_encoder=False,
        )

    @cached_property
    def _mask_name(self) -> str | None:
        return _network(self.config).media_mask_argument

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return hidden states ``(seq, hidden)``; ``input_ids`` come beside the embeddings that are computed from."""
        ids = input_ids if inputs_embeds is None else None
        if self._mask_name is None:
            return super().forward(ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        assert input_ids is not None, "vLLM gives them to a class that requires_raw_input_tokens"
        mask = {self._mask_name: (input_ids == self.config.image_token_id).unsqueeze(0)}
        return Base.forward(self, ids, positions, intermediate_tensors, inputs_embeds, **mask)


def _network(config: Any) -> Any:
    """Return our class with a head for a configuration."""
    return import_object(_classes(config).model_class)


def _classes(config: Any) -> AutoClasses:
    """Return the classes of the family that a configuration belongs to.

    Raises:
        ValueError: for a configuration of another package.
    """
    for classes in families():
        if import_object(classes.config_class) is type(config):
            return classes
    raise ValueError(f"{type(config).__name__} is no configuration of mmtool")


def _check_heads(vllm_config: Any) -> None:
    heads = vllm_config.model_config.hf_config.get_text_config().num_key_value_heads
    size = vllm_config.parallel_config.tensor_parallel_size
    if _network(vllm_config.model_config.hf_config).tensor_parallel_plan and heads % size:
        raise ValueError(f"--tensor_parallel_size {size}: the model's {heads} key/value heads cannot be shared evenly")


def _weights(model_config: Any) -> dict[str, LazyTensor]:
    """Return the weights of our folder by their released names, none of them read yet."""
    network = _network(model_config.hf_config)
    folder, _ = local_folder(model_config.model, {"revision": model_config.revision})
    return network.checked_weights(folder, model_config.hf_config)


def _cast(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: _cast_one(value, dtype) for name, value in inputs.items()}


def _cast_one(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return [_cast_one(item, dtype) for item in value]
