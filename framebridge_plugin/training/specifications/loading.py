"""Loading the components of a model's folder or id, with one-line errors for whatever is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler
from diffusers.configuration_utils import FrozenDict
from safetensors import SafetensorError
from transformers import T5EncoderModel, T5Tokenizer

from framebridge_plugin.backbones.cogvideox.facts import COGVIDEOX
from framebridge_plugin.backbones.facts import BackboneFacts
from framebridge_plugin.backbones.folders import config_problem, find_saved_model, two_file_problem
from framebridge_plugin.errors import FrameBridgeError, first_line
from framebridge_plugin.models.whole_weights import whole_weights
from framebridge_plugin.schedulers import FrameBridgeScheduler

LOADING_ERRORS = (OSError, RuntimeError, ValueError, TypeError, SafetensorError)
"""What diffusers, transformers and safetensors raise for files that are missing, damaged or of another kind."""

COGVIDEOX_FOLDER = (
    "a complete CogVideoX model in diffusers format (model_index.json, transformer/, vae/, text_encoder/, tokenizer/, "
    "scheduler/)"
)


def cannot_load(
    what: str, source: str, reason: BaseException | str, expected: str = COGVIDEOX_FOLDER
) -> FrameBridgeError:
    """The error, of one line, for a component that cannot be loaded; `expected` says what the folder should be."""
    if problem := two_file_problem(find_saved_model(Path(source)) or Path(source)):
        return FrameBridgeError(problem)
    return FrameBridgeError(
        f"cannot load {what} from {source!r}: {first_line(reason)}; check that the folder is {expected}"
    )


def load_config(
    component_class: Any,
    source: str,
    subfolder: str | None,
    *,
    expected: str = COGVIDEOX_FOLDER,
    **hub_settings: Any,
) -> FrozenDict:
    """A component's config, refused if it is of another class; `expected` says what its folder should be."""
    name = component_class.__name__
    try:
        config = component_class.load_config(source, subfolder=subfolder, **hub_settings)
    except LOADING_ERRORS as error:
        raise cannot_load(name, source, error, expected) from error
    if config.get("_class_name") != name:
        raise cannot_load(name, source, f"it is of the class {config.get('_class_name')}", expected)
    return FrozenDict(**config)


def load_backbone(
    source: str, kind: BackboneFacts = COGVIDEOX, *, expected: str = COGVIDEOX_FOLDER, **hub_settings: Any
) -> CogVideoXDDIMScheduler | None:
    """The diffusion process that a model was pretrained on.

    Args:
        source: Folder or id of a whole model.
        kind: Which model it should be.
        expected: What the folder should be.
        **hub_settings: `revision` and `cache_dir`.

    Returns:
        Its noise schedule; of a bridge, whose own settings are left out, the one that it was fine-tuned from. None for
        a bridge that has none.

    Raises:
        FrameBridgeError: If the scheduler's config is missing or damaged, or of a process that the bridge is not
            aligned to.
    """
    try:
        config = CogVideoXDDIMScheduler.load_config(source, subfolder="scheduler", **hub_settings)
    except LOADING_ERRORS as error:
        raise cannot_load("scheduler", source, error, expected) from error
    if problem := config_problem(config, "scheduler", kind):
        raise cannot_load("scheduler", source, f"it {problem}", expected)
    if config.get("_class_name") == FrameBridgeScheduler.__name__:
        config = FrameBridgeScheduler.from_config(config).config.backbone
    if config is None:
        return None
    # CogVideoX-5B names the DPM scheduler; its noise schedule is the same, and finetrainers knows this class.
    return CogVideoXDDIMScheduler.from_config({key: value for key, value in config.items() if key != "_class_name"})


def set_switches(pipeline: Any, switches: Mapping[str, Any]) -> None:
    """Applies finetrainers' `enable_slicing`, `enable_tiling` and `enable_model_cpu_offload` to a pipeline."""
    if switches.get("enable_slicing"):
        pipeline.vae.enable_slicing()
    if switches.get("enable_tiling"):
        pipeline.vae.enable_tiling()
    if switches.get("enable_model_cpu_offload"):
        pipeline.enable_model_cpu_offload()


def load_tokenizer(source: str, subfolder: str, **hub_settings: Any) -> T5Tokenizer:
    """A T5 tokenizer with its vocabulary; the subfolder is empty for a tokenizer alone."""
    try:
        tokenizer = T5Tokenizer.from_pretrained(source, subfolder=subfolder, **hub_settings)
    except LOADING_ERRORS as error:
        raise cannot_load("tokenizer", source, error) from error
    # Without its file, transformers makes up a vocabulary of special tokens and one more.
    if len(tokenizer) - len(tokenizer.added_tokens_decoder) <= 1:
        raise cannot_load("tokenizer", source, "it has no vocabulary (spiece.model)")
    return tokenizer


def load_text_encoder(source: str, subfolder: str, dtype: torch.dtype, **hub_settings: Any) -> T5EncoderModel:
    """A T5 encoder; finetrainers' own loading takes a T5 with its decoder for `text_encoder_id`."""
    try:
        with whole_weights():
            return T5EncoderModel.from_pretrained(source, subfolder=subfolder, dtype=dtype, **hub_settings)
    except LOADING_ERRORS as error:
        raise cannot_load("text encoder", source, error) from error


def rate_setting(specification: Any) -> dict[str, float]:
    """The pipeline's setting `fps`, where the rate of the training clips is known."""
    return {} if specification.clip_rate is None else {"fps": specification.clip_rate}
