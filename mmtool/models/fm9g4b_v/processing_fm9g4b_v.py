"""Pictures to patch rows, and the tokens that stand for one; text goes to the tokenizer."""
# Without the future import of annotations: transformers reads those of the classes of keyword arguments.

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin

from mmtool.errors import CheckpointError
from mmtool.models.common.folders import dump_json, local_folder, read_json
from mmtool.models.common.navit import patch_rows
from mmtool.models.common.pictures import PictureProcessor, look_up
from mmtool.models.common.slicing import SlicePlan, slice_image, slice_plan
from mmtool.models.fm9g4b_v.configuration_fm9g4b_v import (
    DEFAULT_MAX_SLICES,
    DEFAULT_SCALE_RESOLUTION,
    FM9GVConfig,
)
from mmtool.models.fm9g4b_v.tokenization_fm9g4b_v import FM9GVTokenizer

_PREPROCESSOR_FILE = "preprocessor_config.json"
# What the release writes beside the settings.
_RELEASE_KEYS = {
    **{"im_start": "<image>", "im_end": "</image>", "slice_start": "<slice>", "slice_end": "</slice>"},
    **{"im_id_start": "<image_id>", "im_id_end": "</image_id>", "unk": "<unk>", "version": 3.0},
    **{"image_processor_type": "FM9GVImageProcessor", "processor_class": "FM9GVProcessor"},
}
_SETTINGS = (
    *("max_slice_nums", "scale_resolution", "patch_size", "use_image_id", "image_feature_size", "slice_mode"),
    *("norm_mean", "norm_std"),
)
# One message's parts are joined by a newline, and so are pictures and text.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ part['text'] if part['type'] == 'text' else '<unk>' }}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class FM9GVImageKwargs(ImagesKwargs, total=False):
    """Settings of the image processor, by the release's names.

    max_slice_nums (`int`): the most tiles of a picture; 1 never cuts.
    scale_resolution (`int`): side of a square with as many pixels as a slice has.
    patch_size (`int`): pixels of one patch.
    use_image_id (`bool`): number the pictures of a conversation.
    image_feature_size (`int`): positions that a slice takes.
    slice_mode (`bool`): cut large pictures into tiles.
    norm_mean (`list[float]`): mean of each channel.
    norm_std (`list[float]`): standard deviation of each channel.
    """

    max_slice_nums: int
    scale_resolution: int
    patch_size: int
    use_image_id: bool
    image_feature_size: int
    slice_mode: bool
    norm_mean: list[float] | tuple[float, ...]
    norm_std: list[float] | tuple[float, ...]


class FM9GVImageProcessor(PictureProcessor):  # the release's name, by which transformers looks it up
    """RGB, cut into slices, normalise, cut into patches: bit-identical to the release's processor."""

    valid_kwargs = FM9GVImageKwargs
    model_input_names = ("pixel_values", "patch_info")
    max_slice_nums = DEFAULT_MAX_SLICES
    scale_resolution = DEFAULT_SCALE_RESOLUTION
    patch_size = 14
    use_image_id = True
    image_feature_size = 64
    slice_mode = True
    norm_mean = (0.5, 0.5, 0.5)
    norm_std = (0.5, 0.5, 0.5)

    def plan(self, size: tuple[int, int], **settings: Any) -> SlicePlan:
        """Return how a picture of ``size`` (width, height) is cut; ``settings`` replace those of the processor."""
        settings = {name: getattr(self, name) for name in _SETTINGS} | settings
        return slice_plan(size, settings["scale_resolution"], _max_slices(settings), settings["patch_size"])

    def _preprocess(
        self, images: Sequence[Image.Image], return_tensors: str | None = None, **settings: Any
    ) -> BatchFeature:
        """Return the patch rows of all pictures, one after the other.

        ``pixel_values`` is ``(patches, 3 * patch * patch)`` float32, ``patch_info`` ``(patches, 3)``: slice number
        within the picture, row and column. ``image_grids`` is ``(pictures, 2)``, the columns and rows of
        tiles, or zeros: it says how a prompt is written, and is nothing for the model.
        """
        pixel_values, patch_info, grids = [], [], []
        settings = {name: settings[name] for name in _SETTINGS}
        table = _value_table(settings)
        for image in images:
            grids.append(self.plan(image.size, **settings).grid or (0, 0))
            slices = slice_image(image, settings["scale_resolution"], _max_slices(settings), settings["patch_size"])
            for number, part in enumerate(slices):
                rows, info = patch_rows(look_up(part, table), number, settings["patch_size"])
                pixel_values.append(rows)
                patch_info.append(info)
        data = {
            "pixel_values": np.concatenate(pixel_values),
            "patch_info": np.concatenate(patch_info),
            "image_grids": np.asarray(grids),
        }
        return BatchFeature(data, tensor_type=return_tensors)


class FM9GVProcessorKwargs(ProcessingKwargs, total=False):
    """Arguments of a call, by part."""

    _defaults = {}  # noqa: RUF012 - older transformers read it
    images_kwargs: FM9GVImageKwargs


