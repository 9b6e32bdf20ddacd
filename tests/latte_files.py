"""A folder that looks like a Latte model from outside: what is checked before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

NAMES = ["Archery", "BalanceBeam", "Basketball", "GolfSwing"]


def write_latte_folder(
    folder: Path,
    kind: str = "bridge",
    bridge: dict[str, Any] | None = None,
    neural_prior: dict[str, Any] | None = None,
) -> Path:
    """Writes a model of 16 frames of 256x256 pixels with four classes.

    Args:
        folder: Where to write.
        kind: "bridge", "neural_prior" or "bridge_neural_prior".
        bridge: What is different in the bridge's configuration.
        neural_prior: What is different in the neural prior's.

    Returns:
        The folder.
    """
    index: dict[str, Any] = {"_class_name": "FrameBridgeLattePipeline"}
    write_part(folder / "vae", "AutoencoderKL", block_out_channels=[128, 256, 512, 512], latent_channels=4)
    index["vae"] = ["diffusers", "AutoencoderKL"]
    if kind != "neural_prior":
        in_channels = 8 if kind == "bridge_neural_prior" else 4
        write_network(folder / "transformer", **{"in_channels": in_channels, "stage": "bridge", **(bridge or {})})
        index["transformer"] = ["framebridge_plugin.models.latte", "LatteTransformer"]
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "FrameBridgeScheduler"}')
    if kind != "bridge":
        write_network(folder / "neural_prior", **{"stage": "neural_prior", **(neural_prior or {})})
        index["neural_prior"] = ["framebridge_plugin.models.latte", "LatteTransformer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_network(folder: Path, **config: Any) -> Path:
    defaults = {"patch_size": 2, "in_channels": 4, "out_channels": 4, "sample_height": 32, "sample_width": 32}
    classes = {"num_classes": len(NAMES), "class_names": NAMES}
    return write_part(folder, "LatteTransformer", **{**defaults, **classes, "num_frames": 16, **config})


def write_part(folder: Path, class_name: str, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": class_name, **config}))
    save_file({"weight": np.zeros(4, np.float32)}, folder / "model.safetensors")
    return folder
