"""What finetrainers saves, and how it resumes."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version

from framebridge_plugin.training.finetrainers.repairs import Repair

_COUNTERS = ("step", "observed_data_samples", "observed_num_tokens")
_WRAPPER = "_checkpoint_wrapped_module."


def _training_state_refused() -> bool:
    from finetrainers.state import TrainState

    return TrainState not in torch.serialization.get_safe_globals()


def _resume_accelerate() -> None:
    from finetrainers.parallel.accelerate import AccelerateCheckpointer
    from finetrainers.state import TrainState

    torch.serialization.add_safe_globals([TrainState])
    original = AccelerateCheckpointer.load

    @functools.wraps(original)
    def load(self: Any, *args: Any, **kwargs: Any) -> bool:
        live = self.states
        loaded = original(self, *args, **kwargs)
        # finetrainers puts what it has read in the place of its dictionary, while the trainer goes on counting in the
        # objects that the dictionary held before.
        if self.states is not live:
            for name in live.keys() & self.states.keys():
                vars(live[name]).update(vars(self.states[name]))
            self.states = live
        return loaded

    AccelerateCheckpointer.load = load


def _counters_overflow() -> bool:
    from finetrainers.state import TrainState

    try:
        TrainState(observed_num_tokens=2**31).state_dict()
    except (RuntimeError, OverflowError):
        return True
    return False


def _count_in_64_bits() -> None:
    from finetrainers.state import TrainState

    original = TrainState.state_dict

    @functools.wraps(original)
    def state_dict(self: Any) -> dict[str, Any]:
        counts = {name: torch.tensor(getattr(self, name), dtype=torch.int64) for name in _COUNTERS}
        return original(dataclasses.replace(self, **dict.fromkeys(_COUNTERS, 0))) | counts

    TrainState.state_dict = state_dict


def _peft_overlooks_checkpointed_layers() -> bool:
    # Trying it out would load bitsandbytes; where peft finds the layers itself, the repair changes nothing.
    import peft

    is_repaired = hasattr(peft.get_peft_model_state_dict, "__wrapped__")
    return Version(peft.__version__) >= Version("0.21") and not is_repaired


def _find_checkpointed_layers() -> None:
    import peft

    repaired = _with_module_names(peft.get_peft_model_state_dict)
    for name in (
        "peft",
        "peft.utils",
        "finetrainers.trainer.sft_trainer.trainer",
        "finetrainers.trainer.control_trainer.trainer",
    ):
        module: Any = importlib.import_module(name)
        module.get_peft_model_state_dict = repaired


def _with_module_names(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(original)
    def get_peft_model_state_dict(
        model: torch.nn.Module, state_dict: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        names = {name.replace(_WRAPPER, ""): name for name, _ in model.named_parameters() if _WRAPPER in name}
        if not names:
            return original(model, state_dict, *args, **kwargs)
        # peft looks for the names of modules in a state dict whose names lack the checkpoint wrapper.
        state_dict = model.state_dict() if state_dict is None else state_dict
        state_dict = {names.get(name, name): tensor for name, tensor in state_dict.items()}
        found = original(model, state_dict, *args, **kwargs)
        return {name.replace(_WRAPPER, ""): tensor for name, tensor in found.items()}

    return get_peft_model_state_dict


REPAIRS = (
    Repair(
        "resume with accelerate",
        "lets torch.load read the training state, which it refuses, and copies it to where the trainer counts",
        _training_state_refused,
        _resume_accelerate,
    ),
    Repair(
        "counters",
        "stores the counts of steps, samples and tokens in 64 bits, because saving fails after 2^31 tokens",
        _counters_overflow,
        _count_in_64_bits,
    ),
    Repair(
        "checkpointed LoRA layers",
        "finds LoRA weights inside checkpoint wrappers, because peft from 0.21 on saves an empty LoRA",
        _peft_overlooks_checkpointed_layers,
        _find_checkpointed_layers,
    ),
)
