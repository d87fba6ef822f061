"""Slicing against the tables of two families that share the rule."""

import json

import numpy as np
import pytest
from PIL import Image

from mmtool.models.common.slicing import fit_size, slice_grid, slice_image, slice_plan


def table(golden, family: str) -> list[dict]:
    return json.loads((golden(family) / "slicing_table.json").read_text("utf-8"))["rows"]


def test_plans_of_fm9g4b_v(golden):
    for row in table(golden, "fm9g4b-v"):
        plan = slice_plan(tuple(row["image_size"]), 448, row["max_slice_nums"], 14)
        assert plan.grid == (row["grid_cols_rows"] and tuple(row["grid_cols_rows"])), row
        assert plan.overview == tuple(row["source_size"]), row
        assert plan.tile == (row["slice_size"] and tuple(row["slice_size"])), row
        assert [[height // 14, width // 14] for width, height in plan.sizes] == row["tgt_sizes"], row


def test_plans_of_megrez(golden):
    for row in table(golden, "megrez-3b-omni"):
        plan = slice_plan(tuple(row["image_wh"]), 448, 9, 14)
        assert plan.grid == (row["grid_cols_rows"] and tuple(row["grid_cols_rows"])), row
        assert plan.overview == tuple(row["source_wh"]), row
        assert plan.tile == (row["slice_wh"] and tuple(row["slice_wh"])), row
        assert len(plan.sizes) == row["n_slices_total"], row


@pytest.mark.parametrize("max_slices", [0, 1])
def test_one_slice_at_most_is_never_cut(max_slices):
    assert slice_grid((4000, 3000), 448, max_slices) is None
    assert slice_plan((4000, 3000), 448, max_slices, 14).sizes == [(518, 392)]


def test_small_pictures_grow_only_where_it_is_allowed():
    assert fit_size((100, 100), 448, 14, allow_upscale=True) == (448, 448)
    assert fit_size((100, 100), 448, 14, allow_upscale=False) == (98, 98)
    assert fit_size((1, 1), 448, 14, allow_upscale=False) == (14, 14)
    assert fit_size((21, 35), 448, 14, allow_upscale=False) == (28, 28)  # 1.5 and 2.5 patches both go to 2


def test_tiles_are_cut_row_by_row_from_one_resized_picture():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8))
    plan = slice_plan(image.size, 112, 9, 14)
    slices = slice_image(image, 112, 9, 14)
    assert [part.size for part in slices] == plan.sizes
    columns, rows = plan.grid
    assert columns > 1 and rows > 1
    tiles = [np.asarray(part) for part in slices[1:]]
    whole = np.concatenate([np.concatenate(tiles[row * columns :][:columns], axis=1) for row in range(rows)])
    wanted = image.resize((plan.tile[0] * columns, plan.tile[1] * rows), Image.Resampling.BICUBIC)
    assert np.array_equal(whole, np.asarray(wanted))
