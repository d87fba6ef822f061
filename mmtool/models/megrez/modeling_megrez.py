"""Megrez-3B: the resampler, the audio encoder and the merge of Omni around transformers' Llama; Instruct is Llama."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer
from transformers.utils.generic import can_return_tuple

from mmtool.models.common.merge import merge_features, to_device_of
from mmtool.models.common.navit import NaViTSiglip, slices_per_image, split_slices
from mmtool.models.common.release import ReleaseModel
from mmtool.models.common.weights import LazyTensor
from mmtool.models.megrez.configuration_megrez import MegrezAudioConfig, MegrezInstructConfig, MegrezOmniConfig
from mmtool.models.megrez.conversion_megrez import without_leftovers
from mmtool.utils import import_object

_HEAD_SIZE = 128  # of the resampler
_EPS = 1e-6  # of the resampler's norms


# -- pictures --------------------------------------------------------------------------------------------------------


class MegrezAttention(nn.Module):
    """Attention of the resampler, with the parameters that the release got from torch: q, k and v in one matrix."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.num_heads = hidden_size // _HEAD_SIZE
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return ``(batch, num_queries, hidden)`` for queries of that shape, keys and values ``(batch, n, hidden)``."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        heads = [
            nn.functional.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((queries, keys, values), weights, biases, strict=True)
        ]
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        return self.out_proj(mixed.transpose(1, 2).flatten(2).contiguous())


