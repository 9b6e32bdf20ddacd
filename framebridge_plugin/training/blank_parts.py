"""Parts of a run that have shapes and no data, and what counts the memory that they take."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from framebridge_plugin.backbones.memory import Allocations


class CountedUpdate(Allocations):
    """Counts gradients that stay apart."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients = self.peak_beside_gradients = 0

    def keep(self, parameter: torch.Tensor) -> None:
        """Counts a parameter's gradient, when it is whole."""
        self.gradients += 0 if parameter.grad is None else parameter.grad.nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Makes a call of an operator, and counts what it allocated."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.peak_beside_gradients = max(self.peak_beside_gradients, self.live - self.gradients)
        return result


def remade(module: Any, dtype: torch.dtype | None, device: torch.device) -> Any:
    """A module with tensors without data of a precision (None: as they are) on a device; tied weights stay tied.

    Tables that are no part of a saved model are loaded in no precision: they keep their own.
    """
    made: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in made:
                    stays = dtype is None or not tensor.is_floating_point() or name in part._non_persistent_buffers_set
                    kind = tensor.dtype if stays else dtype
                    made[id(tensor)] = torch.empty(tensor.shape, dtype=kind, device=device)
                    if isinstance(tensor, nn.Parameter):
                        made[id(tensor)] = nn.Parameter(made[id(tensor)], tensor.requires_grad)
                tensors[name] = None if tensor is None else made[id(tensor)]
    return module
