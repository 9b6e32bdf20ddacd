"""The command line of `finetrainers`: subcommands, options, help; beyond the standard library for `sample` alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from framebridge_plugin import __version__
from framebridge_plugin.backbones.folders import TWO_FILE_LORA
from framebridge_plugin.errors import UsageError
from framebridge_plugin.settings.choices import ALLOWABLE

_TRAIN_HELP = """\
Train from a recipe: a YAML file that is a whole run.

  finetrainers train --recipe cogvideox_bridge framebridge.data.data_root=clips optimization.lr=2e-5
  finetrainers train --recipe my.yaml --nproc 8

The same command goes on with a run that was killed or interrupted. torchrun and srun may start the processes, too.
Relative paths in a recipe are relative to the working directory."""

_PRECOMPUTE_HELP = """\
Write the latents and text embeddings of all clips of a recipe's data, once for many runs. Killed or interrupted, the
same command goes on where it was; a larger --variants adds epochs.

  finetrainers precompute --recipe my.yaml --output latents --variants 4 --nproc 8
  finetrainers train --recipe my.yaml framebridge.precomputed=latents"""

_CHECK_HELP = """\
Read every clip of a recipe's data, as a run would, and list those that cannot be read, with kind and reason; the list
can be a recipe's framebridge.bad_files.quarantine_file. After Ctrl-C the same command goes on. Exit code 1 says that
there are any.

  finetrainers data check --recipe my.yaml --nproc 16
  finetrainers data check --recipe ucf101_bridge framebridge.data.class_root=UCF-101 --full --output bad.jsonl"""

_PREPARE_HELP = """\
Unpack UCF-101 with unar, unrar, 7z or bsdtar, whichever is installed, and say what is missing. What is unpacked
already is only counted.

  finetrainers prepare ucf101 --archive UCF101.rar --to data --splits UCF101TrainTestSplits-RecognitionTask.zip"""

_SAMPLE_HELP = """\
Turn images into videos with a trained model; writes the mp4 and a contact sheet (PNG) beside it.

  finetrainers sample --model runs/my --image cat.png --prompt "a cat turns its head" --output cat.mp4
  finetrainers sample --model runs/ucf101 --image swing.png --class-name GolfSwing --output swing.mp4
  finetrainers sample --model runs/ucf101 --data-index 0 100 200 --output three.mp4

Most models take text, a Latte (UCF-101) classes. A neural prior alone gives its video in one call; the
options of the sampler are not for it. The weights in a run's folder are the averaged ones (EMA) where it keeps any."""

_EVALUATE_HELP = """\
Make videos of the first frames of held-out clips, and measure them: fidelity to the image and to the true clip, and
motion, beside the same of the true clips and of the image repeated. Writes evaluation.json (with the whole protocol,
and each clip), evaluation.md (the table) and evaluation.png (worst, median and best clip). The clips are those of the
run's own recipe, or of another, with overrides. Killed or interrupted, the same command goes on where it was.

  finetrainers evaluate --model runs/ucf101 framebridge.data.split=test --count 256 --output ucf101
  finetrainers evaluate --model runs/my framebridge.data.data_root=held_out --steps 25 --nproc 8 --output my

What the measures mean is in docs/evaluation.md."""

_EXPORT_HELP = """\
Make the folder of a model or of a LoRA of any checkpoint of a run, whatever the number of processes that wrote it.
Every byte is compared with the checkpoint's manifest on the way.

  finetrainers export --run runs/my --to models/my
  finetrainers export --run runs/my --step 4000 --raw --to models/my-4000"""

_REPORT_HELP = """\
Write one HTML file about a run: curves, samples over time beside input and truth, evaluation, recipe, versions, bad
files. It holds all that it shows and fetches nothing. A run that is still going on, or was killed, has one, too.

  finetrainers report --run runs/my
  finetrainers report --run runs/bridge --compare runs/baseline --output comparison.html"""

_CONVERT_HELP = """\
Make a model folder of a checkpoint of the FrameBridge authors (UCF-101: bridge, neural prior, or bridge on a neural
prior; the file says which). Says which keys were missing or left over; a file that lacks keys is refused.

  finetrainers convert --from reference ucf.pt --to models/ucf101
  finetrainers convert --from reference prior.pt --to models/prior
  finetrainers convert --from reference ucf_prior.pt --to models/ucf101_prior --neural-prior models/prior

Or make one LoRA file of a LoRA of an earlier version, whose input projection lies in a second file:

  finetrainers convert --from two-file-lora runs/old/lora --to runs/old/lora-converted"""


_CONFORMANCE_HELP = """\
Put the specification of a model through the conformance suite: its interface, what it loads and saves, and eight runs
of finetrainers' own SFTTrainer. Take a tiny model: it is trained in float32 on whatever device there is.

  finetrainers conformance --model-name cogvideox_bridge --model tiny-cogvideox
  finetrainers conformance --model-name cogvideox --model tiny-cogvideox --only forward run-lora"""


