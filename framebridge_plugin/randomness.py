"""Seeds by construction: every random draw of training has a seed computed from what it is for.

Resuming then needs no generator state, ranks never share noise and validation cannot disturb training.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(*parts: int | str) -> int:
    """A seed that depends on all parts and on nothing else (not on the process, platform or hash randomisation)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_global_generators(seed: int, device: torch.device) -> None:
    """Seeds torch's own generators of the CPU and of a device that is in use.

    `torch.manual_seed` gives the same draws, but keeps a traceback of every call for each kind of device that is not.
    """
    import torch

    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        there = torch.get_device_module(device)
        getattr(there, "manual_seed_all", there.manual_seed)(seed)
