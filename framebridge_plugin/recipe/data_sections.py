"""The sections of a recipe that say what is read and how, and what all sections share."""

from __future__ import annotations

from os.path import expanduser
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(expanduser)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, types are strict, values are fixed once checked."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataSection(Section):
    """One data set, and the shape of its clips; paths are relative to the working directory."""

    data_root: PathText | None = Field(
        default=None,
        description="folder of clips and captions in one of finetrainers' layouts, or id of one on the hub",
    )
    class_root: PathText | None = Field(
        default=None, description="folder with one folder of videos per class (UCF-101): its name is their caption"
    )
    split: Literal["all", "train", "test"] = Field(
        default="all", description="of class_root: a half of one of UCF-101's official folds, or all"
    )
    fold: Literal[1, 2, 3] = Field(default=1, description="which fold; with split train or test only")
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
    num_frames: Count = Field(description="frames per clip, 8 k + 1 for CogVideoX")
    height: Count = Field(description="pixels, a multiple of 16 for CogVideoX and Latte of patch 2")
    width: Count = Field(description="pixels, a multiple of 16 for CogVideoX and Latte of patch 2")
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
    id_token: str | None = Field(default=None, description="put in front of every caption; CogVideoX only")


class BadFilesSection(Section):
    """What happens when a clip cannot be read."""

    policy: Literal["raise", "skip", "quarantine"] = Field(
        default="skip",
        description="skip: another clip takes its place; quarantine: that, and later runs do not open the file",
    )
    quarantine_file: PathText | None = Field(
        default=None, description="JSON lines, made where there are none; with policy quarantine only"
    )
    max_share: float = Field(
        default=0.5, ge=0, le=1, description="share of the attempts, from the 64th on, that may fail"
    )
    max_in_a_row: Count = Field(default=16, description="failed attempts in a row that end the run")
