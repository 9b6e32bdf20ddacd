"""What the trainers rely on before anything is saved: the interface, what is loaded, batches, and the objective."""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from framebridge_plugin.testing.outcome import Check, fail, require
from framebridge_plugin.testing.subject import SEED, Subject

_COMPONENTS = (
    *("tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3"),
    *("image_encoder", "image_processor", "transformer", "vae"),
)
_SWITCHES = ("enable_slicing", "enable_tiling", "enable_model_cpu_offload", "training")
_SAMPLE = ("caption", "_original_num_frames", "_original_height", "_original_width", "generator")
_BATCH = ("condition_model_conditions", "latent_model_conditions", "sigmas", "generator", "compute_posterior")
_VALIDATION_ROW = (
    *("caption", "prompt", "image", "video", "image_path", "video_path"),
    *("height", "width", "num_frames", "frame_rate", "num_inference_steps", "export_fps"),
)

CALLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "load_condition_models": ((), ()),
    "load_latent_models": ((), ()),
    "load_diffusion_models": ((), ()),
    "load_pipeline": ((), (*_COMPONENTS, *_SWITCHES)),
    "prepare_conditions": ((), _SAMPLE),
    "prepare_latents": ((), (*_SAMPLE, "compute_posterior")),
    "collate_conditions": (("data",), ()),
    "collate_latents": (("data",), ()),
    "forward": ((), ("transformer", "scheduler", *_BATCH)),
    "validation": ((), ("pipeline", "generator", *_VALIDATION_ROW)),
    "_save_lora_weights": (("directory", "transformer_state_dict", "scheduler", "metadata"), ()),
    "_save_model": (("directory", "transformer", "transformer_state_dict", "scheduler"), ()),
}
"""How finetrainers' trainers call a specification: for each method the positional arguments and the keywords.

`prepare_conditions` and `prepare_latents` are also given the video or image, and the models that
`load_condition_models` or `load_latent_models` returned, under the names that they have there.
"""
_NOT_ABSTRACT = ("prepare_conditions", "prepare_latents", "collate_conditions", "collate_latents")


def check_interface(subject: Subject) -> None:
    """Every method is implemented and takes what the trainers pass."""
    from finetrainers.models import ModelSpecification

    specification = subject.specification()
    require(isinstance(specification, ModelSpecification), "is no subclass of finetrainers' ModelSpecification")
    for name, (positional, keywords) in CALLS.items():
        inherited = getattr(type(specification), name) is getattr(ModelSpecification, name)
        require(not inherited or name in _NOT_ABSTRACT, f"{name} is not implemented")
        signature = inspect.signature(getattr(specification, name))
        passed = dict.fromkeys(keywords)
        if name.startswith("prepare_"):
            # The sample's video or image, and the models: the checks of conditions and latents really pass them.
            passed |= {p.name: None for p in signature.parameters.values() if p.default is p.empty and p.kind < 2}
        try:
            bound = signature.bind(*positional, **passed)
        except TypeError as error:
            fail(f"{name}{signature} cannot be called as the trainers call it: {error}")
        for given, taken in zip(positional, bound.arguments, strict=False) if name.startswith("_save") else ():
            # finetrainers' own base class declares another order than its trainer uses.
            require(given == taken, f"{name} takes {given} for {taken}: the trainers pass {', '.join(positional)}")
    dims = specification._resolution_dim_keys
    valid = (
        isinstance(dims, Mapping) and dims and all(isinstance(dim, int) for value in dims.values() for dim in value)
    )
    require(valid, f"_resolution_dim_keys is {dims!r}; it maps keys of a prepared sample to dimensions that vary")


# Models


