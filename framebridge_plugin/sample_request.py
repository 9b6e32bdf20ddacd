"""What `finetrainers sample` was asked for, checked as far as that goes without loading a model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from framebridge_plugin.errors import UsageError
from framebridge_plugin.folder_checks import (
    LORA_INFO_FILE,
    ClipShapeRule,
    clip_shape_rule,
    find_saved_model,
    folder_problem,
    local_path,
    part_problem,
    plain_problem,
    read_json,
    writing_problem,
)
from framebridge_plugin.media import read_image


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One call of `finetrainers sample`.

    Attributes:
        model: A run's folder, a model's folder, or an id on the Hugging Face Hub.
        images: Files; each is the first frame of its videos.
        prompts: One for all images, or one per image.
        output: The mp4 to write; several videos take its name with a number.
        transformer: Folder (or id) of a fine-tuned transformer to put into `model`.
        steps: Network evaluations (twice that with guidance), 1 to 1000.
        sampler: `sde` (the reference's) or `dbim`.
        order: 1, or 2 for the multistep of `dbim`.
        eta: Noise added by `dbim`, 0 (none, the default) to 1 (as the SDE).
        grid: Where the steps lie in time.
        start: `booted` from the prior with its noise, or from the `clean_prior` (as the reference).
        guidance_scale: Classifier-free guidance; 1 is none.
        seed: Seed of the first video; video number i takes seed + i.
        num_frames: Frames; None takes the model's.
        height: Pixels; None takes the model's.
        width: Pixels; None takes the model's.
        num_videos: Videos per image.
        dtype: Number format; None takes fp32 on a CPU and bf16 on a GPU.

    Raises:
        UsageError: With every error on a line of its own.
    """

    model: str
    images: tuple[Path, ...]
    prompts: tuple[str, ...]
    output: Path
    transformer: str | None = None
    steps: int = 50
    sampler: Literal["sde", "dbim"] = "sde"
    order: Literal[1, 2] = 1
    eta: float | None = None
    grid: Literal["trailing", "linspace", "lambda"] = "trailing"
    start: Literal["booted", "clean_prior"] = "booted"
    guidance_scale: float = 6.0
    seed: int = 42
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    num_videos: int = 1
    dtype: Literal["fp32", "bf16", "fp16"] | None = None

    def __post_init__(self) -> None:
        problems = [
            *self._value_problems(),
            *self._sampler_problems(),
            *self._file_problems(),
            *self._model_problems(),
        ]
        if problems:
            raise UsageError("\n".join(problems))

    def prompt_of(self, image: int) -> str:
        """The prompt that belongs to an image.

        Args:
            image: Its position in `images`.

        Returns:
            The prompt.
        """
        return self.prompts[image if len(self.prompts) > 1 else 0]

    def video_paths(self) -> list[Path]:
        """Where the videos go.

        Returns:
            One path per image and video, the videos of the first image first: `output` itself if it is one video,
            else `name-0.mp4`, `name-1.mp4` and so on beside it.
        """
        count = len(self.images) * self.num_videos
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

    def _value_problems(self) -> list[str]:
        checks = {
            f"--steps {self.steps}: should be 1 to 1000": 1 <= self.steps <= 1000,
            f"--guidance-scale {self.guidance_scale}: should be 0 or more": 0 <= self.guidance_scale < float("inf"),
            f"--seed {self.seed}: should be 0 to 2^63 - 1": 0 <= self.seed < 2**63,
            f"--num-videos {self.num_videos}: should be 1 or more": self.num_videos >= 1,
            f"--num-frames {self.num_frames}: should be 1 or more": self.num_frames is None or self.num_frames >= 1,
            f"--height {self.height}: should be 1 or more": self.height is None or self.height >= 1,
            f"--width {self.width}: should be 1 or more": self.width is None or self.width >= 1,
            "--image: give at least one": bool(self.images),
            f"--prompt: give one for all, or one for each of the {len(self.images)} images, not {len(self.prompts)}": (
                len(self.prompts) in (1, len(self.images))
            ),
        }
        return [problem for problem, fine in checks.items() if not fine]

    def _sampler_problems(self) -> list[str]:
        problems = []
        if self.eta is not None and not 0 <= self.eta <= 1:
            problems.append(f"--eta {self.eta}: should be 0 to 1")
        elif self.sampler == "sde" and self.eta not in (None, 1.0):
            problems.append(f"--eta {self.eta}: the SDE is eta 1; for less noise take --sampler dbim")
        if self.sampler == "sde" and self.order != 1:
            problems.append(f"--order {self.order}: the SDE has order 1 only; take --sampler dbim")
        noise = (1.0 if self.sampler == "sde" else 0.0) if self.eta is None else self.eta
        if self.start == "clean_prior" and noise < 1:
            problems.append("--start clean_prior: needs the noise of --sampler sde (or --eta 1); take --start booted")
        return problems

    def _file_problems(self) -> list[str]:
        problems = []
        for path in self.images:
            try:
                read_image(path)
            except UsageError as error:
                problems.append(f"--image {error}")
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

    def _model_problems(self) -> list[str]:
        path = local_path(self.model)
        if path is not None and not path.is_dir():
            return [f"--model {path}: {'is a file, not a folder' if path.exists() else 'no such folder'}"]
        problems = []
        transformer = None if self.transformer is None else local_path(self.transformer)
        if transformer is not None and (problem := part_problem(transformer, "transformer")):
            problems.append(f"--transformer {problem}")
        elif transformer is not None and (problem := plain_problem(transformer)):
            problems.append(f"--transformer {transformer}: {problem}; give a fine-tuned one")
        if path is None:
            return problems
        folder = find_saved_model(path)
        if folder is None:
            what = "is neither a model in diffusers' format nor a run that has saved one"
            return [*problems, f"--model {path}: {what}; give a run's or a model's folder"]
        if (folder / LORA_INFO_FILE).is_file():
            problems += self._lora_problems(folder)
        elif problem := folder_problem(folder):
            problems.append(f"--model {problem}")
        else:
            if self.transformer is None and (problem := plain_problem(folder / "transformer")):
                remedy = "train it with `finetrainers train`, or give a fine-tuned --transformer"
                problems.append(f"--model {folder}: {problem}; {remedy}")
            problems += self._shape_problems(clip_shape_rule(folder / "vae", transformer or folder / "transformer"))
        return problems

    def _lora_problems(self, folder: Path) -> list[str]:
        """Examine a LoRA's folder and the models that it names."""
        problems = []
        if self.transformer is not None:
            problems.append(f"--transformer: {folder} is a LoRA, for its own base model's transformer; leave it out")
        try:
            info = read_json(folder / LORA_INFO_FILE)
            base, replaced = local_path(info["base_model"]), info.get("replaced_components", {})
            parts = {part: None if base is None else base / part for part in ("vae", "transformer")}
            parts |= {part: local_path(source) for part, source in replaced.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            return [*problems, f"--model {folder / LORA_INFO_FILE}: is not as it was written; copy the folder again"]
        remedy = f"put it back, or correct its place in {LORA_INFO_FILE}"
        if base is not None and (problem := folder_problem(base)):
            problems.append(f"--model {folder}: its base model: {problem}; {remedy}")
        for part in replaced:
            if (source := parts[part]) is not None and (problem := part_problem(source, part)):
                problems.append(f"--model {folder}: its {part}: {problem}; {remedy}")
        return problems + self._shape_problems(clip_shape_rule(parts["vae"], parts["transformer"]))

    def _shape_problems(self, rule: ClipShapeRule) -> list[str]:
        found = rule.problems(self.num_frames, self.height, self.width)
        return [f"--{name.replace('_', '-')}: {message}" for name, message in found]
