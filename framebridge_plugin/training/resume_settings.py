"""What a run and the checkpoint that it goes on from have in common: the settings, and the weights' names and shapes.

The number of processes is not among the settings: weights are stored whole, and progress in clips of all processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from framebridge_plugin.backbones.fingerprint import component_fingerprint, short_digest
from framebridge_plugin.data import ClipIndex, ClipSettings

if TYPE_CHECKING:
    from framebridge_plugin.training.specification import BridgeSpecification

_SHOWN = 4
"""Differences that fit into an error's line."""


def run_settings(
    args: Any, specification: BridgeSpecification, datasets: Sequence[tuple[ClipIndex, ClipSettings]]
) -> dict[str, Any]:
    """The settings of a run that a resume may not change, by name, as JSON can say them."""
    settings = {
        "model_name": args.model_name,
        "training_type": args.training_type,
        "optimizer": args.optimizer,
        "seed": args.seed,
        **args.framebridge_objective.model_dump(),
    }
    if args.training_type == "lora":
        settings |= {name: getattr(args, name) for name in ("rank", "lora_alpha", "target_modules")}
    ours = args.framebridge_trainer
    if ours.ema_decay > 0.0:
        settings |= {"ema_decay": ours.ema_decay, "ema_start_step": ours.ema_start_step}
    settings |= specification.adapter.resume_settings()
    folders = specification.frozen_components(args.training_type)
    settings |= {name: f"of digest {short_digest(component_fingerprint(folders[name]))}" for name in folders}
    config = specification.load_scheduler().config
    backbone = {
        name: value for name, value in (config.get("backbone", config) or {}).items() if not name.startswith("_")
    }
    if backbone:
        settings["noise schedule"] = f"of digest {short_digest(backbone)}"
    for number, (index, clips) in enumerate(datasets):
        facts = {"rows": len(index), **clips.fingerprint()}
        settings |= {f"datasets[{number}] {name}": value for name, value in facts.items()}
    return json.loads(json.dumps(settings, default=float))  # as they are read back: lists for tuples


def settings_difference(stored: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """What the settings of a checkpoint say and those of a run do not, and the other way, in a few words; None if
    equal.
    """
    names = dict.fromkeys([*stored, *settings])
    changed = [n for n in names if n not in stored or n not in settings or stored[n] != settings[n]]
    if not changed:
        return None
    shown = changed[:_SHOWN]
    present = ", ".join(f"{name} {stored[name]!r}" for name in shown if name in stored)
    absent = ", ".join(name for name in shown if name not in stored)
    parts = [f"{word} {part}" for word, part in (("with", present), ("without", absent)) if part]
    more = f" ({len(changed) - _SHOWN} more settings differ)" if len(changed) > _SHOWN else ""
    return f"it was trained {' and '.join(parts)}{more}"


def tensors_difference(stored: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str | None:
    """The first difference in names and shapes of stored tensors and a network's, in a few words; None if equal."""
    for name in dict.fromkeys([*expected, *stored]):
        if name not in stored:
            return f"tensor {name} is missing"
        if name not in expected:
            return f"tensor {name} is none of this network's"
        if stored[name].shape != expected[name].shape:
            return f"tensor {name} has the shape {list(stored[name].shape)}, not {list(expected[name].shape)}"
    return None
