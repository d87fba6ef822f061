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
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.utils.generic import can_return_tuple

from mmtool.models.common.merge import merge_features, to_device_of
from mmtool.models.common.release import ReleaseModel
from mmtool.models.common.weights import LazyTensor
from mmtool.models.yi_vl.configuration_yi_vl import YiVLConfig
from mmtool.models.yi_vl.conversion_yi_vl import read_release


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


class YiVLPreTrainedModel(ReleaseModel):
    """What both model classes share: the release's folder, with the vision tower in its own."""

    config: YiVLConfig
    config_class = YiVLConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    _no_split_modules = ("LlamaDecoderLayer", "CLIPEncoderLayer", "CLIPVisionEmbeddings")
    _can_compile_fullgraph = True

    @classmethod
    def read_release(cls, folder: Path, config: YiVLConfig) -> dict[str, LazyTensor]:
        """Return the weights of the main shards, the vision tower's from the vit folder."""
        return read_release(folder, config.mm_vision_tower)

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
        prefix = ("model." if self._has_head else "") + "vision_tower."
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
        pixel_values = to_device_of(pixel_values, self.vision_tower.embeddings.patch_embedding.weight)
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
        logits, loss = self.logits_and_loss(outputs.last_hidden_state, labels, logits_to_keep, **kwargs)
        return YiVLCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )
