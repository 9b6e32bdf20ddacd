"""What is read and how: the data sets, their clips, and what is done about files that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from framebridge_plugin.errors import UsageError
from framebridge_plugin.settings.base import CheckedSettings, PathText, Section
from framebridge_plugin.settings.choices import ANEW, Count

Split = Literal["all", "train", "test"]
Fold = Literal[1, 2, 3]

SOURCES = (("data_root",), ("class_root",), ("csv", "video_root"))
"""The settings that name a data set: one of these groups, and nothing of the others."""


class SourceSection(Section):
    """Where the clips and captions of a data set are."""

    on_resume = "data", {"refresh_index": ANEW}

    data_root: PathText | None = Field(
        default=None,
        description="folder of clips and captions in one of finetrainers' layouts, or id of one on the hub",
    )
    class_root: PathText | None = Field(
        default=None, description="folder with one folder of videos per class (UCF-101): its name is their caption"
    )
    split: Split = Field(default="all", description="of class_root: a half of one of UCF-101's official folds, or all")
    fold: Fold = Field(default=1, description="which fold; with split train or test only")
    splits_dir: PathText | None = Field(
        default=None, description="folder with trainlist01.txt and so on; none: ucfTrainTestlist beside class_root"
    )
    csv: PathText | None = Field(
        default=None,
        description="WebVid's table (columns videoid and name), a folder of its parts, or a pattern; needs video_root",
    )
    video_root: PathText | None = Field(
        default=None, description="folder that holds <videoid>.mp4 or <page_dir>/<videoid>.mp4"
    )
    refresh_index: bool = Field(
        default=False, description="look for the videos of the csv again; else only if table or video_root changed"
    )
    id_token: str | None = Field(default=None, description="put in front of every caption; models of text only")

    @property
    def source(self) -> tuple[str, ...]:
        """Names of the settings that name the data set."""
        return tuple(name for group in SOURCES for name in group if getattr(self, name) is not None)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yields each setting that does not go with the others, and what is wrong with it."""
        yield from super().conflicts()
        if self.source not in SOURCES:
            found = " and ".join(sorted(self.source)) or "none of them"
            yield "", f"give either data_root, or class_root, or csv with video_root, not {found}"
        if self.split == "all":
            for name, default in (("fold", 1), ("splits_dir", None)):
                if getattr(self, name) != default:
                    yield name, "has no effect with split all: set split to train or test"
        elif self.class_root is None:
            yield "split", "has an effect with class_root only: remove it"
        if self.refresh_index and self.csv is None:
            yield "refresh_index", "has an effect with csv only: remove it"


