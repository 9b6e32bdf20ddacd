"""How many processes finetrainers believes in, and which backend joins them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch

from framebridge_plugin.errors import UsageError
from framebridge_plugin.processes import process_count
from framebridge_plugin.training.finetrainers.repairs import Repair
from framebridge_plugin.training.rendezvous import group_arguments

_LONE_PTD_PROCESS = {"RANK": "0", "LOCAL_RANK": "0"}


def change_arguments(function: str, change: Callable[[Any], object]) -> None:
    """Lets `change` adapt finetrainers' parser after one of its functions has added arguments."""
    module: Any = importlib.import_module("finetrainers.args")
    original = getattr(module, function)

    @functools.wraps(original)
    def add_arguments(parser: Any) -> None:
        original(parser)
        change(parser)

    setattr(module, function, add_arguments)


def _default_backend_refused() -> bool:
    from finetrainers.parallel import ParallelBackendEnum

    # argparse passes a default through str(), which returns the name of the member and not its value.
    return str(ParallelBackendEnum.ACCELERATE) != ParallelBackendEnum.ACCELERATE.value


def _name_default_backend() -> None:
    change_arguments("_add_parallel_arguments", lambda parser: parser.set_defaults(parallel_backend="accelerate"))


def _release_0_2_0() -> bool:
    return importlib.metadata.version("finetrainers") == "0.2.0"


def _wrap_init_distributed(wrap: Callable[[Callable[[Any], None]], Callable[[Any], None]]) -> None:
    from finetrainers import ControlTrainer, SFTTrainer

    for trainer in (SFTTrainer, ControlTrainer):
        original = trainer._init_distributed
        trainer._init_distributed = functools.wraps(original)(wrap(original))


def _backend_of(trainer: Any) -> str:
    backend = trainer.args.parallel_backend
    return str(getattr(backend, "value", backend))


def _count_a_lone_process_as_one() -> None:
    def wrap(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def _init_distributed(self: Any) -> None:
            # The other variables stay away from accelerate, which would take them for those of a launcher.
            alone = {"WORLD_SIZE": "1"} | (_LONE_PTD_PROCESS if _backend_of(self) == "ptd" else {})
            with _environment(alone if process_count() == 1 else {}):
                original(self)

        return _init_distributed

    _wrap_init_distributed(wrap)


@contextlib.contextmanager
def _environment(additions: dict[str, str]) -> Iterator[None]:
    """Sets environment variables that are not set yet, and removes them afterwards."""
    added = {name: value for name, value in additions.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _meet_without_ports() -> None:
    from finetrainers.parallel import PytorchDTensorParallelBackend

    original = PytorchDTensorParallelBackend.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        distributed: Any = torch.distributed
        init_process_group = distributed.init_process_group
        arguments = group_arguments(timedelta(seconds=kwargs.get("timeout", 180)))
        distributed.init_process_group = functools.partial(init_process_group, **arguments)
        try:
            original(self, *args, **kwargs)
        finally:
            distributed.init_process_group = init_process_group

    PytorchDTensorParallelBackend.__init__ = __init__


def _refuse_accelerate_processes() -> None:
    def wrap(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def _init_distributed(self: Any) -> None:
            count = process_count()
            if count > 1 and _backend_of(self) == "accelerate":
                raise UsageError(
                    f"parallel_backend=accelerate with {count} processes does not synchronise gradients (finetrainers "
                    "drops the wrapper that would); use parallel_backend=ptd"
                )
            original(self)

        return _init_distributed

    _wrap_init_distributed(wrap)


REPAIRS = (
    Repair(
        "default backend",
        "names accelerate as the default of --parallel_backend, because the enum member there is refused later",
        _default_backend_refused,
        _name_default_backend,
    ),
    Repair(
        "single process",
        "counts a process that no launcher has started as one, because finetrainers counts the GPUs instead",
        _release_0_2_0,
        _count_a_lone_process_as_one,
    ),
    Repair(
        "ports",
        "joins processes of one machine by memory or a file, because finetrainers opens a port to everybody, and "
        "those that torchrun has started again apart from what is left in its store of before",
        _release_0_2_0,
        _meet_without_ports,
    ),
    Repair(
        "accelerate processes",
        "refuses accelerate with more than one process, because finetrainers would not synchronise their gradients",
        _release_0_2_0,
        _refuse_accelerate_processes,
    ),
)
