"""Derived seeds are stable and tell their parts apart."""

from __future__ import annotations

import itertools

import torch

from framebridge_plugin.randomness import derive_seed, seed_global_generators


def test_seeds_never_change():
    # A change of these numbers would change every run that is resumed.
    assert derive_seed(0) == 7210762507766007076
    assert derive_seed(42, 3, 17) == 7945784855282019636
    assert derive_seed(42, 3, "order") == 8476061984212137850


def test_different_parts_give_different_seeds():
    numbers = [(), (0,), (1,), (-1,), (1, 23), (12, 3), (123,), (0, 0)]
    texts = [("1",), ("ab",), ("a", "b"), ("a", 1), ("a1",), ("",)]
    grid = list(itertools.product(range(10), range(10), range(10)))
    seeds = [derive_seed(*part) for part in [*numbers, *texts, *grid]]
    assert len(set(seeds)) == len(seeds)


def test_seeds_fit_a_generator_and_spread_over_the_range():
    seeds = [derive_seed(seed) for seed in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert 0.4 < sum(seed >= 2**62 for seed in seeds) / 200 < 0.6
    torch.Generator().manual_seed(max(seeds))


def test_the_global_generator_is_seeded_as_torch_seeds_it_and_nothing_is_kept():
    torch.manual_seed(7)
    expected, kept = torch.rand(3), len(torch.cuda._queued_calls)
    seed_global_generators(7, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)
    assert len(torch.cuda._queued_calls) == kept
