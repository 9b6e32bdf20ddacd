"""The endless stream of training samples out of a store of latents: what `ClipStream` and the encoders would give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NotRequired, TypedDict

import torch

from framebridge_plugin.data.bad_files import BadFile
from framebridge_plugin.data.permutation import KeyedPermutation
from framebridge_plugin.data.stream import EndlessStream
from framebridge_plugin.randomness import derive_seed
from framebridge_plugin.training.draws import drops_caption
from framebridge_plugin.training.precomputation.numbering import Captions
from framebridge_plugin.training.precomputation.store import LatentStore

Conditions = Mapping[str, torch.Tensor]


class StoredSample(TypedDict):
    """What a clip and its caption became: `conditions` and `latents` as the specification's methods returned them.

    `skipped` lists the files that could not be read for it when it was precomputed. Of a store without captions it
    has `caption` and `sample_seed`, as a `ClipStream`'s, in place of `conditions`.
    """

    conditions: NotRequired[dict[str, torch.Tensor]]
    caption: NotRequired[str]
    sample_seed: NotRequired[int]
    latents: dict[str, torch.Tensor]
    skipped: list[BadFile]


class StoredCaptions:
    """The conditions of samples out of a store of captions, dropped as `prepare_conditions` drops them."""

    def __init__(
        self, store: LatentStore, dropout: float, drop_caption: Callable[[Conditions, Conditions], Conditions]
    ) -> None:
        self._store, self._dropout, self._drop_caption = store, dropout, drop_caption

    def conditions(self, number: int, sample_seed: int) -> dict[str, torch.Tensor]:
        """Those of a sample with the caption of that number."""
        conditions = self._store.caption(number)
        if drops_caption(self._dropout, sample_seed):
            empty = self._store.caption(self._store.manifest.empty_caption)
            conditions = dict(self._drop_caption(conditions, empty))
        return conditions


class StoredStream(EndlessStream[StoredSample]):
    """Yields for ever what `ClipStream` and the encoders would: same order, same draws, same sharing over ranks.

    Epoch e has the clips of variant e % variants in its own order; up to the last variant it is the very epoch that
    was precomputed. Which captions are dropped is drawn anew in every epoch. Without captions in the store,
    `captions` gives their texts.
    """

    def __init__(
        self,
        store: LatentStore,
        seed: int,
        captions: StoredCaptions | Captions,
        *,
        rank: int,
        world_size: int,
        start: int,
    ) -> None:
        super().__init__(seed, rank, world_size, start)
        self.store = store
        self.captions = captions

    def sample(self, position: int) -> StoredSample:
        """The sample at a place in the endless sequence of all epochs."""
        manifest = self.store.manifest
        epoch, offset = divmod(position, manifest.rows)
        row = KeyedPermutation(manifest.rows, self.seed, epoch)[offset]
        variant = epoch % manifest.variants
        latents, caption, skipped = self.store.clip(
            variant, KeyedPermutation(manifest.rows, self.seed, variant).index(row)
        )
        sample_seed = derive_seed(self.seed, epoch, row)
        if isinstance(self.captions, StoredCaptions):
            conditions = self.captions.conditions(caption, sample_seed)
            return {"conditions": conditions, "latents": latents, "skipped": skipped}
        text = self.captions.text(caption)
        return {"caption": text, "sample_seed": sample_seed, "latents": latents, "skipped": skipped}
