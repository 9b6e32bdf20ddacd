"""The command `finetrainers`, a function for each subcommand.

Everything but the standard library is imported inside the subcommands, so that `--help` answers at once and a wrong
recipe is refused before torch is loaded.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from framebridge_plugin import library_messages, signals
from framebridge_plugin.backbones.folders import TWO_FILE_LORA
from framebridge_plugin.commands.arguments import parse
from framebridge_plugin.commands.launching import end_with_launcher, launch, starts_processes
from framebridge_plugin.errors import FrameBridgeError, UsageError, in_one_line, print_line, print_lines, say
from framebridge_plugin.files import why_no_file
from framebridge_plugin.folder_lock import FolderLock
from framebridge_plugin.imports import without_collection
from framebridge_plugin.processes import adopt_slurm, is_first
from framebridge_plugin.progress import alone

EXIT_FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None takes the process's.

    Returns:
        The exit code: 0, 1 for a run that failed, 2 for a wrong recipe or command line, 3 for a run that is done and
        saved but not validated or uploaded at the end, 130 after Ctrl-C (SIGINT), 143 after SIGTERM, 0 after a SIGUSR1
        that a recipe wants.
    """
    debug = os.environ.get("FRAMEBRIDGE_DEBUG", "0") not in ("", "0")
    library_messages.escape()
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        adopt_slurm(os.environ)
        end_with_launcher()
        debug = debug or arguments.debug
        if debug:
            library_messages.show()
        with signals.handled(), signals.as_interruption(), signals.ending_forks(), alone():
            return _RUNS[arguments.run](arguments)
    except KeyboardInterrupt as interruption:
        return signals.ended_by(interruption)
    except Exception as error:
        if debug:
            print_lines(traceback.format_exc(), file=sys.stderr)
        if isinstance(error, FrameBridgeError):
            lines, exit_code = str(error).split("\n") if error.args else [], error.exit_code
        else:
            hint = "" if debug else " (--debug shows the traceback)"
            notes = " ".join(getattr(error, "__notes__", ()))
            lines, exit_code = [f"{type(error).__name__}: {in_one_line(error)}{notes or hint}"], EXIT_FAILED
        for line in lines:
            say(f"error: {line}")
        return exit_code


def _train(arguments: argparse.Namespace) -> int:
    from framebridge_plugin.recipe import load_recipe, outside_effects, resolve_recipe

    several = starts_processes(arguments.nproc)
    environment = os.environ | {"WORLD_SIZE": str(arguments.nproc)} if several else os.environ
    if arguments.dry_run:
        recipe, missing = resolve_recipe(arguments.recipe, arguments.overrides, environment)
        if is_first():
            print_lines(recipe.to_yaml())
            for line in outside_effects(recipe):
                say(line)
        if missing:
            raise UsageError(*missing)

        from framebridge_plugin.training.dry_run import check_start

        check_start(recipe, arguments.allow, processes=int(environment.get("WORLD_SIZE", "1")))
        say("dry run: nothing found that a start would refuse; no weights were loaded")
        return 0
    recipe = load_recipe(arguments.recipe, arguments.overrides, environment)
    if recipe.checkpoints.stop_on_sigusr1:
        signals.handle_sigusr1()
    if several:
        return launch(arguments.argv, arguments.nproc)

    from framebridge_plugin.training.run import train

    train(recipe, arguments.allow)
    return 0


def _precompute(arguments: argparse.Namespace) -> int:
    from framebridge_plugin.recipe import load_recipe

    ours = "framebridge.precomputed"  # the folder need not be there yet
    recipe = load_recipe(arguments.recipe, arguments.overrides, needed=lambda where: where != ours)
    named = arguments.output or recipe.framebridge.precomputed
    store = Path(named or Path(recipe.checkpoints.output_dir, "precomputed"))
    if starts_processes(arguments.nproc):
        return launch(arguments.argv, arguments.nproc)

    from framebridge_plugin.training.precomputation.precompute import Wanted, precompute

    settings = recipe.framebridge.model_copy(update={"precomputed": None})
    recipe = recipe.model_copy(update={"framebridge": settings})
    wanted = Wanted(arguments.variants, arguments.shard_size, arguments.only, arguments.caption_dtype)
    precompute(recipe, store, wanted)
    return 0


