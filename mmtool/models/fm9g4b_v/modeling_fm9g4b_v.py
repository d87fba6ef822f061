"""FM9G4B-V: SigLIP tower, windowed resampler and FM9G decoder, and the merge of picture features into the text."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from mmtool.errors import MMToolError
from mmtool.models.common.merge import merge_features, to_device_of
from mmtool.models.common.mla import MLADecoder, refill_rotary
from mmtool.models.common.navit import NaViTSiglip, slices_per_image, split_slices
from mmtool.models.common.release import ReleaseModel
from mmtool.models.common.weights import LazyTensor
from mmtool.models.fm9g4b_v.chat import ChatOptions, answer
from mmtool.models.fm9g4b_v.configuration_fm9g4b_v import FM9GVConfig
from mmtool.models.fm9g4b_v.conversion_fm9g4b_v import released_weights
from mmtool.models.fm9g4b_v.resampler_fm9g4b_v import WindowAttention, WindowedResampler
from mmtool.models.fm9g4b_v.tokenization_fm9g4b_v import end_of_turn_id


@dataclass
class FM9GVModelOutputWithPast(BaseModelOutputWithPast):
    """Hidden states, and the image features that went into them: one ``(rows, hidden)`` tensor per picture."""

    image_hidden_states: list[Tensor] | None = None


@dataclass
class FM9GVCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Logits, and the image features that went into them: one ``(rows, hidden)`` tensor per picture."""

    image_hidden_states: list[Tensor] | None = None


class FM9GVPreTrainedModel(ReleaseModel):
    """What both model classes share: the release's folder and the initial values of own parameters."""

    config: FM9GVConfig
    config_class = FM9GVConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    _no_split_modules = ("MuPDecoderLayer", "SiglipEncoderLayer", "PatchEmbeddings", "WindowedResampler")

    @classmethod
    def read_release(cls, folder: Path, config: FM9GVConfig) -> dict[str, LazyTensor]:
        """Return the weights of a release folder by their released names."""
        return released_weights(super().read_release(folder, config), config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        refill_rotary(module)
        if isinstance(module, WindowedResampler):
            for parameter in (module.query, module.pos_embed, module.feature_1x_embedding, module.feature_4x_embedding):
                init.normal_(parameter, std=0.02)
            init.normal_(module.proj, std=module.proj.shape[0] ** -0.5)
        elif isinstance(module, WindowAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)


class FM9GVModel(FM9GVPreTrainedModel):
    """The network without the language model's head."""

    _has_head = False

    def __init__(self, config: FM9GVConfig) -> None:
        super().__init__(config)
        vision_config = config.vision_config
        if config.drop_vision_last_layer:
            vision_config = copy.deepcopy(vision_config)
            vision_config.num_hidden_layers = config.num_vision_layers
        self.vision_tower = NaViTSiglip(vision_config)
        self.multi_modal_projector = WindowedResampler(
            config.query_num, vision_config.hidden_size, config.text_config.hidden_size, vision_config
        )
        self.language_model = MLADecoder(config.text_config)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        patch_info: Tensor | Sequence[Tensor],
        return_dict: bool = True,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Return the features of pictures: ``pooler_output`` is a list with one ``(rows, hidden)`` tensor for each.

        Args:
            pixel_values: ``(patches, 3 * patch * patch)``, picture after picture and slice after slice; or a sequence
                of such tensors.
            patch_info: ``(patches, 3)``: slice number within the picture, row and column of each patch.
            return_dict: False gives a tuple.
            kwargs: ignored.
        """
        if not isinstance(pixel_values, Tensor):
            pixel_values = torch.cat(tuple(pixel_values))
        if not isinstance(patch_info, Tensor):
            patch_info = torch.cat(tuple(patch_info))
        pixel_values = to_device_of(pixel_values, self.vision_tower.embeddings.patch_embedding.weight)
        shapes = split_slices(patch_info)
        patches = self.vision_tower(pixel_values, patch_info)
        slices = self.multi_modal_projector(patches, shapes)
        images = [rows.flatten(0, 1) for rows in slices.split(slices_per_image(patch_info))]
        output = BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=images)
        return output if return_dict else output.to_tuple()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        patch_info: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> FM9GVModelOutputWithPast:
        """Return states ``(batch, seq, hidden)`` that a linear head turns into logits.

        Args:
            input_ids: ``(batch, seq)``; every position of a feature holds ``config.image_token_id``.
            pixel_values: ``(patches, 3 * patch * patch)``, the pictures of the batch in reading order.
            patch_info: ``(patches, 3)``, see ``get_image_features``.
            attention_mask: ``(batch, seq)``, 0 at padding.
            position_ids: ``(batch, seq)``; 0..seq-1 if None.
            past_key_values: the cache of earlier positions.
            inputs_embeds: ``(batch, seq, hidden)`` instead of ``input_ids``, text scaled and features merged; or with
                it, text embeddings to merge into.
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
            if input_ids is None or patch_info is None:
                raise ValueError("pixel_values need patch_info, which says what they are, and input_ids: where they go")
            features = self.get_image_features(pixel_values, patch_info).pooler_output
            ids = input_ids
            if attention_mask is not None and attention_mask.shape == ids.shape:
                # The release pads with the id that it puts at picture positions.
                ids = ids.masked_fill(attention_mask == 0, -1)
            inputs_embeds = merge_features(inputs_embeds, ids, torch.cat(features), self.config.image_token_id)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return FM9GVModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
        )


