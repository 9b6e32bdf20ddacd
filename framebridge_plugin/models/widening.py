"""More input channels for a pretrained CogVideoX transformer.

A FrameBridge network sees [aligned latent, image latent] on the channel axis: twice the channels that the
text-to-video checkpoint was trained with. The new channels start at zero, so that the widened network computes
exactly what the pretrained one does until it is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import nn

from framebridge_plugin.backbones.cogvideox.facts import config_problem
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.models.whole_weights import whole_weights


def widen_input_channels(transformer: CogVideoXTransformer3DModel) -> CogVideoXTransformer3DModel:
    """Doubles the input channels of `patch_embed.proj`, in place: old ones copied, new ones zero, config updated.

    Args:
        transformer: A CogVideoX 1.0 transformer (2B, or 5B with rotary embeddings). One that has twice as many input
            as output channels already is returned as it is.

    Returns:
        The same transformer.

    Raises:
        FrameBridgeError: If the transformer is a CogVideoX 1.5 (`patch_size_t`) or has another number of channels.
    """
    config = transformer.config
    if problem := config_problem("transformer", config):
        raise FrameBridgeError(f"the transformer {problem}")
    in_channels = 2 * config.out_channels
    if config.in_channels == in_channels:
        return transformer
    if config.in_channels != config.out_channels:
        raise FrameBridgeError(
            f"the transformer has {config.in_channels} input and {config.out_channels} output channels; expected "
            f"{config.out_channels} inputs (a text-to-video checkpoint) or {in_channels} (a widened one)"
        )

    old = transformer.patch_embed.proj
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        kernel_size=old.kernel_size,
        stride=old.stride,
        bias=old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels].copy_(old.weight)
        if new.bias is not None and old.bias is not None:
            new.bias.copy_(old.bias)
    new.requires_grad_(old.weight.requires_grad)
    transformer.patch_embed.proj = new
    transformer.register_to_config(in_channels=in_channels)
    return transformer


def load_bridge_transformer(
    pretrained_model_name_or_path: str, *, subfolder: str | None = None, **kwargs: Any
) -> CogVideoXTransformer3DModel:
    """Loads a CogVideoX transformer and widens it where that is needed.

    Args:
        pretrained_model_name_or_path: A folder or hub id: a whole CogVideoX model (with `subfolder="transformer"`),
            plain or widened already, or a `transformer/` folder alone.
        subfolder: The folder of the transformer inside a whole model.
        **kwargs: Passed to diffusers' `from_pretrained` (`dtype`, `revision`, `cache_dir`, ...).

    Returns:
        A transformer with twice as many input as output channels.

    Raises:
        FrameBridgeError: If it is a CogVideoX 1.5, has another number of channels, or its weights lack a tensor.
    """
    where = {name: kwargs[name] for name in ("revision", "cache_dir") if name in kwargs}
    config = CogVideoXTransformer3DModel.load_config(pretrained_model_name_or_path, subfolder=subfolder, **where)
    if problem := config_problem("transformer", config):  # before a long download
        raise FrameBridgeError(f"{pretrained_model_name_or_path} {problem}")
    with whole_weights():
        transformer = CogVideoXTransformer3DModel.from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
    return widen_input_channels(transformer)