class FM9GVProcessor(ProcessorMixin):
    """Image processor and tokenizer of an FM9G4B-V model.

    ``processor(text=..., images=...)`` reads every ``<unk>`` in the text as a picture. Text that users type belongs in
    a template instead, where nothing typed can become one.

    Args:
        image_processor: an ``FM9GVImageProcessor``.
        tokenizer: an ``FM9GVTokenizer``.
        chat_template: Jinja template; None takes one that knows pictures.
    """

    valid_processor_kwargs = FM9GVProcessorKwargs
    image_token = "<unk>"

    def __init__(
        self, image_processor: FM9GVImageProcessor, tokenizer: FM9GVTokenizer, chat_template: str | None = None
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template or _CHAT_TEMPLATE)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Build the processor of a folder in the layout of a release, or of a hub id.

        Args:
            pretrained_model_name_or_path: the folder or id. Without a preprocessor_config.json, which folders written
                by the release's fine-tuning lack, config.json and the release's defaults count.
            kwargs: ``tokenizer``, ``image_processor`` to use instead of the folder's, settings of the image processor,
                and download options.
        """
        folder, kwargs = local_folder(pretrained_model_name_or_path, kwargs, ["*.json", "*.jinja"])
        tokenizer = kwargs.pop("tokenizer", None)
        if not isinstance(tokenizer, FM9GVTokenizer):  # serving engines pass what AutoTokenizer made of the folder
            tokenizer = FM9GVTokenizer.from_pretrained(folder)
        image_processor = kwargs.pop("image_processor", None)
        own = {name: kwargs[name] for name in _SETTINGS if name in kwargs}
        return cls(image_processor or FM9GVImageProcessor(**{**_settings(folder), **own}), tokenizer)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write the tokenizer's files and ``preprocessor_config.json``, as in a release."""
        self.tokenizer.save_pretrained(save_directory)
        settings = {name: getattr(self.image_processor, name) for name in _SETTINGS}
        dump_json(Path(save_directory) / _PREPROCESSOR_FILE, {**_RELEASE_KEYS, **settings}, sort_keys=True)

    @property
    def unused_input_names(self) -> list[str]:
        """What the image processor returns and the model does not take."""
        return ["image_grids"]

    def expansion(self, grid: tuple[int, int], number: int | None, num_features: int | None = None) -> str:
        """Return the text that stands for a picture.

        Args:
            grid: (columns, rows) of its tiles, (0, 0) for none.
            number: of the picture in its conversation, from 0; None leaves it out.
            num_features: positions of a slice; the image processor's if None.
        """
        features = self.image_token * (num_features or self.image_processor.image_feature_size)
        columns, rows = grid
        head = "" if number is None else f"<image_id>{number}</image_id>"
        tiles = "\n".join([f"<slice>{features}</slice>" * columns] * rows)
        return f"{head}<image>{features}</image>{tiles}"

    def num_image_tokens(self, image_inputs: Mapping[str, Any], index: int) -> int:
        """Return how many positions picture ``index`` of the image processor's output takes, its number included."""
        return len(self._ids(self.replace_image_token(image_inputs, index)))

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return the text that stands for a picture, which is the ``image_idx``-th of the call.

        ``kwargs`` are the settings of the call; they win over the image processor's.
        """
        numbered = kwargs.get("use_image_id", self.image_processor.use_image_id)
        num_features = kwargs.get("image_feature_size")
        columns, rows = map(int, image_inputs["image_grids"][image_idx])
        return self.expansion((columns, rows), image_idx if numbered else None, num_features)

    def get_text_with_replacements(
        self, text: list[str], images_replacements: Sequence[str] = (), *others: Any, **kwargs: Any
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """Put the expansions in; each text of a batch numbers its pictures from 0."""
        numbers = [index for sample in text for index in range(sample.count(self.image_token))]
        renumbered = [
            replacement.replace(f"<image_id>{index}</image_id>", f"<image_id>{number}</image_id>", 1)
            for index, (replacement, number) in enumerate(zip(images_replacements, numbers, strict=False))
        ]
        renumbered += images_replacements[len(renumbered) :]
        return super().get_text_with_replacements(text, renumbered, *others, **kwargs)

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Return positions and rows of ``pixel_values`` for pictures of these (height, width); vLLM asks this."""
        if image_sizes is None:
            return MultiModalData()
        own = {name: kwargs[name] for name in _SETTINGS if name in kwargs}
        plans = [self.image_processor.plan((width, height), **own) for height, width in image_sizes]
        patch = own.get("patch_size", self.image_processor.patch_size)
        tokens = [self.replace_image_token({"image_grids": [plan.grid or (0, 0)]}, 0, **own) for plan in plans]
        return MultiModalData(
            num_image_tokens=[len(self._ids(text)) for text in tokens],
            num_image_patches=[sum(width * height // patch**2 for width, height in plan.sizes) for plan in plans],
        )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def _settings(folder: Path) -> dict[str, Any]:
    """Return the image processor's settings in a folder; those of its two files must agree, as in the release."""
    path = folder / _PREPROCESSOR_FILE
    found = {key: value for key, value in read_json(path).items() if value is not None} if path.is_file() else {}
    found = {name: found[name] for name in _SETTINGS if name in found}
    if not (folder / "config.json").is_file():  # a processor that was saved without its model
        return found
    config = FM9GVConfig.from_pretrained(folder)
    model = {
        **{"max_slice_nums": config.max_slices, "patch_size": config.patch_size, "slice_mode": config.slice_mode},
        **{"use_image_id": config.use_image_id, "image_feature_size": config.query_num},
    }
    wrong = [
        f"{name} {found[name]!r} instead of {value!r}"
        for name, value in model.items()
        if found.get(name, value) != value
    ]
    if wrong:
        raise CheckpointError(
            f"{path} does not fit config.json: {', '.join(wrong)}", "Make the values in both files equal."
        )
    return {"scale_resolution": config.scale_resolution, **model, **found}


def _max_slices(settings: Mapping[str, Any]) -> int:
    return settings["max_slice_nums"] if settings["slice_mode"] else 1


def _value_table(settings: Mapping[str, Any]) -> np.ndarray:
    """Return ``(3, 256)``: what each byte becomes in each channel, with the roundings of the release's processor."""
    values = np.arange(256, dtype=np.float32) / 255
    mean, std = (np.asarray(settings[key], dtype=np.float32)[:, None] for key in ("norm_mean", "norm_std"))
    return (values - mean) / std
