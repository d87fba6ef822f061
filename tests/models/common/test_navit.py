"""The NaViT tower: positions against the tables of two families, patch rows, and slices that do not see each other."""

import json
import platform

import numpy as np
import pytest
import torch
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig

from mmtool.models.common.navit import (
    NaViTSiglip,
    bucket_positions,
    patch_rows,
    position_ids,
    slices_per_image,
    split_slices,
)


@pytest.mark.parametrize("family", ["fm9g4b-v", "megrez-3b-omni"])
def test_buckets_of_the_release(golden, family):
    buckets = json.loads((golden(family) / "position_buckets.json").read_text("utf-8"))["buckets"]
    assert len(buckets) >= 128
    for count, wanted in buckets.items():
        assert bucket_positions(int(count), 70).tolist() == wanted, count


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="torch.arange rounds as x86 does there only")
@pytest.mark.parametrize("side", [8, 16, 20, 35, 64, 70])
def test_buckets_are_those_of_the_literal_computation(side):
    boundaries = torch.arange(1 / side, 1, 1 / side)
    for count in range(1, 300):
        coordinates = torch.arange(0, 1 - 1e-6, 1 / torch.tensor(count))
        assert torch.equal(bucket_positions(count, side), torch.bucketize(coordinates, boundaries, right=True)), count


def test_position_ids_go_row_by_row():
    rows, columns = bucket_positions(3, 20), bucket_positions(5, 20)
    wanted = [20 * row + column for row in rows.tolist() for column in columns.tolist()]
    assert position_ids(3, 5, 20).tolist() == wanted


def test_patch_rows_are_what_a_convolution_would_take():
    pixels = np.random.default_rng(0).random((3, 6, 8)).astype(np.float32)
    rows, info = patch_rows(pixels, 2, 2)
    unfolded = torch.nn.functional.unfold(torch.from_numpy(pixels)[None], 2, stride=2)[0].T
    assert torch.equal(torch.from_numpy(rows), unfolded)
    assert info.tolist() == [[2, row, column] for row in range(3) for column in range(4)]


def info_of(*slices: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(
        [(number, row, column) for number, rows, columns in slices for row in range(rows) for column in range(columns)]
    )


def test_slices_and_pictures_are_found_again():
    info = info_of((0, 2, 3), (1, 1, 4), (2, 1, 4), (0, 1, 1), (0, 3, 1), (1, 1, 1))
    assert split_slices(info) == [(2, 3), (1, 4), (1, 4), (1, 1), (3, 1), (1, 1)]
    assert slices_per_image(info) == [3, 1, 2]


@pytest.mark.parametrize("info", [info_of((0, 2, 3))[:-1], info_of((0, 2, 3))[1:], info_of((0, 1, 1))[:0]])
def test_parts_of_slices_are_refused(info):
    with pytest.raises(ValueError, match="patch_info"):
        split_slices(info)


@pytest.fixture(scope="module")
def tower() -> NaViTSiglip:
    config = SiglipVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    torch.manual_seed(0)
    return NaViTSiglip(config).eval()


SHAPES = [(2, 3), (1, 4), (2, 3), (3, 2)]


def test_a_slice_does_not_see_its_neighbours(tower):
    torch.manual_seed(1)
    info = info_of(*((0, *shape) for shape in SHAPES))
    pixels = torch.randn(len(info), 3 * 14 * 14)
    with torch.no_grad():
        together = tower(pixels, info)
        lengths = [rows * columns for rows, columns in SHAPES]
        parts = zip(pixels.split(lengths), info.split(lengths), strict=True)
        alone = torch.cat([tower(*part) for part in parts])
    assert torch.allclose(together, alone, atol=1e-5)  # batches of another size round differently


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_rows_are_those_of_a_convolution_and_full_attention(tower, name):
    tower.set_attn_implementation(name)
    torch.manual_seed(2)
    pixels = torch.randn(3, 28, 42)
    rows, info = patch_rows(pixels.numpy(), 0, 14)
    projection = tower.embeddings.patch_embedding
    with torch.no_grad():
        found = tower(torch.from_numpy(rows), torch.from_numpy(info))
        patches = torch.nn.functional.conv2d(pixels[None], projection.weight, projection.bias, stride=14)
        hidden = patches.flatten(2).mT + tower.embeddings.position_embedding(position_ids(2, 3, 4))
        for layer in tower.encoder.layers:
            hidden = layer(hidden, None)
        wanted = tower.post_layernorm(hidden)[0]
    assert torch.allclose(found, wanted, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(tower):
    info, pixels = info_of((0, 2, 3)), torch.randn(6, 588)
    tower.train()
    gradients = []
    for checkpointing in (False, True):
        tower.activation_checkpointing_enable() if checkpointing else tower.activation_checkpointing_disable()
        tower.zero_grad()
        tower(pixels, info).sum().backward()
        gradients.append(tower.encoder.layers[0].mlp.fc1.weight.grad.clone())
    tower.activation_checkpointing_disable()
    tower.eval()
    assert torch.equal(*gradients)
