"""Captions embedded once: a text encoder is there for as long as there are new ones, and not beside the network after.

It takes 9.5 GB in bfloat16 (T5-XXL) and 2 TFLOP for every caption.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from framebridge_plugin import signals
from framebridge_plugin.backbones.fingerprint import short_digest
from framebridge_plugin.data import ClipIndex, ClipSettings
from framebridge_plugin.files import writing
from framebridge_plugin.processes import is_first, process_count, rank
from framebridge_plugin.progress import Progress
from framebridge_plugin.training.precomputation.fingerprint import OF_CAPTIONS
from framebridge_plugin.training.precomputation.store import checksum

if TYPE_CHECKING:
    from framebridge_plugin.training.specification import BridgeSpecification

Conditions = dict[str, torch.Tensor]

_SUFFIX, _CHECKSUM = ".safetensors", "checksum"


class CaptionCache:
    """The conditions of captions, up to a limit, in memory or as files that ranks and later runs share.

    Nothing is thrown out: an epoch has every row once, so that what came last is no more likely to come again.

    Args:
        gib: The limit, in GiB.
        folder: Where the files lie; None for memory.
    """

    def __init__(self, gib: float, folder: Path | None = None) -> None:
        self._bytes, self.folder = int(min(gib, 2.0**30) * 2**30), folder  # of an endless number there is no int
        self._kept: dict[str, Conditions] = {}

    def conditions(self, caption: str, encode: Callable[[], Mapping[str, torch.Tensor]]) -> Conditions:
        """What `encode` gives for a caption, on the CPU; it is not called where that is known."""
        found = self.find(caption)
        if found is None:
            found = {name: value.cpu() for name, value in encode().items()}
            if self.holds(caption) or self._count() < self.room(found):
                self._keep(caption, found)
        return found

    def find(self, caption: str) -> Conditions | None:
        """The conditions of a caption if they are known; a file that is not as it was written is none."""
        if self.folder is None:
            return self._kept.get(caption)
        with contextlib.suppress(OSError, SafetensorError), safe_open(self._file(caption), "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if (file.metadata() or {}).get(_CHECKSUM) == _named_checksum(found):
                return found
        return None

    def holds(self, caption: str) -> bool:
        """Whether there is something for a caption, in a folder a file that may be damaged."""
        return caption in self._kept if self.folder is None else self._file(caption).is_file()

    def room(self, conditions: Mapping[str, torch.Tensor]) -> int:
        """How many such conditions the cache holds when it is full."""
        return self._bytes // sum(value.nbytes for value in conditions.values())

    def _count(self) -> int:
        if self.folder is None:
            return len(self._kept)
        # Not what others write at the moment, or have left half written.
        return sum(1 for _ in self.folder.glob(f"*{_SUFFIX}"))

    def _keep(self, caption: str, conditions: Conditions) -> None:
        if self.folder is None:
            self._kept[caption] = conditions
            return
        # Ranks that write the same caption write the same file; each has a name of its own for what is not whole.
        file = self._file(caption)
        partial = file.with_suffix(f".{rank()}-{os.getpid()}")
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
            mode = partial.stat().st_mode
            save_file(conditions, partial, {_CHECKSUM: _named_checksum(conditions)})
            partial.chmod(mode)  # safetensors makes files that nobody else can read
            partial.replace(file)

    def _file(self, caption: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{hashlib.blake2b(caption.encode(), digest_size=16).hexdigest()}{_SUFFIX}"


def _named_checksum(conditions: Conditions) -> str:
    shapes = {name: (value.dtype, tuple(value.shape)) for name, value in sorted(conditions.items())}
    return f"{shapes} {checksum(conditions)}"


def caption_cache(args: Any, specification: BridgeSpecification, device: torch.device) -> CaptionCache:
    """The cache of a run; of a folder it takes the part for text encoders such as its own."""
    settings, folder = args.framebridge_trainer, args.framebridge_trainer.caption_cache_dir
    if folder is not None:
        facts = specification.precomputation_facts().items()
        of_text = {name: fact for name, fact in facts if name.startswith(OF_CAPTIONS)}
        folder = Path(folder, short_digest(of_text | {"device": device.type}))
    return CaptionCache(settings.caption_cache_gib, folder)


class Embedder:
    """Embeds captions by the text encoder of a specification, which is loaded when a new one comes.

    Args:
        specification: The model, with its `captions`.
        device: Where the text encoder computes.
        models: What encodes captions, if it is loaded; later what was loaded.
    """

    def __init__(self, specification: BridgeSpecification, device: torch.device, models: dict[str, Any]) -> None:
        self._specification, self._device, self.models = specification, device, models

    def __call__(self, caption: str) -> Conditions:
        """The conditions of a caption, on the CPU."""
        cache = self._specification.captions
        assert cache is not None
        return cache.conditions(caption, lambda: self._encode(caption))

    @torch.no_grad()
    def _encode(self, caption: str) -> Conditions:
        if not self.models:
            self.models = self._specification.load_text_models()
            for model in self.models.values():
                if isinstance(model, torch.nn.Module):
                    model.to(self._device)
        return self._specification.adapter.encode_caption(self.models, caption, dropped=False)


def embed_ahead(
    embed: Embedder,
    cache: CaptionCache,
    datasets: Sequence[tuple[ClipIndex, ClipSettings]],
    *,
    samples: int,
    wait: Callable[[], None],
) -> bool:
    """Embeds the empty caption and all of the data, if the cache holds them and the run has as many samples; whether
    it did. With a folder each rank takes a share.
    """
    captions = distinct_captions(datasets, min(cache.room(embed("")), samples))
    if captions is None:
        return False
    ordered = sorted(captions)
    if cache.folder is not None:
        done = _embed_all(embed, ordered[rank() :: process_count()])
        wait()
        if not done:
            return False
    # A folder may be full of other runs' captions.
    new = [caption for caption in ordered if not cache.holds(caption)]
    return _embed_all(embed, new) and all(map(cache.holds, ordered))


def _embed_all(embed: Embedder, captions: Sequence[str]) -> bool:
    with Progress(len(captions), "Captions", unit="caption", disable=not (captions and is_first())) as bar:
        for caption in captions:
            if signals.pending() is not None:
                return False
            embed(caption)
            bar.update()
    return True


def distinct_captions(datasets: Sequence[tuple[ClipIndex, ClipSettings]], most: int) -> Collection[str] | None:
    """The captions that occur, and the empty one; None if they are more than so many."""
    found = {""}
    for text in _texts(datasets):
        found.add(text)
        if len(found) > most:
            return None
    return found


def _texts(datasets: Sequence[tuple[ClipIndex, ClipSettings]]) -> Iterator[str]:
    for index, _ in datasets:
        for _, captions in index.batches():
            yield from captions
