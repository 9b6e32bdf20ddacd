"""What is measured of a training step: time, arithmetic, operations, memory, and the machine's own best."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Arithmetic(FlopCounterMode):
    """Counts floating-point operations by the precision that they are computed in."""

    def __init__(self) -> None:
        # torch's table has no entry for its own attention on a CPU.
        own = {
            _CPU_ATTENTION: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v),
            _CPU_ATTENTION_BACKWARD: lambda g, q, k, v, *args, **kwargs: sdpa_backward_flop_count(g, q, k, v),
        }
        super().__init__(display=False, custom_mapping=own)
        self.by_dtype: Counter[str] = Counter()

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        before = self.get_total_flops()
        super()._count_flops(func_packet, out, args, kwargs)
        if flop := self.get_total_flops() - before:
            tensor = next(value for value in args if isinstance(value, torch.Tensor))
            self.by_dtype[_DTYPES[tensor.dtype]] += flop
        return out


class _Operations(TorchDispatchMode):
    """Counts the operations that torch dispatches, but for those that only look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def counted(step: Callable[[], Any]) -> tuple[Any, dict[str, int], int]:
    """Runs a step; its result, its floating-point operations by precision, and its operations."""
    with _Arithmetic() as arithmetic, _Operations() as operations:
        result = step()
    return result, dict(arithmetic.by_dtype), operations.count


def live_bytes() -> int:
    """Bytes of all tensors on a CPU that Python knows of."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class AddedBytes:
    """Measures the most memory that is taken inside it besides what is there when it begins: its `peak`.

    On a CPU by torch's record of all that it allocates, which is the same in every run, unlike the process's size.
    """

    def __init__(self, device: torch.device) -> None:
        self.peak = 0
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._is_gpu = device.type == "cuda"
        self._profile = None if self._is_gpu else torch.profiler.profile(activities=activities, profile_memory=True)

    def __enter__(self) -> AddedBytes:
        if self._profile is not None:
            self._profile.__enter__()
        else:
            torch.cuda.reset_peak_memory_stats()
            self.peak -= torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._profile is None:
            self.peak += torch.cuda.max_memory_allocated()
            return
        self._profile.__exit__(None, None, None)
        events = [event for event in self._profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            self.peak = max(self.peak, now)


def matmul_peak(dtype: torch.dtype, device: torch.device, size: int) -> float:
    """Floating-point operations per second of a large matrix product, the better of two."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(2))


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    """How long a step takes, by `clock`."""
    began = clock(device)
    step()
    return clock(device) - began


def clock(device: torch.device) -> float:
    """Seconds: of a GPU once it is done with all it was given; on a CPU those that this process had of the processors,
    so that what else the machine does counts little.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
