"""Seeds by construction: every random draw of training has a seed computed from what it is for.

Resuming then needs no generator state, ranks never share noise and validation cannot disturb training.
"""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed that depends on all parts and on nothing else (not on the process, platform or hash randomisation)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
