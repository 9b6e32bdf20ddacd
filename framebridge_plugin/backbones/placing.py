"""Where a pipeline computes, what waits elsewhere, and what is compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from framebridge_plugin.errors import UsageError
from framebridge_plugin.settings.choices import Offload


def find_device(name: str | None = None) -> torch.device:
    """The device of a name such as cpu, cuda or cuda:1, by default the accelerator if there is one; refuses others."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return accelerator or torch.device("cpu")
    there = ["cpu", *(f"{accelerator}:{index}" for index in range(torch.accelerator.device_count()))]
    if name not in there and name not in [place.partition(":")[0] for place in there]:
        raise UsageError(f"--device {name}: there is none here; there are: {', '.join(there)}")
    return torch.device(name)


def place(pipeline: Any, device: torch.device, offload: Offload = "none") -> None:
    """Has a pipeline compute on a device: with all of it there, or the rest waiting in main memory.

    Args:
        pipeline: The pipeline, on the CPU.
        device: Where it computes.
        offload: What diffusers keeps there: all of it ("none"), one component at a time ("model"), one layer
            ("sequential"), or one layer and, on CUDA, the next, copied meanwhile ("group").
    """
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    elif offload == "group":
        is_cuda = device.type == "cuda"
        pipeline.enable_group_offload(device, offload_type="leaf_level", use_stream=is_cuda, non_blocking=is_cuda)
    else:
        pipeline.to(device)


def check_compiler(setting: str) -> None:
    """Refuses a setting that compiles where torch.compile finds no C++ compiler: it would say so in the first step."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # torch itself imports them where it compiles
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UsageError(f"{setting}: needs a C++ compiler, which is not here; install g++, or leave it out") from None


def compile_blocks(network: nn.Module, **settings: Any) -> None:
    """Compiles the repeated blocks of a network, each for itself, so that one compilation serves all of a kind;
    diffusers' `compile_repeated_blocks` does not know those of every network.
    """
    for blocks in network.children():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                block.compile(**settings)
