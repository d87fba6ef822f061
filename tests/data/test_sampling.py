"""Orders that take no memory."""

import numpy as np
import pytest

from mmtool.data.sampling import Permutation, seed_of

EXPECTED = [4, 1, 9, 2, 8, 7, 3, 6, 5, 0]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 64, 65, 1000, 4097])
def test_every_number_comes_once(size: int) -> None:
    order = Permutation(size, 3).block(np.arange(size))
    assert sorted(order) == list(range(size))


def test_parts_and_single_numbers_are_those_of_the_whole() -> None:
    order = Permutation(1000, 7)
    whole = order.block(np.arange(1000))
    assert (order.block(np.array([5, 5, 999])) == whole[[5, 5, 999]]).all()
    assert [order[index] for index in (0, 17, 999)] == whole[[0, 17, 999]].tolist()
    with pytest.raises(IndexError):
        order[1000]


def test_the_order_is_the_same_everywhere_and_another_with_another_seed() -> None:
    # Written down once: a run that is resumed on another machine or with another numpy must go on in the same order.
    assert Permutation(10, 42).block(np.arange(10)).tolist() == EXPECTED
    assert Permutation(10, 43).block(np.arange(10)).tolist() != EXPECTED
    assert seed_of(42, "train", 0) == 11418101458334764305
    assert not (Permutation(1000, 1).block(np.arange(1000)) == np.arange(1000)).mean() > 0.01


def test_all_places_are_about_equally_likely() -> None:
    counts = np.zeros((10, 10))
    for seed in range(1000):
        counts[np.arange(10), Permutation(10, seed).block(np.arange(10))] += 1
    assert 81 - 4.5 * 12.7 < ((counts - 100) ** 2 / 100).sum() < 81 + 4.5 * 12.7  # chi squared, 81 degrees of freedom
