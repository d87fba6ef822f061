"""Pictures to views, and how many positions each one takes; text goes to the SentencePiece tokenizer.

2.0 squeezes a picture into one square view. 4KHD and 2.5 scale it to a whole number of tiles, pad it with white, and
see it twice: once as a whole at the size of a tile, then tile by tile.
"""
# Without the future import of annotations: transformers reads those of the classes of keyword arguments.

import copy
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import SizeDict
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin, TextKwargs

from mmtool.errors import CheckpointError, MediaError, MMToolError
from mmtool.models.common.folders import dump_json, local_folder
from mmtool.models.common.pictures import PictureProcessor, look_up
from mmtool.models.internlm_xcomposer2.configuration_internlm_xcomposer2 import PATCH_SIZE, XComposer2Config
from mmtool.models.internlm_xcomposer2.tokenization_internlm_xcomposer2 import InternLM2Tokenizer

# The byte 0xFF occurs in no UTF-8 text, so its piece is the one id of the vocabulary that no text can produce; every
# [UNUSED_TOKEN_n] can be typed.
IMAGE_TOKEN = "<0xFF>"
_WHITE = (255, 255, 255)
_SETTINGS_FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class TilePlan:
    """How a picture is cut.

    Attributes:
        resized: width and height it is scaled to.
        padded: width and height with the white around it.
        tiles: rows and columns of tiles that makes.
    """

    resized: tuple[int, int]
    padded: tuple[int, int]
    tiles: tuple[int, int]

    @property
    def num_views(self) -> int:
        """The tiles, and the picture as a whole."""
        return 1 + self.tiles[0] * self.tiles[1]

    def num_positions(self, side: int) -> int:
        """Return how many positions it takes where a view has ``side`` x ``side``."""
        newlines = (self.tiles[0] + 1) * side
        return self.num_views * side * side + newlines + 1


def plan_tiles(size: tuple[int, int], tile: int, hd_num: int, max_enlargement: float | None = None) -> TilePlan:
    """Return how a picture of ``size`` (width, height) is cut into tiles of ``tile`` pixels.

    A tall picture is planned lying on its side.

    Args:
        size: of the picture.
        tile: side of a tile.
        hd_num: most tiles.
        max_enlargement: width in tiles is at most the picture's times this, rounded up; None: as large as fits.

    Raises:
        MediaError: for a picture so thin that nothing of it would be left.
    """
    tall = size[0] < size[1]
    width, height = sorted(size, reverse=True)
    ratio = width / height
    columns = 1
    while (columns + 1) * math.ceil((columns + 1) / ratio) <= hd_num:
        columns += 1
    if max_enlargement is not None:
        columns = min(math.ceil(max_enlargement * width / tile), columns)
    new_width = tile * columns
    new_height = int(new_width / ratio)
    if new_height == 0:
        raise MediaError(
            f"a picture of {size[0]}x{size[1]} pixels is too long and thin: scaled down, nothing would be left",
            "Crop it.",
        )
    rows = math.ceil(new_height / tile)
    resized, padded, tiles = (new_width, new_height), (new_width, rows * tile), (rows, columns)
    if tall:
        resized, padded, tiles = resized[::-1], padded[::-1], tiles[::-1]
    return TilePlan(resized, padded, tiles)


class XComposer2ImageKwargs(ImagesKwargs, total=False):
    """Settings of the image processor beside transformers' own.

    hd_num (`int`): most tiles of a picture; 0 for a model without tiles.
    max_enlargement (`float`, *optional*): see ``plan_tiles``.
    split_padding (`bool`): white on both sides of the picture, not behind it alone.
    """

    hd_num: int
    max_enlargement: float | None
    split_padding: bool


