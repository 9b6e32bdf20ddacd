"""The exponential moving average (EMA) of the weights in training: what is validated, exported and sampled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from framebridge_plugin.training.resume_settings import tensors_difference

_TOGETHER = 16
"""Tensors that are averaged by one call."""


class WeightAverage:
    """Float32 average of the trained parameters: average <- decay * average + (1 - decay) * weights at every update.

    Each rank averages the part of the weights that it holds, sharded (FSDP2) or whole. Up to `start_step` the average
    equals the weights.
    """

    def __init__(self, network: torch.nn.Module, decay: float, start_step: int = 0) -> None:
        self.decay = decay
        self.start_step = start_step
        self._network = network
        self._parameters = {
            name.replace(_CHECKPOINT_PREFIX, ""): parameter
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        }
        self._averages = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Updates the average with the weights of update `step`, counted from 1."""
        averages, weights = ([_local(t) for t in ts.values()] for ts in (self._averages, self._parameters))
        if step <= self.start_step:
            torch._foreach_copy_(averages, weights)
            return
        for i in range(0, len(averages), _TOGETHER):  # not all: of bfloat16 weights, float32 copies are made
            some = slice(i, i + _TOGETHER)
            torch._foreach_lerp_(averages[some], [tensor.float() for tensor in weights[some]], 1.0 - self.decay)

    def share_of_start(self, steps: int) -> float:
        """How much of the average after so many updates are the weights before any, or those of `start_step`."""
        return self.decay ** max(0, steps - self.start_step)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The float32 average, sharded as the weights are, by the network's own names."""
        return self._averages

    def load(self, stored: Mapping[str, torch.Tensor]) -> None:
        """Continues from whole `tensors`, the same on every rank; ValueError if it is of another network."""
        difference = tensors_difference(stored, self._averages)
        if difference is not None:
            raise ValueError(f"the average of the weights is of another network: {difference}")
        for name, average in self._averages.items():
            tensor = stored[name].to(average.device)
            if isinstance(average, DTensor):
                tensor = distribute_tensor(tensor, average.device_mesh, average.placements, src_data_rank=None)
            average.copy_(tensor)

    @contextlib.contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Lets the network compute with the average; afterwards it has its weights back, bit for bit."""
        weights = [_local(parameter).clone() for parameter in self._parameters.values()]
        self._set_weights(_local(average) for average in self._averages.values())
        try:
            yield
        finally:
            self._set_weights(weights)

    @torch.no_grad()
    def _set_weights(self, values: Iterable[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters.values(), values, strict=True):
            _local(parameter).copy_(value)
        for module in self._network.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # it may hold weights that it gathered for its last call


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds; shares its memory, without gradient."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
