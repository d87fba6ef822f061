"""What the families' image processors share: any picture to RGB, and bytes to the numbers a tower takes."""
# Without the future import of annotations: transformers reads those of the classes of keyword arguments.

from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor


class PictureProcessor(BaseImageProcessor):
    """Resizes with PIL, as the releases do; a family brings the settings and ``_preprocess``.

    Alpha is dropped without compositing and the EXIF orientation is ignored, as in the releases.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)

    @property
    def backend(self) -> str:
        """Name of the library that resizes."""
        return "pil"

    def process_image(self, image: Any, **kwargs: Any) -> Image.Image:
        """Return ``image`` (PIL; NumPy or torch, ``uint8``, channels last or first) as an RGB picture."""
        if not isinstance(image, Image.Image):
            image = Image.fromarray(_channels_last(np.asarray(image)))
        return image.convert("RGB")


def _channels_last(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8:
        raise ValueError(f"a picture as an array must be uint8, not {array.dtype}")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    return np.ascontiguousarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def look_up(image: Image.Image, table: np.ndarray) -> np.ndarray:
    """Return the ``(3, H, W)`` numbers of an RGB picture; ``table (3, 256)`` has those of each byte in each channel."""
    pixels = np.asarray(image)
    return np.stack([table[channel][pixels[:, :, channel]] for channel in range(3)])
