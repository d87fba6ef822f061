"""InternLM-XComposer2: CLIP's tower, a projector that lays tiles out, and the language model they feed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.utils.generic import can_return_tuple

from mmtool.log import get_logger
from mmtool.models.common.merge import merge_features, to_device_of
from mmtool.models.common.release import ReleaseModel
from mmtool.models.common.weights import LazyTensor, read_weights
from mmtool.models.internlm_xcomposer2.configuration_internlm_xcomposer2 import TASKS, XComposer2Config
from mmtool.models.internlm_xcomposer2.conversion_internlm_xcomposer2 import our_name, wanted_weights
from mmtool.models.internlm_xcomposer2.modeling_internlm2 import LowRankBranch, XComposer2TextModel

logger = get_logger(__name__)

# Views of pictures that go through the tower at once; 25 of 560 pixels would need gigabytes for their attention.
_VIEWS_PER_CALL = 8


# -- pictures ----------------------------------------------------------------------------------------------------------


class XComposer2VisionTower(CLIPVisionModel):
    """The CLIP tower up to its last layer, without the norm behind it."""

    def __init__(self, config: XComposer2Config) -> None:
        super().__init__(config.vision_config)
        self.post_layernorm = nn.Identity()  # releases do not have it

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the patches ``(views, grid * grid, width)`` of ``(views, 3, H, W)``, without the class token."""
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values))
        for layer in self.encoder.layers:
            hidden_states = layer(hidden_states, None)
        return hidden_states[:, 1:]


class XComposer2Projector(nn.Sequential):
    """Vision width to text width; the children's numbers are the released weight names.

    Tiled models bring four patches to one position, so the projector is four times as wide; and they have two learned
    vectors of that width, which take positions of their own between the patches.
    """

    def __init__(self, config: XComposer2Config) -> None:
        width, hidden = config.vision_config.hidden_size * (4 if config.tiled else 1), config.text_config.hidden_size
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        if config.tiled:
            self.plora_glb_GN = nn.Parameter(torch.zeros(1, 1, width))  # between the global view and the tiles
            self.plora_sub_GN = nn.Parameter(torch.zeros(1, 1, 1, width))  # at the end of every row, a newline

    def forward(self, views: Tensor, tiles: tuple[int, int] | None = None) -> Tensor:
        """Return the ``(positions, hidden)`` features of one picture.

        Args:
            views: ``(views, grid * grid, width)`` patches: one view, or the global view and then the tiles, row by row.
            tiles: rows and columns of tiles in a tiled model.
        """
        positions = views[0] if tiles is None else self.lay_out(views, *tiles)
        return super().forward(positions)

    def lay_out(self, views: Tensor, rows: int, columns: int) -> Tensor:
        """Return the positions of a picture ``(positions, 4 * width)``: the global view, a separator, all tiles."""
        num_views, num_patches, width = views.shape
        side = int(num_patches**0.5) // 2
        views = views.view(num_views, side, 2, side, 2, width).permute(0, 1, 3, 2, 4, 5).flatten(3)  # (V, g, g, 4 * w)
        whole, local = views[0], views[1:]
        plane = local.view(rows, columns, side, side, -1).transpose(1, 2).reshape(rows * side, columns * side, -1)
        return torch.cat((self._with_newlines(whole), self.plora_glb_GN[0], self._with_newlines(plane)))

    def _with_newlines(self, plane: Tensor) -> Tensor:
        newlines = self.plora_sub_GN[0].expand(plane.shape[0], -1, -1)
        return torch.cat((plane, newlines), dim=1).flatten(0, 1)


# -- the whole ---------------------------------------------------------------------------------------------------------


@dataclass
class XComposer2ModelOutputWithPast(BaseModelOutputWithPast):
    """Hidden states, and the image features that went into them: one ``(tokens, hidden)`` tensor per picture."""

    image_hidden_states: list[Tensor] | None = None


