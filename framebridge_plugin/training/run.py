"""From a checked recipe to a finished run: what `finetrainers train` does once the recipe is right."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import shlex
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from framebridge_plugin import signals
from framebridge_plugin.backbones.facts import find_backbone
from framebridge_plugin.backbones.files import read_json
from framebridge_plugin.backbones.starting import goes_on
from framebridge_plugin.errors import FinishedRunError, UsageError, say
from framebridge_plugin.files import downloaded, pin
from framebridge_plugin.folder_lock import FolderLock
from framebridge_plugin.imports import without_collection
from framebridge_plugin.processes import is_first, rank
from framebridge_plugin.recipe.outside import SENT, outside_effects
from framebridge_plugin.recipe.scratch_rules import data_class_names, data_clip_shape

if TYPE_CHECKING:
    from finetrainers import BaseArgs
    from finetrainers.models.modeling_utils import ModelSpecification

    from framebridge_plugin.recipe import Recipe

# Arguments of finetrainers that a specification takes under the same name.
_SETTINGS = (
    *("transformer_id", "vae_id", "tokenizer_id", "text_encoder_id", "revision", "cache_dir"),
    *("transformer_dtype", "vae_dtype", "text_encoder_dtype"),
)

_VERSIONS_OF = (
    "framebridge-plugin",
    "finetrainers",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "av",
    "torchao",
)


def train(recipe: Recipe, allowed: Collection[str] = ()) -> None:
    """Trains what the recipe says, in this process and the others that were started beside it.

    The run's folder gets the resolved recipe (`recipe.yaml`; a resumed run writes `recipe-resumed.yaml`), the
    versions of the packages (`versions.json`), metrics, checkpoints, validation videos and, at the end, the model. A
    start that is refused leaves these as they were.

    Args:
        recipe: A checked recipe.
        allowed: Groups of settings (`settings.choices.ALLOWABLE`) in which a resume may differ from its checkpoint.

    Raises:
        UsageError: If the folder holds another run, or the arguments exclude each other.
        FrameBridgeError: If another process writes the folder, a file cannot be read, or the loss is not finite.
        FinishedRunError: If the model is trained and saved, but not validated at the end, or not uploaded.
    """
    output_dir = Path(recipe.checkpoints.output_dir)
    if recipe.checkpoints.stop_on_sigusr1:
        signals.handle_sigusr1()
    refuse_start(recipe)
    if is_first():
        for line in outside_effects(recipe, SENT):
            say(line)
    staging = output_dir / f".starting.{rank()}"
    with FolderLock(output_dir) if is_first() else contextlib.nullcontext():
        shutil.rmtree(staging, ignore_errors=True)
        try:
            _train(recipe, output_dir, staging, allowed)
        except FinishedRunError:
            _say_result(recipe)
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        _say_result(recipe)


def _say_result(recipe: Recipe) -> None:
    if is_first():
        _write_loss_curve(Path(recipe.checkpoints.output_dir))
        say(f"model: {recipe.result_folder}")
        say(f"sample from it: {sample_line(recipe)}")


def _train(recipe: Recipe, output_dir: Path, staging: Path, allowed: Collection[str]) -> None:
    """Trains; the files that describe the run are in `staging` until nothing more can refuse it."""
    pin_downloads(recipe)
    dataset_config = write_run_files(recipe, staging)

    with without_collection():
        from framebridge_plugin.training.finetrainers.registration import recipe_arguments, register

        register()

        from framebridge_plugin.training import FrameBridgeTrainer

    args = recipe_arguments(recipe, dataset_config)
    # finetrainers hands this to the trackers as it is, which would write into the working directory.
    args.logging_dir = str(output_dir / args.logging_dir)

    def publish() -> None:
        names = {"recipe.yaml": "recipe-resumed.yaml"} if trainer.progress.step else {}
        if is_first() and downloaded:
            (staging / "downloads.json").write_text(json.dumps(downloaded, indent=2) + "\n")
        # Every rank its own dataset_config.json, which all read.
        for path in staging.iterdir():
            path.replace(output_dir / names.get(path.name, path.name))
        staging.rmdir()
        args.dataset_config = str(output_dir / dataset_config.name)

    trainer = FrameBridgeTrainer(
        args,
        build_specification(recipe, args),
        on_prepared=publish,
        settings=recipe.by_section(),
        allowed=allowed,
    )
    trainer.run()


def build_specification(recipe: Recipe, args: BaseArgs) -> ModelSpecification:
    """Builds the specification of the recipe's model, without its weights."""
    from finetrainers.config import SUPPORTED_MODEL_CONFIGS

    own = find_backbone(args.model_name).load_adapter().setting_names
    settings = {name: getattr(args, name) for name in (*_SETTINGS, *own) if hasattr(args, name)}
    if "class_names" in own:
        settings["class_names"] = data_class_names(recipe)
    specification_class = SUPPORTED_MODEL_CONFIGS[args.model_name][args.training_type]
    return specification_class(
        args.pretrained_model_name_or_path,
        objective=args.framebridge_objective,
        clip_shape=data_clip_shape(recipe),
        **settings,
    )


