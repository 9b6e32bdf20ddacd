"""Precomputed latents and embeddings on disk: their format, writing and reading it.

    manifest.json                             what is in it, and the fingerprint of what it was made from
    clips/variant-0000/000000.safetensors     what `prepare_latents` returned, `shard_size` clips in a file
    captions/000000.safetensors               what `prepare_conditions` returned, `shard_size` captions in a file

Variant v holds the samples of epoch v in the order of that epoch: the sample at offset o is row o % shard_size of
file o // shard_size. Every tensor of a file has one row for each sample; `_caption` is the number of its caption,
`_checksum` the CRC-32 of all of its values. The file's metadata says under "skipped" which clips could not
be read for a sample. A caption's embedding is stored once, however many clips have it; the empty one is among them.
A store may hold the clips alone, or the captions. Embeddings in fp8 (e4m3) have a factor for each token,
`_scale.NAME`. Format 1 is what has both, as the encoders gave it.

A file is written beside its place and renamed, so that one that is there is whole.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from framebridge_plugin.backbones.fingerprint import first_difference
from framebridge_plugin.data.bad_files import BadFile
from framebridge_plugin.errors import FrameBridgeError, UsageError, in_one_line
from framebridge_plugin.files import write_through
from framebridge_plugin.recipe.schema import recipe_settings
from framebridge_plugin.training.precomputation.fingerprint import as_read_by, part_of

MANIFEST_FILE = "manifest.json"
FORMAT = 2
PARTS = ("latents", "captions")
CAPTION_DTYPES = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}
_CAPTION, _CHECKSUM, _SKIPPED, _SCALE = "_caption", "_checksum", "skipped", "_scale."
_OPEN_FILES = 16
_MEASURED_FILES = 32
_DAMAGE = (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError)
_REMEDY = "run `finetrainers precompute` again"


class StoreError(FrameBridgeError):
    """A file of a store is missing or damaged."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises a worker's error again with the whole traceback as its message; its last line is ours.
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


@dataclass(frozen=True)
class Shard:
    """One file of a store."""

    name: str
    first: int
    """Number of its first sample (variant * rows + offset) or caption."""
    count: int
    """Samples or captions in it."""


