"""Yi-VL: transformers' Llama and CLIP vision modules, with the projector and the merge that are Yi-VL's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.utils.generic import can_return_tuple

from mmtool.errors import CheckpointError
from mmtool.models.common.folders import local_folder
from mmtool.models.common.merge import merge_features
from mmtool.models.yi_vl.configuration_yi_vl import YiVLConfig
from mmtool.models.yi_vl.conversion_yi_vl import TOWER_IN_SHARDS, our_name, read_release


@dataclass
class YiVLModelOutputWithPast(BaseModelOutputWithPast):
    """Hidden states, and the image features that went into them: one ``(tokens, hidden)`` tensor per picture."""

    image_hidden_states: list[Tensor] | None = None


@dataclass
class YiVLCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Logits, and the image features that went into them: one ``(tokens, hidden)`` tensor per picture."""

    image_hidden_states: list[Tensor] | None = None


class YiVLVisionTower(CLIPVisionModel):
    """The CLIP tower up to the layer whose output is the feature; the layers behind it are kept but never run."""

    def __init__(self, config: YiVLConfig) -> None:
        super().__init__(config.vision_config)
        self.num_layers_to_run = config.num_vision_layers

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return hidden states ``(images, 1 + patches, width)``, class token first, for ``(images, 3, H, W)``."""
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values))
        for layer in self.encoder.layers[: self.num_layers_to_run]:
            hidden_states = layer(hidden_states, None)
        return hidden_states


class YiVLProjector(nn.Sequential):
    """Vision width to text width; the children's numbers are the released weight names."""

    def __init__(self, config: YiVLConfig) -> None:
        hidden_size = config.text_config.hidden_size
        super().__init__(
            nn.Linear(config.mm_hidden_size, hidden_size),
            nn.LayerNorm(hidden_size),  # before the GELU, unlike what several re-implementations do
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
            nn.LayerNorm(hidden_size),
        )


