"""More input channels for a pretrained text-to-video network.

A FrameBridge network sees [aligned latent, image latent] on the channel axis: twice the channels that the
text-to-video checkpoint was trained with. The new channels start at zero, so that the widened network computes
exactly what the pretrained one does until it is trained.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from diffusers import ModelMixin
from torch import nn

from framebridge_plugin.errors import FrameBridgeError

NetworkT = TypeVar("NetworkT", bound=ModelMixin)


def widen_input_channels(network: NetworkT, projection: str) -> NetworkT:
    """Doubles the inputs of a network's first layer, in place: old ones copied, new ones zero, config updated.

    Args:
        network: A diffusers network with `in_channels` and `out_channels` in its config. One that has twice as many
            input as output channels already is returned as it is.
        projection: The place of the layer that sees the latents: a convolution, or a linear layer over channels.

    Returns:
        The same network.

    Raises:
        FrameBridgeError: If it has another number of channels, or the layer sees more than channels (CogVideoX 1.5).
    """
    config = network.config
    in_channels, out_channels = config.in_channels, config.out_channels
    if in_channels == 2 * out_channels:
        return network
    layer: Any = network.get_submodule(projection)
    weight = layer.weight
    if in_channels != out_channels or weight.shape[1] != in_channels:
        raise FrameBridgeError(
            f"the transformer has {in_channels} input and {out_channels} output channels, {weight.shape[1]} at "
            f"{projection}; expected {out_channels} inputs (a text-to-video checkpoint) or {2 * out_channels} (a "
            "widened one)"
        )
    with torch.no_grad():
        wide = torch.cat([weight, torch.zeros_like(weight)], dim=1)
    layer.weight = nn.Parameter(wide, requires_grad=weight.requires_grad)
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", wide.shape[1])
    network.register_to_config(in_channels=wide.shape[1])
    return network
