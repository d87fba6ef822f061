"""InternLM-XComposer2: CLIP's tower, a projector that lays tiles out, and InternLM2 with paths for image positions.

In every decoder layer five matrices (wqkv, wo, w1, w2, w3) have a low-rank path beside them, PLoRA, that is added at
image positions alone. So the decoder is told where those are: ``im_mask``, ``(batch, seq)`` bool, None for nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, eager_attention_forward
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from mmtool.log import get_logger
from mmtool.models.common.merge import merge_features, to_device_of
from mmtool.models.common.release import ReleaseModel
from mmtool.models.common.weights import LazyTensor, read_weights
from mmtool.models.internlm_xcomposer2.configuration_internlm_xcomposer2 import (
    TASK_MODES,
    TASKS,
    XComposer2Config,
    XComposer2TextConfig,
)
from mmtool.models.internlm_xcomposer2.conversion_internlm_xcomposer2 import our_name, wanted_weights

logger = get_logger(__name__)

# Views of pictures that go through the tower at once; 25 of 560 pixels would need gigabytes for their attention.
_VIEWS_PER_CALL = 8


# -- the language model ------------------------------------------------------------------------------------------------


class LowRankBranch(nn.Module):
    """What is added to the output of one matrix of the decoder: at image positions, and in a task mode of 2.5.

    The matrix itself is a plain ``nn.Linear`` next to this module: a user's adapter or a quantised matrix takes its
    place and this branch stays untouched. So adapters merge exactly.
    """

    def __init__(self, config: XComposer2TextConfig, matrix: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.config = config
        self.scale = config.plora_scales[matrix]
        rank = config.plora_ranks[matrix]
        self.dropout = nn.Dropout(config.plora_dropout)
        self.Plora_A = nn.Linear(in_features, rank, bias=False)
        self.Plora_B = nn.Linear(rank, out_features, bias=False)
        for task, task_rank in config.task_lora_ranks.items():
            self.add_module(f"lora_{task}_A", nn.Linear(in_features, task_rank, bias=False))
            self.add_module(f"lora_{task}_B", nn.Linear(task_rank, out_features, bias=False))
        self.freeze_idle_tasks()

    def freeze_idle_tasks(self) -> None:
        """Keep the weights of tasks that are not added from being trained: they would only decay."""
        for task in self.config.task_lora_ranks:
            for part in "AB":
                self.get_submodule(f"lora_{task}_{part}").requires_grad_(task in TASK_MODES[self.config.task_mode])

    def forward(self, x: Tensor, y: Tensor, im_mask: Tensor | None) -> Tensor:
        """Return ``y``, the ``(batch, seq, out)`` product of the matrix with ``x`` ``(batch, seq, in)``, completed."""
        for task in TASK_MODES[self.config.task_mode]:
            y = y + self.get_submodule(f"lora_{task}_B")(self.get_submodule(f"lora_{task}_A")(x))
        if im_mask is not None:
            # Everything here is linear, so masking the narrow middle masks the output.
            narrow = self.Plora_A(self.dropout(x)) * im_mask.unsqueeze(-1)
            y = y + self.Plora_B(narrow) * self.scale
        return y


class RotaryAngles(nn.Module):
    """Cosines and sines of positions; beyond ``max_position_embeddings`` the base grows with the length (dynamic NTK).

    The length is that of each row of the batch, and nothing is remembered: a long prompt changes neither its neighbours
    nor those that follow. While a row grows, the keys in its cache stay as they were rotated, as in the release.
    """

    def __init__(self, config: XComposer2TextConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.base = config.rope_parameters["rope_theta"]
        self.limit = config.max_position_embeddings
        self.dynamic = config.rope_parameters["rope_type"] == "dynamic"
        self.factor = config.rope_parameters.get("factor", 1.0)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines ``(rows, seq, head_dim)`` in the dtype of ``x`` for positions ``(rows, seq)``."""
        base = torch.full((len(position_ids), 1), self.base, dtype=torch.float32, device=x.device)
        if self.dynamic:
            length = position_ids.amax(dim=1, keepdim=True).to(x.device, torch.float32) + 1
            stretch = self.factor * length / self.limit - (self.factor - 1)
            base = base * stretch.clamp(min=1.0) ** (self.head_dim / (self.head_dim - 2))
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=x.device) / self.head_dim
        frequencies = 1.0 / base**steps  # (rows, head_dim / 2)
        angles = position_ids.to(x.device, torch.float32).unsqueeze(-1) * frequencies.unsqueeze(1)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class XComposer2Attention(nn.Module):
    """Attention with queries, keys and values from one matrix whose rows are grouped by key/value head.

    For each of them: its query heads, then the key, then the value. The release's order is kept in memory, because the
    low-rank paths, adapters and saved checkpoints all have it.
    """

    def __init__(self, config: XComposer2TextConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        hidden, inner = config.hidden_size, config.num_attention_heads * self.head_dim
        fused = inner + 2 * config.num_key_value_heads * self.head_dim
        self.wqkv = nn.Linear(hidden, fused, bias=config.attention_bias)
        self.wqkv_branch = LowRankBranch(config, "wqkv", hidden, fused)
        self.wo = nn.Linear(inner, hidden, bias=config.attention_bias)
        self.wo_branch = LowRankBranch(config, "wo", inner, hidden)

    def forward(
        self,
        hidden_states: Tensor,
        im_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``(batch, seq, hidden)`` for states of that shape, and the weights where the kernel has them."""
        batch, seq, _ = hidden_states.shape
        fused = self.wqkv_branch(hidden_states, self.wqkv(hidden_states), im_mask)
        fused = fused.view(batch, seq, -1, self.num_key_value_groups + 2, self.head_dim)  # (B, S, kv heads, g + 2, d)
        query = fused[..., :-2, :].reshape(batch, seq, -1, self.head_dim).transpose(1, 2)
        key, value = fused[..., -2, :].transpose(1, 2), fused[..., -1, :].transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        output = output.reshape(batch, seq, -1).contiguous()
        return self.wo_branch(output, self.wo(output), im_mask), weights


class XComposer2FeedForward(nn.Module):
    """The gated MLP: w1 is the gate, w3 goes up, w2 down."""

    def __init__(self, config: XComposer2TextConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.w1, self.w1_branch = nn.Linear(hidden, inner, bias=False), LowRankBranch(config, "w1", hidden, inner)
        self.w3, self.w3_branch = nn.Linear(hidden, inner, bias=False), LowRankBranch(config, "w3", hidden, inner)
        self.w2, self.w2_branch = nn.Linear(inner, hidden, bias=False), LowRankBranch(config, "w2", inner, hidden)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, im_mask: Tensor | None) -> Tensor:
        """Return ``(batch, seq, hidden)`` for states of that shape."""
        gate = self.w1_branch(x, self.w1(x), im_mask)
        inner = self.act(gate) * self.w3_branch(x, self.w3(x), im_mask)
        return self.w2_branch(inner, self.w2(inner), im_mask)


class XComposer2DecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and added to its input."""

    def __init__(self, config: XComposer2TextConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = XComposer2Attention(config, layer_idx)
        self.feed_forward = XComposer2FeedForward(config)
        self.attention_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, im_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return ``(batch, seq, hidden)`` for hidden states of that shape; ``kwargs`` are the attention's."""
        attended, _ = self.attention(self.attention_norm(hidden_states), im_mask, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.feed_forward(self.ffn_norm(hidden_states), im_mask)


class XComposer2TextModel(PreTrainedModel):
    """InternLM2 without its head."""

    config: XComposer2TextConfig
    config_class = XComposer2TextConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("XComposer2DecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": XComposer2DecoderLayer,
        "attentions": XComposer2Attention,
    }

    def __init__(self, config: XComposer2TextConfig) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(XComposer2DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = RotaryAngles(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.tok_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        im_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return hidden states ``(batch, seq, hidden)`` after the last norm.

        Args:
            input_ids: ``(batch, seq)``, or else ``inputs_embeds``.
            attention_mask: ``(batch, past + seq)``, 0 at padding.
            position_ids: ``(batch, seq)``; if None, counted from the first position that is no padding.
            past_key_values: the cache of earlier positions.
            inputs_embeds: ``(batch, seq, hidden)``.
            im_mask: ``(batch, seq)`` bool, True where an image feature stands; None if there is none.
            use_cache: whether to return a cache.
            kwargs: for the attention.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        if inputs_embeds is None:
            inputs_embeds = self.tok_embeddings(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = _positions(inputs_embeds, attention_mask, past_key_values)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = inputs_embeds
        position_embeddings = self.rotary(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                im_mask=im_mask,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


def _positions(embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None) -> Tensor:
    seq = embeds.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -seq:].to(embeds.device)
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    return torch.arange(past, past + seq, device=embeds.device).unsqueeze(0)


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

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.language_model.set_input_embeddings(value)

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

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.set_input_embeddings(value)

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
