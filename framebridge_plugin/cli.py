"""The command `finetrainers`: train, sample, convert, conformance, recipes, doctor.

Everything but the standard library is imported inside the subcommands, so that `--help` answers at once and a wrong
recipe is refused before torch is loaded.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from framebridge_plugin import __version__
from framebridge_plugin.errors import FrameBridgeError, UsageError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

_TRAIN_HELP = """\
Train from a recipe: a YAML file that is a whole run.

  finetrainers train --recipe cogvideox_bridge framebridge.data.data_root=clips optimization.lr=2e-5
  torchrun --nproc-per-node 8 --no-python finetrainers train --recipe my.yaml parallelism.dp_degree=8

Relative paths in a recipe are relative to the working directory."""

_SAMPLE_HELP = """\
Turn images into videos with a trained model; writes the mp4 and a contact sheet (PNG) beside it.

  finetrainers sample --model runs/my --image cat.png --prompt "a cat turns its head" --output cat.mp4
  finetrainers sample --model runs/ucf101 --image swing.png --class-name GolfSwing --output swing.mp4
  finetrainers sample --model runs/ucf101 --data-index 0 100 200 --output three.mp4

A CogVideoX model takes text, a Latte model (UCF-101) classes. A neural prior alone gives its video in one call; the
options of the sampler are not for it. The weights in a run's folder are the averaged ones (EMA) where it keeps any."""

_CONVERT_HELP = """\
Make a model folder of a checkpoint of the FrameBridge authors (UCF-101: bridge, neural prior, or bridge on a neural
prior; the file says which). Says which keys were missing or left over; a file that lacks keys is refused.

  finetrainers convert --from reference ucf.pt --to models/ucf101
  finetrainers convert --from reference prior.pt --to models/prior
  finetrainers convert --from reference ucf_prior.pt --to models/ucf101_prior --neural-prior models/prior"""


_CONFORMANCE_HELP = """\
Put the specification of a model through the conformance suite: its interface, what it loads and saves, and eight runs
of finetrainers' own SFTTrainer. Take a tiny model: it is trained in float32 on whatever device there is.

  finetrainers conformance --model-name cogvideox_bridge --model tiny-cogvideox
  finetrainers conformance --model-name cogvideox --model tiny-cogvideox --only forward run-lora"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None takes the process's.

    Returns:
        The exit code: 0, 1 for a run that failed, 2 for a wrong recipe or command line, 130 after Ctrl-C.
    """
    debug = os.environ.get("FRAMEBRIDGE_DEBUG", "0") not in ("", "0")
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        debug = debug or arguments.debug
        if not debug:
            _quieten_libraries()
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except FrameBridgeError as error:
        if debug:
            traceback.print_exc()
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if debug:
            traceback.print_exc()
        hint = "" if debug else " (--debug shows the traceback)"
        notes = " ".join(getattr(error, "__notes__", ()))
        print(f"error: {type(error).__name__}: {' '.join(str(error).split())}{notes or hint}", file=sys.stderr)
        return EXIT_FAILED