class YiVLPreTrainedModel(PreTrainedModel):
    """What both model classes share: loading a release folder, and writing one."""

    config: YiVLConfig
    config_class = YiVLConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ("LlamaDecoderLayer", "CLIPEncoderLayer", "CLIPVisionEmbeddings")
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _has_head = True  # without it, weight names lack the prefix ``model.`` of a release

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: YiVLConfig | None = None,
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
            config, kwargs = YiVLConfig.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
        weights = read_release(folder, config.mm_vision_tower)
        if not cls._has_head:
            weights.pop("lm_head.weight", None)
        cls._check_weights(config, weights, folder)
        dtype = _target_dtype(dtype, config, weights)
        weights = {name: tensor.astype(dtype) for name, tensor in weights.items()}
        model = super().from_pretrained(None, *model_args, config=config, state_dict=weights, dtype=dtype, **kwargs)
        output_loading_info = isinstance(model, tuple)
        _finish(model[0] if output_loading_info else model, folder, kwargs)
        return model

    @classmethod
    def _check_weights(cls, config: YiVLConfig, weights: dict[str, Any], folder: Path) -> None:
        """Compare names and shapes with those of the network; the error names the first few."""
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
        found = {our_name(name): (name, tensor.shape) for name, tensor in weights.items()}
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
                "Download the folder again, or check config.json and vit/*/config.json against the release.",
            )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        **kwargs: Any,
    ) -> None:
        """Write a folder in the layout of a release: main shards with their copy of the tower, and the vit folder."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        if not self._has_head:
            state_dict = {f"model.{name}": tensor for name, tensor in state_dict.items()}
        prefix = "model.vision_tower."
        tower = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        super().save_pretrained(save_directory, is_main_process, state_dict, max_shard_size=max_shard_size, **kwargs)
        if is_main_process and tower and not self._hf_peft_config_loaded:  # else it was the adapter that was saved
            save_torch_state_dict(
                {f"vision_model.{name}": tensor.contiguous() for name, tensor in tower.items()},
                Path(save_directory) / self.config.vision_folder_name,
                max_shard_size=max_shard_size,
            )


class YiVLModel(YiVLPreTrainedModel):
    """The network without the language model's head."""

    _has_head = False

    def __init__(self, config: YiVLConfig) -> None:
        super().__init__(config)
        self.vision_tower = YiVLVisionTower(config)
        self.multi_modal_projector = YiVLProjector(config)
        self.language_model = LlamaModel(config.text_config)
        self.post_init()

    def get_image_features(
        self, pixel_values: Tensor | Sequence[Tensor], return_dict: bool = True, **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple:
        """Return the features of pictures: ``pooler_output`` is a list with one ``(tokens, hidden)`` tensor for each.

        Args:
            pixel_values: ``(images, 3, H, W)``, or a sequence of ``(3, H, W)``.
            return_dict: False gives a tuple.
            kwargs: ignored.
        """
        if not isinstance(pixel_values, Tensor):
            pixel_values = torch.stack(tuple(pixel_values))
        device = self.vision_tower.embeddings.patch_embedding.weight.device
        if device.type != "meta":  # where accelerate brings the weights for the call only, it moves the input as well
            pixel_values = pixel_values.to(device)
        hidden_states = self.vision_tower(pixel_values)
        patches = hidden_states if self.config.mm_vision_select_feature == "cls_patch" else hidden_states[:, 1:]
        output = BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=list(self.multi_modal_projector(patches))
        )
        return output if return_dict else output.to_tuple()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> YiVLModelOutputWithPast:
        """Return hidden states ``(batch, seq, hidden)``.

        Args:
            input_ids: ``(batch, seq)``; every image position holds ``config.image_token_id``.
            pixel_values: ``(images, 3, H, W)``, the pictures of the batch in reading order.
            attention_mask: ``(batch, seq)``, 0 at padding.
            position_ids: ``(batch, seq)``; 0..seq-1 if None.
            past_key_values: the cache of earlier positions.
            inputs_embeds: ``(batch, seq, hidden)`` instead of ``input_ids``, features already merged; or with it, text
                embeddings to merge into.
            kwargs: for the language model.

        Raises:
            ValueError: when image positions and image features differ in number.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError("either input_ids or inputs_embeds is needed")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        features = None
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids, which say where they go")
            features = self.get_image_features(pixel_values).pooler_output
            inputs_embeds = merge_features(inputs_embeds, input_ids, torch.cat(features), self.config.image_token_id)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return YiVLModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
        )


class YiVLForConditionalGeneration(YiVLPreTrainedModel, GenerationMixin):
    """The network with the language model's head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: YiVLConfig) -> None:
        super().__init__(config)
        self.model = YiVLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor | Sequence[Tensor], **kwargs: Any) -> Any:
        """Return ``model.get_image_features(...)``."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> YiVLCausalLMOutputWithPast:
        """Return logits ``(batch, seq, vocab)``, and the loss where ``labels`` are given.

        Args:
            input_ids: as in ``YiVLModel.forward``, like the other inputs.
            pixel_values: the pictures.
            attention_mask: 0 at padding.
            position_ids: positions.
            past_key_values: cache.
            inputs_embeds: embeddings.
            labels: ``(batch, seq)`` next to ``input_ids``, -100 where nothing is learned; shifted here. The loss is the
                mean cross entropy.
            logits_to_keep: logits of the last so many positions only (0: all), or of these indices.
            kwargs: for the language model and the loss.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return YiVLCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


def _target_dtype(dtype: torch.dtype | str | None, config: YiVLConfig, weights: dict[str, Any]) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None or dtype == "auto":
        return config.dtype or next(tensor.stored_dtype for tensor in weights.values())
    return getattr(torch, dtype)


def _finish(model: YiVLPreTrainedModel, folder: Path, options: dict[str, Any]) -> None:
    """Set what transformers reads from a folder and could not, since it was given tensors."""
    for module in (model, model.base_model):  # an adapter notes it as the base it belongs to
        module.name_or_path = module.config.name_or_path = str(folder)
    if model.can_generate() and options.get("generation_config") is None:
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        else:
            model.generation_config = GenerationConfig.from_model_config(model.config)


def _named(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{len(names)} {what} ({', '.join(names[:3])}{more})"]


__all__ = ["TOWER_IN_SHARDS", "YiVLForConditionalGeneration", "YiVLModel", "YiVLPreTrainedModel"]
