"""Rules of a recipe that concern several fields, the disk, or the processes that were started."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

from framebridge_plugin.backbones.cogvideox.facts import COGVIDEOX
from framebridge_plugin.backbones.folders import (
    clip_shape_rule,
    folder_problem,
    local_path,
    part_problem,
    writing_problem,
)
from framebridge_plugin.backbones.latte.rules import is_another_part, is_of_another_kind
from framebridge_plugin.recipe.data_rules import content_problems, data_problems, validation_problems
from framebridge_plugin.recipe.latte_rules import (
    latte_clip_rule,
    latte_part_folders,
    latte_problems,
    latte_sample_rules,
)
from framebridge_plugin.recipe.problem import Problem
from framebridge_plugin.recipe.schema import Recipe
from framebridge_plugin.recipe.sections import MODEL_DEFAULTS, DiffusionSection
from framebridge_plugin.recipe.start_rules import start_problems

# What a user would expect to change the run, and does not: for all models, and by the beginning of the model's name.
_ONE_TEXT_ENCODER = "no model here has more than one text encoder"
_WITHOUT_EFFECT = {
    "model.variant": "finetrainers 0.2.0 reads the plain weight files only, and precision.* sets the number formats",
    "model.tokenizer_2_id": _ONE_TEXT_ENCODER,
    "model.tokenizer_3_id": _ONE_TEXT_ENCODER,
    "model.text_encoder_2_id": _ONE_TEXT_ENCODER,
    "model.text_encoder_3_id": _ONE_TEXT_ENCODER,
    "optimization.beta3": "no optimiser of finetrainers 0.2.0 has a third moment",
} | {
    f"diffusion.{name}": "neither the bridge nor the diffusion baseline is trained by flow matching"
    for name in DiffusionSection.model_fields
}
_CLASSES_NOT_TEXT = "Latte has no text encoder: the caption of a clip is the name of its class"
_NO_PIXEL_NOISE = "with Latte the first frame's one latent is condition, prior and first frame of the video"
_NO_BRIDGE = "the neural prior is the mean of the videos that begin with an image, without a bridge"
_LATTE_WITHOUT_EFFECT = {
    "model.tokenizer_id": _CLASSES_NOT_TEXT,
    "model.text_encoder_id": _CLASSES_NOT_TEXT,
    "precision.text_encoder_dtype": _CLASSES_NOT_TEXT,
    "framebridge.data.id_token": _CLASSES_NOT_TEXT,
    "framebridge.image_noise": _NO_PIXEL_NOISE,
    "framebridge.prior_noise": _NO_PIXEL_NOISE,
    "framebridge.noise_log_mean": _NO_PIXEL_NOISE,
    "framebridge.noise_log_std": _NO_PIXEL_NOISE,
}
_WITHOUT_EFFECT_FOR = {
    "cogvideox_bridge": dict.fromkeys(("framebridge.latte_size", "framebridge.neural_prior"), "it is for Latte"),
    "latte_bridge": _LATTE_WITHOUT_EFFECT,
    "latte_neural_prior": _LATTE_WITHOUT_EFFECT
    | {
        f"framebridge.{name}": _NO_BRIDGE
        for name in ("objective", "target", "snr_aligned", "alignment_edge", "beta_min", "beta_max", "neural_prior")
    },
}

# Attention providers by the beginning of their names.
_PROVIDER_PACKAGES = {
    "flash": ("flash_attn", "flash-attn"),
    "xformers": ("xformers", "xformers"),
    "sage": ("sageattention", "sageattention"),
    "_sage": ("sageattention", "sageattention"),
}


def recipe_problems(recipe: Recipe) -> Iterator[Problem]:
    """Check everything that does not depend on how the command was launched.

    Args:
        recipe: A recipe whose single values are right.

    Yields:
        Each problem.
    """
    problems = list(_quick_problems(recipe))
    yield from problems
    if not any(problem.where.startswith(("framebridge.data", "dataset")) for problem in problems):
        yield from content_problems(recipe)


def _quick_problems(recipe: Recipe) -> Iterator[Problem]:
    yield from _no_effect_problems(recipe)
    yield from _objective_problems(recipe)
    yield from _training_problems(recipe)
    yield from _parallelism_problems(recipe)
    yield from _attention_problems(recipe)
    if recipe.is_latte:
        yield from latte_problems(recipe)
        yield from start_problems(recipe, latte_part_folders(recipe))
        yield from data_problems(recipe, latte_clip_rule(recipe))
        yield from validation_problems(recipe, *latte_sample_rules(recipe))
    else:
        rule = clip_shape_rule(_part_folder(recipe, "vae"), _part_folder(recipe, "transformer"))
        yield from _cogvideox_problems(recipe)
        parts = ("transformer", "vae", "text_encoder", "tokenizer")
        yield from start_problems(recipe, {part: _part_folder(recipe, part) for part in parts})
        yield from data_problems(recipe, rule)
        yield from validation_problems(recipe, rule, lambda caption: None)
    if problem := writing_problem(Path(recipe.checkpoints.output_dir)):
        yield Problem("checkpoints.output_dir", problem, on_disk=True)


def launch_problems(recipe: Recipe, environment: Mapping[str, str]) -> Iterator[Problem]:
    """Check the recipe against the number of processes that were started.

    Args:
        recipe: A recipe whose single values are right.
        environment: Environment variables; torchrun sets WORLD_SIZE.

    Yields:
        Each problem.
    """
    try:
        world_size = int(environment.get("WORLD_SIZE", "1"))
    except ValueError:
        world_size = 0
    if world_size < 1:
        yield Problem(
            "parallelism", f"WORLD_SIZE should be a positive number, not {environment['WORLD_SIZE']!r}: use torchrun"
        )
        return
    parallelism = recipe.parallelism
    wanted = parallelism.dp_degree * parallelism.dp_shards
    if parallelism.parallel_backend == "accelerate" and world_size > 1:
        yield Problem("parallelism.parallel_backend", _ACCELERATE.format(processes=world_size))
    elif wanted != world_size:
        yield Problem(
            "parallelism.dp_degree",
            f"dp_degree x dp_shards is {wanted}, but the number of processes is {world_size}: launch with `torchrun "
            f"--nproc-per-node {wanted} --no-python finetrainers ...`, or set parallelism.dp_degree={world_size}",
        )


_ACCELERATE = (
    "accelerate does not synchronise gradients in finetrainers 0.2.0, so {processes} processes would train "
    "{processes} different models: use parallel_backend=ptd"
)


def _no_effect_problems(recipe: Recipe) -> Iterator[Problem]:
    model_name = recipe.model.model_name
    for where, reason in (_WITHOUT_EFFECT | _WITHOUT_EFFECT_FOR[model_name]).items():
        *parents, name = where.split(".")
        section = recipe
        for parent in parents:
            section = getattr(section, parent)
        if section is None:
            continue  # framebridge.data
        default = type(section).model_fields[name].default
        if parents == ["framebridge"]:
            default = MODEL_DEFAULTS[model_name].get(name, default)
        if getattr(section, name) != default:
            yield Problem(where, f"has no effect: {reason}; remove it")


def _objective_problems(recipe: Recipe) -> Iterator[Problem]:
    ours = recipe.framebridge
    target, predicted = ("eps_psi", "the noise") if recipe.is_latte else ("v", "v")
    if ours.objective == "diffusion" and ours.target != target:
        yield Problem("framebridge.target", f"objective diffusion predicts {predicted}, not {ours.target}: remove it")
    if ours.beta_min == ours.beta_max == 0:
        yield Problem("framebridge.beta_max", "should be above 0 when beta_min is 0: there would be no noise at all")
    if ours.ema_start_step and not ours.ema_decay:
        yield Problem("framebridge.ema_start_step", "has no effect with ema_decay 0: remove it")


def _training_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.training.training_type == "full-finetune":
        for name in sorted(recipe.lora.model_fields_set):
            yield Problem(
                f"lora.{name}", "has no effect with training_type full-finetune: remove it, or override lora=null"
            )
        if recipe.precision.layerwise_upcasting_modules:
            path = "precision.layerwise_upcasting_modules"
            yield Problem(path, "weights stored in fp8 cannot be trained: set training.training_type=lora, or []")
    optimization = recipe.optimization
    if optimization.lr_scheduler == "constant" and optimization.lr_warmup_steps:
        yield Problem(
            "optimization.lr_warmup_steps",
            "constant has no warm-up: set lr_scheduler=constant_with_warmup, or 0 here",
        )
    if recipe.precision.allow_tf32 and recipe.precision.float32_matmul_precision == "highest":
        yield Problem(
            "precision.allow_tf32", "float32_matmul_precision=highest switches TF32 off again: set it to high"
        )
    if (store := recipe.framebridge.precomputed) is not None:
        if recipe.dataset.enable_precomputation:
            yield Problem(
                "framebridge.precomputed", "excludes dataset.enable_precomputation, which encodes anew: remove one"
            )
        if not Path(store, "manifest.json").is_file():
            message = f"{store} holds no precomputed latents: `finetrainers precompute` makes them"
            yield Problem("framebridge.precomputed", message, on_disk=True)
    if recipe.dataset.precomputation_once and not recipe.dataset.enable_precomputation:
        yield Problem("dataset.precomputation_once", "needs dataset.enable_precomputation=true")
    if recipe.is_latte and "text_encoder" in recipe.compile.compile_modules:
        yield Problem("compile.compile_modules", "Latte has no text encoder: remove it")
    modules, scopes = recipe.compile.compile_modules, recipe.compile.compile_scopes
    if scopes is not None and not (modules and len(scopes) in (1, len(modules))):
        yield Problem(
            "compile.compile_scopes",
            f"{len(scopes)} scope(s) for {len(modules)} compile_modules: give one each",
        )


def _parallelism_problems(recipe: Recipe) -> Iterator[Problem]:
    parallelism = recipe.parallelism
    processes = parallelism.dp_degree * parallelism.dp_shards
    if parallelism.parallel_backend == "accelerate" and processes > 1:
        yield Problem("parallelism.parallel_backend", _ACCELERATE.format(processes=processes))
    for name in ("pp_degree", "cp_degree", "tp_degree"):
        if getattr(parallelism, name) > 1:
            yield Problem(f"parallelism.{name}", "only 1 is supported: share the work by dp_degree and dp_shards")
    if recipe.optimization.optimizer.endswith(("-bnb", "-8bit")) and parallelism.dp_shards > 1:
        yield Problem(
            "optimization.optimizer",
            f"{recipe.optimization.optimizer} does not work on sharded weights: take adamw, or dp_degree in place of "
            "dp_shards",
        )
    if recipe.validation.enable_model_cpu_offload and processes > 1:
        yield Problem("validation.enable_model_cpu_offload", "works with one process only")


def _attention_problems(recipe: Recipe) -> Iterator[Problem]:
    for name, values in recipe.attention:
        for value in values or ():
            component, _, provider = value.partition(":")
            package = next((p for start, p in _PROVIDER_PACKAGES.items() if provider.startswith(start)), None)
            if component == "vae":
                vae = "Latte's VAE keeps torch's own" if recipe.is_latte else "CogVideoX's VAE has no attention"
                yield Problem(f"attention.{name}", f"{value}: {vae}; remove it")
            elif component == "text_encoder" and recipe.is_latte:
                yield Problem(f"attention.{name}", f"{value}: Latte has no text encoder; remove it")
            elif package is not None and importlib.util.find_spec(package[0]) is None:
                remedy = f"`pip install {package[1]}`, or take {component}:native"
                yield Problem(f"attention.{name}", f"{value} needs the package {package[1]}: {remedy}")


def _cogvideox_problems(recipe: Recipe) -> Iterator[Problem]:
    model = recipe.model
    if model.pretrained_model_name_or_path is None:
        yield Problem("model.pretrained_model_name_or_path", "is required")
        return
    path = local_path(model.pretrained_model_name_or_path)
    if path is not None and (problem := folder_problem(path)) is not None:
        on_disk = not is_of_another_kind(path, COGVIDEOX)
        yield Problem("model.pretrained_model_name_or_path", problem, on_disk=on_disk)
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        replacement = getattr(model, f"{part}_id")
        path = None if replacement is None else local_path(replacement)
        if path is not None and (problem := part_problem(path, part)) is not None:
            yield Problem(f"model.{part}_id", problem, on_disk=not is_another_part(path, part, COGVIDEOX))


def _part_folder(recipe: Recipe, part: str) -> Path | None:
    replacement = recipe.transformer_source if part == "transformer" else getattr(recipe.model, f"{part}_id")
    if replacement is not None:
        return local_path(replacement)
    whole = recipe.model.pretrained_model_name_or_path
    path = None if whole is None else local_path(whole)
    return None if path is None else path / part