def refuse_start(recipe: Recipe) -> None:
    """Refuses a run whose results could not be sent where it says."""
    if not is_first():
        return
    if recipe.tracking.report_to == "wandb" and not sys.stdin.isatty():  # in a terminal it asks
        import wandb

        if wandb.setup().settings.mode in ("online", "run", "shared") and not wandb.login(prompt=False, verify=False):
            raise UsageError(
                "tracking.report_to: wandb has no login here; run `wandb login`, or set WANDB_MODE=offline to write "
                "files that `wandb sync` sends later"
            )
    if recipe.hub.push_to_hub:
        from huggingface_hub import constants, get_token

        if get_token() is None:
            raise UsageError("hub.push_to_hub: there is no login here; run `hf auth login`, or set this false")
        if constants.HF_HUB_OFFLINE:
            raise UsageError("hub.push_to_hub: HF_HUB_OFFLINE keeps this process from the hub; set one of them false")


def pin_downloads(recipe: Recipe) -> None:
    """A run that goes on takes from the hub what it began with (`downloads.json`)."""
    folder = Path(recipe.checkpoints.output_dir)
    path = folder / "downloads.json"
    if goes_on(folder, recipe.checkpoints.resume_from_checkpoint) and path.is_file():
        pin({name: str(commit) for name, commit in read_json(path).items()})
    else:
        pin({})


def write_run_files(recipe: Recipe, output_dir: Path) -> Path:
    """Writes recipe, versions and the description of the data sets; returns the path of that."""
    output_dir.mkdir(parents=True, exist_ok=True)
    if is_first():
        (output_dir / "recipe.yaml").write_text(recipe.to_yaml())
        versions = {"python": platform.python_version()}
        versions |= {name: importlib.metadata.version(name) for name in _VERSIONS_OF}
        (output_dir / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
    path = output_dir / "dataset_config.json"
    path.write_text(json.dumps(recipe.dataset_config(), indent=2) + "\n")
    return path


def sample_line(recipe: Recipe) -> str:
    """A line for a shell that samples from the run's model: the first picture of its validation, or of its data."""
    from framebridge_plugin.data.validation_rows import read_validation_rows

    output_dir, file = recipe.checkpoints.output_dir, recipe.validation.validation_dataset_file
    options = ["--data-index", "0"]
    for row in read_validation_rows(Path(file)) if file is not None else ():
        image = str(row.get("image_path") or row.get("video_path"))
        if Path(image).is_file():
            condition = "--class-name" if recipe.backbone.condition == "class" else "--prompt"
            options = ["--image", image, condition, str(row["caption"])]
            break
    output = str(Path(output_dir, "sample.mp4"))
    return shlex.join(["finetrainers", "sample", "--model", output_dir, *options, "--output", output])


def _write_loss_curve(output_dir: Path) -> None:
    from framebridge_plugin.media import loss_curve

    loss_curve(output_dir / "metrics.jsonl", output_dir / "loss.png")
    say(f"loss curve: {output_dir / 'loss.png'}")