def check_models(subject: Subject) -> None:
    """The loaders return what the trainers keep, in the precision asked for, ready for use, and always the same."""
    from finetrainers import SFTTrainer, utils

    loaders = {
        "load_condition_models": SFTTrainer._condition_component_names,
        "load_latent_models": SFTTrainer._latent_component_names,
        "load_diffusion_models": SFTTrainer._diffusion_component_names,
    }
    for dtype in (torch.float32, torch.bfloat16):
        specification = subject.specification(dtype)
        for loader, known in loaders.items():
            models = getattr(specification, loader)()
            unknown = sorted(set(models) - set(known))
            require(not unknown, f"{loader} returns {', '.join(unknown)}, which the trainers drop; they know {known}")
            again = getattr(subject.specification(dtype), loader)()
            for name, model in models.items():
                if isinstance(model, nn.Module):
                    _check_network(name, model, again[name], dtype)
                    frozen = loader != "load_diffusion_models"
                    require(not (frozen and model.training), f"{name} is loaded in training mode, which is never left")
    require("transformer" in models, f"load_diffusion_models returns no transformer but {sorted(models)}")
    require("scheduler" in models, f"load_diffusion_models returns no scheduler but {sorted(models)}")
    require(hasattr(models["transformer"], "config"), "the transformer has no config, which the trainers read")
    try:
        utils.get_scheduler_sigmas(models["scheduler"])
    except ValueError as error:
        fail(f"finetrainers cannot train with the scheduler: {error}")


def _check_network(name: str, model: nn.Module, again: nn.Module, dtype: torch.dtype) -> None:
    found = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    # diffusers and transformers keep the layers of this list in float32.
    kept = {torch.float32} if getattr(model, "_keep_in_fp32_modules", None) else set()
    wrong = ", ".join(sorted(map(str, found - kept - {dtype})))
    require(dtype in found and not wrong, f"{name} is loaded in {wrong or 'float32'} where {dtype} is asked for")
    differing = differing_tensors(model.state_dict(), again.state_dict())
    require(not differing, f"{name} differs from one load to the next: {differing}")


# Samples and batches


def check_conditions(subject: Subject) -> None:
    """`prepare_conditions` returns a batch of one that can be stored, and depends on nothing but its arguments."""
    specification = subject.specification()
    models = specification.load_condition_models()
    _check_prepared(subject, specification.prepare_conditions, models)


def check_latents(subject: Subject) -> None:
    """`prepare_latents` does the same, with and without a drawn posterior, and its size can be told."""
    specification = subject.specification()
    models = specification.load_latent_models()
    for compute_posterior in (True, False):
        prepared = _check_prepared(subject, specification.prepare_latents, models, compute_posterior=compute_posterior)
        require("latents" in prepared, f"the trainers read 'latents', but there is only {sorted(prepared)}")
    dims = specification._resolution_dim_keys
    for key in dims.keys() & prepared.keys():
        require(
            max(dims[key]) < prepared[key].ndim,
            f"_resolution_dim_keys says {dims[key]} of {key!r}, which has {prepared[key].ndim} dimensions",
        )


def _check_prepared(subject: Subject, prepare: Any, models: Mapping[str, Any], **options: bool) -> dict[str, Any]:
    name = prepare.__name__
    results = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            generator = torch.Generator().manual_seed(SEED)
            results.append(prepare(**subject.samples[0], **models, **options, generator=generator))
    prepared, again = results
    require(isinstance(prepared, dict), f"{name} returns {type(prepared).__name__}, not a dictionary")
    for key, value in _collated(prepared).items():
        shape = list(value.shape)
        require(value.ndim > 0 and shape[0] == 1, f"{name}: {key} {shape} is no batch of one")
        require(torch.isfinite(value).all(), f"{name}: {key} has values that are not finite")
        require(not value.requires_grad, f"{name}: {key} carries a graph, which fills the memory with precomputation")
        require(torch.equal(value, again[key]), f"{name}: {key} is another with the same sample and generator")
    file = io.BytesIO()
    torch.save(prepared, file)
    file.seek(0)
    try:
        stored = torch.load(file, weights_only=True)
    except Exception as error:
        fail(f"{name}: what it returns cannot be precomputed, torch.load refuses it: {error}")
    before, after = ({k: v for k, v in d.items() if isinstance(v, torch.Tensor)} for d in (prepared, stored))
    require(not (keys := differing_tensors(before, after)), f"{name}: precomputation changes {keys}")
    return prepared


