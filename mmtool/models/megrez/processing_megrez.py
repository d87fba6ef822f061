"""Pictures to patch rows, sounds to log-mel frames, and how many positions each one takes; the tokenizer as it is."""
# Without the future import of annotations: transformers reads those of the classes of keyword arguments.

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from transformers.image_processing_base import BatchFeature
from transformers.models.whisper.feature_extraction_whisper import WhisperFeatureExtractor
from transformers.processing_utils import (
    AudioKwargs,
    ImagesKwargs,
    MultiModalData,
    ProcessingKwargs,
    ProcessorMixin,
    TextKwargs,
)
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from mmtool.errors import CheckpointError
from mmtool.models.common.folders import dump_json, local_folder, read_json
from mmtool.models.common.navit import patch_rows
from mmtool.models.common.pictures import PictureProcessor
from mmtool.models.common.slicing import SlicePlan, slice_grid, slice_image, slice_plan
from mmtool.models.common.text_processor import TextProcessor
from mmtool.models.megrez.configuration_megrez import MegrezOmniConfig
from mmtool.models.megrez.tokens import token_ids, usual_texts
from mmtool.models.megrez.tokens import token_texts as read_texts

_PREPROCESSOR_FILE = "preprocessor_config.json"
_IMAGE_KEYS = ("max_slice_nums", "scale_resolution", "patch_size", "slice_mode", "norm_mean", "norm_std")
_SOUND_KEYS = ("feature_size", "sampling_rate", "n_fft", "hop_length", "chunk_length")
# The parts of the prompt by their names in a released preprocessor_config.json.
_TOKEN_KEYS = {
    **{"unk": "feature", "im_start": "image_start", "im_end": "image_end"},
    **{"slice_start": "slice_start", "slice_end": "slice_end"},
}
_PATTERNS = ["*.json", "*.jinja"]


class MegrezTokenizer(TokenizersBackend):
    """The release's ``tokenizer.json`` and nothing else; no token type ids, which ``generate`` would refuse."""

    model_input_names = ("input_ids", "attention_mask")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Build the tokenizer of a folder or hub id."""
        folder, kwargs = local_folder(pretrained_model_name_or_path, kwargs, _PATTERNS)
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json", "Copy the file from the release into the folder.")
        # transformers would only warn that it does not clean up the text of such a tokenizer.
        return super().from_pretrained(folder, *args, **{"clean_up_tokenization_spaces": False, **kwargs})

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Write the files of a release, for the class that it names."""
        files = super().save_pretrained(save_directory, *args, **{"save_jinja_files": False, **kwargs})
        path = Path(save_directory) / "tokenizer_config.json"
        drop = ("backend", "is_local", "local_files_only")
        settings = {key: value for key, value in read_json(path).items() if key not in drop}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        dump_json(path, settings)
        return files


class MegrezInstructProcessor(TextProcessor):
    """The text model's tokenizer."""

    tokenizer_class = f"{MegrezTokenizer.__module__}:{MegrezTokenizer.__name__}"


# -- pictures --------------------------------------------------------------------------------------------------------


class MegrezImageKwargs(ImagesKwargs, total=False):
    """Settings of the image processor beside transformers' own.

    max_slice_nums (`int`): most tiles of a picture.
    scale_resolution (`int`): side of a square with as many pixels as a slice.
    patch_size (`int`): side of a patch in pixels.
    slice_mode (`bool`): false takes every picture as one slice.
    norm_mean (`list[float]`): subtracted from channels that reach from 0 to 1.
    norm_std (`list[float]`): divides what is left.
    """

    max_slice_nums: int
    scale_resolution: int
    patch_size: int
    slice_mode: bool
    norm_mean: list[float]
    norm_std: list[float]


