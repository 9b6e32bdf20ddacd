"""The network: two convolutions, and between them a block that is told the caption and the time."""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn


class Block(nn.Module):
    """A layer over channels, to whose input the mean of the caption and the time are added."""

    def __init__(self, width: int, text_dim: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.text = nn.Linear(text_dim, width)
        self.time = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        told = self.text(text.mean(dim=1)) + self.time(time)
        return hidden + nn.functional.silu(self.to_q(hidden + told[:, None, None, None]))


class MiniTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Latents [B, C, T, h, w], times [B] in [0, 1000] and text [B, L, D] to the flow, [B, C, T, h, w]."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, in_channels: int = 4, out_channels: int = 4, width: int = 16, text_dim: int = 16) -> None:
        super().__init__()
        self.proj_in = nn.Conv3d(in_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList([Block(width, text_dim)])
        self.proj_out = nn.Conv3d(width, out_channels, 3, padding=1)

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        time = get_timestep_embedding(time, self.config.width).to(latents.dtype)
        hidden = self.proj_in(latents).movedim(1, -1)
        for block in self.blocks:
            hidden = block(hidden, text, time)
        return self.proj_out(hidden.movedim(-1, 1))