def _collated(prepared: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a prepared sample of which finetrainers makes batches."""
    from finetrainers.models.modeling_utils import IGNORE_KEYS_FOR_COLLATION

    tensors = {key: value for key, value in prepared.items() if isinstance(value, torch.Tensor)}
    return {key: value for key, value in tensors.items() if key not in IGNORE_KEYS_FOR_COLLATION}


def check_collation(subject: Subject) -> None:
    """Two samples become one batch that holds both, unchanged and in order."""
    from finetrainers import data

    specification = subject.specification()
    for compute_posterior in (True, False):
        conditions, latents = subject.prepared(specification, compute_posterior)
        sampler = data.ResolutionSampler(batch_size=2, dim_keys=specification._resolution_dim_keys)
        for pair in zip(conditions, latents, strict=True):
            sampler.consume(*pair)
        require(sampler.is_ready, "two clips of one size have latents of two sizes, and never become a batch")
        batches = sampler.get_batch()
        for name, samples in zip(("collate_conditions", "collate_latents"), batches, strict=True):
            _check_batch(name, getattr(specification, name)(list(samples)), samples)


def _check_batch(name: str, batch: Any, samples: Any) -> None:
    require(isinstance(batch, dict), f"{name} returns {type(batch).__name__}, not a dictionary")
    missing = sorted(samples[0].keys() - batch.keys())
    require(not missing, f"{name} loses {', '.join(missing)}")
    for key in _collated(samples[0]):
        expected, found = torch.cat([sample[key] for sample in samples]), batch[key]
        # A list is fine: the trainers cast tensors to the precision of the network, whole numbers too.
        require(
            isinstance(found, torch.Tensor | list) and torch.equal(torch.as_tensor(found), expected),
            f"{name}: {key} is not the samples one after the other, {list(expected.shape)}",
        )


# The objective


def check_forward(subject: Subject) -> None:
    """`forward` returns prediction, target and sigmas, and its loss has a gradient for all that is trained."""
    for dtype, compute_posterior in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True)):
        specification = subject.specification(dtype)
        batch = subject.batch(specification, compute_posterior)
        models = specification.load_diffusion_models()
        network, scheduler = models["transformer"], models["scheduler"]
        network.requires_grad_(True).train()
        result = batch.evaluate(specification, network, scheduler)
        require(isinstance(result, tuple) and len(result) == 3, "forward returns no (prediction, target, sigmas)")
        prediction, target, sigmas = result
        shapes = f"{list(prediction.shape)} and {list(target.shape)}"
        require(prediction.shape == target.shape, f"prediction and target differ in shape: {shapes}")
        require(len(prediction) == len(sigmas) == 2, f"of two samples, prediction and target have {shapes}")
        for name, tensor in {"prediction": prediction, "target": target}.items():
            kind = f"{name} ({dtype} network)"
            require(tensor.is_floating_point(), f"{kind} is {tensor.dtype}")
            require(torch.isfinite(tensor).all(), f"{kind} has values that are not finite")
        require(prediction.requires_grad, "the prediction has no gradient")
        require(not target.requires_grad, "the target has a gradient: training would move it too")
        batch.loss(specification, network, scheduler).backward()
        unused = [name for name, parameter in network.named_parameters() if parameter.grad is None]
        require(not unused, f"no gradient for {_some(unused)}: training on several processes stops at unused weights")
        broken = [name for name, p in network.named_parameters() if not torch.isfinite(p.grad).all()]
        require(not broken, f"the gradient is not finite for {_some(broken)}")


def check_loss_falls(subject: Subject) -> None:
    """Twenty updates on one batch, with the same draws, take at least a tenth off the loss."""
    specification = subject.specification()
    batch = subject.batch(specification)
    models = specification.load_diffusion_models()
    network, scheduler = models["transformer"], models["scheduler"]
    network.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(21):
        loss = batch.loss(specification, network, scheduler)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    require(losses[-1] < 0.9 * losses[0], f"from {losses[0]:.4g} the loss comes to {losses[-1]:.4g} in 20 updates")


# Tools


def differing_tensors(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    """What differs between state dicts, bit for bit, in words; empty if nothing does."""
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is too many" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        one, other = expected[name].detach(), found[name].detach()
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            problems.append(f"{name} is {other.dtype} {list(other.shape)} instead of {one.dtype} {list(one.shape)}")
        elif not torch.equal(one, other):
            problems.append(f"{name} has other values")
    return _some(sorted(problems))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


CHECKS = (
    Check("interface", check_interface),
    Check("models", check_models),
    Check("conditions", check_conditions),
    Check("latents", check_latents),
    Check("collation", check_collation),
    Check("forward", check_forward),
    Check("loss-falls", check_loss_falls),
)
