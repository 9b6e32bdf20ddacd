"""The model that `finetrainers sample` was given, examined as far as that goes without loading it."""

from __future__ import annotations

from framebridge_plugin.backbones.examination import SavedModel, examine
from framebridge_plugin.backbones.folders import find_part, find_saved_model, place_problem
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.files import local_path


def examine_model(
    model: str, transformer: str | None, base: str | None = None, allow_other_base: bool = False
) -> tuple[SavedModel | None, list[str]]:
    """Examines the model that options name: what is known of it (nothing of a hub id), and a line for each error,
    which begins with the option that it concerns.
    """
    path = local_path(model)
    if path is None:
        own = None if transformer is None else local_path(transformer)
        problem = None if own is None else place_problem(own)
        return None, [f"--transformer {problem}"] if problem else []
    if not path.exists() or path.is_file():
        return None, [f"--model {place_problem(path)}"]
    folder = find_saved_model(path)
    if folder is None:
        what = "is neither a model in diffusers' format nor a run that has saved one"
        return None, [f"--model {path}: {what}; give a run's or a model's folder"]
    try:
        saved = examine(folder, base=base)
        network = saved.facts.network
        if transformer is not None and saved.lora is None:
            own = local_path(transformer)
            components = {network: None if own is None else find_part(own, network)}
            saved = examine(folder, components=components, read=saved.read)
    except FrameBridgeError as error:
        return None, [f"--model {error}"]
    problems = _option_problems(saved, transformer, base, allow_other_base)
    for finding in saved.findings():
        if saved.lora is None:
            option = "--transformer" if finding.part in saved.components else "--model"
        else:
            is_base = base is not None and finding.part not in ("lora", *saved.components)
            option = "--base" if is_base else "--model"
        problems.append(f"{option} {finding.message}")
    if not problems and saved.lora is None and saved.takes_no_image:
        problems.append(_text_model_problem(saved, transformer))
    if not problems and not allow_other_base and (problem := saved.other_base_problem()):
        problems.append(f"--model {problem}")
    return saved, problems


def _option_problems(
    saved: SavedModel, transformer: str | None, base: str | None, allow_other_base: bool
) -> list[str]:
    """What is wrong with the options that are for some models alone."""
    problems = []
    if saved.lora is None:
        given = {"--base": base is not None, "--allow-other-base": allow_other_base}
        wrong = [option for option, is_given in given.items() if is_given]
        problems = [f"{option}: {saved.base} is a whole model, not a LoRA; leave it out" for option in wrong]
    if transformer is not None and saved.facts.input_projection is None:
        what = "is for a model of text, such as CogVideoX"
        problems.append(f"--transformer: {what}; name the whole folder of this {saved.facts.title} by --model")
    elif transformer is not None and saved.lora is not None:
        problems.append(f"--transformer: {saved.lora} is a LoRA, for its own base model's network; leave it out")
    return problems


def _text_model_problem(saved: SavedModel, transformer: str | None) -> str:
    folder = saved.folder(saved.facts.network)
    channels = saved.configs[saved.facts.network]["in_channels"]
    what = f"a plain {saved.facts.title}: its network has {channels} input channels, a bridge's has {2 * channels}"
    if transformer is not None:
        return f"--transformer {folder}: {what}; give a fine-tuned one"
    return f"--model {saved.base}: {what}; train it with `finetrainers train`, or give a fine-tuned --transformer"
