"""Pictures to pixel values, and how many positions each one takes; text goes to the SentencePiece tokenizer."""
# Without the future import of annotations: transformers reads those of the classes of keyword arguments.

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import SizeDict
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin, TextKwargs

from mmtool.errors import CheckpointError, MediaError
from mmtool.models.common.folders import dump_json, local_folder, read_json, vision_folder
from mmtool.models.common.pictures import PictureProcessor, look_up
from mmtool.models.common.tokenization import SentencePieceTokenizer
from mmtool.models.yi_vl.configuration_yi_vl import DEFAULT_VISION_TOWER, YiVLConfig

_PREPROCESSOR_FILE = "preprocessor_config.json"
_STRIP_PIXELS = 1 << 24  # of a picture that is padded and resized at a time
_LONGEST_SIDE = 100_000  # pixels; a file of a few bytes can claim more than any memory holds


class YiVLImageKwargs(ImagesKwargs, total=False):
    """Settings of the image processor beside transformers' own.

    image_aspect_ratio (`str`): ``pad`` makes pictures square first; anything else crops the centre.
    patch_size (`int`): pixels of one image position.
    """

    image_aspect_ratio: str
    patch_size: int


class YiVLImageProcessor(PictureProcessor):
    """RGB, pad to a square, resize, crop the centre, normalise: bit-identical to the release's CLIP processor."""

    valid_kwargs = YiVLImageKwargs
    model_input_names = ("pixel_values",)
    resample = Image.Resampling.BICUBIC
    image_mean = (0.48145466, 0.4578275, 0.40821073)
    image_std = (0.26862954, 0.26130258, 0.27577711)
    size = SizeDict(shortest_edge=448)
    crop_size = SizeDict(height=448, width=448)
    default_to_square = False
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    image_aspect_ratio = "pad"
    patch_size = 14

    def _preprocess(
        self, images: Sequence[Image.Image], return_tensors: str | None = None, **settings: Any
    ) -> BatchFeature:
        """Return ``pixel_values``: one ``(3, H, W)`` float32 array for each picture, or ``(images, 3, H, W)``."""
        pixel_values = [_pixel_values(image, settings) for image in images]
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)


class YiVLTextKwargs(TextKwargs, total=False):
    """Settings of the tokenizer beside transformers' own.

    media_tokens (`list[str]`): control pieces that the text may contain.
    """

    media_tokens: list[str]


class YiVLProcessorKwargs(ProcessingKwargs, total=False):
    """Arguments of a call, by part."""

    _defaults = {}  # noqa: RUF012 - older transformers read it
    text_kwargs: YiVLTextKwargs
    images_kwargs: YiVLImageKwargs


