from __future__ import annotations

import torch
from torch import nn

from framebridge_plugin.backbones.memory import Allocations, free_memory, without_data


def test_the_peak_of_a_module_is_what_its_tensors_take():
    """A chain of four layers over 1000 x 1000 floats: two of them are there at once, with gradients all."""
    size = 4 * 1000 * 1000
    with without_data(torch.float32):
        layers, batch = nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(4))), torch.empty(1000, 1000)
        with torch.no_grad(), Allocations() as without_gradients:
            result = layers(batch)
        assert (without_gradients.peak, without_gradients.live) == (2 * size, size)
        del result
        assert without_gradients.live == 0
        with Allocations() as with_gradients:
            result = layers(batch)
        assert with_gradients.live == 4 * size
    assert result.shape == (1000, 1000)


def test_views_and_computing_in_place_take_nothing():
    batch = torch.ones(8, 8)
    with Allocations() as allocations:
        batch.view(64).t().add_(1)
        other = batch.half()[:4]
    assert allocations.peak == 128
    assert torch.equal(other, torch.full((4, 8), 2.0).half())


def test_types_are_those_asked_for_and_do_not_stay():
    with without_data(torch.bfloat16):
        assert nn.Linear(2, 2).weight.dtype == torch.bfloat16
    assert torch.zeros(1).dtype == torch.float32


def test_the_free_memory_of_the_machine():
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50
