"""Training where there is no GPU. All of these are inert where CUDA is available."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from framebridge_plugin.training.finetrainers.repairs import Repair


def _no_cuda() -> bool:
    return not torch.cuda.is_available()


def _no_accelerator() -> bool:
    return torch.accelerator.current_accelerator(check_available=True) is None


def _name_the_cpu() -> None:
    for name in ("finetrainers.parallel.ptd", "finetrainers.parallel.accelerate", "finetrainers.state"):
        module: Any = importlib.import_module(name)
        for attribute, value in {"_device_type": "cpu", "_device_module": torch.cpu}.items():
            if hasattr(module, attribute):
                setattr(module, attribute, value)


def _start_with_gloo() -> None:
    from finetrainers.parallel import PytorchDTensorParallelBackend

    original = PytorchDTensorParallelBackend.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "gloo"
        original(self, *args, **kwargs)

    PytorchDTensorParallelBackend.__init__ = __init__


def _skip_peak_memory() -> None:
    cuda: Any = torch.cuda

    @functools.wraps(cuda.reset_peak_memory_stats)
    def reset_peak_memory_stats(device: Any = None) -> None:
        """There is no device whose statistics could be reset."""

    cuda.reset_peak_memory_stats = reset_peak_memory_stats


def _round_what_is_known() -> None:
    memory: Any = importlib.import_module("finetrainers.utils.memory")

    def round_if_known(number: float | None, ndigits: int | None = None) -> float | None:
        return None if number is None else round(number, ndigits)

    # A global of the module shadows the builtin, for this module alone.
    memory.round = round_if_known


REPAIRS = (
    Repair(
        "device name",
        "names the cpu as the device, because finetrainers takes it for cuda where it finds no accelerator",
        _no_accelerator,
        _name_the_cpu,
    ),
    Repair(
        "gloo",
        "starts ptd with gloo, because finetrainers always asks for nccl, which needs CUDA",
        _no_cuda,
        _start_with_gloo,
    ),
    Repair(
        "peak memory",
        "skips torch.cuda.reset_peak_memory_stats, which finetrainers calls and which fails without CUDA",
        _no_cuda,
        _skip_peak_memory,
    ),
    Repair(
        "memory statistics",
        "leaves unknown memory figures None, because finetrainers rounds them and fails without CUDA",
        _no_cuda,
        _round_what_is_known,
    ),
)
