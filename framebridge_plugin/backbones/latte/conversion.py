"""What `finetrainers convert` makes of the authors' checkpoints: whole models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from framebridge_plugin.backbones.copying import check_is_free, written_whole
from framebridge_plugin.backbones.examination import SavedModel
from framebridge_plugin.backbones.folders import find_part
from framebridge_plugin.backbones.hub import local_folder
from framebridge_plugin.backbones.latte.facts import LATTE_BRIDGE
from framebridge_plugin.backbones.latte.pipeline import FrameBridgeLattePipeline
from framebridge_plugin.backbones.latte.reference_checkpoints import (
    ReferenceCheckpoint,
    ReferenceNetwork,
    read_reference_checkpoint,
)
from framebridge_plugin.backbones.saving import save_model_folder
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.models.latte import LatteTransformer
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
    """Writes a complete model folder: the network, its scheduler (eps_psi, no SAF, SDE on `linspace`) and the VAE."""
    check_is_free(Path(folder))
    reference = read_reference_checkpoint(checkpoint, class_names=class_names, num_attention_heads=num_attention_heads)
    main_name, main = next(iter(reference.networks.items()))
    linked = {"vae": ("diffusers", "AutoencoderKL", _find_vae(vae, main.config["out_channels"]))}

    with written_whole(Path(folder)) as partial:
        if reference.stage == "bridge_neural_prior":
            if "neural_prior" in reference.networks:
                prior_folder = partial / "neural_prior"
                _save_network(reference.networks["neural_prior"], prior_folder)
            else:
                prior_folder = _find_neural_prior(neural_prior, checkpoint, main.config)
            linked["neural_prior"] = (LatteTransformer.__module__, LatteTransformer.__name__, prior_folder)
        save_model_folder(
            partial,
            pipeline_class=FrameBridgeLattePipeline.__name__,
            network_name=main_name,
            network_class=LatteTransformer,
            network_config=main.config,
            network_state_dict=main.state_dict,
            scheduler=FrameBridgeScheduler(target="eps_psi", grid="linspace") if main_name == "transformer" else None,
            components=linked,
            settings=LATTE_BRIDGE.default_call if main_name == "transformer" else None,
        )
    return reference


def _save_network(network: ReferenceNetwork, folder: Path) -> None:
    with torch.device("meta"):
        transformer = LatteTransformer(**network.config)
    transformer.load_state_dict(network.state_dict, assign=True)
    transformer.save_pretrained(folder)


def _find_vae(vae: str, latent_channels: int) -> Path:
    folder = local_folder(vae, patterns=["config.json", "*.safetensors", "vae/config.json", "vae/*.safetensors"])
    folder = find_part(folder, "vae")
    _check({"vae": folder}, "autoencoder", transformer={"out_channels": latent_channels})
    return folder


def _find_neural_prior(
    neural_prior: str | os.PathLike | None, checkpoint: str | os.PathLike, bridge: dict[str, Any]
) -> Path:
    if neural_prior is None:
        raise FrameBridgeError(
            f"{checkpoint}: a bridge on a neural prior, and the file does not hold the neural prior; convert that "
            "one's checkpoint first and give its folder (--neural-prior)"
        )
    folder = find_part(Path(neural_prior), "neural_prior")
    _check({"neural_prior": folder}, "neural prior", transformer=bridge)
    return folder


def _check(components: dict[str, Path | None], what: str, transformer: dict[str, Any]) -> None:
    """Refuses components that are not what they should be, or do not fit a network's config."""
    unseen = dict.fromkeys(name for name in LATTE_BRIDGE.parts if name not in components)
    saved = SavedModel(LATTE_BRIDGE, None, {**unseen, **components})
    for finding in saved.findings(transformer):
        raise FrameBridgeError(f"{what}: {finding.message}")
