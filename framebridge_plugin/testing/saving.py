"""What a specification saves is what it was given: whole models, and LoRA files that diffusers loads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from framebridge_plugin.backbones.folders import LORA_FILE
from framebridge_plugin.errors import in_one_line
from framebridge_plugin.testing.checks import differing_tensors
from framebridge_plugin.testing.outcome import Check, fail, require
from framebridge_plugin.testing.subject import SEED, Subject
from framebridge_plugin.training.finetrainers.registration import add_lora_layers

RANK = 4


def network_name(specification: Any) -> str:
    """The trained network's folder in a saved model, and its name in a pipeline."""
    return getattr(specification, "network_name", "transformer")


# Whole models


def check_model_round_trip(subject: Subject) -> None:
    """`_save_model` writes the weights that it is given, and diffusers reads them back bit for bit."""
    specification, models, state_dict, folder = _save_changed_model(subject)
    check_saved_model(specification, models["transformer"], state_dict, folder)
    if (folder / "scheduler").is_dir():
        scheduler = models["scheduler"]
        found = type(scheduler).from_pretrained(folder, subfolder="scheduler").config
        differing = [name for name, value in scheduler.config.items() if name[0] != "_" and found.get(name) != value]
        require(not differing, f"the saved scheduler has another {', '.join(differing)}")


def check_reopening(subject: Subject) -> None:
    """A specification that is given what another one saved goes on with the same weights."""
    specification, _, state_dict, folder = _save_changed_model(subject)
    again = subject.specification()
    if (folder / "model_index.json").is_file():
        again.pretrained_model_name_or_path = str(folder)
    else:
        again.transformer_id = str(folder / network_name(specification))
    try:
        again._load_configs()
        found = again.load_diffusion_models()["transformer"].state_dict()
    except Exception as error:
        # Some of these messages list all the weights.
        summary = in_one_line(error)[:300]
        fail(f"cannot load what was saved ({type(error).__name__}: {summary})")
    require(not (names := differing_tensors(state_dict, found)), f"goes on with other weights: {names}")


def check_saved_model(
    specification: Any, network: nn.Module, state_dict: dict[str, torch.Tensor], folder: Path
) -> None:
    """Reads the network that a specification saved with diffusers, and compares it bit for bit."""
    saved = folder / network_name(specification)
    written = ", ".join(sorted(path.name for path in folder.iterdir()))
    require(saved.is_dir(), f"_save_model writes no folder {saved.name}, only {written or 'nothing'}")
    network_class: Any = type(network)
    found = network_class.from_pretrained(saved)
    names = differing_tensors(state_dict, found.state_dict())
    require(not names, f"the saved model is not the trained one: {names}")
    config: Any = network.config
    differing = [name for name, value in config.items() if name[0] != "_" and found.config.get(name) != value]
    require(not differing, f"the saved model's config has another {', '.join(differing)}")


def _save_changed_model(subject: Subject) -> tuple[Any, dict[str, Any], dict[str, torch.Tensor], Path]:
    """Saves weights that are neither those on the disk nor those of the network that is handed over.

    With sharding the network that a specification sees holds no whole weights: only the state dict counts.
    """
    specification = subject.specification()
    models = specification.load_diffusion_models()
    state_dict = _changed(models["transformer"].state_dict())
    folder = subject.new_folder("model")
    specification._save_model(str(folder), models["transformer"], state_dict, models["scheduler"])
    return specification, models, state_dict, folder


def _changed(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in state_dict.items()
    }


# LoRA


def check_lora_export(subject: Subject) -> None:
    """A LoRA file is loaded by diffusers, bit for bit, and reproduces the trained output."""
    _check_export(subject, alpha=RANK)


def check_lora_alpha(subject: Subject) -> None:
    """It does so too where alpha is not the rank, which scales the layers."""
    _check_export(subject, alpha=2 * RANK)


def _check_export(subject: Subject, alpha: int) -> None:
    specification = subject.specification()
    models = specification.load_diffusion_models()
    network, scheduler = models["transformer"], models["scheduler"]
    settings = {"r": RANK, "lora_alpha": alpha, "init_lora_weights": True, "target_modules": subject.target_modules}
    network.requires_grad_(False)
    add_lora_layers(specification, network, LoraConfig(**settings))
    if hasattr(specification, "prepare_trainable_parameters"):
        specification.prepare_trainable_parameters(network, "lora")
    generator = torch.Generator().manual_seed(SEED)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    folder = subject.new_folder("lora")
    metadata = {"lora_config": json.dumps(settings)}
    specification._save_lora_weights(str(folder), get_peft_model_state_dict(network), scheduler, metadata)
    check_saved_lora(subject, specification, network, scheduler, folder)


def check_saved_lora(subject: Subject, specification: Any, network: nn.Module, scheduler: Any, folder: Path) -> None:
    """Loads a LoRA with diffusers, alone and into the pipeline, and compares weights, scales and outputs."""
    batch = subject.batch(specification)

    @torch.no_grad()
    def output(module: nn.Module) -> torch.Tensor:
        return batch.evaluate(specification, module.eval(), scheduler)[0].float()

    again = subject.specification()
    base = again.load_diffusion_models()["transformer"]
    base_output = output(base)
    base.load_lora_adapter(str(folder), prefix=network_name(specification), weight_name=LORA_FILE)
    _compare_layers(network, base, "a network with diffusers' load_lora_adapter")

    pipeline = again.load_pipeline()
    pipeline.load_lora_weights(str(folder))
    loaded = getattr(pipeline, network_name(specification))
    _compare_layers(network, loaded, "the pipeline")
    names = differing_tensors(plain_state_dict(network), plain_state_dict(loaded))
    require(not names, f"the pipeline with the LoRA is not the trained network: {names}")

    trained, found = output(network), output(loaded)
    size = trained.abs().max().item()
    moved, error = ((trained - other).abs().max().item() for other in (base_output, found))
    require(moved > 1e-4 * size, f"training moved the output by only {moved:.2g} of {size:.2g}: nothing to compare")
    require(
        error < min(1e-5 * size, 0.01 * moved),
        f"the LoRA gives an output that is {error:.2g} from the trained one, which is {moved:.2g} from the base's",
    )


def _compare_layers(network: nn.Module, loaded: nn.Module, where: str) -> None:
    expected, found = ({n: t for n, t in plain_state_dict(m).items() if ".lora_" in n} for m in (network, loaded))
    require(expected, "no layer has a LoRA; name the layers to adapt (target_modules)")
    require(not (names := differing_tensors(expected, found)), f"{where} gets other LoRA layers: {names}")
    wanted, scales = _scales(network), _scales(loaded)
    for name, scale in wanted.items():
        found_scale = scales[name]
        require(found_scale == scale, f"{where} gets a LoRA of scale {found_scale} for {scale}: alpha is lost")


def _scales(network: nn.Module) -> dict[str, float]:
    layers = ((name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer))
    return {_plain_name(name): next(iter(layer.scaling.values())) for name, layer in layers}


def plain_state_dict(network: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict without the names of adapters and of checkpoint wrappers."""
    return {_plain_name(name): tensor.detach() for name, tensor in network.state_dict().items()}


def _plain_name(name: str) -> str:
    name = name.replace("_checkpoint_wrapped_module.", "")
    return re.sub(r"\.(lora_[AB])\.\w+\.", r".\1.", name)


CHECKS = (
    Check("model-round-trip", check_model_round_trip),
    Check("reopening", check_reopening),
    Check("lora-export", check_lora_export),
    Check("lora-alpha", check_lora_alpha),
)