@dataclass
class XComposer2CausalLMOutputWithPast(CausalLMOutputWithPast):
    """Logits, and the image features that went into them: one ``(tokens, hidden)`` tensor per picture."""

    image_hidden_states: list[Tensor] | None = None


class XComposer2PreTrainedModel(ReleaseModel):
    """What both model classes share."""

    config: XComposer2Config
    config_class = XComposer2Config
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    media_mask_argument = "im_mask"
    # The rows of wqkv stand by key/value head: equal parts are whole heads where their number can be divided. What a
    # branch adds is cut like the output of its matrix; beside a matrix whose input is cut, its first half is, too.
    tensor_parallel_plan = (
        (r"layers\.\d+\.(attention\.wqkv|feed_forward\.(w1|w3))(_branch\.\w+_B)?$", "colwise"),
        (r"layers\.\d+\.(attention\.wo|feed_forward\.w2)(_branch\.\w+_A)?$", "rowwise"),
    )
    _no_split_modules = ("XComposer2DecoderLayer", "CLIPEncoderLayer", "CLIPVisionEmbeddings")

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a folder or hub id; see ``ReleaseModel``.

        ``task_mode="write"`` (or ``"web"``) adds the task weights of 2.5, ``task_loras=False`` does not load them.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for branch in model.modules():
            if isinstance(branch, LowRankBranch):  # loading makes everything trainable
                branch.freeze_idle_tasks()
        if model.can_generate():
            # The releases limit prompt and answer together, some to 1600 positions, which one picture can take.
            model.generation_config.max_length = None
        return loaded

    @classmethod
    def read_release(cls, folder: Path, config: XComposer2Config) -> dict[str, LazyTensor]:
        """Return the weights of a folder; those of tasks only where the configuration has them."""
        weights = read_weights(folder)
        kept = wanted_weights(weights, config.text_config.task_lora_ranks)
        if any(".lora_web_A." in name or ".lora_sft_A." in name for name in weights.keys() - kept.keys()):
            logger.info(
                "The task weights (%s) of %s are left out: a copy saved from here will not have them.",
                ", ".join(f"lora_{task}" for task in TASKS),
                folder,
            )
        return kept

    @classmethod
    def our_name(cls, released: str) -> str:
        """Return the name of a released weight in the class with a head."""
        return our_name(released)


class XComposer2Model(XComposer2PreTrainedModel):
    """The network without the language model's head."""

    _has_head = False

    def __init__(self, config: XComposer2Config) -> None:
        super().__init__(config)
        self.vision_tower = XComposer2VisionTower(config)
        self.multi_modal_projector = XComposer2Projector(config)
        self.language_model = XComposer2TextModel(config.text_config)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        view_layout: Tensor | Sequence[Tensor] | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Return the features of pictures: ``pooler_output`` is a list with one ``(tokens, hidden)`` tensor for each.

        Args:
            pixel_values: ``(views, 3, H, W)``: of each picture one view, or in a tiled model the global view and the
                tiles; or a sequence of such tensors.
            view_layout: ``(views, 3)``, of tiled models only: the number of the view in its picture (0 is the global
                one), and how many rows and columns of tiles that picture has.
            return_dict: False gives a tuple.
            kwargs: ignored.
        """
        pixel_values, view_layout = _joined(pixel_values, 4), _joined(view_layout, 2)
        pixel_values = to_device_of(pixel_values, self.vision_tower.embeddings.patch_embedding.weight)
        patches = torch.cat([self.vision_tower(views) for views in pixel_values.split(_VIEWS_PER_CALL)])
        if self.config.tiled:
            if view_layout is None:
                raise ValueError("pixel_values of a tiled model need view_layout, which says which tile is where")
            counts, tiles = pictures_of(view_layout)
        else:
            counts, tiles = [1] * len(patches), [None] * len(patches)
        features = [
            self.multi_modal_projector(views, grid) for views, grid in zip(patches.split(counts), tiles, strict=True)
        ]
        output = BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=features)
        return output if return_dict else output.to_tuple()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        view_layout: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        im_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> XComposer2ModelOutputWithPast:
        """Return hidden states ``(batch, seq, hidden)``.

        Args:
            input_ids: ``(batch, seq)``; every image position holds ``config.image_token_id``.
            pixel_values: ``(views, 3, H, W)``, the pictures of the batch in reading order.
            view_layout: as in ``get_image_features``.
            attention_mask: ``(batch, seq)``, 0 at padding.
            position_ids: ``(batch, seq)``; if None, counted from the first position that is no padding.
            past_key_values: the cache of earlier positions.
            inputs_embeds: ``(batch, seq, hidden)`` instead of ``input_ids``, features already merged; or with it, text
                embeddings to merge into.
            im_mask: ``(batch, seq)`` bool, the image positions; those of ``input_ids`` if None.
            kwargs: for the language model.

        Raises:
            ValueError: when image positions and image features differ in number.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError("either input_ids or inputs_embeds is needed")
        # Outside of training, a call without pictures has no image positions and skips the paths for them. In training
        # all parameters take part in every step, which distributed training wants.
        if im_mask is None and input_ids is not None and (pixel_values is not None or self.training):
            im_mask = input_ids == self.config.image_token_id
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        features = None
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids, which say where they go")
            features = self.get_image_features(pixel_values, view_layout).pooler_output
            inputs_embeds = merge_features(inputs_embeds, input_ids, torch.cat(features), self.config.image_token_id)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            im_mask=im_mask,
            **kwargs,
        )
        return XComposer2ModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
        )


