"""Whether the videos that `finetrainers sample` is to make fit into memory, and how many at once."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from framebridge_plugin.backbones.examination import SavedModel
from framebridge_plugin.backbones.memory import GIB, free_memory
from framebridge_plugin.backbones.sampling_memory import SamplingMemory, sampling_memory
from framebridge_plugin.errors import UsageError, first_line, say
from framebridge_plugin.settings.choices import Offload

if TYPE_CHECKING:
    from framebridge_plugin.commands.model_request import ModelRequest

_SHARE = 0.9
"""Of the free memory that a batch is chosen for: convolutions and the allocator take some for themselves."""
_SHARE_OF_MAIN = 0.5
"""The same of main memory: where it ends the batch is not halved, as on a GPU, but the process killed."""
_MAIN = torch.device("cpu")
_OFFLOADS: tuple[Offload, ...] = ("none", "model", "group", "sequential")


def inputs_that_fit(saved: SavedModel, request: ModelRequest, device: torch.device, dtype: torch.dtype) -> int | None:
    """The most inputs of a call of the network; None where that is not to be seen beforehand.

    Where not even one fits it is refused, or with a `batch_size` in the request only said.
    """
    try:
        return _inputs_that_fit(saved, request, device, dtype)
    except UsageError:
        raise
    except Exception as error:  # of a network that cannot be called without data, say: no reason not to sample
        if _is_seen(saved, request, dtype):  # an autoencoder's convolutions and rotary positions refuse large frames
            what = "take fewer or smaller frames (--num-frames, --height, --width)"
            raise UsageError(f"videos of this size cannot be computed; {what}: {first_line(error)}") from error
        say(f"how much memory it takes is not to be seen beforehand: {first_line(error)}")
        return None


def _is_seen(saved: SavedModel, request: ModelRequest, dtype: torch.dtype) -> bool:
    """Whether what small videos take is to be seen beforehand."""
    with contextlib.suppress(Exception):
        small = sampling_memory(saved, (9, 64, 64), dtype)
        return small is not None and small.needed(1, request.offload, True) > 0
    return False


def _inputs_that_fit(saved: SavedModel, request: ModelRequest, device: torch.device, dtype: torch.dtype) -> int | None:
    clip = request.num_frames, request.height, request.width
    memory = sampling_memory(saved, clip, dtype)
    if memory is None:
        return None
    free, tiled = free_memory(device), memory.is_tiled(request.tiling)
    if (needed := memory.needed(request.batch_size or 1, request.offload, tiled)) > free:
        frames, height, width = memory.clip
        problem = (
            f"{frames} frames of {height} x {width} need {needed / GIB:.1f} GiB of {device}, "
            f"which has {free / GIB:.1f} free"
        )
        if request.batch_size is None:
            remedy = _remedy(saved, request, device, dtype, free)
            raise UsageError(f"{problem}; {remedy} (--batch-size 1 tries it all the same)")
        say(problem)
    if request.offload != "none" and (waiting := sum(memory.weights.values())) > (there := free_memory(_MAIN)):
        say(f"--offload {request.offload}: {waiting / GIB:.1f} GiB wait in main memory, {there / GIB:.1f} are free")
    return memory.inputs_in((_SHARE_OF_MAIN if device == _MAIN else _SHARE) * free, request.offload)


def _remedy(saved: SavedModel, request: ModelRequest, device: torch.device, dtype: torch.dtype, free: int) -> str:
    """What changes least of what makes it fit."""
    least = None
    for options, needed in _changes(saved, request, device, dtype):
        if needed <= free:
            return f"with {options} they need {needed / GIB:.1f}"
        if least is None or needed < least[1]:
            least = options, needed
    what = "take fewer or smaller frames (--num-frames, --height, --width)"
    return what if least is None else f"{what}: with {least[0]} they still need {least[1] / GIB:.1f}"


def _changes(
    saved: SavedModel, request: ModelRequest, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, int]]:
    """Other options, and the bytes that it takes with them."""
    clip = request.num_frames, request.height, request.width
    offloads = _OFFLOADS[_OFFLOADS.index(request.offload) :] if device != _MAIN else (request.offload,)
    dtypes = dict.fromkeys((dtype, torch.float16 if dtype == torch.float16 else torch.bfloat16))
    for kind, offload in itertools.product(dtypes, offloads):
        memory: SamplingMemory | None = sampling_memory(saved, clip, kind)
        assert memory is not None
        for tiled in dict.fromkeys((memory.is_tiled(request.tiling), True)):
            changed = {
                "--dtype bf16": kind != dtype,
                "--tiling on": tiled != memory.is_tiled(request.tiling),
                f"--offload {offload}": offload != request.offload,
            }
            if any(changed.values()):
                yield " ".join(filter(changed.get, changed)), memory.needed(1, offload, tiled)
