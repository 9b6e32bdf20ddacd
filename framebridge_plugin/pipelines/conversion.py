"""Turning a checkpoint of the FrameBridge authors into a model folder that `FrameBridgeLattePipeline` opens."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.model_folders.checks import read_json
from framebridge_plugin.model_folders.latte import find_neural_prior, neural_prior_problem
from framebridge_plugin.models.latte import LatteTransformer
from framebridge_plugin.models.reference_checkpoints import (
    ReferenceCheckpoint,
    ReferenceNetwork,
    read_reference_checkpoint,
)
from framebridge_plugin.pipelines.saving import local_folder, save_model_folder
from framebridge_plugin.schedulers import FrameBridgeScheduler

DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"


def convert_reference_checkpoint(
    checkpoint: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    vae: str = DEFAULT_VAE,
    neural_prior: str | os.PathLike | None = None,
    class_names: Sequence[str] | None = None,
    num_attention_heads: int | None = None,
) -> ReferenceCheckpoint:
    """Writes a complete model folder: the network, its scheduler (eps_psi, no SAF, SDE on `linspace`) and the VAE.

    The folder appears when it is whole; nothing is left behind by a conversion that fails.

    Args:
        checkpoint: The authors' file, of any of the three stages.
        folder: The model folder to make; it must not exist, or be empty.
        vae: Folder or hub id of the per-frame autoencoder (`AutoencoderKL`), or of a model with one in `vae/`.
        neural_prior: Model folder with the converted neural prior, for the checkpoint of a bridge on a neural prior,
            which does not hold it.
        class_names: Names of the classes, taken where the network has as many; otherwise its labels stay numbers.
        num_attention_heads: Number of heads of a network that is none of `LATTE_SIZES`.

    Returns:
        What was in the file; its `describe()` is a line for the user.

    Raises:
        FrameBridgeError: If the file is refused (see `read_reference_checkpoint`), the folder is taken, or the VAE or
            the neural prior is missing or does not fit.
    """
    destination = Path(folder).absolute()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FrameBridgeError(f"{destination}: exists and is not an empty folder; choose another folder")
    reference = read_reference_checkpoint(checkpoint, class_names=class_names, num_attention_heads=num_attention_heads)
    main_name, main = next(iter(reference.networks.items()))
    linked = {"vae": ("diffusers", "AutoencoderKL", _find_vae(vae, main.config["out_channels"]))}

    partial = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if reference.stage == "bridge_neural_prior":
            if "neural_prior" in reference.networks:
                prior_folder = partial / "neural_prior"
                _save_network(reference.networks["neural_prior"], prior_folder)
            else:
                prior_folder = _find_neural_prior(neural_prior, checkpoint, main.config)
            linked["neural_prior"] = (LatteTransformer.__module__, LatteTransformer.__name__, prior_folder)
        save_model_folder(
            partial,
            pipeline_class="FrameBridgeLattePipeline",
            network_name=main_name,
            network_class=LatteTransformer,
            network_config=main.config,
            network_state_dict=main.state_dict,
            scheduler=FrameBridgeScheduler(target="eps_psi", grid="linspace") if main_name == "transformer" else None,
            linked_components=linked,
        )
        if destination.exists():
            destination.rmdir()
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return reference


def _save_network(network: ReferenceNetwork, folder: Path) -> None:
    with torch.device("meta"):
        transformer = LatteTransformer(**network.config)
    transformer.load_state_dict(network.state_dict, assign=True)
    transformer.save_pretrained(folder)


def _find_vae(vae: str, latent_channels: int) -> Path:
    folder = local_folder(vae, patterns=["config.json", "*.safetensors", "vae/config.json", "vae/*.safetensors"])
    if (folder / "vae").is_dir():
        folder = folder / "vae"
    try:
        config = read_json(folder / "config.json")
    except ValueError as error:
        raise FrameBridgeError(f"autoencoder: {error}; give the folder or hub id of an AutoencoderKL") from error
    if config.get("_class_name") != "AutoencoderKL" or config.get("latent_channels") != latent_channels:
        raise FrameBridgeError(
            f"autoencoder: {folder} is of the class {config.get('_class_name')} with {config.get('latent_channels')} "
            f"latent channels; the network needs an AutoencoderKL with {latent_channels}, such as {DEFAULT_VAE}"
        )
    return folder


def _find_neural_prior(
    neural_prior: str | os.PathLike | None, checkpoint: str | os.PathLike, bridge: dict[str, Any]
) -> Path:
    if neural_prior is None:
        raise FrameBridgeError(
            f"{checkpoint}: a bridge on a neural prior, and the file does not hold the neural prior; convert that "
            "one's checkpoint first and give its folder (--neural-prior)"
        )
    problem = neural_prior_problem(Path(neural_prior), bridge)
    folder = find_neural_prior(Path(neural_prior))
    if problem is not None or folder is None:
        raise FrameBridgeError(f"neural prior: {problem}")
    return folder
