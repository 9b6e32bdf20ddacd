"""Finding and loading Latte networks, of a whole model or alone, and Latte's own diffusion process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler

from framebridge_plugin.backbones.folders import file_problem, find_part
from framebridge_plugin.backbones.latte.rules import config_problem
from framebridge_plugin.backbones.loading import ModelSource, cannot_load, load_config, load_weights, loading
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.files import local_path
from framebridge_plugin.models.calling import unrounded
from framebridge_plugin.models.latte import LatteTransformer

FOLDERS = {"bridge": "transformer", "neural_prior": "neural_prior"}
"""Where a model has its network, by the network's stage."""
EXPECTED = {
    "bridge": "a Latte model in diffusers format (model_index.json, transformer/, scheduler/, vae/)",
    "neural_prior": "a trained neural prior: a run's folder, its model/ (model_index.json, neural_prior/, vae/), or a "
    "neural_prior/ folder alone",
}
"""What the folder of a network's model should be, by its stage, for errors."""


def read_network(model: ModelSource, place: tuple[str, str], stage: str) -> LatteTransformer:
    """A saved network without its weights, refused if it is of another class or stage; `place`: see `ModelSource`."""
    source, subfolder = place
    other = next(folder for name, folder in FOLDERS.items() if name != stage)
    if subfolder and not os.path.isdir(os.path.join(source, subfolder)) and os.path.isdir(f"{source}/{other}"):
        raise FrameBridgeError(
            f"cannot load {subfolder}/ from {source}: it has only {other}/, as a model of another stage; check that "
            f"the folder is {EXPECTED[stage]}"
        )
    config = load_config(LatteTransformer, model, place, EXPECTED[stage])
    if problem := config_problem(FOLDERS[stage], config):
        raise FrameBridgeError(f"{Path(source, subfolder)} {problem}; give {EXPECTED[stage]}")
    with loading("LatteTransformer", source, EXPECTED[stage]):
        return blank_network(config)


def blank_network(config: Mapping[str, Any]) -> LatteTransformer:
    """A network without its weights, on the meta device: its config and its classes."""
    with torch.device("meta"):
        return LatteTransformer.from_config(dict(config))


def load_network(model: ModelSource, place: tuple[str, str], stage: str, dtype: torch.dtype) -> LatteTransformer:
    """A network with its weights, refused if these are not those of its config."""
    what, expected = "LatteTransformer", EXPECTED[stage]
    network, found = load_weights(
        LatteTransformer, what, model, place, expected, dtype=dtype, output_loading_info=True
    )
    if wrong := sorted(found["unexpected_keys"]):  # diffusers only warns of these
        reason = f"its weights are not those of its config, {len(wrong)} are left over, first {wrong[0]}"
        raise cannot_load(what, place[0], reason, expected)
    return network


def find_neural_prior_network(name: str) -> tuple[str, str]:
    """The place of a trained neural prior: of a run, a checkpoint, a model, or alone; or of a model on the hub."""
    folder = local_path(name)
    if folder is None:
        return name, "neural_prior"
    network = find_part(folder, "neural_prior")
    if network != folder or (network / "config.json").is_file():
        return str(network), ""
    if folder.is_file():
        raise FrameBridgeError(f"neural_prior: {file_problem(folder)}")
    problem = "is no folder" if not folder.is_dir() else "holds no neural prior"
    raise FrameBridgeError(f"neural_prior: {folder} {problem}; give {EXPECTED['neural_prior']}")


def latte_backbone(prediction_type: str = "epsilon") -> CogVideoXDDIMScheduler:
    """The diffusion process of Latte: DDPM's linear betas, the network predicts eps unless a baseline is told to
    predict v.

    It is the noise schedule of the diffusion baseline, and the one that a bridge is aligned to (SAF), in the class
    whose loss finetrainers knows.
    """
    return CogVideoXDDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type=prediction_type,
        clip_sample=False,
        rescale_betas_zero_snr=False,
        snr_shift_scale=1.0,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def call_latte(
    transformer: LatteTransformer,
    latents_BFCHW: torch.Tensor,
    timestep_B: torch.Tensor | None,
    class_labels_B: torch.Tensor,
    image_latents_B1CHW: torch.Tensor | None = None,
    neural_prior_BFCHW: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs a Latte network in its own precision, with the time in float32; the output is float32 [B, F, C, h, w].

    The image's latent is put in front of the noisy ones, and its output dropped; the neural prior's video, for a
    network that takes it, are further input channels, in which the frame in front has the image once more. A neural
    prior is given the repeated image as `latents_BFCHW`, and neither time nor image.
    """
    inputs = latents_BFCHW
    if image_latents_B1CHW is not None:
        inputs = torch.cat([image_latents_B1CHW, inputs], dim=1)
        if neural_prior_BFCHW is not None:
            inputs = torch.cat([inputs, torch.cat([image_latents_B1CHW, neural_prior_BFCHW], dim=1)], dim=2)
    with unrounded(transformer, timestep=timestep_B):
        call = {"timestep": timestep_B, "class_labels": class_labels_B, "return_dict": False}
        output = transformer(inputs.to(transformer.dtype), **call)[0].float()
    return output[:, -latents_BFCHW.shape[1] :]