def _quieten_libraries() -> None:
    """Mutes what libraries say about optional kernels that are not there: every start would open with it."""
    for name in ("bitsandbytes", "diffusers.quantizers.torchao", "torch.utils._pytree", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as the command reports everything else."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="finetrainers", description="FrameBridge image-to-video models for finetrainers.")
    parser.add_argument("--version", action="version", version=f"framebridge-plugin {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_train(_add_command(commands, "train", _train, "train from a recipe", _TRAIN_HELP))
    _add_sample(_add_command(commands, "sample", _sample, "turn images into videos", _SAMPLE_HELP))
    _add_convert(_add_command(commands, "convert", _convert, "make a model folder of another format", _CONVERT_HELP))
    help_text = "check that a model's specification does what finetrainers relies on"
    _add_conformance(_add_command(commands, "conformance", _conformance, help_text, _CONFORMANCE_HELP))
    _add_command(commands, "recipes", _recipes, "list the recipes that come with the package")
    _add_command(commands, "doctor", _doctor, "report versions, repairs, devices and problems")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "train":
        # argparse takes only the first group of overrides when options stand between them.
        arguments.overrides += [item for item in rest if not item.startswith("-")]
        rest = [item for item in rest if item.startswith("-")]
    if rest:
        parser.error(f"unknown argument {rest[0]}")
    return arguments


def _add_command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    description: str = "",
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=description or f"{summary[0].upper()}{summary[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run)
    return command


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", required=True, metavar="R", help="a YAML file, or a name from `finetrainers recipes`"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and stop; only warn of missing files"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="path=value", help="replace a value, such as optimization.lr=2e-5"
    )


def _add_sample(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="RUN_OR_FOLDER", help="a run's folder, a model's folder, or a hub id")
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument(
        "--image",
        nargs="+",
        type=Path,
        default=[],
        metavar="I.png",
        help="first frame: a picture, or a video whose first frame is taken; several make several videos",
    )
    images.add_argument(
        "--data-index",
        nargs="+",
        type=int,
        default=[],
        metavar="N",
        help="in place of --image: rows of the run's data set; their captions or classes are the default conditions",
    )
    conditions = parser.add_mutually_exclusive_group()
    for option, metavar, kind, what in (
        ("--prompt", "TEXT", str, "CogVideoX: one for all images, or one per image"),
        ("--class-name", "NAME", str, "Latte: one for all images, or one per image"),
        ("--label", "N", int, "Latte: the classes' numbers, in place of --class-name"),
    ):
        conditions.add_argument(option, nargs="+", type=kind, default=[], metavar=metavar, help=what)
    add("--output", required=True, type=Path, metavar="OUT.mp4", help="several videos: OUT-0.mp4, OUT-1.mp4, ...")
    add("--transformer", metavar="FOLDER", help="a fine-tuned transformer to put into a CogVideoX model")
    add("--steps", type=int, metavar="N", help="sampling steps, 1 to 1000 (default: 50; Latte: 1000, the reference's)")
    add("--sampler", choices=("sde", "dbim"), help="default: sde, as the reference")
    add("--order", type=int, choices=(1, 2), help="2: multistep, dbim only (default: 1)")
    add("--eta", type=float, metavar="E", help="noise of dbim, 0 to 1 (default: 0)")
    add("--grid", choices=("trailing", "linspace", "lambda"), help="times (default: trailing; Latte: linspace)")
    add("--start", choices=("booted", "clean_prior"), help="first latent (default: booted)")
    add("--guidance-scale", type=float, metavar="G", help="1: none (default: 6; Latte: 7)")
    add("--seed", type=int, default=42, metavar="S", help="of the first video; video i takes S + i (default: 42)")
    add("--num-frames", type=int, metavar="F", help="default: the model's")
    add("--height", type=int, metavar="H", help="pixels (default: the model's)")
    add("--width", type=int, metavar="W", help="pixels (default: the model's)")
    add("--num-videos", type=int, default=1, metavar="N", help="videos per image (default: 1)")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="default: fp32 on a CPU, bf16 on a GPU")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--from", required=True, dest="format", choices=("reference",), help="whose checkpoint it is: the authors'")
    add("checkpoint", type=Path, metavar="CKPT.pt", help="the file; only weights are read from it, never code")
    add("--to", required=True, type=Path, metavar="FOLDER", help="the model folder to make")
    add("--vae", metavar="FOLDER_OR_ID", help="the per-frame autoencoder (default: stabilityai/sd-vae-ft-ema)")
    add("--neural-prior", metavar="FOLDER", help="for a bridge on a neural prior: the converted neural prior")
    add("--heads", type=int, metavar="N", help="attention heads of a network that is none of the sizes S, B, L, XL")


