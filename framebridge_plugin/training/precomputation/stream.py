"""The endless stream of training samples out of a store of latents: what `ClipStream` and the encoders would give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypedDict

import torch

from framebridge_plugin.data.bad_files import BadFile
from framebridge_plugin.data.permutation import KeyedPermutation
from framebridge_plugin.data.stream import EndlessStream
from framebridge_plugin.randomness import derive_seed
from framebridge_plugin.training.draws import drops_caption
from framebridge_plugin.training.precomputation.store import LatentStore

Conditions = Mapping[str, torch.Tensor]


class StoredSample(TypedDict):
    """What a clip and its caption became: `conditions` and `latents` as the specification's methods returned them.

    `skipped` lists the files that could not be read for it when it was precomputed.
    """

    conditions: dict[str, torch.Tensor]
    latents: dict[str, torch.Tensor]
    skipped: list[BadFile]


class StoredStream(EndlessStream[StoredSample]):
    """Yields for ever what `ClipStream` and the encoders would: same order, same draws, same sharing over ranks.

    Epoch e has the clips of variant e % variants in its own order; up to the last variant it is the very epoch that
    was precomputed. Which captions are dropped is drawn anew in every epoch.
    """

    def __init__(
        self,
        store: LatentStore,
        seed: int,
        caption_dropout: float,
        *,
        rank: int,
        world_size: int,
        start: int,
        drop_caption: Callable[[Conditions, Conditions], Conditions],
    ) -> None:
        super().__init__(seed, rank, world_size, start)
        self.store = store
        self.caption_dropout = caption_dropout
        self.drop_caption = drop_caption

    def sample(self, position: int) -> StoredSample:
        """The sample at a place in the endless sequence of all epochs."""
        manifest = self.store.manifest
        epoch, offset = divmod(position, manifest.rows)
        row = KeyedPermutation(manifest.rows, self.seed, epoch)[offset]
        variant = epoch % manifest.variants
        latents, caption, skipped = self.store.clip(
            variant, KeyedPermutation(manifest.rows, self.seed, variant).index(row)
        )
        conditions = self.store.caption(caption)
        if drops_caption(self.caption_dropout, derive_seed(self.seed, epoch, row)):
            conditions = dict(self.drop_caption(conditions, self.store.caption(manifest.empty_caption)))
        return {"conditions": conditions, "latents": latents, "skipped": skipped}
