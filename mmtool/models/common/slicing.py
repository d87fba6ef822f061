"""Cut a picture into an overview and tiles, as the releases with a NaViT tower do; sizes are (width, height) in pixels.

Sizes alone are enough to know how many positions a picture takes, so the plan is made apart from the pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image

Size = tuple[int, int]


@dataclass(frozen=True)
class SlicePlan:
    """How a picture is cut.

    Attributes:
        overview: size of the whole picture as the tower sees it.
        grid: (columns, rows) of tiles; None where the picture is not cut.
        tile: size of one tile.
    """

    overview: Size
    grid: tuple[int, int] | None = None
    tile: Size | None = None

    @property
    def sizes(self) -> list[Size]:
        """The size of every slice: the overview, then the tiles row by row."""
        if self.grid is None or self.tile is None:
            return [self.overview]
        columns, rows = self.grid
        return [self.overview, *[self.tile] * (columns * rows)]


def slice_grid(size: Size, scale_resolution: int, max_slices: int) -> tuple[int, int] | None:
    """Return the (columns, rows) of tiles whose shape is nearest to that of a picture, None for one slice.

    Of equally near grids the first counts: fewer tiles before more, fewer columns before more.
    """
    width, height = size
    wanted = min(math.ceil(width * height / scale_resolution**2), max_slices)
    if wanted <= 1:
        return None
    counts = [count for count in (wanted - 1, wanted, wanted + 1) if 1 < count <= max_slices]
    grids = [(columns, count // columns) for count in counts for columns in range(1, count + 1) if count % columns == 0]
    shape = math.log(width / height)
    return min(grids, key=lambda grid: abs(shape - math.log(grid[0] / grid[1])))


def fit_size(size: tuple[float, float], scale_resolution: int, patch_size: int, allow_upscale: bool) -> Size:
    """Return a size in whole patches, of the same shape and about ``scale_resolution`` squared pixels.

    A picture with fewer pixels keeps its size unless ``allow_upscale``.
    """
    width, height = size
    if allow_upscale or width * height > scale_resolution**2:
        ratio = width / height
        height = int(scale_resolution / math.sqrt(ratio))
        width = int(height * ratio)
    return _whole(width, patch_size), _whole(height, patch_size)


def slice_plan(size: Size, scale_resolution: int, max_slices: int, patch_size: int) -> SlicePlan:
    """Return how a picture of ``size`` is cut into at most ``max_slices`` tiles and their overview."""
    grid = slice_grid(size, scale_resolution, max_slices)
    if grid is None:
        return SlicePlan(fit_size(size, scale_resolution, patch_size, allow_upscale=True))
    columns, rows = grid
    cell = _whole(size[0], columns) / columns, _whole(size[1], rows) / rows
    return SlicePlan(
        overview=fit_size(size, scale_resolution, patch_size, allow_upscale=False),
        grid=grid,
        tile=fit_size(cell, scale_resolution, patch_size, allow_upscale=True),
    )


def slice_image(image: Image.Image, scale_resolution: int, max_slices: int, patch_size: int) -> list[Image.Image]:
    """Return the overview of a picture and its tiles, row by row; all of them resized from the original (bicubic)."""
    plan = slice_plan(image.size, scale_resolution, max_slices, patch_size)
    slices = [image.resize(plan.overview, Image.Resampling.BICUBIC)]
    if plan.grid is None or plan.tile is None:
        return slices
    (columns, rows), (width, height) = plan.grid, plan.tile
    resized = image.resize((width * columns, height * rows), Image.Resampling.BICUBIC)
    for top in range(0, height * rows, height):
        for left in range(0, width * columns, width):
            slices.append(resized.crop((left, top, left + width, top + height)))
    return slices


def _whole(length: float, unit: int) -> int:
    """Round to a multiple of ``unit``, at least one; a half goes to the even multiple, as Python rounds."""
    return max(round(length / unit) * unit, unit)
