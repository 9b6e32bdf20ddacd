"""`finetrainers export`: a model's or a LoRA's folder out of a checkpoint. Needs torch, but neither an accelerator nor
finetrainers.
"""

from __future__ import annotations

from pathlib import Path

from framebridge_plugin.backbones.copying import copy_file, written_whole
from framebridge_plugin.backbones.files import safetensors_header
from framebridge_plugin.backbones.folders import backbone_of
from framebridge_plugin.backbones.manifest import (
    AVERAGE_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    DamagedError,
    FileFacts,
    Manifest,
    check_file,
    folder_problem,
    read_manifest,
    step_folder,
    step_folders,
    whole_checkpoints,
    write_manifest,
)
from framebridge_plugin.backbones.tensor_files import read_tensors, write_tensors
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.files import writing_problem


def export_checkpoint(run: Path, to: Path, *, step: int | None = None, average: bool | None = None) -> str:
    """Writes what sampling opens of a checkpoint; every byte is checked on the way.

    Args:
        run: A run's folder, or one that holds checkpoints themselves, as one in `abandoned/` does.
        to: The folder to make.
        step: The checkpoint; None takes the one that was written last.
        average: The averaged weights (EMA), or those that were trained; None takes the average where there is one.

    Returns:
        What was exported, in words.

    Raises:
        UsageError: If the folder to make is there already, or there is no such checkpoint or average.
        FrameBridgeError: If a file is damaged.
    """
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise UsageError(f"--to {to}: is there already; name another folder")
    if problem := writing_problem(to):
        raise UsageError(f"--to {problem}")
    checkpoint = _find(run, step)
    try:
        manifest = read_manifest(checkpoint)
        has_average = AVERAGE_FILE in manifest.files
        if average and not has_average:
            raise UsageError(f"--ema: {run} keeps no average of its weights (framebridge.ema_decay); leave it out")
        kind = next(name.partition("/")[0] for name in manifest.files if name.endswith(f"/{MANIFEST_FILE}"))
        _write(checkpoint, manifest, kind, to, raw=has_average and average is False)
    except DamagedError as error:
        raise FrameBridgeError(f"{error}; give the --step of another checkpoint of {run}") from error
    which = ("averaged" if average is not False else "trained") if has_average else "trained"
    return f"{kind} of {checkpoint.name}, the {which} weights"


def _find(run: Path, step: int | None) -> Path:
    root = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    steps = ", ".join(map(str, sorted(step_folders(root)))) or "none"
    if step is None:
        newest = next(iter(whole_checkpoints(root)), None)
        if newest is None:
            raise UsageError(f"--run {run}: holds no whole checkpoint (steps there: {steps})")
        return newest
    folder = step_folder(root, step)
    if not folder.is_dir():
        raise UsageError(f"--step {step}: {run} has no such checkpoint (steps there: {steps})")
    if problem := folder_problem(folder):
        raise FrameBridgeError(f"{problem}; give the --step of another checkpoint of {run}")
    return folder


def _write(checkpoint: Path, manifest: Manifest, kind: str, to: Path, *, raw: bool) -> None:
    facts = backbone_of(checkpoint / kind)
    if facts is None:
        raise FrameBridgeError(f"{checkpoint / kind} is of no backbone that is known here; install its package")
    network = f"{facts.network}/" if kind == "model" else ""
    known = {}
    try:
        with written_whole(to) as partial:
            for name, expected in manifest.files.items():
                inner = name.removeprefix(f"{kind}/")
                if inner in (name, MANIFEST_FILE):
                    continue
                (partial / inner).parent.mkdir(parents=True, exist_ok=True)
                if raw and inner.startswith(network) and inner.endswith(".safetensors"):
                    known[inner] = _write_raw(checkpoint, manifest, name, partial / inner, prefix=facts.network)
                else:
                    known[inner] = copy_file(checkpoint / name, partial / inner)
                    check_file(checkpoint / name, known[inner], expected)
            write_manifest(partial, known)
    except OSError as error:
        raise FrameBridgeError(f"cannot write {to}: {error}; free disk space") from error


def _write_raw(checkpoint: Path, manifest: Manifest, name: str, path: Path, *, prefix: str) -> FileFacts:
    """A file of averaged weights with those that were trained in their place."""
    averaged = read_tensors(checkpoint, name, manifest)
    trained = read_tensors(checkpoint, WEIGHTS_FILE, manifest)
    # A LoRA's file names its network, and leaves out the name that peft gives to the layers.
    trained |= {f"{prefix}.{key.replace('.default.', '.')}": tensor for key, tensor in trained.items()}
    metadata = (safetensors_header(checkpoint / name) or {}).get("__metadata__")
    return write_tensors(path, {key: trained.get(key, tensor) for key, tensor in averaged.items()}, metadata)