def _add_conformance(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model-name", required=True, metavar="X", help="the name that finetrainers knows the model by")
    add("--model", required=True, metavar="FOLDER", help="a model's folder in diffusers' format, or a hub id")
    add("--only", nargs="+", default=[], metavar="CHECK", help="make these checks, and those whose names begin so")
    add(
        "--clip-shape",
        nargs=3,
        type=int,
        metavar=("F", "H", "W"),
        help="frames, height and width of the clips (default: what the model's config says, else 9 64 64)",
    )


def _train(arguments: argparse.Namespace) -> int:
    from framebridge_plugin.recipe import load_recipe, resolve_recipe

    if arguments.dry_run:
        recipe, warnings = resolve_recipe(arguments.recipe, arguments.overrides)
        print(recipe.to_yaml(), end="")
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return 0
    recipe = load_recipe(arguments.recipe, arguments.overrides, os.environ)

    from framebridge_plugin.training.run import train

    try:
        train(recipe)
    except FrameBridgeError:
        raise
    except Exception as error:
        # Nobody wants to repeat hours of training to see a traceback.
        error.add_note(f" (traceback: {_write_crash(Path(recipe.checkpoints.output_dir))})")
        raise
    return 0


def _write_crash(output_dir: Path) -> Path:
    path = output_dir / f"crash-rank{os.environ.get('RANK', '0')}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(traceback.format_exc(), encoding="utf-8")
    return path


def _sample(arguments: argparse.Namespace) -> int:
    from framebridge_plugin.sample_request import SampleRequest

    request = SampleRequest(
        model=arguments.model,
        images=tuple(arguments.image),
        data_rows=tuple(arguments.data_index),
        prompts=tuple(arguments.prompt),
        class_names=tuple(arguments.class_name),
        labels=tuple(arguments.label),
        output=arguments.output,
        transformer=arguments.transformer,
        steps=arguments.steps,
        sampler=arguments.sampler,
        order=arguments.order,
        eta=arguments.eta,
        grid=arguments.grid,
        start=arguments.start,
        guidance_scale=arguments.guidance_scale,
        seed=arguments.seed,
        num_frames=arguments.num_frames,
        height=arguments.height,
        width=arguments.width,
        num_videos=arguments.num_videos,
        dtype=arguments.dtype,
    )

    from framebridge_plugin.sample_inputs import load_inputs

    inputs = load_inputs(request)

    from framebridge_plugin.pipelines.sampling import sample

    sample(request, inputs)
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    if not arguments.checkpoint.is_file():
        raise UsageError(f"{arguments.checkpoint}: no such file")

    from framebridge_plugin.data import UCF101_CLASSES
    from framebridge_plugin.pipelines.conversion import DEFAULT_VAE, convert_reference_checkpoint

    converted = convert_reference_checkpoint(
        arguments.checkpoint,
        arguments.to,
        vae=arguments.vae or DEFAULT_VAE,
        neural_prior=arguments.neural_prior,
        class_names=UCF101_CLASSES,
        num_attention_heads=arguments.heads,
    )
    print(f"{arguments.checkpoint}: {converted.describe()}")
    print(f"model: {arguments.to}")
    return 0


def _conformance(arguments: argparse.Namespace) -> int:
    from framebridge_plugin.testing.command import run_conformance

    return run_conformance(
        arguments.model_name,
        arguments.model,
        only=arguments.only,
        clip_shape=tuple(arguments.clip_shape) if arguments.clip_shape else None,
        debug=arguments.debug,
    )


def _recipes(arguments: argparse.Namespace) -> int:
    from framebridge_plugin.recipe import recipe_summary, shipped_recipes

    recipes = shipped_recipes()
    for name, path in recipes.items():
        print(f"{name:{max(map(len, recipes))}}  {recipe_summary(path)}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from framebridge_plugin.doctor import run_doctor

    return run_doctor()
