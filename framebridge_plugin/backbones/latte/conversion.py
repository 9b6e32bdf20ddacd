"""What `finetrainers convert` makes: models of the authors' checkpoints, LoRA folders of those in two files."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from framebridge_plugin.backbones.cogvideox.facts import INPUT_PROJECTION
from framebridge_plugin.backbones.copying import written_whole
from framebridge_plugin.backbones.examination import SavedModel
from framebridge_plugin.backbones.files import component_files
from framebridge_plugin.backbones.folders import (
    EXTRA_WEIGHTS_FILE,
    LORA_FILE,
    LORA_INFO_FILE,
    find_part,
    find_saved_model,
    two_file_problem,
)
from framebridge_plugin.backbones.hub import local_folder
from framebridge_plugin.backbones.latte.facts import LATTE_BRIDGE
from framebridge_plugin.backbones.latte.pipeline import FrameBridgeLattePipeline
from framebridge_plugin.backbones.latte.reference_checkpoints import (
    ReferenceCheckpoint,
    ReferenceNetwork,
    read_reference_checkpoint,
)
from framebridge_plugin.backbones.lora_folders import adapter_settings, read_lora_info
from framebridge_plugin.backbones.saving import (
    describe_base,
    save_lora_file,
    save_model_folder,
)
from framebridge_plugin.errors import FrameBridgeError, first_line
from framebridge_plugin.models.latte import LatteTransformer
from framebridge_plugin.models.projection_adapter import full_rank_settings, with_identity
from framebridge_plugin.models.widening import load_bridge_transformer
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
    _check_is_free(Path(folder))
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


def convert_two_file_lora(source: str | os.PathLike, folder: str | os.PathLike) -> Path:
    """Writes a LoRA folder of an earlier version, with the input projection beside the LoRA file, as one LoRA file."""
    _check_is_free(Path(folder))
    found = find_saved_model(Path(source)) or Path(source)
    if two_file_problem(found) is None:
        raise FrameBridgeError(f"{found}: no LoRA in two files (it has no {EXTRA_WEIGHTS_FILE}); use it as it is")
    info = read_lora_info(found)
    names = ("transformer", "tokenizer", "text_encoder", "vae")
    sources = {name: info.replaced_components.get(name, info.base_model) for name in names}
    try:
        revisions = {name: info.replaced_revisions.get(name) for name in info.replaced_components}
        folders = {
            name: local_folder(source, revision=revisions.get(name, info.revision)) for name, source in sources.items()
        }
        folders = {name: folder / name if (folder / name).is_dir() else folder for name, folder in folders.items()}
        settings = adapter_settings(found, "transformer")
        layers = {name.removeprefix("transformer."): tensor for name, tensor in load_file(found / LORA_FILE).items()}
        trained = load_file(found / EXTRA_WEIGHTS_FILE)
        base = load_bridge_transformer(str(folders["transformer"]), dtype=torch.float32).state_dict()
        weight, bias = (
            trained[f"{INPUT_PROJECTION}.{name}"].float() - base[f"{INPUT_PROJECTION}.{name}"]
            for name in ("weight", "bias")
        )
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise FrameBridgeError(
            f"{found}: cannot read the LoRA and its base model ({first_line(error)}); take the folder as it was "
            f"written, and correct the base model's place in its {LORA_INFO_FILE}"
        ) from error

    layer = f"{INPUT_PROJECTION}.lora_B"
    layers[f"{layer}.weight"] = weight.flatten(1)[..., *(None,) * (weight.ndim - 2)]
    layers = with_identity(layers, INPUT_PROJECTION, weight.shape[2:])
    # peft knows biases for all layers or none.
    for name in [name for name in layers if name.endswith(".lora_B.weight")]:
        layers[name.replace(".weight", ".bias")] = torch.zeros(len(layers[name]))
    layers[f"{layer}.bias"] = bias
    settings |= full_rank_settings(INPUT_PROJECTION, weight[0].numel(), settings["target_modules"])
    settings["lora_bias"] = True
    with written_whole(Path(folder)) as partial:
        (partial / "scheduler").mkdir()
        for name, file in component_files(found / "scheduler"):
            shutil.copyfile(file, partial / "scheduler" / name)
        save_lora_file(partial / LORA_FILE, "transformer", layers, settings)
        components = {name: (sources[name], folders[name]) for name in sources}
        dataclasses.replace(info, **describe_base(info.base_model, components)).write(partial)
    return found


def _check_is_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FrameBridgeError(f"{folder.absolute()}: exists and is not an empty folder; choose another folder")


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