@dataclass(frozen=True)
class Manifest:
    """What a store holds: `variants` epochs of `rows` clips, and all distinct captions."""

    rows: int
    variants: int
    captions: int
    empty_caption: int
    """Number of the empty caption."""
    shard_size: int
    """Samples or captions in a file."""
    fingerprint: Mapping[str, Any]
    clip_rate: float | None = None
    """Frames per second at which the clips are seen; None if nothing says it."""
    holds: Sequence[str] = PARTS
    """"latents", "captions", or both."""
    caption_dtype: str | None = None
    """Key of `CAPTION_DTYPES`; None for what the text encoder gave."""

    def clip_shards(self) -> Iterator[Shard]:
        """Yields the files of samples, variant by variant."""
        for variant in range(self.variants if "latents" in self.holds else 0):
            for shard in self._shards(f"clips/variant-{variant:04}", self.rows):
                yield dataclasses.replace(shard, first=variant * self.rows + shard.first)

    def caption_shards(self) -> Iterator[Shard]:
        """Yields the files of captions."""
        return self._shards("captions", self.captions if "captions" in self.holds else 0)

    def _shards(self, folder: str, total: int) -> Iterator[Shard]:
        for first in range(0, total, self.shard_size):
            name = f"{folder}/{first // self.shard_size:06}.safetensors"
            yield Shard(name, first, min(self.shard_size, total - first))

    def missing(self, store: Path) -> tuple[list[Shard], list[Shard]]:
        """The files of captions and those of samples that are not there."""
        present = {
            f"{folder.relative_to(store)}/{entry.name}"
            for folder in [store / "captions", *store.glob("clips/variant-*")]
            if folder.is_dir()
            for entry in os.scandir(folder)
        }
        captions = [shard for shard in self.caption_shards() if shard.name not in present]
        return captions, [shard for shard in self.clip_shards() if shard.name not in present]

    def write(self, store: Path) -> None:
        """Writes the manifest."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}

        def write(path: Path) -> None:
            path.write_text(json.dumps(content, indent=2) + "\n")

        write_through(store / MANIFEST_FILE, write)


def read_manifest(store: Path) -> Manifest | None:
    """Reads what a store holds; None if there is no manifest."""
    path = store / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        found = content.pop("format")
        if found not in range(1, FORMAT + 1):
            raise ValueError(f"its format is {found}, this release reads up to {FORMAT}")
        return Manifest(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FrameBridgeError(
            f"{path} is no manifest of precomputed latents: {in_one_line(error)}; precompute into another folder"
        ) from error


def check_fingerprint(
    store: Path, manifest: Manifest, fingerprint: Mapping[str, Any], *, to_read: bool = True
) -> None:
    """Refuses a store that was made from something else than a run would use, be it `to_read` or to add to it."""
    there, here = (part_of(facts, manifest.holds) for facts in (manifest.fingerprint, fingerprint))
    there = as_read_by(there, here) if to_read else there
    difference = first_difference(there, here)
    if difference is not None and difference.startswith("model.objective is diffusion there"):
        raise UsageError(
            f"{store}: it was made for the diffusion baseline, without the noisy prior of this bridge; precompute "
            "with framebridge.objective=bridge into another folder, which serves both"
        )
    if difference is not None:
        name, _, said = difference.partition(" is ")
        if len(fingerprint.get("data", ())) < 2 or not name.startswith("data."):  # else which of them counts, too
            name = {setting: path for path, _, setting in recipe_settings()}.get(name.rpartition(".")[2], name)
        raise UsageError(
            f"{store}: its {' and '.join(manifest.holds)} are not those of this run: {name} is {said}; set that back, "
            "or precompute into another folder"
        )


def compressed(conditions: Mapping[str, torch.Tensor], dtype: str | None) -> dict[str, torch.Tensor]:
    """Conditions [1, ..., D] as a store keeps them in a `CAPTION_DTYPES`; `_uncompressed` takes them back."""
    stored = dict(conditions)
    for name, value in conditions.items():
        if dtype is None or not value.is_floating_point():
            continue
        if dtype == "fp8":
            scale = value.float().abs().amax(-1, keepdim=True) / torch.finfo(CAPTION_DTYPES[dtype]).max
            stored[_SCALE + name] = scale = torch.where(scale == 0, 1.0, scale)
            value = value.float() / scale
        stored[name] = value.to(CAPTION_DTYPES[dtype])
    return stored


def _uncompressed(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    scales = {name.removeprefix(_SCALE): stored.pop(name) for name in list(stored) if name.startswith(_SCALE)}
    return stored | {name: stored[name].float() * scale for name, scale in scales.items()}


def write_shard(
    path: Path,
    rows: Sequence[Mapping[str, torch.Tensor]],
    captions: Sequence[int] = (),
    skipped: Mapping[int, Sequence[BadFile]] | None = None,
) -> None:
    """Writes the rows of one file, each a tensor [1, ...] by its name; with samples, their captions' numbers.

    `skipped` says of a row which clips were tried for it and could not be read.
    """
    layouts = {json.dumps({name: [list(t.shape), str(t.dtype)] for name, t in row.items()}) for row in rows}
    if len(layouts) > 1:
        raise FrameBridgeError(f"{path}: the rows are not alike: {' and '.join(sorted(layouts)[:2])}")
    tensors = {name: torch.cat([row[name].cpu() for row in rows]).contiguous() for name in rows[0]}
    tensors[_CHECKSUM] = torch.tensor([checksum(row) for row in rows])
    if captions:
        tensors[_CAPTION] = torch.tensor(captions)
    metadata = {_SKIPPED: json.dumps({str(row): list(files) for row, files in (skipped or {}).items() if files})}
    write_through(path, lambda partial: save_file(tensors, partial, metadata))


def read_skipped(path: Path) -> list[BadFile]:
    """The clips that could not be read when the samples of a file were made."""
    try:
        with safe_open(path, "pt") as file:
            skipped = json.loads(file.metadata()[_SKIPPED])
        return [bad_file for files in skipped.values() for bad_file in files]
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def latent_deviation(store: Path, manifest: Manifest) -> tuple[float, int]:
    """The standard deviation of the latents about their mean, and of how many clips: those of evenly spread files."""
    shards = list(manifest.clip_shards())
    looked_at = shards[:: math.ceil(len(shards) / _MEASURED_FILES)]
    values, total, squares = 0, 0.0, 0.0
    for shard in looked_at:
        try:
            with safe_open(store / shard.name, "pt") as file:
                latents = file.get_tensor("latents").double()
        except _DAMAGE as error:
            raise _damaged(store / shard.name, error) from error
        values, total, squares = values + latents.numel(), total + latents.sum(), squares + latents.square().sum()
    variance = squares / values - (total / values) ** 2
    return math.sqrt(max(0.0, float(variance))), sum(shard.count for shard in looked_at)


def _damaged(path: Path, error: BaseException) -> StoreError:
    reason = in_one_line(error)
    return StoreError(f"{path} is damaged ({reason}); remove it and {_REMEDY}: it writes only what is missing")


class LatentStore:
    """Reads single rows; at most 16 files are open at a time, and nothing of them is held in memory."""

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise UsageError(f"{folder} holds no precomputed latents; `finetrainers precompute` makes them")
        check_fingerprint(self.folder, manifest, fingerprint)
        self.manifest = manifest
        self._reads_prior = fingerprint.get("model", {}).get("objective") != "diffusion"
        self._files: OrderedDict[str, Any] = OrderedDict()
        if missing := [shard.name for shards in manifest.missing(self.folder) for shard in shards]:
            raise FrameBridgeError(
                f"{folder}: {len(missing)} of its files are missing, first {missing[0]}; {_REMEDY}: it writes only "
                "these"
            )

    def clip(self, variant: int, offset: int) -> tuple[dict[str, torch.Tensor], int, list[BadFile]]:
        """A sample's `prepare_latents`, the number of its caption, and the clips that could not be read for it."""
        shard, row = divmod(offset, self.manifest.shard_size)
        values, caption, skipped = self._read(f"clips/variant-{variant:04}/{shard:06}.safetensors", row)
        if not self._reads_prior:
            values.pop("prior_latents", None)
        return values, caption, skipped

    def caption(self, number: int) -> dict[str, torch.Tensor]:
        """What `prepare_conditions` returned for a caption."""
        shard, row = divmod(number, self.manifest.shard_size)
        return _uncompressed(self._read(f"captions/{shard:06}.safetensors", row)[0])

    def _read(self, name: str, row: int) -> tuple[dict[str, torch.Tensor], int, list[BadFile]]:
        try:
            file, skipped = self._open(name)
            values = {key: file.get_slice(key)[row : row + 1] for key in file.keys()}  # noqa: SIM118
            stored, caption = values.pop(_CHECKSUM), values.pop(_CAPTION, torch.zeros(1))
            if checksum(values) != stored.item():
                raise ValueError(f"row {row} is not as it was written")
        except _DAMAGE as error:
            raise _damaged(self.folder / name, error) from error
        return values, int(caption), skipped.get(str(row), [])

    def _open(self, name: str) -> tuple[Any, dict[str, list[BadFile]]]:
        if name in self._files:
            self._files.move_to_end(name)
        else:
            file = safe_open(self.folder / name, "pt")
            self._files[name] = file, json.loads(file.metadata()[_SKIPPED])
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return self._files[name]


def checksum(row: Mapping[str, torch.Tensor]) -> int:
    """That of the values of all tensors, in the order of their names."""
    found = 0
    for name in sorted(row):
        data = row[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        found = zlib.crc32(data.data, found)
    return found