class XComposer2ForConditionalGeneration(XComposer2PreTrainedModel, GenerationMixin):
    """The network with the language model's head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.tok_embeddings.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: XComposer2Config) -> None:
        super().__init__(config)
        self.model = XComposer2Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        view_layout: Tensor | Sequence[Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return ``model.get_image_features(...)``."""
        return self.model.get_image_features(pixel_values, view_layout, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        view_layout: Tensor | Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        im_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> XComposer2CausalLMOutputWithPast:
        """Return logits ``(batch, seq, vocab)``, and the loss where ``labels`` are given.

        Args:
            input_ids: as in ``XComposer2Model.forward``, like the other inputs.
            pixel_values: the views of the pictures.
            view_layout: which view is which.
            attention_mask: 0 at padding.
            position_ids: positions.
            past_key_values: cache.
            inputs_embeds: embeddings.
            im_mask: image positions.
            labels: ``(batch, seq)`` next to ``input_ids``, -100 where nothing is learned; shifted here. The loss is the
                mean cross entropy.
            logits_to_keep: logits of the last so many positions only (0: all), or of these indices.
            kwargs: for the language model and the loss.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            view_layout=view_layout,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            im_mask=im_mask,
            **kwargs,
        )
        logits, loss = self.logits_and_loss(outputs.last_hidden_state, labels, logits_to_keep, **kwargs)
        return XComposer2CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


def pictures_of(view_layout: Tensor) -> tuple[list[int], list[tuple[int, int]]]:
    """Return how many views each picture has, and its rows and columns of tiles; see ``get_image_features``."""
    starts = [index for index, (number, _, _) in enumerate(view_layout.tolist()) if number == 0]
    ends = [*starts[1:], len(view_layout)]
    counts = [end - start for start, end in zip(starts, ends, strict=True)]
    tiles = [tuple(view_layout[start, 1:].tolist()) for start in starts]
    if any(count != 1 + rows * columns for count, (rows, columns) in zip(counts, tiles, strict=True)):
        raise ValueError(f"pictures of {tiles} rows and columns of tiles came with {counts} views")
    return counts, tiles


def _joined(rows: Tensor | Sequence[Tensor] | None, ndim: int) -> Tensor | None:
    """Return rows that came as a sequence, of single rows or of tensors of rows, as one tensor."""
    if rows is None or isinstance(rows, Tensor):
        return rows
    return torch.cat([row if row.ndim == ndim else row.unsqueeze(0) for row in rows])
