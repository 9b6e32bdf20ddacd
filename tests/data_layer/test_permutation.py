"""The keyed shuffle: whole, keyed, uniform, and the same for ever."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from framebridge_plugin.data.permutation import KeyedPermutation


@pytest.mark.parametrize("size", [1, 2, 3, 7, 255, 256, 257, 1000, 4097])
def test_every_number_comes_once(size):
    order = KeyedPermutation(size, 1, 0)
    assert sorted(order[position] for position in range(size)) == list(range(size))
    assert len(order) == size
    assert [order.index(order[position]) for position in range(size)] == list(range(size))
    for outside in (-1, size):
        with pytest.raises(IndexError):
            order[outside]
        with pytest.raises(ValueError):
            order.index(outside)


def test_it_depends_on_the_key_alone():
    orders = [[KeyedPermutation(50, *key)[i] for i in range(50)] for key in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3


def test_the_shuffle_of_a_release_is_the_shuffle_of_the_next():
    """A changed order would make a resumed run repeat some clips and leave out others."""
    assert [KeyedPermutation(10, 42, 3)[i] for i in range(10)] == [9, 5, 3, 7, 0, 6, 1, 4, 2, 8]
    assert KeyedPermutation(2_500_000, 42, 3)[1_234_567] == 1910465


@pytest.mark.parametrize("size", [3, 4])
def test_all_orders_are_about_equally_frequent(size):
    counts = Counter(tuple(KeyedPermutation(size, seed)[i] for i in range(size)) for seed in range(4800))
    orders = 6 if size == 3 else 24
    expected = 4800 / orders
    # The chi-square statistic of orders - 1 degrees of freedom: 4 standard deviations above its mean.
    chi_square = sum((counts[order] - expected) ** 2 / expected for order in counts)
    assert len(counts) == orders
    assert chi_square < (orders - 1) + 4 * (2 * (orders - 1)) ** 0.5


def test_neighbours_are_spread_over_the_whole_data_set():
    size = 100_000
    order = KeyedPermutation(size, 5, 0)
    values = [order[i] for i in range(2000)]
    assert len({value * 20 // size for value in values}) == 20
    distances = [abs(a - b) for a, b in itertools.pairwise(values)]
    assert size * 0.3 < sum(distances) / len(distances) < size * 0.37  # a third for independent uniform numbers
