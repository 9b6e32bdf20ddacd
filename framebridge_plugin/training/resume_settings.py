"""What a run and the checkpoint that it goes on from have in common: the settings, and the weights' names and shapes.

The sections of settings say of each what becomes of another value (`Section.resume_kind`). What is not applied anew is
compared, in groups: by value; the base model, the data and the clips of an update by what they come to, so that files
may move and another number of processes may share the same update.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from framebridge_plugin.backbones.fingerprint import component_fingerprint, short_digest
from framebridge_plugin.data import ClipIndex, ClipSettings
from framebridge_plugin.recipe.schema import recipe_settings
from framebridge_plugin.settings.base import Section
from framebridge_plugin.settings.bridge import ObjectiveSection, TrainerSection
from framebridge_plugin.settings.choices import ALLOWABLE, REFUSED
from framebridge_plugin.settings.finetrainers import has_no_effect
from framebridge_plugin.training.precomputation.fingerprint import data_fingerprint
from framebridge_plugin.training.precomputation.store import read_manifest

if TYPE_CHECKING:
    from framebridge_plugin.training.specification import BridgeSpecification

Groups = Mapping[str, Mapping[str, Any]]
"""Values by name, in groups: `REFUSED`, and those of `ALLOWABLE`."""

_WHOLE = " (every byte)"
"""End of the name of what is read on request, and compared where it was both times."""

_SHOWN = 4
"""Differences that fit into an error's line."""

_EPOCHS, _CAPTIONS = "stored epochs", "stored captions"
_AS_GIVEN = "captions as the text encoder gave them"
_STORES = {_EPOCHS: "of as many epochs", _AS_GIVEN: "without captions in fewer bits"}
"""Which other store a run goes on with, by what it was trained with."""


def run_settings(
    args: Any, specification: BridgeSpecification, datasets: Sequence[tuple[ClipIndex, ClipSettings]]
) -> dict[str, dict[str, Any]]:
    """The settings of a run that are not applied anew when it is resumed, as JSON can say them.

    Those of the group `REFUSED` are the run's identity: no resume changes them.
    """
    groups: dict[str, dict[str, Any]] = {name: {} for name in (REFUSED, *ALLOWABLE)}
    is_lora = args.training_type == "lora"
    for path, section, name in recipe_settings():
        kind = section.resume_kind(name)
        if kind in (REFUSED, "seed", "precision", "objective") and (is_lora or not path.startswith("lora.")):
            groups[kind][name] = _value(args, section, name)
    groups[REFUSED] |= specification.adapter.resume_settings()
    groups["base"] = _base(args, specification)
    groups["data"] = _data(args, datasets)
    clips = args.batch_size * args.gradient_accumulation_steps * args.dp_degree * args.dp_shards
    groups["batch"] = {"clips per update": clips}
    return json.loads(json.dumps(groups, default=str))  # as they are read back: lists for tuples


def _value(args: Any, section: type[Section], name: str) -> Any:
    for ours, holder in ((ObjectiveSection, "framebridge_objective"), (TrainerSection, "framebridge_trainer")):
        if name in ours.model_fields:
            return getattr(getattr(args, holder), name)
    return getattr(args, name, section.model_fields[name].default)  # what finetrainers' own parser does not know


def _base(args: Any, specification: BridgeSpecification) -> dict[str, Any]:
    folders = specification.frozen_components(args.training_type)
    values = {name: f"of digest {short_digest(component_fingerprint(folders[name]))}" for name in folders}
    if getattr(args, "verify_files", False):
        for name, folder in folders.items():
            digest = short_digest(component_fingerprint(folder, whole=True))
            values[f"{name}{_WHOLE}"] = f"of digest {digest}"
    config = specification.load_scheduler().config
    backbone = {
        name: value for name, value in (config.get("backbone", config) or {}).items() if not name.startswith("_")
    }
    if backbone:
        values["noise schedule"] = f"of digest {short_digest(backbone)}"
    return values


def _data(args: Any, datasets: Sequence[tuple[ClipIndex, ClipSettings]]) -> dict[str, Any]:
    values: dict[str, Any] = {"enable_tiling": args.enable_tiling}
    if args.enable_precomputation and args.precomputation_once:  # then no other clips are trained on
        values["precomputation_items"] = args.precomputation_items
    if args.precomputed is not None and (manifest := read_manifest(Path(args.precomputed))) is not None:
        if "latents" in manifest.holds:
            values[_EPOCHS] = manifest.variants
        if manifest.caption_dtype is not None:
            values[_CAPTIONS] = manifest.caption_dtype
    for number, (index, clips) in enumerate(datasets):
        facts = data_fingerprint(index, clips)
        facts |= {name: f"of digest {facts[name][:16]}" for name in ("files", "captions", "file_sizes")}
        facts |= facts.pop("clip")
        values |= {f"datasets[{number}] {name}": value for name, value in facts.items()}
    return values


def setting_differences(stored: Groups, settings: Groups) -> dict[str, str]:
    """What the settings of a checkpoint say and those of a run do not, and the other way: for each group that differs,
    in a few words.
    """
    found = {}
    for group in (REFUSED, *ALLOWABLE):
        theirs, ours = stored.get(group) or {}, settings.get(group) or {}
        # One that an earlier version had not, and a later one does not set (None, or False), is the same.
        before, now = ({n: v for n, v in said.items() if v is not None and v is not False} for said in (theirs, ours))
        changed = [n for n in dict.fromkeys([*theirs, *ours]) if before.get(n) != now.get(n)]
        changed = [n for n in changed if not n.endswith(_WHOLE) or (n in theirs and n in ours)]
        changed = [n for n in changed if not has_no_effect(n, theirs.get(n))]  # of an earlier version
        if changed:
            shown = changed[:_SHOWN]
            present = ", ".join(f"{name} {theirs[name]!r}" for name in shown if name in theirs)
            if _CAPTIONS in shown and _CAPTIONS not in theirs:
                present = ", ".join(filter(None, (present, _AS_GIVEN)))
            absent = ", ".join(name for name in shown if name not in theirs and name != _CAPTIONS)
            parts = [f"{word} {part}" for word, part in (("with", present), ("without", absent)) if part]
            more = f" (and {len(changed) - _SHOWN} more)" if len(changed) > _SHOWN else ""
            found[group] = f"{' and '.join(parts)}{more}"
    return found


def settings_refusal(differences: Mapping[str, str], allowed: Collection[str]) -> str | None:
    """Why a run with such differences does not go on, and what to do about it; None if it does."""
    refused = {group: text for group, text in differences.items() if group not in allowed}
    if not refused:
        return None
    remedy = "resume with the settings of the run's recipe.yaml"
    was_with = refused.get("data", "").partition("without ")[0]
    if stores := [store for said, store in _STORES.items() if said in was_with]:
        remedy += f" (if its store has grown since, with one {' and '.join(stores)})"
    if REFUSED not in refused:
        remedy += f", or take the change by {' '.join(f'--allow {group}' for group in refused)}"
    return f"it was trained {' and '.join(refused.values())}; {remedy}"


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
