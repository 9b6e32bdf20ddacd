"""What `finetrainers sample` was asked for, checked as far as that goes without loading a model."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from framebridge_plugin.backbones.examination import SavedModel
from framebridge_plugin.backbones.facts import BackboneFacts
from framebridge_plugin.backbones.folders import local_path, writing_problem
from framebridge_plugin.commands.sample_model import examine_model
from framebridge_plugin.data.listing import is_video
from framebridge_plugin.errors import UsageError
from framebridge_plugin.media import read_image

DATA_FILE = "dataset_config.json"

Sampler = Literal["sde", "dbim"]
Grid = Literal["trailing", "linspace", "lambda"]
Start = Literal["booted", "clean_prior"]

_SAMPLER_OPTIONS = ("sampler", "order", "eta", "grid", "start")


class SamplerSettings(NamedTuple):
    """How a video is sampled.

    Attributes:
        sampler: `sde` (the reference's) or `dbim`.
        order: 1, or 2 for the multistep of `dbim`.
        eta: Noise added by `dbim`, 0 (none) to 1 (as the SDE); None is the sampler's own.
        grid: Where the steps lie in time.
        start: `booted` from the prior with its noise, or from the `clean_prior` (as the reference).
    """

    sampler: Sampler
    order: int
    eta: float | None
    grid: Grid
    start: Start


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One call of `finetrainers sample`.

    Attributes:
        model: A run's folder, a model's folder, or an id on the Hugging Face Hub.
        output: The mp4 to write; several videos take its name with a number.
        images: Files, pictures or videos (whose first frame is taken); each is the first frame of its videos.
        data_rows: In place of `images`, rows of the run's data set, whose captions are the default conditions.
        prompts: For CogVideoX: one for all images, or one per image.
        class_names: For Latte: one for all images, or one per image.
        labels: For Latte, in place of `class_names`: the classes' numbers.
        transformer: Folder (or id) of a fine-tuned transformer, or of a model that holds one, to put into a CogVideoX
            `model`.
        base: Where the model that a LoRA was trained on is now, a folder or an id; None takes what the LoRA says.
        allow_other_base: Whether that may be another model than the one it was trained on.
        steps: Network evaluations (twice that with guidance), 1 to 1000; None takes the model's.
        sampler: See `SamplerSettings`; None, here and below, takes the default of the model's kind.
        order: See `SamplerSettings`.
        eta: See `SamplerSettings`.
        grid: See `SamplerSettings`.
        start: See `SamplerSettings`.
        guidance_scale: Classifier-free guidance, 1 is none; None takes the model's.
        use_dynamic_cfg: Whether the guidance changes from step to step, as in diffusers' CogVideoX pipelines.
        seed: Seed of the first video; video number i takes seed + i.
        num_frames: Frames; None takes the model's.
        height: Pixels; None takes the model's.
        width: Pixels; None takes the model's.
        num_videos: Videos per image.
        fps: Frames per second of the files; None takes the rate of the clips that the model was trained on.
        dtype: Number format; None takes fp32 on a CPU and bf16 on a GPU.

    Raises:
        UsageError: With every error on a line of its own.
    """

    model: str
    output: Path
    images: tuple[Path, ...] = ()
    data_rows: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    transformer: str | None = None
    base: str | None = None
    allow_other_base: bool = False
    steps: int | None = None
    sampler: Sampler | None = None
    order: Literal[1, 2] | None = None
    eta: float | None = None
    grid: Grid | None = None
    start: Start | None = None
    guidance_scale: float | None = None
    use_dynamic_cfg: bool = False
    seed: int = 42
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    num_videos: int = 1
    fps: float | None = None
    dtype: Literal["fp32", "bf16", "fp16"] | None = None

    def __post_init__(self) -> None:
        problems = [*self._value_problems(), *self._sampler_problems(), *self._file_problems()]
        problems += self._model_problems(*self._examined)
        if problems:
            raise UsageError("\n".join(problems))

    @functools.cached_property
    def _examined(self) -> tuple[SavedModel | None, list[str]]:
        return examine_model(self.model, self.transformer, self.base, self.allow_other_base)

    @property
    def num_images(self) -> int:
        """Number of first frames."""
        return len(self.images) or len(self.data_rows)

    @property
    def saved(self) -> SavedModel | None:
        """The model; None for an id on the hub."""
        return self._examined[0]

    def condition_of(self, image: int) -> str | int | None:
        """The prompt, the class's name or its label that belongs to an image.

        Args:
            image: Its position in `images` or `data_rows`.

        Returns:
            What was given; None leaves it to the data set.
        """
        given = self.prompts or self.class_names or self.labels or (None,)
        return given[image if len(given) > 1 else 0]

    def sampler_settings(self, facts: BackboneFacts) -> SamplerSettings:
        """The options of the sampler, with the defaults of a backbone.

        Args:
            facts: The model's backbone.

        Returns:
            The settings.
        """
        given = {name: getattr(self, name) for name in _SAMPLER_OPTIONS}
        defaults = SamplerSettings("sde", 1, None, facts.sampling.get("grid", "trailing"), "booted")
        return defaults._replace(**{name: value for name, value in given.items() if value is not None})

    def video_paths(self) -> list[Path]:
        """Where the videos go.

        Returns:
            One path per image and video, the videos of the first image first: `output` itself if it is one video,
            else `name-0.mp4`, `name-1.mp4` and so on beside it.
        """
        count = self.num_images * self.num_videos
        if count == 1:
            return [self.output]
        digits = len(str(count - 1))
        return [self.output.with_name(f"{self.output.stem}-{i:0{digits}}.mp4") for i in range(count)]

    def contact_sheet_path(self) -> Path:
        """Where the contact sheet goes.

        Returns:
            `output` with the ending `.png`.
        """
        return self.output.with_suffix(".png")

    def data_file(self) -> Path | None:
        """The description of the data set that the model was trained on.

        Returns:
            The file that the run wrote in its folder; None if there is none above the model.
        """
        path = local_path(self.model)
        if path is None:
            return None
        folder = path.absolute()
        # A run holds checkpoints/step_000100/model/.
        return next((path / DATA_FILE for path in (folder, *folder.parents[:3]) if (path / DATA_FILE).is_file()), None)

    def check_download(self, folder: Path) -> SavedModel:
        """Checks what could not be checked of an id on the hub.

        Args:
            folder: Where its files are.

        Returns:
            The model.

        Raises:
            UsageError: With every error on a line of its own.
        """
        saved, problems = examine_model(str(folder), self.transformer, self.base, self.allow_other_base)
        problems = self._model_problems(saved, problems)
        if saved is None or problems:
            raise UsageError("\n".join(problems))
        return saved

    def _model_problems(self, saved: SavedModel | None, problems: list[str]) -> list[str]:
        if saved is None:
            return problems
        problems = [*problems, *self._condition_problems(saved)]
        found = saved.clip_rule.problems(self.num_frames, self.height, self.width)
        return problems + [f"--{option.replace('_', '-')}: {message}" for option, message in found]

    def _condition_problems(self, saved: SavedModel) -> list[str]:
        """Errors in what depends on the backbone: the conditions, and options that not all have."""
        facts, problems = saved.facts, []
        if facts.condition == "text":
            given = {"--class-name": self.class_names, "--label": self.labels}
            takes, remedy = "text, not classes", "--prompt"
            missing = "--prompt: give one for all images, or one for each"
        else:
            given = {"--prompt": self.prompts}
            takes, remedy = "classes, not text", "--class-name"
            missing = "--class-name: give one for all images, or one for each (or give their numbers by --label)"
            if self.use_dynamic_cfg:
                problems.append("--use-dynamic-cfg: is for models of text; leave it out")
        what = f"a {facts.title} model takes {takes}; give {remedy}"
        wrong = [f"{option}: {what}" for option, values in given.items() if values]
        options = ("steps", *_SAMPLER_OPTIONS, "guidance_scale")
        sampled = [f"--{name.replace('_', '-')}" for name in options if getattr(self, name) is not None]
        if "scheduler" not in facts.parts and sampled:
            what = "this model gives its video in one call, without a sampler"
            problems.append(f"{', '.join(sampled)}: {what}; leave {'it' if len(sampled) == 1 else 'them'} out")
        if (classes := saved.known_classes) is not None:
            option = "--class-name" if self.class_names else "--label"
            for name in dict.fromkeys(map(str, self.class_names or self.labels)):
                if problem := classes.problem(name):
                    problems.append(f"{option} {name}: {problem}")
        if not wrong and not self.data_rows and self.condition_of(0) is None:
            problems.append(missing)
        return wrong + problems

    def _value_problems(self) -> list[str]:
        checks = {
            f"--steps {self.steps}: should be 1 to 1000": self.steps is None or 1 <= self.steps <= 1000,
            f"--guidance-scale {self.guidance_scale}: should be 0 or more": (
                self.guidance_scale is None or 0 <= self.guidance_scale < float("inf")
            ),
            f"--seed {self.seed}: should be 0 to 2^63 - 1": 0 <= self.seed < 2**63,
            f"--num-videos {self.num_videos}: should be 1 or more": self.num_videos >= 1,
            f"--fps {self.fps}: should be more than 0, at most 1000": self.fps is None or 0 < self.fps <= 1000,
            f"--num-frames {self.num_frames}: should be 1 or more": self.num_frames is None or self.num_frames >= 1,
            f"--height {self.height}: should be 1 or more": self.height is None or self.height >= 1,
            f"--width {self.width}: should be 1 or more": self.width is None or self.width >= 1,
            "--image: give at least one, or rows of the run's data set by --data-index": self.num_images > 0,
            "--data-index: the images come from files or from the data set; leave it out, or --image": (
                not (self.images and self.data_rows)
            ),
            "--data-index: should be 0 or more": all(row >= 0 for row in self.data_rows),
        }
        given = {"--prompt": self.prompts, "--class-name": self.class_names, "--label": self.labels}
        given = {option: values for option, values in given.items() if values}
        checks[f"{' and '.join(given)}: give one kind of them"] = len(given) <= 1
        for option, values in given.items():
            wanted = f"give one for all, or one for each of the {self.num_images} images"
            checks[f"{option}: {wanted}, not {len(values)}"] = len(values) in (1, self.num_images)
        return [problem for problem, fine in checks.items() if not fine]

    def _sampler_problems(self) -> list[str]:
        problems = []
        sampler = self.sampler or "sde"
        if self.eta is not None and not 0 <= self.eta <= 1:
            problems.append(f"--eta {self.eta}: should be 0 to 1")
        elif sampler == "sde" and self.eta not in (None, 1.0):
            problems.append(f"--eta {self.eta}: the SDE is eta 1; for less noise take --sampler dbim")
        if sampler == "sde" and self.order not in (None, 1):
            problems.append(f"--order {self.order}: the SDE has order 1 only; take --sampler dbim")
        noise = (1.0 if sampler == "sde" else 0.0) if self.eta is None else self.eta
        if self.start == "clean_prior" and noise < 1:
            problems.append("--start clean_prior: needs the noise of --sampler sde (or --eta 1); take --start booted")
        return problems

    def _file_problems(self) -> list[str]:
        problems = []
        for path in self.images:
            if is_video(path.name) and not path.is_dir():
                if not path.is_file():
                    problems.append(f"--image {path}: no such file")
                continue  # decoded when the libraries are loaded
            try:
                read_image(path)
            except UsageError as error:
                problems.append(f"--image {error}")
        if self.data_rows and self.data_file() is None:
            problems.append(
                f"--data-index: {self.model} is not in the folder of a run with a {DATA_FILE}; give --image"
            )
        if self.output.suffix != ".mp4":
            return [*problems, f"--output {self.output}: should end in .mp4"]
        if problem := writing_problem(self.output.parent):
            return [*problems, f"--output {self.output}: {problem}"]
        for path in (*self.video_paths(), self.contact_sheet_path()):
            if path.is_dir():
                problems.append(f"--output {path}: is a folder")
            elif path.exists() and not os.access(path, os.W_OK):
                problems.append(f"--output {path}: exists and is not writable")
        return problems
