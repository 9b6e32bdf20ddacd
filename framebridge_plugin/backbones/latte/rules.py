"""What can be told about a Latte from the configs of its parts: do they fit, which clips and classes does it know.

Needs the standard library alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from framebridge_plugin.backbones.facts import ClipRule, ClipShape, ClipShapeRule, Config, KnownClasses
from framebridge_plugin.errors import UsageError

VAE_DEFAULTS = {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None, "block_out_channels": [64]}
"""What diffusers takes for these where the configuration of an `AutoencoderKL` leaves them out."""

LATTE_SIZES = {"Ti": (6, 192, 6), "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Blocks (half of them spatial, half temporal), width, heads. Ti is this package's own, for trials on a CPU."""

_STAGES = {"transformer": "bridge", "neural_prior": "neural_prior"}
_NAMES = {"bridge": "a bridge", "neural_prior": "a neural prior"}
_LARGEST = 100_000
_HUB_COMPRESSION = 8  # Stable Diffusion's autoencoder, where it is not to be seen
# What a neural prior and the bridge that takes its videos have in common.
_SHARED = {
    "num_frames": "frames",
    "sample_height": "rows of its latents",
    "sample_width": "columns of its latents",
    "out_channels": "channels of its latents",
    "num_classes": "classes",
}


def config_problem(part: str, config: Config) -> str | None:
    """That a network is of another stage, or its config not whole."""
    if part not in _STAGES:
        return None
    found, wanted = config.get("stage"), _STAGES[part]
    if found != wanted:
        return f"holds {_NAMES.get(str(found), f'a network of stage {found!r}')}, not {_NAMES[wanted]}"
    damaged = [key for key in _SHARED if type(size := config.get(key)) is not int or not 0 < size <= _LARGEST]
    return f"has a config whose {damaged[0]} is not as it was written; copy the model again" if damaged else None


def parts_problems(configs: Mapping[str, Config]) -> Iterator[tuple[str, str]]:
    """Compares autoencoder, bridge and neural prior, see `BackboneFacts.parts_problems`."""
    vae, bridge, prior = (configs.get(part, {}) for part in ("vae", "transformer", "neural_prior"))
    different = []
    for part, network in {"transformer": bridge, "neural_prior": prior}.items():
        channels, wanted = network.get("out_channels"), _whole_vae_config(vae).get("latent_channels")
        if None not in (channels, wanted) and channels != wanted:
            different.append(part)
            remedy = "give the autoencoder that it was trained with"
            yield part, f"is for latents of {channels} channels, the autoencoder has {wanted}; {remedy}"
    if bridge.keys() >= {"in_channels", "out_channels"}:
        takes, is_there = bridge["in_channels"] != bridge["out_channels"], "neural_prior" in configs
        if takes and not is_there:
            yield "transformer", "takes the video of a neural prior, and there is none; give its neural_prior"
        if is_there and not takes:
            yield "neural_prior", "is for a bridge that takes its video, and the transformer takes none; leave it out"
            return
    if different:
        return
    if (problem := _mismatch(prior, bridge)) or (
        problem := _other_vae_problem(configs.get("neural_prior/vae", {}), vae)
    ):
        yield "neural_prior", problem


def _mismatch(prior: Config, bridge: Config) -> str | None:
    differences = [
        f"{prior[key]} {name}, not {bridge[key]}"
        for key, name in _SHARED.items()
        if key in bridge and key in prior and prior[key] != bridge[key]
    ]
    if not differences:
        names = enumerate(zip(prior.get("class_names") or (), bridge.get("class_names") or (), strict=False))
        others = [
            f"the class {own!r} at label {label}, not {wanted!r}" for label, (own, wanted) in names if own != wanted
        ]
        differences = others[:1]
    if not differences:
        return None
    remedy = "train both on clips of one shape and the same classes"
    return f"does not fit the bridge: it has {'; '.join(differences)}; {remedy}"


def _other_vae_problem(there: Config, here: Config) -> str | None:
    """Autoencoders that agree in `VAE_DEFAULTS` make latents of the same shape and scale."""
    theirs, ours = _whole_vae_config(there), _whole_vae_config(here)
    if not theirs or not ours:
        return None
    different = [key for key in VAE_DEFAULTS if (theirs[key] or 0) != (ours[key] or 0)]  # no shift is one of 0
    if not different:
        return None
    key = different[0]
    return f"was trained with another autoencoder: {key} is {theirs[key]} there, {ours[key]} here; take the same"


def clip_rule(vae: Config, network: Config) -> ClipRule:
    """The shape that a network was trained on; for one without a shape, sides that are multiples of its patches."""
    compression = compression_of(vae)
    if "num_frames" not in network:
        return ClipShapeRule(frames_step=1, size_step=int(network.get("patch_size", 1)) * (compression or 1))
    scale = compression or _HUB_COMPRESSION
    return ClipShape(network["num_frames"], network["sample_height"] * scale, network["sample_width"] * scale)


def known_classes(network: Config) -> KnownClasses | None:
    """The classes of a network; None if it is not to be seen."""
    if "num_classes" not in network:
        return None
    return KnownClasses(network["num_classes"], tuple(network.get("class_names") or ()))


def scratch_config(
    size: str,
    vae: Config,
    clip_shape: tuple[int, int, int] | None,
    class_names: list[str] | None,
    optional_parts: frozenset[str],
) -> dict[str, Any]:
    """What is known of the config of a network from scratch, see `BackboneFacts.scratch_config`."""
    name, _, patch = size.partition("/")
    if name not in LATTE_SIZES or patch not in ("2", "4", "8"):
        raise UsageError(
            f"unknown Latte size {size!r}; choose one of {', '.join(LATTE_SIZES)} and one of the patch sizes 2, 4, 8, "
            "such as 'S/2'"
        )
    num_layers, width, heads = LATTE_SIZES[name]
    config: dict[str, Any] = {
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "patch_size": int(patch),
    }
    if clip_shape is not None:
        config["num_frames"] = clip_shape[0]
        if compression := compression_of(vae):
            config |= {"sample_height": clip_shape[1] // compression, "sample_width": clip_shape[2] // compression}
    if class_names is not None:
        config |= {"num_classes": len(class_names), "class_names": class_names}
    if vae:
        channels = _whole_vae_config(vae)["latent_channels"]
        config |= {"out_channels": channels, "in_channels": channels * (2 if "neural_prior" in optional_parts else 1)}
    return config


def _whole_vae_config(vae: Config) -> dict[str, Any]:
    return VAE_DEFAULTS | dict(vae) if vae else {}


def compression_of(vae: Config) -> int | None:
    """Pixels per row of the latents; None if the autoencoder is not to be seen."""
    levels = _whole_vae_config(vae).get("block_out_channels")
    return 2 ** (len(levels) - 1) if isinstance(levels, list | tuple) and levels else None
