"""The random draws of a sample, each from a generator of its own."""

from __future__ import annotations

import torch

from framebridge_plugin.randomness import derive_seed


def sample_generator(
    sample_seed: int | None, purpose: str, generator: torch.Generator | None
) -> torch.Generator | None:
    """The generator of one draw for a sample: keyed on the sample where its seed (from `ClipStream`) is known, else
    the trainer's.
    """
    if sample_seed is None:
        return generator
    return torch.Generator().manual_seed(derive_seed(int(sample_seed), purpose))


def drops_caption(share: float, sample_seed: int | None, generator: torch.Generator | None = None) -> bool:
    """Draws whether a sample loses its caption, for classifier-free guidance; one number is drawn in any case."""
    draw = sample_generator(sample_seed, "caption dropout", generator)
    device = draw.device if draw is not None else "cpu"
    return bool(torch.rand((), generator=draw, device=device) < share)
