"""Rules of a recipe that concern several fields, the disk, or the processes that were started."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

from framebridge_plugin.files import foreign_entry, writing_problem
from framebridge_plugin.recipe.data_rules import content_problems, data_problems, heldout_problems, validation_problems
from framebridge_plugin.recipe.model_rules import RecipeModel
from framebridge_plugin.recipe.problem import Problem
from framebridge_plugin.recipe.schema import FrameBridgeSection, Recipe
from framebridge_plugin.recipe.scratch_rules import scratch_problems, size_problems
from framebridge_plugin.recipe.start_rules import start_problems
from framebridge_plugin.settings.choices import BASELINE_TARGETS

# Attention providers by the beginning of their names.
_PROVIDER_PACKAGES = {
    "flash": ("flash_attn", "flash-attn"),
    "xformers": ("xformers", "xformers"),
    "sage": ("sageattention", "sageattention"),
    "_sage": ("sageattention", "sageattention"),
}


def recipe_problems(recipe: Recipe) -> Iterator[Problem]:
    """Check everything that does not depend on how the command was launched."""
    problems = list(_quick_problems(recipe))
    yield from problems
    if not any(problem.where.startswith(("framebridge.data", "dataset")) for problem in problems):
        yield from content_problems(recipe)


def _quick_problems(recipe: Recipe) -> Iterator[Problem]:
    yield from _no_effect_problems(recipe)
    yield from _objective_problems(recipe)
    yield from _training_problems(recipe)
    yield from _optimization_problems(recipe)
    yield from _parallelism_problems(recipe)
    yield from _attention_problems(recipe)
    model = RecipeModel(recipe)
    blocks = (model.scratch_config or model.saved.configs[recipe.backbone.network]).get("num_layers")
    if isinstance(blocks, int) and recipe.training.gradient_checkpointing_every > blocks:
        yield Problem("training.gradient_checkpointing_every", f"the network has {blocks} blocks: give at most that")
    if recipe.backbone.scratch_config is not None:
        yield from scratch_problems(recipe)
        yield from size_problems(recipe, model.saved.configs[recipe.backbone.network])
    yield from model.problems()
    yield from start_problems(recipe, model.folders)
    yield from data_problems(recipe, model.clip_rule)
    yield from heldout_problems(recipe)
    yield from validation_problems(recipe, model.sample_rule, model.caption_problem)
    if (folder := recipe.framebridge.caption_cache_dir) is not None and (problem := writing_problem(Path(folder))):
        yield Problem("framebridge.caption_cache_dir", problem, on_disk=True)
    if problem := writing_problem(Path(recipe.checkpoints.output_dir)):
        yield Problem("checkpoints.output_dir", problem, on_disk=True)
    elif problem := foreign_entry(Path(recipe.checkpoints.output_dir)):
        remedy = "remove it (the run's folder itself may be a link, or lie on another disk)"
        yield Problem("checkpoints.output_dir", f"{problem}; {remedy}", on_disk=True)


def launch_problems(recipe: Recipe, environment: Mapping[str, str]) -> Iterator[Problem]:
    """Check the recipe against the number of processes that were started."""
    try:
        world_size = int(environment.get("WORLD_SIZE", "1"))
    except ValueError:
        world_size = 0
    if world_size < 1:
        yield Problem(
            "parallelism",
            f"WORLD_SIZE should be a positive number, not {environment['WORLD_SIZE']!r}: use --nproc or torchrun",
        )
        return
    shards, given = recipe.parallelism.dp_shards, recipe.parallelism.dp_degree
    there = f"there {'is one process' if world_size == 1 else f'are {world_size} processes'}"
    if recipe.parallelism.parallel_backend == "accelerate" and world_size > 1:
        yield Problem("parallelism.parallel_backend", _ACCELERATE.format(processes=world_size))
    elif world_size % shards:
        message = f"{shards} shards need that many processes, or a multiple, and {there}: start them with --nproc"
        yield Problem("parallelism.dp_shards", f"{message}, or give fewer shards")
    elif given is not None and given * shards != world_size:
        remedy = "leave dp_degree out (null), which makes it follow from their number and changes the clips per update"
        message = f"dp_degree x dp_shards is {given * shards}, and {there}: start them with --nproc {given * shards}"
        yield Problem("parallelism.dp_degree", f"{message}, or {remedy}")
    elif world_size > 1 and given is None and shards == 1:
        for name in _of_one_process(recipe):
            yield Problem(name, _OFFLOAD)


_OFFLOAD = "works with one process only"
_ACCELERATE = (
    "accelerate does not synchronise gradients in finetrainers 0.2.0, so {processes} processes would train "
    "{processes} different models: use parallel_backend=ptd"
)


def _of_one_process(recipe: Recipe) -> Iterator[str]:
    if recipe.validation.enable_model_cpu_offload:
        yield "validation.enable_model_cpu_offload"
    if recipe.optimization.offload_optimizer:
        yield "optimization.offload_optimizer"


def _no_effect_problems(recipe: Recipe) -> Iterator[Problem]:
    facts, derived = recipe.backbone, {}
    if facts.scratch_config is None:
        derived["framebridge.latte_size"] = "it is for Latte"
    if "neural_prior" not in facts.optional_parts:
        derived["framebridge.neural_prior"] = "it is for Latte"
    if facts.process == "flow_matching":
        derived["framebridge.alignment_edge"] = "flow matching knows every noise level of the bridge, there is no edge"
    for where, reason in (derived | dict(facts.without_effect)).items():
        *parents, name = where.split(".")
        section = recipe
        for parent in parents:
            section = getattr(section, parent)
        if section is None:
            continue  # framebridge.data
        default = type(section).model_fields[name].default
        if parents == ["framebridge"]:
            default = recipe.backbone.defaults.get(name, default)
        if getattr(section, name) != default:
            yield Problem(where, f"has no effect: {reason}; remove it")


def _objective_problems(recipe: Recipe) -> Iterator[Problem]:
    ours = recipe.framebridge
    target = recipe.backbone.defaults.get("target", FrameBridgeSection.model_fields["target"].default)
    choices = () if recipe.backbone.scratch_config is None else tuple(BASELINE_TARGETS)
    if ours.objective == "diffusion" and ours.target not in (target, *choices):
        others = f", or take {' or '.join(choices)}" if choices else ""
        message = f"{ours.target} is for objective bridge; diffusion has the backbone's own target: remove it{others}"
        yield Problem("framebridge.target", message)
    if ours.objective == "diffusion":
        for part in recipe.backbone.optional_parts:
            if getattr(ours, part, None) is not None:
                yield Problem(f"framebridge.{part}", "goes with objective bridge, not with diffusion: remove it")
    for name, message in ours.conflicts():
        yield Problem(f"framebridge.{name}", message)


def _training_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.training.training_type == "full-finetune":
        for name in sorted(recipe.lora.model_fields_set):
            yield Problem(
                f"lora.{name}", "has no effect with training_type full-finetune: remove it, or override lora=null"
            )
    yield from _quantization_problems(recipe)
    if recipe.precision.allow_tf32 and recipe.precision.float32_matmul_precision == "highest":
        yield Problem(
            "precision.allow_tf32", "float32_matmul_precision=highest switches TF32 off again: set it to high"
        )
    if recipe.training.gradient_checkpointing_every > 1 and not recipe.training.gradient_checkpointing:
        yield Problem("training.gradient_checkpointing_every", "has no effect without gradient_checkpointing=true")
    yield from _autocast_problems(recipe)
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
    modules, scopes = recipe.compile.compile_modules, recipe.compile.compile_scopes
    if scopes is not None and len(scopes) != len(modules):
        yield Problem(
            "compile.compile_scopes",
            f"{len(scopes)} scope(s) for {len(modules)} compile_modules: give one each",
        )


def _autocast_problems(recipe: Recipe) -> Iterator[Problem]:
    precision, is_lora = recipe.precision, recipe.training.training_type == "lora"
    in_half = is_lora and precision.transformer_dtype == "bf16"
    if precision.autocast is None or precision.transformer_dtype == "fp32":
        return
    if in_half and recipe.parallelism.dp_shards > 1:
        message = "has no effect with dp_shards > 1 and transformer_dtype=bf16, which all layers then have"
        yield Problem("precision.autocast", f"{message}: take transformer_dtype=fp32, or remove it")
    elif not in_half:
        message = f"needs transformer_dtype=fp32, not {precision.transformer_dtype}: the weights stay float32"
        yield Problem("precision.autocast", message)


def _optimization_problems(recipe: Recipe) -> Iterator[Problem]:
    ours, shards = recipe.optimization, recipe.parallelism.dp_shards
    if ours.lr_scheduler == "constant" and ours.lr_warmup_steps:
        message = "constant has no warm-up: set lr_scheduler=constant_with_warmup, or 0 here"
        yield Problem("optimization.lr_warmup_steps", message)
    if "-" in ours.optimizer and shards > 1:
        yield Problem(
            "optimization.optimizer",
            f"{ours.optimizer} does not work on sharded weights: take adamw, or dp_degree in place of dp_shards",
        )
    if ours.stochastic_rounding:
        if ours.optimizer != "adamw" and "torchao" not in ours.optimizer:
            message = f"{ours.optimizer} has none: take adamw or adamw-torchao-8bit, or remove it"
            yield Problem("optimization.stochastic_rounding", message)
        if recipe.precision.transformer_dtype != "bf16":
            message = "has no effect on weights that are not bf16: set precision.transformer_dtype=bf16, or remove it"
            yield Problem("optimization.stochastic_rounding", message)
        elif recipe.training.training_type == "lora" and shards == 1:
            yield Problem("optimization.stochastic_rounding", "has no effect on LoRA layers, float32 here: remove it")
    if ours.offload_optimizer and (ours.optimizer != "adamw" or ours.stochastic_rounding):
        message = "works with optimizer adamw, without stochastic_rounding: choose, or take adamw-torchao-8bit alone"
        yield Problem("optimization.offload_optimizer", message)


def _quantization_problems(recipe: Recipe) -> Iterator[Problem]:
    training, kind = recipe.training, recipe.precision.transformer_quantization
    where, is_lora = "precision.transformer_quantization", training.training_type == "lora"
    if kind is not None and not is_lora:
        yield Problem(where, f"weights in {kind} cannot be trained: set training.training_type=lora, or null")
    elif kind is not None and recipe.parallelism.dp_shards > 1:
        yield Problem(where, "weights in 8 bits cannot be sharded: take dp_degree in place of dp_shards, or null")
    elif kind is not None and (not training.gradient_checkpointing or training.gradient_checkpointing_every > 1):
        unpacked = "blocks that are not computed again keep their unpacked weights for the backward pass"
        yield Problem(where, f"saves nothing: {unpacked}; set training.gradient_checkpointing=true, and _every=1")
    if recipe.precision.float8_training is not None:
        where = "precision.float8_training"
        if is_lora:
            message = "is for a full fine-tune; for a LoRA store the base by precision.transformer_quantization=int8"
            yield Problem(where, f"{message}, or set null")
        elif "bf16" not in (recipe.precision.transformer_dtype, recipe.precision.autocast):
            yield Problem(where, "needs a network that computes in bf16: set precision.autocast=bf16")


def _parallelism_problems(recipe: Recipe) -> Iterator[Problem]:
    parallelism = recipe.parallelism
    processes = (parallelism.dp_degree or 1) * parallelism.dp_shards
    if parallelism.parallel_backend == "accelerate" and processes > 1:
        yield Problem("parallelism.parallel_backend", _ACCELERATE.format(processes=processes))
    for name in _of_one_process(recipe) if processes > 1 else ():
        yield Problem(name, _OFFLOAD)


def _attention_problems(recipe: Recipe) -> Iterator[Problem]:
    for name, values in recipe.attention:
        for value in values or ():
            component, _, provider = value.partition(":")
            package = next((p for start, p in _PROVIDER_PACKAGES.items() if provider.startswith(start)), None)
            if component == "vae":
                yield Problem(f"attention.{name}", f"{value}: a VAE keeps torch's own attention, if any; remove it")
            elif component == "text_encoder" and component not in recipe.backbone.parts:
                what = f"{recipe.model.model_name} has no text encoder"
                yield Problem(f"attention.{name}", f"{value}: {what}; remove it")
            elif package is not None and importlib.util.find_spec(package[0]) is None:
                remedy = f"`pip install {package[1]}`, or take {component}:native"
                yield Problem(f"attention.{name}", f"{value} needs the package {package[1]}: {remedy}")
