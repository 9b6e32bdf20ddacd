"""The model that `finetrainers sample` was given, examined as far as that goes without loading it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from framebridge_plugin.backbones.cogvideox.facts import COGVIDEOX
from framebridge_plugin.backbones.facts import BackboneFacts, ClipShapeRule
from framebridge_plugin.backbones.folders import (
    LORA_INFO_FILE,
    backbone_of,
    clip_shape_rule,
    file_problem,
    find_saved_model,
    find_transformer,
    folder_problem,
    local_path,
    part_problem,
    plain_problem,
    read_json,
    two_file_problem,
)
from framebridge_plugin.backbones.latte.facts import LATTE_BRIDGE, LATTE_NEURAL_PRIOR
from framebridge_plugin.backbones.latte.rules import (
    LatteFacts,
    latte_folder_problem,
    latte_parts_problem,
    read_latte_facts,
)
from framebridge_plugin.backbones.lora_folders import HOW_TO_SAY_BASE, other_base_error, read_lora_info
from framebridge_plugin.errors import FrameBridgeError


class SampleModel(NamedTuple):
    """A model on the disk.

    Attributes:
        folder: The folder of the model, or of the LoRA.
        kind: Its kind.
        rule: Which clips it can return; a Latte model's says which classes it knows, too.
    """

    folder: Path
    kind: BackboneFacts
    rule: ClipShapeRule | LatteFacts

    @property
    def facts(self) -> LatteFacts | None:
        """What a Latte model can be asked for."""
        return self.rule if isinstance(self.rule, LatteFacts) else None


def examine_model(
    model: str, transformer: str | None, base: str | None = None, allow_other_base: bool = False
) -> tuple[SampleModel | None, list[str]]:
    """Examine the folders of a model.

    Args:
        model: A run's folder, one of its checkpoints, a model's or a LoRA's folder, or an id on the Hugging Face Hub.
        transformer: Folder or id of a fine-tuned transformer to put into a CogVideoX model.
        base: Folder or id of the model that a LoRA was trained on, if it is not where it was.
        allow_other_base: Whether that may be another model.

    Returns:
        The model, or None for an id and for a folder that cannot be told; and a line for each error, which begins
        with the option that it concerns.
    """
    path = local_path(model)
    if path is None:
        return None, _transformer_problems(transformer)
    if not path.is_dir():
        return None, [f"--model {file_problem(path)}" if path.exists() else f"--model {path}: no such folder"]
    folder = find_saved_model(path)
    if folder is None:
        what = "is neither a model in diffusers' format nor a run that has saved one"
        return None, [f"--model {path}: {what}; give a run's or a model's folder"]
    kind = backbone_of(folder)
    if kind is None:
        return None, [f"--model {_unknown_kind(folder)}"]
    is_lora = (folder / LORA_INFO_FILE).is_file()
    if is_lora:
        parts, problems = _lora_parts(folder, kind, base, allow_other_base)
        if transformer is not None and kind is COGVIDEOX:
            problems.append(f"--transformer: {folder} is a LoRA, for its own base model's transformer; leave it out")
    elif kind is COGVIDEOX:
        parts, problems = _cogvideox_parts(folder, transformer)
    else:
        problem = latte_folder_problem(folder, kind)
        parts = {part: folder / part for part in ("vae", "transformer", "neural_prior")}
        problems = [f"--model {problem}"] if problem else []
    if not is_lora:
        given = {"--base": base is not None, "--allow-other-base": allow_other_base}
        wrong = [option for option, is_given in given.items() if is_given]
        problems += [f"{option}: {folder} is a whole model, not a LoRA; leave it out" for option in wrong]
    if kind is COGVIDEOX:
        return SampleModel(folder, kind, clip_shape_rule(parts["vae"], parts["transformer"])), problems
    if problems:
        return None, problems
    network = parts["transformer" if kind is LATTE_BRIDGE else "neural_prior"]
    if network is None:  # on the hub
        return None, []
    try:
        return SampleModel(folder, kind, read_latte_facts(parts["vae"], network)), []
    except ValueError as error:
        return None, [f"--model {error}"]


def _unknown_kind(folder: Path) -> str:
    """What is wrong with a folder that does not say what it holds, or something foreign."""
    if (folder / LORA_INFO_FILE).is_file():
        return f"{folder / LORA_INFO_FILE}: is not as it was written; copy the folder again"
    try:
        name = read_json(folder / "model_index.json").get("_class_name")
    except ValueError as error:
        return f"{error}; copy the model again"
    return f"{folder} holds a {name}, which is no FrameBridge model (CogVideoX or Latte)"


def _local_transformer(transformer: str | None) -> Path | None:
    path = None if transformer is None else local_path(transformer)
    return None if path is None else find_transformer(path)


def _transformer_problems(transformer: str | None) -> list[str]:
    folder = _local_transformer(transformer)
    if folder is not None and (problem := part_problem(folder, "transformer")):
        return [f"--transformer {problem}"]
    if folder is not None and (problem := plain_problem(folder)):
        return [f"--transformer {folder}: {problem}; give a fine-tuned one"]
    return []


def _cogvideox_parts(folder: Path, transformer: str | None) -> tuple[dict[str, Path | None], list[str]]:
    """The folders that sampling will use, and what is wrong with them."""
    problems = _transformer_problems(transformer)
    if problem := folder_problem(folder):
        problems.append(f"--model {problem}")
    elif transformer is None and (problem := plain_problem(folder / "transformer")):
        remedy = "train it with `finetrainers train`, or give a fine-tuned --transformer"
        problems.append(f"--model {folder}: {problem}; {remedy}")
    own = _local_transformer(transformer)
    return {"vae": folder / "vae", "transformer": own or folder / "transformer"}, problems


def _lora_parts(
    folder: Path, kind: BackboneFacts, base: str | None, allow_other_base: bool
) -> tuple[dict[str, Path | None], list[str]]:
    """The folders of the models that a LoRA names (None for an id), and what is wrong with them."""
    parts: dict[str, Path | None] = dict.fromkeys(("vae", "transformer", "neural_prior"))
    try:
        info = read_lora_info(folder)
        path, replaced = local_path(info.base_model if base is None else base), info.replaced_components
        if base is not None and path is not None:
            path = find_saved_model(path) or path
        components = {part: None if path is None else path / part for part in (*parts, *info.fingerprint)}
        components |= {part: local_path(source) for part, source in replaced.items()}
    except (FrameBridgeError, TypeError):
        return parts, [f"--model {folder / LORA_INFO_FILE}: is not as it was written; copy the folder again"]
    own_problem = two_file_problem(folder)
    problems = [] if own_problem is None else [f"--model {own_problem}"]
    check_whole = folder_problem if kind is COGVIDEOX else latte_folder_problem
    if path is not None and (info.base_model or base) and (problem := check_whole(path, kind)):
        if base is not None:
            problems.append(f"--base {problem}")
        else:
            problems.append(f"--model {folder}: its base model: {problem}; say where it is now ({HOW_TO_SAY_BASE})")
    for part in replaced:
        part_kind = LATTE_NEURAL_PRIOR if part == "neural_prior" else kind
        if (source := components[part]) is not None and (problem := part_problem(source, part, part_kind)):
            remedy = f"put it back, or correct its place in {LORA_INFO_FILE}"
            problems.append(f"--model {folder}: its {part}: {problem}; {remedy}")
    present = {part: source for part, source in components.items() if source is not None and source.exists()}
    if kind is not COGVIDEOX and path is not None and replaced and not problems:
        found = latte_parts_problem(*(present.get(part) for part in parts))
        problems += [f"--model {folder}: {found}"] if found else []
    if not problems and not allow_other_base and (difference := info.other_base_problem(present)):
        problems.append(f"--model {other_base_error(folder, str(path), difference)}")
    return {part: components[part] for part in parts}, problems
