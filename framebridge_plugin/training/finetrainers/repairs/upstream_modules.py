"""The functions of finetrainers' sub-modules that are missing from its wheel, written anew.

finetrainers 0.2.0 was packed without `finetrainers/patches/dependencies` and `finetrainers/patches/models`, which it
imports. What each function has to do follows from where finetrainers calls it. `MISSING_MODULES` says which function
belongs to which module; `importing.MissingModuleFinder` serves them where the real ones are absent.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from framebridge_plugin.backbones.folders import LORA_FILE


def load_lora_weights(pipeline: Any, path: str | Path, adapter_name: str | None = None) -> None:
    """Loads a LoRA that finetrainers has saved into a diffusers pipeline's transformer.

    finetrainers writes rank and alpha into the file's header under a key of its own, which diffusers does not read:
    it would take alpha for equal to the rank, and scale the LoRA wrongly wherever they differ.
    """
    from safetensors import safe_open

    file = Path(path) / LORA_FILE if Path(path).is_dir() else Path(path)
    with safe_open(file, framework="pt") as weights:
        header = weights.metadata() or {}
        state_dict = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 (no mapping)
    # A file of another origin is diffusers' own business.
    metadata = None
    if "lora_config" in header:
        metadata = {f"transformer.{key}": value for key, value in json.loads(header["lora_config"]).items()}
    pipeline.transformer.load_lora_adapter(
        state_dict, prefix="transformer", adapter_name=adapter_name, metadata=metadata
    )


def patch_diffusers_rms_norm_forward() -> None:
    """Makes diffusers' RMSNorm return the type of its input.

    With a float32 weight and half-precision input (LoRA training keeps trainable weights in float32) it returns
    float32; attention then refuses queries and keys that differ in type from the values.
    """
    from diffusers.models import normalization

    rms_norm: Any = normalization.RMSNorm
    original = rms_norm.forward
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original(self, hidden_states, *args, **kwargs).to(hidden_states.dtype)

    rms_norm.forward = forward


@contextlib.contextmanager
def control_channel_concat(
    module: torch.nn.Module, input_names: Sequence[str], inputs: Sequence[torch.Tensor], dims: Sequence[int]
) -> Iterator[None]:
    """While the context lasts, appends tensors to inputs of a module."""
    signature = inspect.signature(module.forward)
    if unknown := [name for name in input_names if name not in signature.parameters]:
        raise ValueError(f"{type(module).__name__}.forward has no parameter {', '.join(unknown)}")
    appended = list(zip(input_names, inputs, dims, strict=True))

    def append(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        bound = signature.bind(*args, **kwargs)
        for name, tensor, dim in appended:
            given = bound.arguments[name]
            bound.arguments[name] = torch.cat([given, tensor.to(given)], dim=dim)
        return bound.args, bound.kwargs

    hook = module.register_forward_pre_hook(append, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def patch_peft_move_adapter_to_device_of_base_layer() -> None:
    """Makes peft keep an adapter's type when it moves the adapter to the device of a base layer of 8 bits.

    With layerwise upcasting the base layers are stored so; peft would cast the adapter's weights to that type as well,
    and training would start from weights that 8 bits have rounded. Beside other layers, such as those of a pipeline
    that is opened later in the same process, peft does as ever.
    """
    from finetrainers.patches.utils import DisableTensorToDtype
    from peft.tuners import tuners_utils

    layer: Any = tuners_utils.BaseTunerLayer
    original = layer._move_adapter_to_device_of_base_layer
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def move(self: Any, *args: Any, **kwargs: Any) -> None:
        weight = getattr(self.get_base_layer(), "weight", None)
        is_8_bit = weight is not None and weight.is_floating_point() and weight.element_size() == 1
        with DisableTensorToDtype() if is_8_bit else contextlib.nullcontext():
            original(self, *args, **kwargs)

    layer._move_adapter_to_device_of_base_layer = move


def _not_provided(module: str, function: str, when: str) -> Callable[[], NoReturn]:
    def refuse() -> NoReturn:
        raise NotImplementedError(
            f"{module}.{function} is missing from the finetrainers wheel and framebridge-plugin does not provide it; "
            f"{when} is not available"
        )

    refuse.__name__ = function
    return refuse


_LTX, _WAN = "finetrainers.patches.models.ltx_video.patch", "finetrainers.patches.models.wan.patch"

MISSING_MODULES: dict[str, dict[str, Any] | None] = {
    "finetrainers.patches.dependencies": None,
    "finetrainers.patches.dependencies.diffusers": None,
    "finetrainers.patches.dependencies.diffusers.control": {"control_channel_concat": control_channel_concat},
    "finetrainers.patches.dependencies.diffusers.patch": {
        "patch_diffusers_rms_norm_forward": patch_diffusers_rms_norm_forward
    },
    "finetrainers.patches.dependencies.diffusers.peft": {"load_lora_weights": load_lora_weights},
    "finetrainers.patches.dependencies.diffusers.rms_norm": {
        "patch_diffusers_rms_norm_forward": patch_diffusers_rms_norm_forward
    },
    "finetrainers.patches.dependencies.peft": None,
    "finetrainers.patches.dependencies.peft.patch": {
        "patch_peft_move_adapter_to_device_of_base_layer": patch_peft_move_adapter_to_device_of_base_layer
    },
    "finetrainers.patches.models": None,
    "finetrainers.patches.models.ltx_video": None,
    _LTX: {
        "patch_transformer_forward": _not_provided(_LTX, "patch_transformer_forward", "training LTX-Video"),
        "patch_apply_rotary_emb_for_tp_compatibility": _not_provided(
            _LTX, "patch_apply_rotary_emb_for_tp_compatibility", "tensor parallelism for LTX-Video"
        ),
    },
    "finetrainers.patches.models.wan": None,
    _WAN: {
        "patch_time_text_image_embedding_forward": _not_provided(
            _WAN, "patch_time_text_image_embedding_forward", "layerwise upcasting of Wan's transformer"
        ),
    },
}
"""Name of each missing module -> its functions; None marks a package that only holds other modules."""
