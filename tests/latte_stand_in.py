"""The network with which the reference's Latte numbers were made: a fixed linear map of all that it is shown."""

from __future__ import annotations

from typing import Any

import torch

from framebridge_plugin.models import LatteTransformer
from framebridge_plugin.schedulers import FrameBridgeScheduler

BACKBONE = {
    "_class_name": "CogVideoXDDIMScheduler",
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "snr_shift_scale": 1.0,
    "rescale_betas_zero_snr": False,
}


class StandInLatte(LatteTransformer):
    """out[b, g, c] = sum over f, k of frames[g, f] channels[c, k] x[b, f, k] + time[c] t[b] / 1000."""

    def __init__(self, vectors: dict[str, torch.Tensor], takes_neural_prior: bool, frame_scale: float = 1.0) -> None:
        super().__init__(
            num_layers=2,
            num_attention_heads=1,
            attention_head_dim=4,
            in_channels=8 if takes_neural_prior else 4,
            out_channels=4,
            sample_height=4,
            sample_width=4,
            num_frames=4,
            num_classes=1,
        )
        self.frames = frame_scale * vectors["standin.Fmat"]
        self.channels = vectors["standin.Mn" if takes_neural_prior else "standin.M"]
        self.time = vectors["standin.u"]
        self.seen_inputs: list[torch.Tensor] = []
        self.seen_times: list[torch.Tensor] = []

    def forward(
        self, hidden_states: torch.Tensor, timestep: Any, class_labels: torch.Tensor, return_dict: bool = True
    ) -> tuple[torch.Tensor]:
        assert not return_dict
        self.seen_inputs.append(hidden_states)
        self.seen_times.append(timestep)
        output = torch.einsum("gf,ck,bfkhw->bgchw", self.frames, self.channels, hidden_states)
        return (output + self.time.view(1, 1, -1, 1, 1) * timestep.view(-1, 1, 1, 1, 1) / 1000,)


class RecordedNoise(FrameBridgeScheduler):
    """A scheduler whose draws are the ones that the reference recorded."""

    noises: list[torch.Tensor]

    def _draw(self, like, generator):
        return self.noises.pop(0)


def make_scheduler(is_aligned: bool, noises: torch.Tensor | tuple = (), **settings: Any) -> RecordedNoise:
    """The reference's bridge: SNR-aligned to DDPM's linear betas or not, its options chosen by name."""
    settings = {"target": "eps_psi", "grid": "linspace", **settings}
    if is_aligned:
        settings["backbone"] = BACKBONE
    scheduler = RecordedNoise(**settings)
    scheduler.noises = list(noises)
    return scheduler