class MegrezResampler(nn.Module):
    """The patches of a slice to ``query_num`` features: learned queries look at the patches once."""

    def __init__(self, config: MegrezOmniConfig) -> None:
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.query = nn.Parameter(torch.empty(config.query_num, hidden_size))
        self.kv_proj = nn.Linear(config.vision_config.hidden_size, hidden_size, bias=False)
        self.attn = MegrezAttention(hidden_size)
        self.ln_q = nn.LayerNorm(hidden_size, eps=_EPS)
        self.ln_kv = nn.LayerNorm(hidden_size, eps=_EPS)
        self.ln_post = nn.LayerNorm(hidden_size, eps=_EPS)
        self.proj = nn.Parameter(torch.empty(hidden_size, hidden_size))

    def forward(self, patches: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Return ``(slices, query_num, hidden)``.

        Args:
            patches: ``(patches, width)``, slice after slice.
            shapes: (rows, columns) of patches of every slice.
        """
        slices = self.ln_kv(self.kv_proj(patches)).split([rows * columns for rows, columns in shapes])
        queries = self.ln_q(self.query).unsqueeze(0)
        features: list[Tensor] = [patches] * len(slices)  # each is replaced below
        for shape in dict.fromkeys(shapes):
            alike = [index for index, other in enumerate(shapes) if other == shape]
            values = torch.stack([slices[index] for index in alike])
            positions = grid_positions(*shape, values.shape[-1]).to(values.device, values.dtype)
            mixed = self.attn(queries.expand(len(alike), -1, -1), values + positions, values)
            for index, rows in zip(alike, self.ln_post(mixed) @ self.proj, strict=True):
                features[index] = rows
        return torch.stack(features)


@lru_cache(maxsize=256)
def grid_positions(num_rows: int, num_columns: int, hidden_size: int) -> Tensor:
    """Return ``(rows * columns, hidden)`` float32, added to the keys of a slice: half for the column, half for the row.

    The column comes first, whatever the release calls it. The table has no largest size. Do not modify it.
    """
    columns, rows = (_axis_positions(count, hidden_size // 2) for count in (num_columns, num_rows))
    shape = (num_rows, num_columns, hidden_size // 2)
    table = np.concatenate([np.broadcast_to(columns, shape), np.broadcast_to(rows[:, None], shape)], axis=-1)
    return torch.from_numpy(table.reshape(num_rows * num_columns, hidden_size))


def _axis_positions(count: int, size: int) -> np.ndarray:
    frequency = 1.0 / 10000 ** (np.arange(size // 2, dtype=np.float32) / np.float32(size / 2))
    angle = np.outer(np.arange(count, dtype=np.float32), frequency.astype(np.float32))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


# -- sounds ----------------------------------------------------------------------------------------------------------


class MegrezAudioTower(PreTrainedModel):
    """Whisper's encoder with half as many positions behind it: neighbours are averaged, then normed."""

    config: MegrezAudioConfig
    config_class = MegrezAudioConfig
    base_model_prefix = "audio_tower"
    main_input_name = "input_features"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ("WhisperEncoderLayer",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: MegrezAudioConfig) -> None:
        super().__init__(config)
        self.conv1 = nn.Conv1d(config.n_mels, config.n_state, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.n_state, config.n_state, kernel_size=3, stride=2, padding=1)
        # Stored in the release and never trained; not quite the sinusoids that it was made from.
        self.register_buffer("positional_embedding", torch.empty(config.n_ctx, config.n_state))
        self.layers = nn.ModuleList(WhisperEncoderLayer(config) for _ in range(config.n_layer))
        self.ln_post = nn.LayerNorm(config.n_state)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MegrezAudioTower):
            count, width = module.positional_embedding.shape
            frequency = torch.exp(-torch.arange(width // 2) * (np.log(10000) / (width // 2 - 1)))
            angle = torch.arange(count).unsqueeze(1) * frequency
            init.copy_(module.positional_embedding, torch.cat([angle.sin(), angle.cos()], dim=1))

    def forward(self, input_features: Tensor, num_frames: Tensor) -> list[Tensor]:
        """Return ``(positions, width)`` for every sound: a position for four frames.

        Args:
            input_features: ``(sounds, mels, frames)``.
            num_frames: ``(sounds,)``, how many frames the encoder sees; what lies behind counts as zero.
        """
        lengths = num_frames // 2  # positions after the convolutions
        longest = max(int(lengths.max()), 1)
        hidden = input_features[..., : 2 * longest + 1].to(self.conv1.weight.dtype)
        hidden = hidden * (torch.arange(hidden.shape[-1], device=hidden.device) < num_frames.unsqueeze(1)).unsqueeze(1)
        hidden = nn.functional.gelu(self.conv1(hidden))
        hidden = nn.functional.gelu(self.conv2(hidden))[..., :longest].transpose(1, 2)
        hidden = hidden + self.positional_embedding[:longest].to(hidden.dtype)
        # A sound without a position keeps one, that nobody asks for: no softmax runs over nothing.
        kept = torch.arange(longest, device=hidden.device) < lengths.clamp(min=1).unsqueeze(1)
        hidden = hidden * kept.unsqueeze(-1)
        mask = create_bidirectional_mask(self.config, hidden, kept.long())
        for layer in self.layers:
            hidden = layer(hidden, mask)
        pooled = nn.functional.avg_pool1d(hidden.transpose(1, 2), 2).transpose(1, 2) if longest > 1 else hidden[:, :0]
        pooled = self.ln_post(pooled.contiguous())
        return [rows[:count] for rows, count in zip(pooled, (lengths // 2).tolist(), strict=True)]


class MegrezAudioProjector(nn.Module):
    """Audio width to text width, with a learned vector before and behind every sound."""

    def __init__(self, config: MegrezAudioConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.n_state, config.output_dim)
        self.audio_bos_eos_token = nn.Embedding(2, config.output_dim)

    def forward(self, sounds: Sequence[Tensor]) -> list[Tensor]:
        """Return ``(2 + positions, hidden)`` for every ``(positions, width)``."""
        projected = self.proj(torch.cat(tuple(sounds))).split([len(rows) for rows in sounds])
        begin, end = self.audio_bos_eos_token(torch.arange(2, device=sounds[0].device)).chunk(2)
        return [torch.cat([begin, rows, end]) for rows in projected]


# -- the whole -------------------------------------------------------------------------------------------------------


@dataclass
class MegrezModelOutputWithPast(BaseModelOutputWithPast):
    """Hidden states, and the features that went into them: one ``(positions, hidden)`` tensor per picture and sound."""

    image_hidden_states: list[Tensor] | None = None
    audio_hidden_states: list[Tensor] | None = None


@dataclass
class MegrezCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Logits, and the features that went into them: one ``(positions, hidden)`` tensor per picture and sound."""

    image_hidden_states: list[Tensor] | None = None
    audio_hidden_states: list[Tensor] | None = None


class MegrezOmniPreTrainedModel(ReleaseModel):
    """What both model classes share."""

    config: MegrezOmniConfig
    config_class = MegrezOmniConfig
    base_model_prefix = "model"
    input_modalities = ("image", "audio", "text")
    _no_split_modules = ("LlamaDecoderLayer", "SiglipEncoderLayer", "PatchEmbeddings", "WhisperEncoderLayer")
    _can_compile_fullgraph = True

    @classmethod
    def read_release(cls, folder: Path, config: MegrezOmniConfig) -> dict[str, LazyTensor]:
        """Return the weights of a folder by their released names."""
        return without_leftovers(super().read_release(folder, config), num_vision_layers(config))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MegrezResampler):
            init.normal_(module.query, std=0.02)
            init.normal_(module.proj, std=len(module.proj) ** -0.5)
        elif isinstance(module, MegrezAttention):
            init.normal_(module.in_proj_weight, std=module.in_proj_weight.shape[1] ** -0.5)
            init.zeros_(module.in_proj_bias)


class MegrezOmniModel(MegrezOmniPreTrainedModel):
    """The network without the language model's head."""

    _has_head = False

    def __init__(self, config: MegrezOmniConfig) -> None:
        super().__init__(config)
        vision_config = copy.copy(config.vision_config)
        vision_config.num_hidden_layers = num_vision_layers(config)
        self.vision_tower = NaViTSiglip(vision_config)
        self.resampler = MegrezResampler(config)
        self.audio_tower = MegrezAudioTower(config.audio_config)
        self.audio_projector = MegrezAudioProjector(config.audio_config)
        self.language_model = LlamaModel(config.text_config)
        self.post_init()

    def get_image_features(
        self, pixel_values: Tensor | Sequence[Tensor], patch_info: Tensor, return_dict: bool = True, **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple:
        """Return the features of pictures: ``pooler_output`` lists one ``(positions, hidden)`` tensor for each.

        Args:
            pixel_values: ``(patches, channels * patch * patch)``, all slices of all pictures; or a sequence of such.
            patch_info: ``(patches, 3)``: slice number within the picture, row and column of each patch.
            return_dict: False gives a tuple.
            kwargs: ignored.
        """
        if not isinstance(pixel_values, Tensor):
            pixel_values, patch_info = torch.cat(tuple(pixel_values)), torch.cat(tuple(patch_info))
        pixel_values = to_device_of(pixel_values, self.vision_tower.embeddings.patch_embedding.weight)
        patches = self.vision_tower(pixel_values, patch_info)
        features = self.resampler(patches, split_slices(patch_info)).split(slices_per_image(patch_info))
        output = BaseModelOutputWithPooling(
            last_hidden_state=patches, pooler_output=[slices.flatten(0, 1) for slices in features]
        )
        return output if return_dict else output.to_tuple()

    def get_audio_features(
        self,
        input_features: Tensor | Sequence[Tensor],
        input_features_mask: Tensor | Sequence[Tensor] | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Return the features of sounds: ``pooler_output`` lists one ``(positions, hidden)`` tensor for each.

        Args:
            input_features: ``(sounds, mels, frames)``.
            input_features_mask: ``(sounds, frames)``, not 0 at frames that the encoder sees; None for all of them.
            return_dict: False gives a tuple.
            kwargs: ignored.
        """
        if not isinstance(input_features, Tensor):
            input_features = torch.stack(tuple(input_features))
        if input_features_mask is None:
            input_features_mask = torch.ones_like(input_features[:, 0])
        elif not isinstance(input_features_mask, Tensor):
            input_features_mask = torch.stack(tuple(input_features_mask))
        input_features = to_device_of(input_features, self.audio_tower.conv1.weight)
        num_frames = (input_features_mask != 0).sum(dim=1).to(input_features.device)
        sounds = self.audio_tower(input_features, num_frames)
        output = BaseModelOutputWithPooling(pooler_output=self.audio_projector(sounds))
        return output if return_dict else output.to_tuple()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        patch_info: Tensor | None = None,
        input_features: Tensor | Sequence[Tensor] | None = None,
        input_features_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> MegrezModelOutputWithPast:
        """Return hidden states ``(batch, seq, hidden)``.

        Args:
            input_ids: ``(batch, seq)``; features go between the tokens that open and close a slice or a sound.
            pixel_values: the pictures of the batch in reading order, as in ``get_image_features``.
            patch_info: what their rows are.
            input_features: the sounds of the batch in reading order, as in ``get_audio_features``.
            input_features_mask: which of their frames are seen.
            attention_mask: ``(batch, seq)``, 0 at padding.
            position_ids: ``(batch, seq)``; 0..seq-1 if None.
            past_key_values: the cache of earlier positions.
            inputs_embeds: ``(batch, seq, hidden)`` instead of ``input_ids``, features already merged; or with it, text
                embeddings to merge into.
            kwargs: for the language model.

        Raises:
            ValueError: when media positions and features differ in number.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError("either input_ids or inputs_embeds is needed")
        if input_ids is None and (pixel_values is not None or input_features is not None):
            raise ValueError("pixel_values and input_features need input_ids, which say where they go")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        images = sounds = None
        if pixel_values is not None:
            images = self.get_image_features(pixel_values, patch_info).pooler_output
            inputs_embeds = merge_features(inputs_embeds, self.image_positions(input_ids), torch.cat(images), True)
        if input_features is not None:
            sounds = self.get_audio_features(input_features, input_features_mask).pooler_output
            inputs_embeds = merge_features(inputs_embeds, self.audio_positions(input_ids), torch.cat(sounds), True)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return MegrezModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=images,
            audio_hidden_states=sounds,
        )

    def image_positions(self, input_ids: Tensor) -> Tensor:
        """Return ``(batch, seq)`` bool: where features of pictures go."""
        return self._between(input_ids, ("image_start", "slice_start"), ("image_end", "slice_end"))

    def audio_positions(self, input_ids: Tensor) -> Tensor:
        """Return ``(batch, seq)`` bool: where features of sounds go."""
        return self._between(input_ids, ("audio_start",), ("audio_end",))

    def _between(self, input_ids: Tensor, starts: Sequence[str], ends: Sequence[str]) -> Tensor:
        # The same placeholder stands for pictures and sounds, so the tokens around it tell which it is.
        ids = self.config.special_token_ids
        opens = torch.isin(input_ids, input_ids.new_tensor([ids[name] for name in starts]))
        closes = torch.isin(input_ids, input_ids.new_tensor([ids[name] for name in ends]))
        return (opens.cumsum(dim=1) > closes.cumsum(dim=1)) & ~opens


class MegrezOmniForConditionalGeneration(MegrezOmniPreTrainedModel, GenerationMixin):
    """The network with the language model's head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: MegrezOmniConfig) -> None:
        super().__init__(config)
        self.model = MegrezOmniModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """Load a folder, see ``ReleaseModel``; answers end at the end of a turn and of the text, whatever it names."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        _complete_stop_ids(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def chat(self, messages: Sequence[Any], sampling: bool = False, streamer: Any = None, **settings: Any) -> str:
        """Return the answer to ``[{"role": "user", "content": {"text": .., "image": .., "audio": ..}}]``.

        Args:
            messages: the conversation; see ``chat.py`` for what a content may be.
            sampling: draw tokens at random, as the release's web page does; else the likeliest ones are taken.
            streamer: gets tokens as they come, like the streamers of transformers.
            settings: ``max_new_tokens``, ``temperature``, ``repetition_penalty`` and other fields of ``Sampling``.
        """
        return import_object("mmtool.models.megrez.chat:answer")(self, messages, sampling, streamer, settings)

    def get_image_features(self, pixel_values: Tensor | Sequence[Tensor], patch_info: Tensor, **kwargs: Any) -> Any:
        """Return ``model.get_image_features(...)``."""
        return self.model.get_image_features(pixel_values, patch_info, **kwargs)

    def get_audio_features(
        self, input_features: Tensor | Sequence[Tensor], input_features_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Return ``model.get_audio_features(...)``."""
        return self.model.get_audio_features(input_features, input_features_mask, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        patch_info: Tensor | None = None,
        input_features: Tensor | Sequence[Tensor] | None = None,
        input_features_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MegrezCausalLMOutputWithPast:
        """Return logits ``(batch, seq, vocab)``, and the loss where ``labels`` are given.

        Args:
            input_ids: as in ``MegrezOmniModel.forward``, like the other inputs.
            pixel_values: the pictures.
            patch_info: what their rows are.
            input_features: the sounds.
            input_features_mask: which of their frames are seen.
            attention_mask: 0 at padding.
            position_ids: positions.
            past_key_values: cache.
            inputs_embeds: embeddings.
            labels: ``(batch, seq)`` next to ``input_ids``, -100 where nothing is learned; shifted here. The loss is the
                mean cross entropy over all learned positions of the batch.
            logits_to_keep: logits of the last so many positions only (0: all), or of these indices.
            kwargs: for the language model and the loss.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            patch_info=patch_info,
            input_features=input_features,
            input_features_mask=input_features_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits, loss = self.logits_and_loss(outputs.last_hidden_state, labels, logits_to_keep, **kwargs)
        return MegrezCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            audio_hidden_states=outputs.audio_hidden_states,
        )


class MegrezInstructForCausalLM(ReleaseModel, LlamaForCausalLM):
    """The text model: Llama, loaded and written as a release."""

    config_class = MegrezInstructConfig

    @classmethod
    def read_release(cls, folder: Path, config: MegrezInstructConfig) -> dict[str, LazyTensor]:
        """Return the weights of a folder without tables that are computed."""
        return without_leftovers(super().read_release(folder, config), 0)


def num_vision_layers(config: MegrezOmniConfig) -> int:
    """Return how many layers of the vision tower run, and exist."""
    return config.vision_config.num_hidden_layers - config.drop_vision_last_layer


def _complete_stop_ids(model: MegrezOmniForConditionalGeneration) -> None:
    config, generation = model.config, model.generation_config
    named = generation.eos_token_id
    ids = [*(named if isinstance(named, list) else [named]), config.text_config.eos_token_id]
    ids.append(config.special_token_ids.get("end_of_text"))
    generation.eos_token_id = list(dict.fromkeys(index for index in ids if index is not None))


__all__ = [
    "MegrezInstructForCausalLM",
    "MegrezOmniForConditionalGeneration",
    "MegrezOmniModel",
    "MegrezOmniPreTrainedModel",
]