class XComposer2ImageProcessor(PictureProcessor):
    """RGB, resize, cut into views, normalise: bit-identical to the release."""

    valid_kwargs = XComposer2ImageKwargs
    model_input_names = ("pixel_values", "view_layout")
    resample = Image.Resampling.BICUBIC
    image_mean = (0.48145466, 0.4578275, 0.40821073)
    image_std = (0.26862954, 0.26130258, 0.27577711)
    size = SizeDict(height=224, width=224)
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    hd_num = 0
    max_enlargement = None
    split_padding = False

    @property
    def side(self) -> int:
        """Pixels along each side of a view."""
        return self.size.height

    def plan(self, size: tuple[int, int], **settings: Any) -> TilePlan:
        """Return how this processor cuts a picture of ``size`` (width, height); ``settings`` replace its own."""
        hd_num = settings.get("hd_num") or self.hd_num
        return plan_tiles(size, self.side, hd_num, settings.get("max_enlargement", self.max_enlargement))

    def _preprocess(
        self, images: Sequence[Image.Image], return_tensors: str | None = None, **settings: Any
    ) -> BatchFeature:
        """Return ``pixel_values`` ``(views, 3, side, side)`` of all pictures, and with tiles ``view_layout``.

        That has a row for every view, as ``XComposer2Model.get_image_features`` takes it, so that both can be cut
        between pictures.
        """
        side = settings["size"].height
        if not settings["hd_num"]:
            squares = [image.resize((side, side), settings["resample"]) for image in images]
            views = [_normalized(square, settings) for square in squares]
            return _feature({"pixel_values": torch.stack(views)}, return_tensors)
        plans = [plan_tiles(image.size, side, settings["hd_num"], settings["max_enlargement"]) for image in images]
        canvases = [_padded(image, plan, settings) for image, plan in zip(images, plans, strict=True)]
        views = [
            _views(_normalized(canvas, settings), plan, side) for canvas, plan in zip(canvases, plans, strict=True)
        ]
        layout = torch.tensor([(number, *plan.tiles) for plan in plans for number in range(plan.num_views)])
        return _feature({"pixel_values": torch.cat(views), "view_layout": layout}, return_tensors)


# What the releases do with a picture: 4KHD enlarges every one as far as its tiles allow, 2.5 to a whole tile at most.
_BILINEAR = Image.Resampling.BILINEAR
TILING: Mapping[str, Mapping[str, Any]] = {
    "2.0": {"hd_num": 0},
    "4khd": {"hd_num": 25, "max_enlargement": None, "split_padding": True, "resample": _BILINEAR},
    "2.5": {"hd_num": 24, "max_enlargement": 1.0, "split_padding": False, "resample": _BILINEAR},
}
# How the authors' fine-tuning code prepares pictures of 2.5, unlike their chat code.
OFFICIAL_TRAINING_TILING: Mapping[str, Any] = {"hd_num": 18, "max_enlargement": 1.5, "split_padding": True}


class XComposer2TextKwargs(TextKwargs, total=False):
    """Settings of the tokenizer beside transformers' own.

    media_tokens (`list[str]`): pieces that stay whole where the text contains them.
    """

    media_tokens: list[str]


class XComposer2ProcessorKwargs(ProcessingKwargs, total=False):
    """Arguments of a call, by part."""

    _defaults = {}  # noqa: RUF012 - older transformers read it
    text_kwargs: XComposer2TextKwargs
    images_kwargs: XComposer2ImageKwargs