class YiVLProcessor(ProcessorMixin):
    """Image processor and tokenizer of a Yi-VL model.

    ``processor(text=..., images=...)`` reads every ``image_token`` in the text as a picture. Text that users type
    belongs in a template instead, where nothing typed can become one.

    Args:
        image_processor: a ``YiVLImageProcessor``.
        tokenizer: a ``SentencePieceTokenizer``.
        image_token: placeholder of a picture; None takes ``<|reserved003|>``.
        num_tokens_per_image: positions that a picture takes; None counts the patches.
        vision_folder_name: ``vit/<name>``, where the image processor's settings are written.
        chat_template: Jinja template of the tokenizer, if any.
    """

    valid_processor_kwargs = YiVLProcessorKwargs

    def __init__(
        self,
        image_processor: YiVLImageProcessor,
        tokenizer: SentencePieceTokenizer,
        image_token: str | None = None,
        num_tokens_per_image: int | None = None,
        vision_folder_name: str = DEFAULT_VISION_TOWER.removeprefix("./"),
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = image_token or tokenizer.convert_ids_to_tokens(YiVLConfig.image_token_id)
        if not tokenizer.is_control(self.image_token):
            raise CheckpointError(
                f"the image placeholder {self.image_token!r} is no control piece of the tokenizer: text can contain it"
            )
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        patches = image_processor.crop_size.height // image_processor.patch_size
        self.num_tokens_per_image = num_tokens_per_image or patches**2
        self.vision_folder_name = vision_folder_name

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Return ``input_ids``, ``attention_mask`` and ``pixel_values``, as transformers' processors do."""
        return super().__call__(images=images, text=text, media_tokens=[self.image_token], **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Build the processor of a folder in the layout of a release, or of a hub id.

        Args:
            pretrained_model_name_or_path: the folder or id.
            kwargs: ``tokenizer``, ``image_processor`` to use instead of the folder's, settings of the image processor,
                and download options.
        """
        patterns = ["*.json", "vit/*/*.json", "tokenizer.model", "*.jinja"]
        folder, kwargs = local_folder(pretrained_model_name_or_path, kwargs, patterns)
        tokenizer = kwargs.pop("tokenizer", None)
        if not isinstance(tokenizer, SentencePieceTokenizer):  # serving engines pass what AutoTokenizer made of it
            tokenizer = SentencePieceTokenizer.from_pretrained(folder)
        image_processor = kwargs.pop("image_processor", None)
        if not (folder / "config.json").is_file():  # a processor that was saved without its model
            settings = _settings(vision_folder(folder, None))
            return cls(image_processor or YiVLImageProcessor(**{**settings, **kwargs}), tokenizer)
        config = YiVLConfig.from_pretrained(folder)
        if image_processor is None:
            vision = config.vision_config
            size = {"size": vision.image_size, "crop_size": vision.image_size, "patch_size": vision.patch_size}
            found = _settings(vision_folder(folder, config.mm_vision_tower))
            own = {"image_aspect_ratio": config.image_aspect_ratio, "patch_size": vision.patch_size}
            image_processor = YiVLImageProcessor(**{**size, **found, **own, **kwargs})
            _check_size(image_processor, vision.image_size, folder)
        return cls(
            image_processor,
            tokenizer,
            image_token=tokenizer.convert_ids_to_tokens(config.image_token_id),
            num_tokens_per_image=config.num_image_tokens,
            vision_folder_name=config.vision_folder_name,
        )

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write the tokenizer's files and ``vit/<name>/preprocessor_config.json``, as in a release."""
        self.tokenizer.save_pretrained(save_directory)
        folder = Path(save_directory) / self.vision_folder_name
        folder.mkdir(parents=True, exist_ok=True)
        settings = self.image_processor.to_dict()
        settings |= {"image_processor_type": "CLIPImageProcessor", "crop_size": self.image_processor.crop_size.height}
        settings |= {"size": self.image_processor.size.shortest_edge}
        dump_json(folder / _PREPROCESSOR_FILE, settings, sort_keys=True)

    def num_image_tokens(self, image_inputs: Mapping[str, Any], index: int) -> int:
        """Return how many positions picture ``index`` of the image processor's output takes: always the same."""
        return self.num_tokens_per_image

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return the text that stands for a picture: its placeholder, once for every position."""
        return self.image_token * self.num_image_tokens(image_inputs, image_idx)

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Return positions and rows of ``pixel_values`` for pictures of these (height, width); vLLM asks this."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_tokens_per_image] * count, num_image_patches=[1] * count)


def _settings(folder: Path) -> dict[str, Any]:
    """Return the image processor's settings in a vit folder; none where the file is missing."""
    path = folder / _PREPROCESSOR_FILE
    return {key: value for key, value in read_json(path).items() if value is not None} if path.is_file() else {}


def _check_size(image_processor: YiVLImageProcessor, image_size: int, folder: Path) -> None:
    crop = image_processor.crop_size
    if (crop.height, crop.width) != (image_size, image_size):
        raise CheckpointError(
            f"{folder}: pictures are made {crop.height}x{crop.width} pixels, but the vision tower takes {image_size}",
            f"Make crop_size in vit/*/{_PREPROCESSOR_FILE} equal image_size in vit/*/config.json.",
        )


def _pixel_values(image: Image.Image, settings: Mapping[str, Any]) -> np.ndarray:
    """Return the ``(3, H, W)`` float32 input of the tower for an RGB picture."""
    pad = settings["image_aspect_ratio"] == "pad"
    color = tuple(int(mean * 255) for mean in settings["image_mean"])
    if settings["do_resize"]:
        resize = partial(resize_padded, color=color) if pad else _resize
        image = resize(image, settings["size"].shortest_edge, resample=settings["resample"])
    elif pad:
        image = pad_to_square(image, color)
    if settings["do_center_crop"]:
        image = _crop(image, settings["crop_size"].width, settings["crop_size"].height)
    return look_up(image, _value_table(settings))


def pad_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """Centre ``image`` on a square of its longer side; the odd pixel goes below or to the right."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def resize_padded(image: Image.Image, side: int, color: tuple[int, ...], resample: int) -> Image.Image:
    """Return ``pad_to_square(image)`` resized to ``side``, bit for bit, without ever holding the square.

    PIL resizes each row first and then each column; so do we, strip by strip. Rows of padding need no resizing.
    """
    width, height = image.size
    square = max(width, height)
    if width == height or square == side:
        return pad_to_square(image, color).resize((side, side), resample)
    _check_longest(square, image)
    left, top, num_rows = (square - width) // 2, (square - height) // 2, max(1, _STRIP_PIXELS // square)
    narrow = Image.new("RGB", (side, square), color)
    for row in range(0, height, num_rows):
        strip = image.crop((0, row, width, min(row + num_rows, height)))
        if width < square:
            padded = Image.new("RGB", (square, strip.height), color)
            padded.paste(strip, (left, 0))
            strip = padded
        narrow.paste(strip.resize((side, strip.height), resample), (0, top + row))
    return narrow.resize((side, side), resample)


def _check_longest(longest: int, image: Image.Image) -> None:
    if longest > _LONGEST_SIDE:
        raise MediaError(
            f"a picture of {image.width}x{image.height} pixels is too long and thin: its long side would be {longest}",
            "Crop it.",
        )


def _resize(image: Image.Image, shortest_edge: int, resample: int) -> Image.Image:
    short, long = sorted(image.size)
    longest_edge = int(shortest_edge * long / short)
    _check_longest(longest_edge, image)
    size = (shortest_edge, longest_edge) if image.width <= image.height else (longest_edge, shortest_edge)
    return image.resize(size, resample=resample)


def _crop(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _value_table(settings: Mapping[str, Any]) -> np.ndarray:
    """Return ``(3, 256)``: what each byte becomes in each channel, with the roundings of the release's processor."""
    values = np.arange(256)
    values = (values * settings["rescale_factor"] if settings["do_rescale"] else values).astype(np.float32)
    if not settings["do_normalize"]:
        return np.stack([values] * 3)
    mean, std = (np.asarray(settings[key], dtype=np.float32)[:, None] for key in ("image_mean", "image_std"))
    return (values - mean) / std
