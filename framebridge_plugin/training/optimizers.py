"""The optimizer of a run: torch's in its fused form, bitsandbytes', or torchao's, which rounds by a seed."""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import torch

from framebridge_plugin.randomness import seed_global_generators

_CLASSES = {
    "adam": "torch.optim:Adam",
    "adamw": "torch.optim:AdamW",
    "adam-bnb": "bitsandbytes.optim:Adam",
    "adamw-bnb": "bitsandbytes.optim:AdamW",
    "adam-bnb-8bit": "bitsandbytes.optim:Adam8bit",
    "adamw-bnb-8bit": "bitsandbytes.optim:AdamW8bit",
    "adamw-torchao-8bit": "torchao.optim:AdamW8bit",
    "adamw-torchao-4bit": "torchao.optim:AdamW4bit",
    "adamw-torchao-fp8": "torchao.optim:AdamWFp8",
}
TORCHAO_OPTIMIZERS = tuple(name for name in _CLASSES if "torchao" in name)


def make_optimizer(args: Any, network: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the trained parameters; what does not go together is refused before (`refuse_unsupported`)."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    options = {
        "lr": args.lr,
        "betas": (args.beta1, args.beta2),
        "eps": args.epsilon,
        "weight_decay": args.weight_decay,
    }
    rounds = args.stochastic_rounding
    if args.optimizer in TORCHAO_OPTIMIZERS:
        return optimizer_class(args.optimizer)(parameters, **options, bf16_stochastic_round=rounds)
    if rounds:
        return _torchao("torchao.optim:_AdamW")(parameters, **options, bf16_stochastic_round=True)
    if args.offload_optimizer:
        return OffloadedAdamW(parameters, **options, fused=True)
    kind = optimizer_class(args.optimizer)
    if not kind.__module__.startswith("torch."):
        return kind(parameters, **options)
    try:
        return kind(parameters, **options, fused=True)
    except RuntimeError:  # a kind of device for which torch has no such kernel
        return kind(parameters, **options, foreach=True)


def optimizer_class(name: str) -> Any:
    """The class of an optimizer in the recipe's words."""
    return _torchao(_CLASSES[name]) if name in TORCHAO_OPTIMIZERS else pkgutil.resolve_name(_CLASSES[name])


def _torchao(place: str) -> Any:
    """One of torchao's optimizers, whose every step begins with the generators at `rounding_seed`, and leaves them."""

    class Seeded(pkgutil.resolve_name(place)):  # type: ignore[misc]
        rounding_seed = 0

        def step(self, closure: Any = None) -> Any:
            device = self.param_groups[0]["params"][0].device
            forked = [] if device.type == "cpu" else [device]
            with torch.random.fork_rng(forked, device_type=device.type), _uncompiled_on_a_cpu(device):
                seed_global_generators(self.rounding_seed, device)
                return super().step(closure)

    return Seeded


@contextlib.contextmanager
def _uncompiled_on_a_cpu(device: torch.device) -> Iterator[None]:
    """torchao compiles the step for each shape of parameters: on a CPU that takes a compiler for C++, and minutes."""
    if device.type == "cpu":
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW whose moments lie in main memory, where its step is made.

    torchao's `CPUOffloadOptimizer` copies gradients during the backward pass, before they are clipped, and its state
    has no names of parameters.
    """

    def step(self, closure: Any = None) -> Any:
        """Makes an update; the gradients are gone after it."""
        with self._in_main_memory():
            return super().step(closure)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, which goes where the parameters are."""
        with self._in_main_memory():
            super().load_state_dict(state_dict)

    @contextlib.contextmanager
    def _in_main_memory(self) -> Iterator[None]:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        there = [parameter.data for parameter in parameters]
        for parameter in parameters:
            gradient, parameter.grad = parameter.grad, None
            parameter.data = _host_copy(parameter.data)
            parameter.grad = None if gradient is None else _host_copy(gradient)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        try:
            yield
        finally:
            for parameter, data in zip(parameters, there, strict=True):
                parameter.grad = None
                data.copy_(parameter.data)
                parameter.data = data


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    pinned = tensor.device.type != "cpu"
    return torch.empty_like(tensor, device="cpu", pin_memory=pinned).copy_(tensor, non_blocking=True)
