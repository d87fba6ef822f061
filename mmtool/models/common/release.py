"""Base of the native models: load a folder in the layout of a release, write one, refuse one that does not fit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.generation import GenerationConfig
from transformers.modeling_utils import PreTrainedModel

from mmtool.errors import CheckpointError
from mmtool.models.common.bnb import parted
from mmtool.models.common.folders import local_folder
from mmtool.models.common.weights import LazyTensor, read_weights


class ReleaseModel(PreTrainedModel):
    """Loads weights lazily, tensor by tensor, and checks every name and shape before the first is read.

    A family sets ``config_class`` and registers its renamings with ``register_checkpoint_conversion_mapping`` under
    ``config_class.model_type``, the release's name first, ours second; ``save_pretrained`` applies them backwards.
    Weights that must be dropped or come from elsewhere are the matter of ``read_release``.
    """

    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ("past_key_values",)

    # Keyword of the decoder that takes the media positions, ``(batch, seq)`` bool, where its layers treat them apart.
    media_mask_argument: ClassVar[str | None] = None
    # How GPUs share the matrices of the decoder in vLLM, (regular expression on module names, style), where the plan in
    # its configuration cannot say it. Key/value heads are then shared out as a whole.
    tensor_parallel_plan: ClassVar[tuple[tuple[str, str], ...]] = ()
    # Without its head, a model's weight names lack the prefix ``model.`` of a release.
    _has_head: ClassVar[bool] = True

    @classmethod
    def read_release(cls, folder: Path, config: Any) -> dict[str, LazyTensor]:
        """Return the weights of a release folder by their released names, without what the network does not have."""
        return read_weights(folder)

    @classmethod
    def our_name(cls, released: str) -> str:
        """Return the name of a released weight in the class with a head."""
        for renaming in _renamings(cls.config_class.model_type):
            name, matched = renaming.rename_source_key(released)
            if matched is not None:
                return name
        return released

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: Any = None,
        dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a folder in the layout of a release, tensor by tensor, without random initialisation.

        Args:
            pretrained_model_name_or_path: a folder, or a hub id.
            model_args: for the constructor.
            config: the configuration; that of the folder if None.
            dtype: of the weights in memory; ``auto`` or None for what the configuration says, or else the files.
            kwargs: as in transformers: ``device_map``, ``attn_implementation``, ``quantization_config``, ...

        Raises:
            CheckpointError: when a file is missing or broken, or a weight is missing, left over or of another shape.
        """
        dtype = dtype if dtype is not None else kwargs.pop("torch_dtype", None)
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, dtype=dtype, **kwargs)
        folder, kwargs = local_folder(pretrained_model_name_or_path, kwargs)
        if config is None:
            config, kwargs = cls.config_class.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
        weights = cls.checked_weights(folder, config)
        dtype = _target_dtype(dtype, config, weights)
        weights = parted({name: tensor.astype(dtype) for name, tensor in weights.items()})
        model = super().from_pretrained(None, *model_args, config=config, state_dict=weights, dtype=dtype, **kwargs)
        output_loading_info = isinstance(model, tuple)
        _finish(model[0] if output_loading_info else model, folder, kwargs)
        return model

    @classmethod
    def checked_weights(cls, folder: Path, config: Any) -> dict[str, LazyTensor]:
        """Return the weights of a folder by their released names, those of the network and no others.

        ``config`` learns from them what a release's ``config.json`` may leave out.

        Raises:
            CheckpointError: when a file is missing or broken, or a weight is missing, left over or of another shape.
        """
        weights = cls.read_release(folder, config)
        if not weights:
            raise CheckpointError(
                f"{folder} has no weights",
                "It needs model.safetensors or pytorch_model.bin, or an index and its shards.",
            )
        if not cls._has_head or config.tie_word_embeddings:  # a tied head may be stored as a copy
            weights = {name: tensor for name, tensor in weights.items() if cls.our_name(name) != "lm_head.weight"}
        cls._check_weights(config, weights, folder)
        return weights

    @classmethod
    def _check_weights(cls, config: Any, weights: Mapping[str, LazyTensor], folder: Path) -> None:
        """Compare names and shapes with those of the network; the error names the first few."""
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
        found = {cls.our_name(name): (name, tensor.shape) for name, tensor in weights.items()}
        if not cls._has_head:
            expected = {f"model.{name}": shape for name, shape in expected.items()}
        if config.tie_word_embeddings:
            expected.pop("lm_head.weight", None)
        missing = [name for name in expected if name not in found]
        unexpected = [released for name, (released, _) in found.items() if name not in expected]
        wrong = [
            f"{released} is {list(shape)} instead of {list(expected[name])}"
            for name, (released, shape) in found.items()
            if name in expected and shape != expected[name]
        ]
        problems = [*_named("missing", missing), *_named("unexpected", unexpected), *_named("of another shape", wrong)]
        if problems:
            raise CheckpointError(
                f"the weights in {folder} do not fit its config.json: {'; '.join(problems)}",
                "Download the folder again, or check its configuration files against the release.",
            )

    def logits_and_loss(
        self, hidden_states: Tensor, labels: Tensor | None, logits_to_keep: int | Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return what ``lm_head`` makes of ``(batch, seq, hidden)`` states, and the loss where ``labels`` are given.

        Args:
            hidden_states: the decoder's output.
            labels: ``(batch, seq)``, -100 where nothing is learned; shifted here. The loss is the mean cross entropy.
            logits_to_keep: logits of the last so many positions only (0: all), or of these indices.
            kwargs: for the loss.
        """
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept])
        if labels is None:
            return logits, None
        return logits, self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a folder in the layout of a release; arguments as in transformers."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        if not self._has_head:
            state_dict = {f"model.{name}": tensor for name, tensor in state_dict.items()}
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)


@cache
def _renamings(model_type: str) -> tuple[Any, ...]:
    """Return the registered renamings of a family: a copy, as transformers keeps notes in its entries."""
    return tuple(get_checkpoint_conversion_mapping(model_type) or ())


def _target_dtype(dtype: torch.dtype | str | None, config: Any, weights: Mapping[str, LazyTensor]) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None or dtype == "auto":
        return config.dtype or next(tensor.stored_dtype for tensor in weights.values())
    return getattr(torch, dtype)


def _finish(model: PreTrainedModel, folder: Path, options: Mapping[str, Any]) -> None:
    """Set what transformers reads from a folder and could not, since it was given tensors."""
    for module in (model, model.base_model):  # an adapter notes it as the base it belongs to
        module.name_or_path = module.config.name_or_path = str(folder)
    if model.can_generate() and options.get("generation_config") is None:
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        else:
            model.generation_config = GenerationConfig.from_model_config(model.config)


def _named(what: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{len(names)} {what} ({', '.join(names[:3])}{more})"]