class XComposer2Processor(ProcessorMixin):
    """Image processor and tokenizer of an InternLM-XComposer2 model.

    ``processor(text=..., images=...)`` reads every ``image_token`` in the text as a picture. Text that users type
    belongs in a template instead, where nothing typed can become one.

    Args:
        image_processor: an ``XComposer2ImageProcessor``.
        tokenizer: a ``InternLM2Tokenizer``.
        variant: ``2.0``, ``4khd`` or ``2.5``.
        chat_template: Jinja template of the tokenizer, if any.
    """

    valid_processor_kwargs = XComposer2ProcessorKwargs

    def __init__(
        self,
        image_processor: XComposer2ImageProcessor,
        tokenizer: InternLM2Tokenizer,
        variant: str = "2.0",
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.variant = variant
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if not tokenizer.sp_model.is_byte(self.image_token_id):
            raise CheckpointError(
                f"the tokenizer has no byte piece {IMAGE_TOKEN}, which stands for pictures",
                "Take tokenizer.model from the release.",
            )
        patches = image_processor.side // PATCH_SIZE
        self.positions_per_side = patches if variant == "2.0" else patches // 2

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Return ``input_ids``, ``attention_mask`` and the fields of the pictures, as transformers' processors do."""
        return super().__call__(images=images, text=text, media_tokens=[self.image_token], **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Build the processor of a folder in the layout of a release, or of a hub id.

        Args:
            pretrained_model_name_or_path: the folder or id.
            kwargs: ``tokenizer``, ``image_processor`` to use instead of the folder's, settings of the image processor
                (``hd_num``, ...), and download options.
        """
        folder, kwargs = local_folder(pretrained_model_name_or_path, kwargs, ["*.json", "tokenizer.model", "*.jinja"])
        tokenizer = kwargs.pop("tokenizer", None)
        if not isinstance(tokenizer, InternLM2Tokenizer):  # serving engines pass what AutoTokenizer made of it
            tokenizer = InternLM2Tokenizer.from_pretrained(folder)
        config = XComposer2Config.from_pretrained(folder)
        image_processor = kwargs.pop("image_processor", None)
        if image_processor is None:
            side = config.vision_config.image_size
            settings = {"size": {"height": side, "width": side}, **TILING[config.variant]}
            image_processor = XComposer2ImageProcessor(**{**settings, **_saved_settings(folder), **kwargs})
        processor = cls(image_processor, tokenizer, config.variant)
        if processor.image_token_id != config.image_token_id:
            raise CheckpointError(
                f"{folder}: image_token_id is {config.image_token_id}, but {IMAGE_TOKEN} is {processor.image_token_id}",
                "Take tokenizer.model and config.json from the same release.",
            )
        return processor

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write the tokenizer's files, and how pictures are cut where that is not as in the release."""
        self.tokenizer.save_pretrained(save_directory)
        tiling = TILING[self.variant]
        changed = {key: getattr(self.image_processor, key) for key in tiling}
        if changed != tiling:
            settings = {"image_processor_type": type(self.image_processor).__name__, **changed}
            dump_json(Path(save_directory) / _SETTINGS_FILE, settings)

    def with_hd_num(self, hd_num: int) -> "XComposer2Processor":
        """Return this processor with another number of tiles; the tokenizer is shared."""
        if self.variant == "2.0" or hd_num < 1:
            raise MMToolError(
                f"hd_num is {hd_num}, but " + ("it must be at least 1" if hd_num < 1 else "this model has no tiles"),
                "Leave it out for the release's own number.",
            )
        other = copy.copy(self)
        other.image_processor = copy.copy(self.image_processor)
        other.image_processor.hd_num = hd_num
        return other

    def num_image_tokens(self, image_inputs: Mapping[str, Any], index: int) -> int:
        """Return how many positions picture ``index`` of the image processor's output takes."""
        if self.variant == "2.0":
            return self.positions_per_side**2
        starts = [tuple(int(number) for number in row[1:]) for row in image_inputs["view_layout"] if int(row[0]) == 0]
        return TilePlan((0, 0), (0, 0), starts[index]).num_positions(self.positions_per_side)

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return the text that stands for a picture: its placeholder, once for every position."""
        return self.image_token * self.num_image_tokens(image_inputs, image_idx)

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Return positions and rows of ``pixel_values`` for pictures of these (height, width); vLLM asks this."""
        if image_sizes is None:
            return MultiModalData()
        if self.variant == "2.0":
            count = len(image_sizes)
            return MultiModalData(num_image_tokens=[self.positions_per_side**2] * count, num_image_patches=[1] * count)
        plans = [self.image_processor.plan((width, height), **kwargs) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[plan.num_positions(self.positions_per_side) for plan in plans],
            num_image_patches=[plan.num_views for plan in plans],
        )


def _saved_settings(folder: Path) -> dict[str, Any]:
    """Return how pictures are cut where somebody changed it; the releases have no such file."""
    path = folder / _SETTINGS_FILE
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: saved[key] for key in ("hd_num", "max_enlargement", "split_padding") if key in saved}


def _normalized(image: Image.Image, settings: Mapping[str, Any]) -> Tensor:
    """Return the ``(3, H, W)`` float32 pixels of an RGB picture, with the roundings of torchvision's transforms."""
    values = torch.arange(256, dtype=torch.float32) / 255
    mean, std = (torch.tensor(settings[key]).unsqueeze(1) for key in ("image_mean", "image_std"))
    table = ((values - mean) / std).numpy()  # (3, 256): what each byte becomes in each channel
    return torch.from_numpy(look_up(image, table))


def _padded(image: Image.Image, plan: TilePlan, settings: Mapping[str, Any]) -> Image.Image:
    """Scale ``image`` as planned, and fill it up with white: below, or to the right of one that is tall."""
    if image.width >= image.height:
        scaled = image.resize(plan.resized, settings["resample"])
    else:  # lying on its side, as in the release: PIL rounds between its two passes
        lying = image.transpose(Image.Transpose.TRANSPOSE).resize(plan.resized[::-1], settings["resample"])
        scaled = lying.transpose(Image.Transpose.TRANSPOSE)
    free_width, free_height = plan.padded[0] - plan.resized[0], plan.padded[1] - plan.resized[1]
    canvas = Image.new("RGB", plan.padded, _WHITE)
    canvas.paste(scaled, (free_width // 2, free_height // 2) if settings["split_padding"] else (0, 0))
    return canvas


def _views(canvas: Tensor, plan: TilePlan, side: int) -> Tensor:
    """Return the views ``(1 + tiles, 3, side, side)`` of a padded picture: the whole of it, then its tiles."""
    whole = torch.nn.functional.interpolate(canvas.unsqueeze(0), size=(side, side), mode="bicubic", align_corners=False)
    rows, columns = plan.tiles
    tiles = canvas.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
    return torch.cat((whole, tiles))


def _feature(fields: Mapping[str, Tensor], return_tensors: str | None) -> BatchFeature:
    arrays = {name: tensor.numpy() for name, tensor in fields.items()}
    return BatchFeature(arrays, tensor_type=return_tensors)