class MegrezOImageProcessor(PictureProcessor):
    """Cut pictures into an overview and tiles, and those into patches; see ``models/common/navit.py`` for the rows."""

    valid_kwargs = MegrezImageKwargs
    model_input_names = ("pixel_values", "patch_info")
    max_slice_nums = 9
    scale_resolution = 448
    patch_size = 14
    slice_mode = True
    norm_mean = (0.5, 0.5, 0.5)
    norm_std = (0.5, 0.5, 0.5)

    @property
    def max_slices(self) -> int:
        """Most tiles of a picture."""
        return self.max_slice_nums if self.slice_mode else 1

    def plan(self, size: tuple[int, int]) -> SlicePlan:
        """Return how a picture of ``size`` (width, height) is cut."""
        return slice_plan(size, self.scale_resolution, self.max_slices, self.patch_size)

    def _preprocess(
        self, images: Sequence[Image.Image], return_tensors: str | None = None, **settings: Any
    ) -> BatchFeature:
        """Return the patch rows of all pictures, and (columns, rows) of each one's tiles, which is not for the model.

        ``pixel_values (patches, 3 * patch * patch)``, ``patch_info (patches, 3)``, ``image_grids (images, 2)``; a grid
        of zeros says that there is the overview alone.
        """
        mean, std = (np.asarray(settings[key], np.float32)[:, None, None] for key in ("norm_mean", "norm_std"))
        max_slices = settings["max_slice_nums"] if settings["slice_mode"] else 1
        rows: list[tuple[np.ndarray, np.ndarray]] = []
        grids = []
        for image in images:
            grids.append(slice_grid(image.size, settings["scale_resolution"], max_slices) or (0, 0))
            slices = slice_image(image, settings["scale_resolution"], max_slices, settings["patch_size"])
            for number, part in enumerate(slices):
                pixels = np.asarray(part, dtype=np.float32).transpose(2, 0, 1)
                rows.append(patch_rows((pixels - 255 * mean) / (255 * std), number, settings["patch_size"]))
        pixel_values, patch_info = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        data = {"pixel_values": pixel_values, "patch_info": patch_info, "image_grids": np.array(grids)}
        return BatchFeature(data, tensor_type=return_tensors)


# -- sounds ----------------------------------------------------------------------------------------------------------