def _data_check(arguments: argparse.Namespace) -> int:
    from framebridge_plugin.recipe import load_recipe

    data = ("framebridge.data", "dataset.dataset_config")  # the model need not be there yet
    recipe = load_recipe(arguments.recipe, arguments.overrides, needed=lambda where: where.startswith(data))

    from framebridge_plugin.commands.data_check import check_data

    output = arguments.output or Path(recipe.checkpoints.output_dir) / "data_check.jsonl"
    nproc = arguments.nproc or len(os.sched_getaffinity(0))
    with FolderLock(output.parent, f".{output.name}.lock"):
        return check_data(recipe.dataset_config(), output, nproc=nproc, full=arguments.full)


def _prepare_ucf101(arguments: argparse.Namespace) -> int:
    from framebridge_plugin.commands.prepare_ucf101 import prepare_ucf101

    prepare_ucf101(arguments.archive, arguments.to, arguments.splits)
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    from framebridge_plugin.commands.sample_request import SampleRequest

    given = _with_tuples(arguments)
    request = SampleRequest(**{name: given[name] for name in given.keys() & SampleRequest.model_fields.keys()})

    from framebridge_plugin.commands.sample_inputs import load_inputs

    inputs = load_inputs(request)

    with without_collection():
        from framebridge_plugin.commands.sample import sample

    sample(request, inputs)
    return 0


def _with_tuples(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(arguments).items()}


def _evaluate(arguments: argparse.Namespace) -> int:
    from framebridge_plugin.commands.evaluate_request import read_request

    request, content = read_request(_with_tuples(arguments))
    if starts_processes(arguments.nproc):
        return launch(arguments.argv, arguments.nproc)

    with without_collection():
        from framebridge_plugin.commands.evaluate import evaluate

    evaluate(request, content)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from framebridge_plugin.commands.export import export_checkpoint

    exported = export_checkpoint(arguments.from_run, arguments.to, step=arguments.step, average=arguments.average)
    print_line(f"{arguments.to}: {exported}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from framebridge_plugin.commands.report import write_report

    output = arguments.output or arguments.from_run / "report.html"
    print_lines(write_report([arguments.from_run, *arguments.compare], output))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    if arguments.format == TWO_FILE_LORA:
        return _convert_two_file_lora(arguments)
    if reason := why_no_file(arguments.checkpoint):
        raise UsageError(f"{arguments.checkpoint}: {reason}")

    from framebridge_plugin.backbones.latte.conversion import DEFAULT_VAE, convert_reference_checkpoint
    from framebridge_plugin.data import UCF101_CLASSES

    converted = convert_reference_checkpoint(
        arguments.checkpoint,
        arguments.to,
        vae=arguments.vae or DEFAULT_VAE,
        neural_prior=arguments.neural_prior,
        class_names=UCF101_CLASSES,
        num_attention_heads=arguments.heads,
    )
    print_line(f"{arguments.checkpoint}: {converted.describe()}")
    print_line(f"model: {arguments.to}")
    return 0


def _convert_two_file_lora(arguments: argparse.Namespace) -> int:
    if not arguments.checkpoint.is_dir():
        what = "it is no folder" if arguments.checkpoint.exists() else "no such folder"
        raise UsageError(f"{arguments.checkpoint}: {what}")
    for option in ("vae", "neural_prior", "heads"):
        if getattr(arguments, option) is not None:
            raise UsageError(f"--{option.replace('_', '-')} is not for --from {TWO_FILE_LORA}; leave it out")

    from framebridge_plugin.backbones.cogvideox.conversion import convert_two_file_lora

    found = convert_two_file_lora(arguments.checkpoint, arguments.to)
    print_line(f"{found}: its input projection is now a layer of the LoRA file")
    print_line(f"LoRA: {arguments.to}")
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
        print_line(f"{name:{max(map(len, recipes))}}  {recipe_summary(path)}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.recipe is not None:
        from framebridge_plugin.commands.memory_report import report_memory

        return report_memory(arguments.recipe, arguments.overrides)
    if arguments.overrides:
        raise UsageError(f"{arguments.overrides[0]!r} is for a recipe; give --recipe, too")

    from framebridge_plugin.commands.doctor import run_doctor

    return run_doctor()


_RUNS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "precompute": _precompute,
    "data check": _data_check,
    "prepare ucf101": _prepare_ucf101,
    "sample": _sample,
    "evaluate": _evaluate,
    "export": _export,
    "report": _report,
    "convert": _convert,
    "conformance": _conformance,
    "recipes": _recipes,
    "doctor": _doctor,
}
