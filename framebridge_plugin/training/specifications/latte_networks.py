"""Finding Latte networks, and telling from their configs alone whether they are the ones that a run needs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from framebridge_plugin.backbones.folders import file_problem, local_path
from framebridge_plugin.backbones.latte.rules import find_neural_prior
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.models.latte import LatteTransformer
from framebridge_plugin.models.whole_weights import missing_tensors
from framebridge_plugin.training.specifications.loading import LOADING_ERRORS, cannot_load, load_config

FOLDER_OF_STAGE = {"bridge": "transformer", "neural_prior": "neural_prior"}
"""Where a saved model has its network."""

_EXPECTED = {
    "bridge": "a Latte model in diffusers format (model_index.json, transformer/, scheduler/, vae/)",
    "neural_prior": "a trained neural prior: a run's folder, its model/ (model_index.json, neural_prior/, vae/), or a "
    "neural_prior/ folder alone",
}


def read_network(source: str, subfolder: str, stage: str, **hub_settings: Any) -> LatteTransformer:
    """A saved network without its weights, see `blank_network`.

    Args:
        source: Folder or hub id of a whole model, or of the network alone.
        subfolder: The network's folder in a whole model, "" for the network alone.
        stage: "bridge" or "neural_prior".
        **hub_settings: `revision` and `cache_dir`.

    Returns:
        The network.

    Raises:
        FrameBridgeError: If it is missing, damaged, of another class or of another stage.
    """
    other = next(name for name in FOLDER_OF_STAGE.values() if name != FOLDER_OF_STAGE[stage])
    if subfolder and not os.path.isdir(os.path.join(source, subfolder)) and os.path.isdir(os.path.join(source, other)):
        raise FrameBridgeError(
            f"cannot load {subfolder}/ from {source}: it has only {other}/, as a model of another stage; check that "
            f"the folder is {_EXPECTED[stage]}"
        )
    config = load_config(LatteTransformer, source, subfolder, expected=_EXPECTED[stage], **hub_settings)
    found = config.get("stage")
    if found != stage:
        raise FrameBridgeError(
            f"{os.path.join(source, subfolder)} holds a Latte network of the stage {found!r}; give {_EXPECTED[stage]}"
        )
    try:
        return blank_network(config)
    except LOADING_ERRORS as error:
        raise cannot_load("LatteTransformer", source, error, _EXPECTED[stage]) from error


def blank_network(config: Mapping[str, Any]) -> LatteTransformer:
    """A network without its weights, on the meta device: its config and its classes.

    Args:
        config: Config of a `LatteTransformer`.

    Returns:
        The network.
    """
    with torch.device("meta"):
        return LatteTransformer.from_config(dict(config))


def load_network(source: str, subfolder: str, stage: str, dtype: torch.dtype, **hub_settings: Any) -> LatteTransformer:
    """A network with its weights.

    Args:
        source: Folder or hub id of a whole model, or of the network alone.
        subfolder: The network's folder in a whole model, "" for the network alone.
        stage: "bridge" or "neural_prior", for the error's text.
        dtype: Precision of the weights.
        **hub_settings: `revision` and `cache_dir`.

    Returns:
        The network.

    Raises:
        FrameBridgeError: If a file is missing or damaged, or lacks weights.
    """
    try:
        network, found = LatteTransformer.from_pretrained(
            source, subfolder=subfolder, dtype=dtype, output_loading_info=True, **hub_settings
        )
    except LOADING_ERRORS as error:
        raise cannot_load("LatteTransformer", source, error, _EXPECTED[stage]) from error
    # diffusers only warns of these, and makes up what is missing.
    wrong = sorted(missing_tensors(network, found) | set(found["unexpected_keys"]))
    if wrong:
        reason = f"its weights are not those of its config, {len(wrong)} names differ, first {wrong[0]}"
        raise cannot_load("LatteTransformer", source, reason, _EXPECTED[stage])
    return network


def find_neural_prior_network(name: str) -> tuple[str, str]:
    """Finds a trained neural prior.

    Args:
        name: The folder of its run, of one of its checkpoints, of a model that has it, or of the network alone; or a
            model's hub id.

    Returns:
        Folder or id, and the subfolder in it ("" for the network alone).

    Raises:
        FrameBridgeError: If a folder holds nothing that could be one.
    """
    folder = local_path(name)
    if folder is None:
        return name, FOLDER_OF_STAGE["neural_prior"]
    network = folder if (folder / "config.json").is_file() else find_neural_prior(folder)
    if network is None:
        if folder.is_file():
            raise FrameBridgeError(f"neural_prior: {file_problem(folder)}")
        problem = "is no folder" if not folder.is_dir() else "holds no neural prior"
        raise FrameBridgeError(f"neural_prior: {folder} {problem}; give {_EXPECTED['neural_prior']}")
    return str(network), ""