class MegrezFeatureExtractor(WhisperFeatureExtractor):
    """Whisper's log-mel frames of the first 30 seconds, and how many of them the encoder sees.

    ``input_features (sounds, mels, 3000)`` float32; ``input_features_mask (sounds, 3000)`` int64, 1 at frames that are
    seen: two for each position after the convolutions.
    """

    model_input_names: ClassVar = ["input_features", "input_features_mask"]

    def __init__(
        self,
        feature_size: int = 128,
        sampling_rate: int = 16_000,
        hop_length: int = 160,
        chunk_length: int = 30,
        n_fft: int = 400,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size, sampling_rate, hop_length, chunk_length, n_fft, **kwargs)

    def __call__(
        self,
        raw_speech: np.ndarray | Sequence[np.ndarray],
        return_tensors: str | None = None,
        sampling_rate: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Return the frames of one sound, or of each of several.

        Args:
            raw_speech: ``(samples,)`` from -1 to 1, or a list of such arrays; one channel.
            return_tensors: ``pt`` for tensors.
            sampling_rate: what it is; another one than that of the model is an error.
            kwargs: ignored: every sound is padded and cut to the same length.
        """
        sounds = [raw_speech] if isinstance(raw_speech, np.ndarray) and raw_speech.ndim == 1 else list(raw_speech)
        # The release decodes to 16 bits per sample.
        sounds = [np.clip(np.rint(np.asarray(s, np.float32) * 32768), -32768, 32767) / 32768 for s in sounds]
        frames = super().__call__(sounds, sampling_rate=sampling_rate or self.sampling_rate, return_tensors="np")
        features = np.asarray(frames["input_features"], np.float32)
        seen = [2 * self.num_positions(len(sound)) for sound in sounds]
        mask = (np.arange(features.shape[-1]) < np.array(seen)[:, None]).astype(np.int64)
        return BatchFeature({"input_features": features, "input_features_mask": mask}, tensor_type=return_tensors)

    def num_positions(self, num_samples: int) -> int:
        """Return how many positions a sound has after the convolutions."""
        return -(-(min(num_samples, self.n_samples) // self.hop_length) // 2)


# -- the whole -------------------------------------------------------------------------------------------------------


class MegrezAudioKwargs(AudioKwargs, total=False):
    """Settings of the feature extractor: transformers' own."""


class MegrezProcessorKwargs(ProcessingKwargs, total=False):
    """Arguments of a call, by part."""

    _defaults = {}  # noqa: RUF012 - older transformers read it
    text_kwargs: TextKwargs
    images_kwargs: MegrezImageKwargs
    audio_kwargs: MegrezAudioKwargs


class MegrezOProcessor(ProcessorMixin):
    """Image processor, feature extractor and tokenizer of Megrez-3B-Omni, under the name that its folders give it.

    ``processor(text=..., images=..., audio=...)`` reads every ``image_token`` and ``audio_token`` in the text as a
    medium. Text that users type belongs in a template instead, where nothing typed can become one.

    Args:
        image_processor: a ``MegrezOImageProcessor``.
        feature_extractor: a ``MegrezFeatureExtractor``.
        tokenizer: a ``MegrezTokenizer``.
        token_texts: strings of the tokens around media and at their positions, by part; None takes the usual ones.
        query_num: positions that a slice of a picture takes.
        chat_template: Jinja template of the tokenizer, if any.
    """

    valid_processor_kwargs = MegrezProcessorKwargs

    def __init__(
        self,
        image_processor: MegrezOImageProcessor,
        feature_extractor: MegrezFeatureExtractor,
        tokenizer: MegrezTokenizer,
        token_texts: Mapping[str, str] | None = None,
        query_num: int = 64,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, feature_extractor, tokenizer, chat_template=chat_template)
        self.token_texts = dict(token_texts or usual_texts())
        self.token_ids = {part: _single_id(tokenizer, text) for part, text in self.token_texts.items()}
        self.query_num = query_num
        # What serving engines put into a prompt; our own prompts hold the release's placeholder, the same for both.
        self.image_token, self.audio_token = (
            self.token_texts.get(part, self.token_texts["feature"]) for part in ("image", "audio")
        )
        self.image_token_id, self.audio_token_id = map(
            tokenizer.convert_tokens_to_ids, (self.image_token, self.audio_token)
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Build the processor of a folder in the layout of a release, or of a hub id.

        Args:
            pretrained_model_name_or_path: the folder or id.
            kwargs: ``tokenizer``, ``image_processor``, ``feature_extractor`` to use instead of the folder's, settings
                of the image processor, and download options.
        """
        folder, kwargs = local_folder(pretrained_model_name_or_path, kwargs, _PATTERNS)
        tokenizer = kwargs.pop("tokenizer", None)
        if not isinstance(tokenizer, MegrezTokenizer):  # serving engines pass what AutoTokenizer made of the folder
            tokenizer = MegrezTokenizer.from_pretrained(folder)
        image_processor, extractor = kwargs.pop("image_processor", None), kwargs.pop("feature_extractor", None)
        path = folder / _PREPROCESSOR_FILE
        settings = {**(read_json(path) if path.is_file() else {}), **kwargs}
        if image_processor is None:
            image_processor = MegrezOImageProcessor(**_chosen(settings, _IMAGE_KEYS))
        if extractor is None:
            extractor = MegrezFeatureExtractor(**_chosen(settings, _SOUND_KEYS))
        texts = read_texts(folder)
        ids = token_ids(folder) or {}
        query_num = settings.get("image_feature_size", 64)
        if (folder / "config.json").is_file():
            query_num = _checked(MegrezOmniConfig.from_pretrained(folder), settings, image_processor, extractor, folder)
        return cls(image_processor, extractor, tokenizer, {part: texts[part] for part in ids}, query_num)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write the tokenizer's files and ``preprocessor_config.json``, as in a release."""
        self.tokenizer.save_pretrained(save_directory)
        images, sounds = self.image_processor, self.feature_extractor
        settings = {
            "image_processor_type": type(images).__name__,
            "processor_class": type(self).__name__,
            "image_feature_size": self.query_num,
            "use_image_id": False,
            **{key: getattr(images, key) for key in _IMAGE_KEYS},
            **{key: getattr(sounds, key) for key in _SOUND_KEYS},
            **{key: self.token_texts[part] for key, part in _TOKEN_KEYS.items()},
            **{part: self.token_texts[part] for part in ("audio_start", "audio_end")},
        }
        dump_json(Path(save_directory) / _PREPROCESSOR_FILE, settings)

    # How many positions a medium takes, and what stands at them

    def image_ids(self, size: tuple[int, int]) -> tuple[list[int], list[int]]:
        """Return the token ids of a picture of ``size`` (width, height), and which of them hold features."""
        grid = self.image_processor.plan(size).grid
        ids = self._slice_ids("image_start", "image_end")
        if grid is not None:
            columns, rows = grid
            line = self._slice_ids("slice_start", "slice_end") * columns
            newline = self.tokenizer.encode("\n", add_special_tokens=False)
            ids += line + (newline + line) * (rows - 1)
        return ids, [index for index, token in enumerate(ids) if token == self.token_ids["feature"]]

    def audio_ids(self, num_positions: int) -> tuple[list[int], list[int]]:
        """Return the token ids of a sound with so many positions after the convolutions, and which hold features."""
        count = num_positions // 2 + 2
        tokens = self.token_ids
        return [tokens["audio_start"], *[tokens["feature"]] * count, tokens["audio_end"]], [*range(1, count + 1)]

    def _slice_ids(self, start: str, end: str) -> list[int]:
        return [self.token_ids[start], *[self.token_ids["feature"]] * self.query_num, self.token_ids[end]]

    # What transformers' processors and serving engines ask for

    @property
    def unused_input_names(self) -> list[str]:
        """Names of outputs that the model does not take."""
        return ["image_grids"]

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return the text that stands for a picture: its placeholder at every position, with the marks between."""
        columns, rows = map(int, image_inputs["image_grids"][image_idx])
        texts, run = self.token_texts, self.image_token * self.query_num
        line = f"{texts['slice_start']}{run}{texts['slice_end']}" * columns
        return f"{texts['image_start']}{run}{texts['image_end']}" + "\n".join([line] * rows)

    def replace_audio_token(self, audio_inputs: Mapping[str, Any], audio_idx: int, **kwargs: Any) -> str:
        """Return the text that stands for a sound."""
        num_frames = int(np.asarray(audio_inputs["input_features_mask"][audio_idx]).sum())
        texts = self.token_texts
        return texts["audio_start"] + self.audio_token * (num_frames // 4 + 2) + texts["audio_end"]

    def _get_num_multimodal_tokens(
        self,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        audio_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """Return positions, and rows of ``pixel_values``, for pictures of these (height, width) and sounds."""
        counts: dict[str, list[int]] = {}
        if image_sizes is not None:
            area = self.image_processor.patch_size**2
            sizes = [(width, height) for height, width in image_sizes]
            counts["num_image_tokens"] = [len(self.image_ids(size)[0]) for size in sizes]
            counts["num_image_patches"] = [
                sum(width * height // area for width, height in self.image_processor.plan(size).sizes) for size in sizes
            ]
        if audio_lengths is not None:
            positions = map(self.feature_extractor.num_positions, audio_lengths)
            counts["num_audio_tokens"] = [len(self.audio_ids(count)[0]) for count in positions]
        return MultiModalData(**counts)


def _single_id(tokenizer: MegrezTokenizer, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise CheckpointError(
            f"{text!r} stands for a single token in the prompts, but the tokenizer makes {len(ids)} of it",
            "Take tokenizer.json, tokenizer_config.json and preprocessor_config.json from one release.",
        )
    return ids[0]


def _chosen(settings: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: settings[key] for key in keys if settings.get(key) is not None}


def _checked(
    config: MegrezOmniConfig,
    settings: Mapping[str, Any],
    image_processor: MegrezOImageProcessor,
    extractor: MegrezFeatureExtractor,
    folder: Path,
) -> int:
    """Return ``query_num``; CheckpointError where the folder's two configuration files do not fit."""
    pairs = {
        "image_feature_size": (settings.get("image_feature_size", config.query_num), config.query_num),
        "patch_size": (image_processor.patch_size, config.patch_size),
        "feature_size": (extractor.feature_size, config.audio_config.n_mels),
    }
    for key, (found, wanted) in pairs.items():
        if found != wanted:
            raise CheckpointError(
                f"{folder}: {key} in {_PREPROCESSOR_FILE} is {found}, but the model of config.json takes {wanted}",
                "Take both files from one release.",
            )
    return config.query_num
