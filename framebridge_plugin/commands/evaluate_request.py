"""What `finetrainers evaluate` was asked for, checked as far as that goes without loading the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from framebridge_plugin.backbones.folders import place_problem
from framebridge_plugin.commands.model_request import ModelRequest, file_of_run
from framebridge_plugin.errors import UsageError, say
from framebridge_plugin.evaluation.requirements import detector_problem, network_problem
from framebridge_plugin.files import local_path, writing_problem
from framebridge_plugin.recipe import load_recipe
from framebridge_plugin.settings.data import dataset_entries
from framebridge_plugin.settings.sampling import EvaluateSection

_DATA = ("framebridge.data", "dataset.dataset_config")


class EvaluateRequest(EvaluateSection, ModelRequest):
    """One call of `finetrainers evaluate`; every error is a line of one `UsageError`.

    Its `output` is a folder; frames, height and width are those of the clips.
    """

    also: tuple[str, ...] = ()
    """Trained networks, of `NETWORKS`, that look at the videos, too."""

    @property
    def conditions_come_with_images(self) -> bool:
        """Those of clips do."""
        return True

    def _file_problems(self) -> list[str]:
        problem = writing_problem(self.output)
        problems = [f"--output {self.output}: {problem}"] if problem else []
        if self.fvd_features is not None and (path := local_path(self.fvd_features)) is not None:
            problems += filter(None, [detector_problem(path, self.fvd_sha256)])
        return [*problems, *filter(None, map(network_problem, self.also))]

    @classmethod
    def _option(cls, name: str) -> str:
        return f"framebridge.data.{name}" if name in ("num_frames", "height", "width") else super()._option(name)


def load_clip_data(model: str, recipe: str | None, overrides: list[str]) -> dict[str, Any]:
    """The content of the dataset file that a recipe, or that of the model's run, stands for; no clip is mirrored."""
    folder, path = local_path(model), recipe or file_of_run(model, "recipe.yaml")
    if folder is not None and not folder.exists():
        raise UsageError(f"--model {place_problem(folder)}")
    if path is None:
        raise UsageError(
            f"--model {model} is not in the folder of a run with a recipe.yaml; say by --recipe where the clips are"
        )
    if recipe is None and not overrides:
        say("these clips are what the run was trained on; name others, such as framebridge.data.split=test")
    content = load_recipe(path, overrides, needed=lambda where: where.startswith(_DATA)).dataset_config()
    entries = [
        {name: value for name, value in entry.items() if name != "horizontal_flip"} for entry in content["datasets"]
    ]
    return content | {"datasets": entries}


def read_request(given: dict[str, Any], content: Mapping[str, Any]) -> EvaluateRequest:
    """The request of a command line, given the content of the dataset file."""
    shapes = {(e.num_frames, e.height, e.width) for e in dataset_entries(content, "the recipe's data")}
    if len(shapes) > 1:
        raise UsageError(
            f"the data sets have clips of {len(shapes)} shapes {sorted(shapes)}; evaluate them one by one"
        )
    num_frames, height, width = shapes.pop()
    if num_frames < 2:
        raise UsageError("framebridge.data.num_frames: videos of one frame do not move; take two frames or more")
    return EvaluateRequest(**given, num_frames=num_frames, height=height, width=width)
