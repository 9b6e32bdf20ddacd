"""The numbers of captions in a store."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from framebridge_plugin.data import ClipIndex, ClipSettings
from framebridge_plugin.data.folders import ClipRows
from framebridge_plugin.randomness import derive_seed


class Captions:
    """The distinct captions of all data sets, and the empty one, numbered in the order of their hashes.

    Only the hashes are in memory, 16 bytes for each row.
    """

    def __init__(self, datasets: Sequence[tuple[ClipIndex, ClipSettings]]) -> None:
        self._rows = ClipRows(datasets)
        texts = (text for index, _ in datasets for _, batch in index.batches() for text in batch)
        hashes = np.fromiter(map(_hash, itertools.chain(texts, [""])), np.uint64, count=len(self._rows) + 1)
        self._hashes, self._row_of_number = np.unique(hashes, return_index=True)

    def __len__(self) -> int:
        return len(self._hashes)

    def number(self, caption: str) -> int:
        """The number of a caption, which must be among them."""
        return int(np.searchsorted(self._hashes, _hash(caption)))

    def text(self, number: int) -> str:
        """The caption of a number."""
        row = int(self._row_of_number[number])
        return self._rows[row][1] if row < len(self._rows) else ""


def _hash(caption: str) -> np.uint64:
    return np.uint64(derive_seed("caption", caption))
