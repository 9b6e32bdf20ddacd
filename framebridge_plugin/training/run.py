"""From a checked recipe to a finished run: what `finetrainers train` does once the recipe is right."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import shlex
import shutil
import sys
import tempfile
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from framebridge_plugin import signals
from framebridge_plugin.backbones.facts import find_backbone
from framebridge_plugin.backbones.files import read_json
from framebridge_plugin.backbones.starting import goes_on
from framebridge_plugin.errors import FinishedRunError, FrameBridgeError, UsageError, escaped, say
from framebridge_plugin.files import downloaded, pin, write_whole
from framebridge_plugin.folder_lock import FolderLock
from framebridge_plugin.imports import without_collection
from framebridge_plugin.processes import have_met, is_first, rank
from framebridge_plugin.recipe.outside import SENT, outside_effects
from framebridge_plugin.recipe.scratch_rules import data_class_names, data_clip_shape
from framebridge_plugin.training.heartbeats import HEARTBEATS

if TYPE_CHECKING:
    from finetrainers import BaseArgs
    from finetrainers.models.modeling_utils import ModelSpecification

    from framebridge_plugin.recipe import Recipe

# Arguments of finetrainers that a specification takes under the same name.
_SETTINGS = (
    *("transformer_id", "vae_id", "tokenizer_id", "text_encoder_id", "revision", "cache_dir"),
    *("transformer_dtype", "vae_dtype", "text_encoder_dtype"),
    *("transformer_quantization", "text_encoder_quantization", "float8_training"),
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
    refuse_start(recipe)
    if is_first():
        for line in outside_effects(recipe, SENT):
            say(line)
    # The other ranks touch nothing in the folder before they have met the first one, which holds the lock by then.
    with FolderLock(output_dir) if is_first() else contextlib.nullcontext():
        if is_first():
            shutil.rmtree(output_dir / HEARTBEATS, ignore_errors=True)  # of a run that did not end in order
        try:
            with signals.as_interruption(), tempfile.TemporaryDirectory(prefix="framebridge-") as private:
                _train(recipe, output_dir, Path(private), allowed)
        except FinishedRunError:
            _say_result(recipe)
            raise
        except FrameBridgeError:
            raise
        except Exception as error:
            if is_first() or have_met():
                # Nobody wants to repeat hours of training to see a traceback.
                crash = output_dir / f"crash-rank{rank()}.txt"
                lines = traceback.format_exc().split("\n")
                crash.write_text("".join(f"{escaped(line)}\n" for line in lines), encoding="utf-8")
                error.add_note(f" (traceback: {crash})")
            raise
        _say_result(recipe)


def _say_result(recipe: Recipe) -> None:
    if is_first():
        _write_loss_curve(Path(recipe.checkpoints.output_dir))
        say(f"model: {recipe.result_folder}")
        say(f"sample from it: {sample_line(recipe)}")


def _train(recipe: Recipe, output_dir: Path, private: Path, allowed: Collection[str]) -> None:
    """Trains; the files that describe the run are written once nothing more can refuse it."""
    pin_downloads(recipe)
    # What this process reads; a copy for others comes into the run's folder.
    dataset_config = private / "dataset_config.json"
    dataset_config.write_text(json.dumps(recipe.dataset_config()))

    with without_collection():
        from framebridge_plugin.training.finetrainers.registration import recipe_arguments, register

        register()

        from framebridge_plugin.training import FrameBridgeTrainer

    args = recipe_arguments(recipe, dataset_config)
    # finetrainers hands this to the trackers as it is, which would write into the working directory.
    args.logging_dir = str(output_dir / args.logging_dir)

    def publish() -> None:
        if is_first():
            write_run_files(recipe, output_dir, "recipe-resumed.yaml" if trainer.progress.step else "recipe.yaml")
            if downloaded:
                write_whole(output_dir / "downloads.json", json.dumps(downloaded, indent=2) + "\n")

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

        try:
            sends = wandb.setup().settings.mode in ("online", "run", "shared")
            has_login = not sends or wandb.login(verify=False)
        except wandb.errors.UsageError:  # there is none, and nobody to ask for it
            has_login = False
        if not has_login:
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


def package_versions() -> dict[str, str]:
    """The versions of what decides about a run's numbers."""
    return {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in _VERSIONS_OF},
    }


def write_run_files(recipe: Recipe, output_dir: Path, name: str = "recipe.yaml") -> None:
    """Writes the recipe, by that name, the versions, and the description of the data sets."""
    write_whole(output_dir / name, recipe.to_yaml())
    write_whole(output_dir / "versions.json", json.dumps(package_versions(), indent=2) + "\n")
    write_whole(output_dir / "dataset_config.json", json.dumps(recipe.dataset_config(), indent=2) + "\n")


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
            scale, facts = row.get("guidance_scale"), recipe.backbone
            if scale is not None and "scheduler" in facts.parts and scale != facts.default_call["guidance_scale"]:
                options += ["--guidance-scale", f"{scale:g}"]
            break
    output = str(Path(output_dir, "new_sample.mp4"))
    return shlex.join(["finetrainers", "sample", "--model", output_dir, *options, "--output", output])


def _write_loss_curve(output_dir: Path) -> None:
    from framebridge_plugin.media import loss_curve

    loss_curve(output_dir / "metrics.jsonl", output_dir / "loss.png")
    say(f"loss curve: {output_dir / 'loss.png'}")
