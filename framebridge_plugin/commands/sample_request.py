"""What `finetrainers sample` was asked for, checked as far as that goes without loading a model."""

from __future__ import annotations

import os
from pathlib import Path

from framebridge_plugin.commands.model_request import ModelRequest, file_of_run
from framebridge_plugin.data.listing import is_video
from framebridge_plugin.errors import UsageError
from framebridge_plugin.files import why_no_file, writing_problem
from framebridge_plugin.media import read_image
from framebridge_plugin.settings.sampling import SampleSection

DATA_FILE = "dataset_config.json"


class SampleRequest(ModelRequest, SampleSection):
    """One call of `finetrainers sample`; every error is a line of one `UsageError`.

    Its `output` is the mp4 to write; several videos take its name with a number.
    """

    singular = {"images": "image", "data_rows": "data-index", "prompts": "prompt", "class_names": "class-name"}  # noqa: RUF012

    images: tuple[Path, ...] = ()
    """Pictures, or videos whose first frame is taken; each is the first frame of its videos."""
    data_rows: tuple[int, ...] = ()
    """In place of `images`, rows of the run's data set, whose captions are the default conditions."""

    @property
    def num_images(self) -> int:
        """Number of first frames."""
        return len(self.images) or len(self.data_rows)

    def condition_of(self, image: int) -> str | int | None:
        """The prompt, class or label of an image, by its position; None leaves it to the data set."""
        given = self.prompts or self.class_names or self.labels or (None,)
        return given[image if len(given) > 1 else 0]

    @property
    def conditions_come_with_images(self) -> bool:
        """Those of rows of a data set do."""
        return bool(self.data_rows)

    def video_paths(self) -> list[Path]:
        """Where the videos go, those of the first image first: `output`, or `name-0.mp4` and so on beside it."""
        count = self.num_images * self.num_videos
        if count == 1:
            return [self.output]
        digits = len(str(count - 1))
        return [self.output.with_name(f"{self.output.stem}-{i:0{digits}}.mp4") for i in range(count)]

    def contact_sheet_path(self) -> Path:
        """Where the contact sheet goes."""
        return self.output.with_suffix(".png")

    def data_file(self) -> Path | None:
        """The description of the data that a run wrote in the folder above its model; None without one."""
        return file_of_run(self.model, DATA_FILE)

    def _input_problems(self) -> list[str]:
        """Errors in the number of images and conditions."""
        checks = {
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

    def _file_problems(self) -> list[str]:
        problems = []
        for path in self.images:
            if is_video(path.name) and not path.is_dir():
                if reason := why_no_file(path):
                    problems.append(f"--image {path}: {reason}")
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