class ClipSection(Section):
    """How a clip is cut out of a video."""

    on_resume = "data", {"isolated": ANEW}

    num_frames: Count = Field(description="frames per clip: 8 k + 1 for CogVideoX and LTX, 4 k + 1 for Wan")
    height: Count = Field(description="pixels, a multiple of 16 (LTX: 32; Latte: 8 patches)")
    width: Count = Field(description="pixels, a multiple of 16 (LTX: 32; Latte: 8 patches)")
    frame_sampling: Literal["stride", "linspace"] = Field(
        default="stride",
        description="stride: every frame_stride-th frame (WebVid); linspace: spread over window_frames (UCF-101)",
    )
    frame_stride: Count = Field(default=1, description="frames of the file from one frame of the clip to the next")
    window_frames: Count | None = Field(
        default=None, description="frames of the file that a clip spans; with linspace only"
    )
    window: Literal["random", "start"] = Field(default="random", description="where in the file the clip begins")
    horizontal_flip: bool = Field(default=False, description="mirror every other clip, at random")
    decoder: Literal["pyav", "decord"] = Field(
        default="pyav", description="what reads the videos; decord refuses files that it is not known to read rightly"
    )
    strict: bool = Field(default=False, description="damaged pictures are errors; pyav only")
    resize: Literal["torch", "decoder"] = Field(
        default="torch",
        description="torch: antialiased; decoder: FFmpeg's filter, other pixels, faster for 720p files; pyav only",
    )
    isolated: bool = Field(
        default=False, description="a child process decodes: one that crashes or hangs costs a clip and not the run"
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yields each setting that does not go with the others, and what is wrong with it."""
        yield from super().conflicts()
        if self.decoder != "pyav":
            for name, default in (("strict", False), ("resize", "torch")):
                if getattr(self, name) != default:
                    yield name, f"does not go with decoder {self.decoder}: remove one of the two"
        if self.frame_sampling == "stride":
            if self.window_frames is not None:
                yield "window_frames", "has no effect with frame_sampling stride: set it to linspace"
            return
        if self.frame_stride != 1:
            yield "frame_stride", "has no effect with frame_sampling linspace: remove it"
        if self.window_frames is None:
            yield "window_frames", "frame_sampling linspace needs it: the frames that a clip spans"
        elif self.window_frames < self.num_frames:
            yield "window_frames", f"should be at least num_frames, {self.num_frames}, not {self.window_frames}"


class HeldoutSection(SourceSection):
    """Clips that are not trained on, cut as those of the data, whose loss is measured at every validation.

    Where no source is named, they are the other half of the data's official fold.
    """

    clips: Count = Field(
        default=16,
        description="how many, evenly spread over them; each costs 20 calls of the network without gradients (a "
        "neural prior: 1), and main memory for its latents",
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yields each setting that does not go with the others, and what is wrong with it."""
        if self.source:
            yield from super().conflicts()
            return
        for name, field in SourceSection.model_fields.items():
            if getattr(self, name) != field.default:
                yield name, "has no effect without data_root, class_root or csv beside it: remove it"

    @classmethod
    def resume_kind(cls, name: str) -> str:
        """They change nothing of the training."""
        return ANEW


class DataSection(ClipSection, SourceSection):
    """One data set, and the shape of its clips; paths are relative to the working directory."""


class BadFilesSection(Section):
    """What happens when a clip cannot be read."""

    on_resume = ANEW, {}

    policy: Literal["raise", "skip", "quarantine"] = Field(
        default="skip",
        description="skip: another clip takes its place; quarantine: that, and later runs do not open the file",
    )
    quarantine_file: PathText | None = Field(
        default=None, description="a .jsonl, made where there is none; with policy quarantine only"
    )
    max_share: float = Field(
        default=0.5, ge=0, le=1, description="share of the attempts, from the 64th on, that may fail"
    )
    max_in_a_row: Count = Field(default=16, description="failed attempts in a row that end the run")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yields each setting that does not go with the others, and what is wrong with it."""
        yield from super().conflicts()
        if self.policy == "quarantine" and self.quarantine_file is None:
            yield "quarantine_file", "policy quarantine needs it: a file that runs may share"
        elif self.policy == "quarantine" and (problem := _place_problem(str(self.quarantine_file))):
            yield "quarantine_file", problem
        elif self.policy != "quarantine" and self.quarantine_file is not None:
            yield "quarantine_file", f"has no effect with policy {self.policy}: remove it"


def _place_problem(file: str) -> str | None:
    """Why a file may not be added to: a recipe of others could name any that there is."""
    path, here = Path(file), Path(os.path.realpath("."))
    if path.is_symlink():
        return f"{file} is a link: name the file"
    path = Path(os.path.realpath(path))  # a folder on the way may be a link, too
    if path.is_relative_to(here):  # which may itself be hidden
        path = path.relative_to(here)
    if path.suffix != ".jsonl" or any(part.startswith(".") for part in path.parts):
        return f"{file} should end in .jsonl and lie in no hidden folder, as {path} does"
    return None


class DatasetSource(CheckedSettings, SourceSection):
    """What `index_dataset` takes."""

    called = "data set"

    remove_common_llm_caption_prefixes: bool = Field(
        default=False, description='cut phrases such as "The video shows" from the start of captions'
    )


class HeldoutSource(DatasetSource):
    """What `load_heldout` takes: under "heldout" in finetrainers' dataset file."""

    called = "heldout"

    clips: Count = HeldoutSection.model_fields["clips"].default


class DatasetEntry(DatasetSource, ClipSection):
    """An entry of finetrainers' dataset file, whose `video_resolution_buckets` says the shape of the clips."""

    called = ""

    dataset_type: Literal["video"] = Field(default="video", description="images cannot be trained on")
    reshape_mode: Literal["resize_crop"] = Field(
        default="resize_crop", description="clips are always resized to cover the bucket, and centre-cropped"
    )


def dataset_entries(content: Any, where: str) -> list[DatasetEntry]:
    """The entries of finetrainers' dataset file, given its content; `UsageError` if one is wrong."""
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UsageError(f'{where}: no data sets in it; it must be {{"datasets": [{{"data_root": ...}}, ...]}}')
    checked = []
    for number, values in enumerate(entries):
        try:
            checked.append(_entry(values))
        except UsageError as error:
            raise UsageError(f"{where}: datasets[{number}]: {error}") from error
    return checked


def _entry(values: Any) -> DatasetEntry:
    if not isinstance(values, dict):
        raise UsageError("it is no object with keys and values")
    values = {name: value for name, value in values.items() if value is not None}
    buckets = values.pop("video_resolution_buckets", None)
    match buckets:
        case [[num_frames, height, width]] if values.keys().isdisjoint(("num_frames", "height", "width")):
            return DatasetEntry(**values, num_frames=num_frames, height=height, width=width)
    raise UsageError(f"video_resolution_buckets is {buckets!r}; it must be one size, [[frames, height, width]]")