class FM9GVAutoModel(FM9GVModel):
    """What ``AutoModel`` finds: the network without a head, made by ``from_config``, which serving engines call.

    ``from_pretrained`` gives the whole model, as the release's own ``AutoModel`` entry does: its ``chat`` needs a head.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """Return a ``FM9GVForConditionalGeneration``."""
        return FM9GVForConditionalGeneration.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


class FM9GVForConditionalGeneration(FM9GVPreTrainedModel, GenerationMixin):
    """The network with the language model's head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: FM9GVConfig) -> None:
        super().__init__(config)
        self.model = FM9GVModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """Load a folder, see ``ReleaseModel``; ``generate`` stops at the end of a turn as well."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        end_of_turn, found = end_of_turn_id(Path(model.name_or_path)), model.generation_config.eos_token_id
        found = found if isinstance(found, list) else [found]
        if end_of_turn is not None and end_of_turn not in found:
            model.generation_config.eos_token_id = [index for index in (end_of_turn, *found) if index is not None]
        return loaded

    def chat(
        self, image: Any = None, msgs: Any = None, tokenizer: Any = None, processor: Any = None, **options: Any
    ) -> Any:
        """Answer a conversation, as the release's ``chat`` does; see ``chat.py`` for the arguments.

        Raises:
            MMToolError: for a conversation that cannot be read, or one longer than ``max_inp_length``.
        """
        if options.pop("vision_hidden_states", None) is not None:
            raise MMToolError("chat takes no vision_hidden_states", "Give it the pictures.")
        names = ChatOptions.__dataclass_fields__
        chosen = ChatOptions(**{name: options.pop(name) for name in names if name in options})
        return answer(self, image, msgs, tokenizer, processor, chosen, options)

    def get_image_features(
        self, pixel_values: Tensor | Sequence[Tensor], patch_info: Tensor | Sequence[Tensor], **kwargs: Any
    ) -> Any:
        """Return ``model.get_image_features(...)``."""
        return self.model.get_image_features(pixel_values, patch_info, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        patch_info: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> FM9GVCausalLMOutputWithPast:
        """Return logits ``(batch, seq, vocab)``, and the loss where ``labels`` are given.

        Args:
            input_ids: as in ``FM9GVModel.forward``, like the other inputs.
            pixel_values: the pictures.
            patch_info: what their rows are.
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
            patch_info=patch_info,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits, loss = self.logits_and_loss(outputs.last_hidden_state, labels, logits_to_keep, **kwargs)
        return FM9GVCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )
