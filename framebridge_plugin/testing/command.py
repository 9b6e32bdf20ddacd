"""`finetrainers conformance`: the suite for a model that finetrainers knows by name."""

from __future__ import annotations

import collections
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from framebridge_plugin.errors import FrameBridgeError, UsageError, in_one_line, print_line, print_lines
from framebridge_plugin.files import local_path


def run_conformance(
    model_name: str,
    model: str,
    *,
    only: Sequence[str] = (),
    clip_shape: tuple[int, int, int] | None = None,
    debug: bool = False,
) -> int:
    """Puts the specification of a model through the suite and prints a table of what came out.

    Args:
        model_name: A name of finetrainers' `SUPPORTED_MODEL_CONFIGS`, ours included.
        model: Folder of a model for it (a tiny one: it is trained eight times), or its id on the hub.
        only: Names of checks to make; by default all. A name also stands for those that begin with it.
        clip_shape: (frames, height, width) of the clips; by default the model's.
        debug: Whether to print the traceback of every failure.

    Returns:
        1 if a check failed, else 0.

    Raises:
        UsageError: If finetrainers knows no such model, there is no such folder or no such check.
        FrameBridgeError: If the specification cannot be made from the folder.
    """
    path = local_path(model)
    if path is not None and not path.is_dir():
        raise UsageError(f"--model: {path}: no such folder; give the folder of a model in diffusers' format")

    # First, because the modules below import what stands on torchvision.
    specification_class = _specification_class(model_name)

    from framebridge_plugin.testing.known_faults import known_faults_of
    from framebridge_plugin.testing.outcome import run_check
    from framebridge_plugin.testing.subject import Subject
    from framebridge_plugin.testing.suite import CHECKS

    selected = [name for name in CHECKS if not only or name.startswith(tuple(only))]
    for name in only:
        if not any(check.startswith(name) for check in CHECKS):
            raise UsageError(f"--only: no check is called {name!r}; there are {', '.join(CHECKS)}")
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        try:
            subject = Subject(
                lambda: specification_class(pretrained_model_name_or_path=model),
                folder,
                model_name=model_name,
                clip_shape=clip_shape,
            )
        except FrameBridgeError:
            raise
        except Exception as error:
            reason = in_one_line(error)
            raise FrameBridgeError(
                f"cannot make {specification_class.__name__} from {model} ({type(error).__name__}: {reason}); check "
                f"that it is a complete model for {model_name}"
            ) from error
        faults = known_faults_of(specification_class)
        frames, height, width = subject.clip_shape
        what = "images" if subject.is_image_model else f"clips of {frames} frames"
        print_line(f"{subject.name} with {model}, {what} of {height} x {width}")
        results = []
        for name in selected:
            result = run_check(CHECKS[name], subject, faults)
            line = f"{name:{max(map(len, CHECKS))}}  {result.status:8}  {result.seconds:6.1f} s  {result.message}"
            print_line(line.rstrip())
            if debug and result.traceback:
                print_lines(result.traceback, file=sys.stderr)
            results.append(result)
    counts = collections.Counter(result.status for result in results)
    print_line(", ".join(f"{count} {status}" for status, count in counts.items()))
    return int(counts["FAILED"] > 0)


def _specification_class(model_name: str) -> Any:
    from framebridge_plugin.training.finetrainers.registration import register

    register()
    from finetrainers.config import SUPPORTED_MODEL_CONFIGS

    known = sorted(getattr(name, "value", name) for name in SUPPORTED_MODEL_CONFIGS)
    if model_name not in known:
        raise UsageError(f"--model-name: finetrainers knows no {model_name!r}; it knows {', '.join(known)}")
    return SUPPORTED_MODEL_CONFIGS[model_name]["lora"]