_DOCTOR_HELP = """\
Report versions, repairs, devices, and what to do about each problem. With a recipe: the memory that its run needs of a
GPU, for what, and what would save most; its data need not be there, nor a model of the hub that is known, and nothing
is downloaded. Exit code 1 says that this machine's card has less.

  finetrainers doctor
  finetrainers doctor --recipe cogvideox_bridge_lora framebridge.precomputed=latents"""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as the command reports everything else."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads a command line without the program's name; `run` is the subcommand, such as "train" or "data check"."""
    parser = _Parser(prog="finetrainers", description="FrameBridge image-to-video models for finetrainers.")
    parser.add_argument("--version", action="version", version=f"framebridge-plugin {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_train(_add_command(commands, "train", "train from a recipe", _TRAIN_HELP))
    help_text = "write the latents and text embeddings of a corpus, once for many runs"
    _add_precompute(_add_command(commands, "precompute", help_text, _PRECOMPUTE_HELP))
    sample = _add_command(commands, "sample", "turn images into videos", _SAMPLE_HELP)
    if argv[:1] == ["sample"]:  # its settings take longer to import than all else
        _add_sample(sample)
    evaluate = _add_command(commands, "evaluate", "measure the videos of a model", _EVALUATE_HELP)
    if argv[:1] == ["evaluate"]:
        _add_evaluate(evaluate)
    _add_export(_add_command(commands, "export", "make a model folder of a checkpoint", _EXPORT_HELP))
    _add_report(_add_command(commands, "report", "write a page about a run, or about several", _REPORT_HELP))
    _add_convert(_add_command(commands, "convert", "make a model folder of another format", _CONVERT_HELP))
    help_text = "check that a model's specification does what finetrainers relies on"
    _add_conformance(_add_command(commands, "conformance", help_text, _CONFORMANCE_HELP))
    _add_data_check(_add_group(commands, "data", "look after a corpus"))
    _add_prepare_ucf101(_add_group(commands, "prepare", "unpack a corpus as it is distributed"))
    _add_command(commands, "recipes", "list the recipes that come with the package")
    help_text = "report versions, repairs, devices and problems; or the memory that a recipe needs"
    _add_recipe(_add_command(commands, "doctor", help_text, _DOCTOR_HELP), required=False)
    arguments, rest = parser.parse_known_args(argv)
    if hasattr(arguments, "overrides"):
        # argparse takes only the first group of overrides when options stand between them.
        arguments.overrides += [item for item in rest if not item.startswith("-")]
        rest = [item for item in rest if item.startswith("-")]
    if rest:
        parser.error(f"unknown argument {rest[0].partition('=')[0]}")  # the value may be a password
    arguments.argv = list(argv)
    return arguments


def _add_command(
    commands: argparse._SubParsersAction,
    name: str,
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
    command.set_defaults(run=command.prog.partition(" ")[2])
    return command


def _add_group(commands: argparse._SubParsersAction, name: str, summary: str) -> argparse._SubParsersAction:
    group = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    return group.add_subparsers(dest="what", metavar="WHAT", required=True)


def _add_recipe(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument(
        "--recipe", required=required, metavar="R", help="a YAML file, or a name from `finetrainers recipes`"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="path=value", help="replace a value, such as optimization.lr=2e-5"
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    _add_nproc(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe, say what a start would refuse, and stop before weights are loaded; the exit "
        "code is that of the start",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=list(ALLOWABLE),
        metavar="NAME",
        help=f"resume with other settings than the checkpoint's, of {', '.join(ALLOWABLE)}; may be repeated",
    )


def _add_precompute(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    add, one_or_more = parser.add_argument, _whole_number_from(1)
    default = "the recipe's framebridge.precomputed, else <output_dir>/precomputed"
    add("--output", type=Path, metavar="FOLDER", help=f"where to (default: {default})")
    _add_nproc(parser)
    add("--variants", type=one_or_more, metavar="K", help="epochs to store (default: as there are, 1 in a new folder)")
    add("--shard-size", type=one_or_more, metavar="N", help="clips in a file of a new folder (default: 64)")
    add("--only", choices=("latents", "captions"), help="the other part is encoded by the run, as it goes")
    dtype = "captions in this (default: as the text encoder gives them); fp8: e4m3 with a factor for each token"
    add("--caption-dtype", choices=("fp8", "bf16"), help=dtype)


def _add_nproc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nproc",
        type=_whole_number_from(1),
        metavar="N",
        help="processes to start on this machine, one for each GPU in turn (default: 1, or what torchrun or srun "
        "has started)",
    )


def _whole_number_from(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if int(text) < least:
            raise ValueError
        return int(text)

    return whole_number


def _add_data_check(commands: argparse._SubParsersAction) -> None:
    parser = _add_command(commands, "check", "read every clip, list those that cannot be", _CHECK_HELP)
    _add_recipe(parser)
    add = parser.add_argument
    add("--nproc", type=_whole_number_from(1), metavar="N", help="reading processes (default: one for each core)")
    add("--full", action="store_true", help="decode every file from end to end, not one clip of it")
    add("--output", type=Path, metavar="FILE", help="the list (default: <output_dir>/data_check.jsonl)")


def _add_prepare_ucf101(commands: argparse._SubParsersAction) -> None:
    summary = "unpack UCF-101 with whichever tool is there, and count the clips"
    add = _add_command(commands, "ucf101", summary, _PREPARE_HELP).add_argument
    add("--archive", required=True, type=Path, metavar="FILE", help="UCF101.rar, or a .zip of it")
    add("--to", required=True, type=Path, metavar="FOLDER", help="the folder that UCF-101 comes to lie in")
    add("--splits", type=Path, metavar="ZIP", help="UCF101TrainTestSplits-RecognitionTask.zip, to be unpacked too")


def _add_sample(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_model(parser)
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument(
        "--image",
        dest="images",
        nargs="+",
        type=Path,
        metavar="I.png",
        help="first frame: a picture, or a video whose first frame is taken; several make several videos",
    )
    images.add_argument(
        "--data-index",
        dest="data_rows",
        nargs="+",
        type=int,
        metavar="N",
        help="in place of --image: rows of the run's data set; their captions or classes are the default conditions",
    )
    _add_conditions(parser)
    add("--output", required=True, type=Path, metavar="OUT.mp4", help="several videos: OUT-0.mp4, OUT-1.mp4, ...")

    from framebridge_plugin.settings.options import add_options
    from framebridge_plugin.settings.sampling import SampleSection

    add_options(parser, SampleSection, dashes=True)


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="RUN_OR_FOLDER", help="a run's folder, a model's folder, or a hub id")
    add(
        "--transformer",
        metavar="FOLDER",
        help="a fine-tuned transformer, or a model that has it, for a base of text",
    )
    add("--base", metavar="FOLDER", help="where the model that a LoRA was trained on is now (default: where it was)")
    add("--allow-other-base", action="store_true", help="load a LoRA into another model than it was trained on")


def _add_conditions(parser: argparse.ArgumentParser) -> None:
    conditions = parser.add_mutually_exclusive_group()
    for option, metavar, kind, what in (
        ("prompt", "TEXT", str, "for a model of text: one for all images, or one per image"),
        ("class-name", "NAME", str, "for a model of classes: one for all images, or one per image"),
        ("label", "N", int, "the classes' numbers, in place of --class-name"),
    ):
        dest = f"{option.replace('-', '_')}s"
        conditions.add_argument(f"--{option}", dest=dest, nargs="+", type=kind, metavar=metavar, help=what)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    _add_recipe(parser, required=False)
    add = parser.add_argument
    what = "in place of clips: pictures, videos whose first frame is taken, folders of them, and tables (.csv with "
    add("--images", nargs="+", type=Path, metavar="PATH", help=f"{what}caption and image_path or video_path)")
    _add_conditions(parser)
    add("--output", required=True, type=Path, metavar="FOLDER", help="where to")
    add("--vbench", type=Path, metavar="FOLDER", help="write the videos by VBench-I2V's names, too")
    add("--preset", choices=("ucf101", "msrvtt"), help="how FVD is published on a corpus; says what it sets")
    _add_nproc(parser)

    from framebridge_plugin.settings.options import add_options
    from framebridge_plugin.settings.sampling import NETWORKS, EvaluateSection

    what = f"what trained networks find, too (all but vmaf: framebridge-plugin[evaluate]): {', '.join(NETWORKS)}"
    add("--also", nargs="+", default=[], choices=NETWORKS, metavar="NAME", help=what)
    add_options(parser, EvaluateSection, dashes=True)


def _add_export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--run",
        required=True,
        dest="from_run",
        type=Path,
        metavar="R",
        help="a run's folder, or one in its abandoned/",
    )
    add("--step", type=int, metavar="N", help="the checkpoint (default: the one that was written last)")
    weights = parser.add_mutually_exclusive_group()
    what = "the averaged weights (default where there are any)"
    weights.add_argument("--ema", dest="average", action="store_true", default=None, help=what)
    weights.add_argument("--raw", dest="average", action="store_false", default=None, help="the weights as trained")
    add("--to", required=True, type=Path, metavar="FOLDER", help="the folder to make")


def _add_report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--run", required=True, dest="from_run", type=Path, metavar="R", help="a run's folder")
    add("--compare", nargs="+", type=Path, default=[], metavar="R2", help="runs to show beside it")
    add("--output", type=Path, metavar="FILE.html", help="the page (default: report.html in the run's folder)")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--from", required=True, dest="format", choices=("reference", TWO_FILE_LORA), help="what it is")
    add("checkpoint", type=Path, metavar="CKPT.pt", help="the file (only weights are read, never code), or the folder")
    add("--to", required=True, type=Path, metavar="FOLDER", help="the model folder to make")
    add("--vae", metavar="FOLDER_OR_ID", help="the per-frame autoencoder (default: stabilityai/sd-vae-ft-ema)")
    add("--neural-prior", metavar="FOLDER", help="for a bridge on a neural prior: the converted neural prior")
    add("--heads", type=int, metavar="N", help="attention heads of a network that is none of Latte's sizes")


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
