"""Reading the FrameBridge authors' Latte checkpoints: their key names and layouts become those of `LatteTransformer`.

A checkpoint is a file of `torch.save`: a dictionary with the weights under "ema" or "model". Three stages have one:
the bridge, the bridge on a neural prior (twice the input channels) and the neural prior (all keys begin with
`nwarp_model.`). Names, shapes and order of the parts are facts about their files; no code is taken over.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from framebridge_plugin.backbones.latte.rules import LATTE_SIZES
from framebridge_plugin.errors import FrameBridgeError, first_line
from framebridge_plugin.models.latte import LatteTransformer, spatial_positions, temporal_positions

PRIOR_PREFIX = "nwarp_model."

# Parts of our names and what the authors call them.
_REFERENCE_NAMES = {
    "patch_embed.": "x_embedder.",
    "time_embedding.linear_1.": "t_embedder.mlp.0.",
    "time_embedding.linear_2.": "t_embedder.mlp.2.",
    "class_embedding.": "y_embedder.embedding_table.",
    "transformer_blocks.": "blocks.",
    "norm1.linear.": "adaLN_modulation.1.",
    "attn.to_q.": "attn.qkv.",
    "attn.to_k.": "attn.qkv.",
    "attn.to_v.": "attn.qkv.",
    "attn.to_out.0.": "attn.proj.",
    "ff.net.0.proj.": "mlp.fc1.",
    "ff.net.2.": "mlp.fc2.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
    "proj_out.": "final_layer.linear.",
}
# Stored by the authors, computed by us.
_TABLES = ("pos_embed", "temp_embed")
_LISTED_KEYS = 20
_MOST_KEYS, _LONGEST_KEY, _MOST_BLOCKS = 20_000, 300, 500


@dataclass(frozen=True)
class ReferenceNetwork:
    """One network of a checkpoint, as `LatteTransformer` has it.

    Attributes:
        config: Arguments of `LatteTransformer`.
        state_dict: Its weights in float32.
    """

    config: dict[str, Any]
    state_dict: dict[str, torch.Tensor]


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """What a checkpoint holds.

    Attributes:
        stage: "bridge", "bridge_neural_prior" or "neural_prior".
        weights: "ema" or "model": which of the dictionaries in the file was read.
        networks: The networks by their names in our pipeline, "transformer" and "neural_prior"; a bridge's checkpoint
            does not have to hold the neural prior it was trained on.
        leftover_keys: Names in the file that belong to none of them.
    """

    stage: str
    weights: str
    networks: dict[str, ReferenceNetwork]
    leftover_keys: list[str]

    def describe(self) -> str:
        """Says in one line what was read, and that no key was missing; a checkpoint with missing keys is refused."""
        config = next(iter(self.networks.values())).config
        leftover = f"left over: {list_keys(self.leftover_keys)}" if self.leftover_keys else "none left over"
        return (
            f"{self.stage} ({' and '.join(self.networks)}), weights {self.weights!r}: {config['num_layers']} blocks "
            f"of width {config['num_attention_heads'] * config['attention_head_dim']}, patch {config['patch_size']}, "
            f"{config['num_frames']} frames of {config['sample_height']}x{config['sample_width']} latents, "
            f"{config['num_classes']} classes; no keys missing, {leftover}"
        )


def read_reference_checkpoint(
    checkpoint: str | os.PathLike,
    *,
    class_names: Sequence[str] | None = None,
    num_attention_heads: int | None = None,
) -> ReferenceCheckpoint:
    """Reads a checkpoint of the authors; only tensors and plain containers are unpickled, never code."""
    weights, state_dict = _load_weights(checkpoint)
    prior_keys = {name: name.removeprefix(PRIOR_PREFIX) for name in state_dict if name.startswith(PRIOR_PREFIX)}
    bridge_state = {name: tensor for name, tensor in state_dict.items() if name not in prior_keys}
    prior_state = {short: state_dict[name] for name, short in prior_keys.items()}
    is_bridge, has_prior = _count_blocks(bridge_state) > 0, _count_blocks(prior_state) > 0
    if not is_bridge and not has_prior:
        raise FrameBridgeError(
            f"{checkpoint}: no Latte network in {weights!r}: it has keys such as {list_keys(list(state_dict)[:3])}, "
            f"and none that begin with blocks. or {PRIOR_PREFIX}blocks.; give a UCF-101 checkpoint of the authors"
        )

    networks = {}
    stage = "bridge" if is_bridge else "neural_prior"
    try:
        if is_bridge:
            networks["transformer"], used = _convert(bridge_state, "bridge", class_names, num_attention_heads)
            config = networks["transformer"].config
            if config["in_channels"] != config["out_channels"]:
                stage = "bridge_neural_prior"
        else:
            used = set()
        # A neural prior in the file of a plain bridge would belong to nothing.
        if has_prior and stage != "bridge":
            networks["neural_prior"], used_by_prior = _convert(
                prior_state, "neural_prior", class_names, num_attention_heads
            )
            used |= {PRIOR_PREFIX + name for name in used_by_prior}
    except FrameBridgeError as error:
        raise FrameBridgeError(f"{checkpoint} ({stage}, {weights!r}): {error}") from error
    return ReferenceCheckpoint(stage, weights, networks, [name for name in state_dict if name not in used])


def list_keys(keys: Sequence[str]) -> str:
    """The keys in one line, the first of them where there are very many."""
    rest = len(keys) - _LISTED_KEYS
    return ", ".join(keys[:_LISTED_KEYS]) + (f" and {rest} more" if rest > 0 else "")


def _load_weights(checkpoint: str | os.PathLike) -> tuple[str, dict[str, torch.Tensor]]:
    size = 0
    try:
        size = os.path.getsize(checkpoint)
        if not os.path.isfile(checkpoint):
            raise ValueError("it is no file")
        if zipfile.is_zipfile(checkpoint):
            with zipfile.ZipFile(checkpoint) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > size:
                    raise ValueError("it is compressed, which torch.save does not do")
        # Files of torch before 1.6 are no archives, and cannot be mapped.
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(checkpoint))
    except FileNotFoundError as error:
        raise FrameBridgeError(f"{checkpoint}: there is no such file; check the path") from error
    except pickle.UnpicklingError as error:
        raise FrameBridgeError(
            f"{checkpoint}: refused, for it holds more than weights, and unpickling that could run code; "
            "save its dictionary 'ema' or 'model' alone"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, MemoryError, zipfile.BadZipFile) as error:
        raise FrameBridgeError(
            f"{checkpoint}: not a whole file of torch.save ({first_line(error)}); download it again"
        ) from error
    for weights in ("ema", "model"):
        state_dict = content.get(weights) if isinstance(content, dict) else None
        if isinstance(state_dict, dict) and all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values()):
            if problem := _problem_of(state_dict, size):
                raise FrameBridgeError(f"{checkpoint}: {problem}; take the file as the authors saved it")
            return weights, state_dict
    raise FrameBridgeError(
        f"{checkpoint}: expected a dictionary with the weights under 'ema' or 'model', as the authors save it"
    )


def _problem_of(state_dict: dict[Any, torch.Tensor], size: int) -> str | None:
    """What no checkpoint of this size in bytes has."""
    names, tensors = list(state_dict), state_dict.values()
    if len(names) > _MOST_KEYS or any(not isinstance(name, str) or len(name) > _LONGEST_KEY for name in names):
        return "its keys are none of a network"
    if any(tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized for tensor in tensors):
        return "it has tensors that are not dense"
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > size:
        return "its tensors are larger than the file, parts of which they repeat"
    if _count_blocks(name.removeprefix(PRIOR_PREFIX) for name in names) > _MOST_BLOCKS:
        return f"it numbers more than {_MOST_BLOCKS} blocks"
    return None


def _count_blocks(state_dict: Iterable[str]) -> int:
    numbers = [int(match[1]) for name in state_dict if (match := re.match(r"blocks\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _convert(
    state_dict: Mapping[str, torch.Tensor],
    stage: str,
    class_names: Sequence[str] | None,
    num_attention_heads: int | None,
) -> tuple[ReferenceNetwork, set[str]]:
    """One network, and the names of the file that it took."""
    num_layers = _count_blocks(state_dict)
    expected = [_reference_name(name) for name in _names_of_weights(num_layers, stage)]
    missing = [name for name in dict.fromkeys([*_TABLES, *expected]) if name not in state_dict]
    if missing:
        raise FrameBridgeError(f"keys are missing: {list_keys(missing)}; take the file as the authors saved it")

    try:
        config = _infer_config(state_dict, num_layers, stage, num_attention_heads)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        if isinstance(error, FrameBridgeError):
            raise
        raise FrameBridgeError("its shapes are not those of a Latte; take the file as the authors saved it") from error
    if class_names is not None and len(class_names) == config["num_classes"]:
        config["class_names"] = list(class_names)
    with torch.device("meta"):
        network = LatteTransformer(**config)
    _check_tables(state_dict, config)
    converted = {}
    for name, ours in network.state_dict().items():
        reference_name = _reference_name(name)
        tensor = _our_part(name, state_dict[reference_name])
        if tensor.shape != ours.shape:
            raise FrameBridgeError(
                f"{reference_name} has the shape {list(state_dict[reference_name].shape)}, which does not fit the "
                "other weights; take the file as the authors saved it"
            )
        converted[name] = tensor.to(torch.float32, copy=True).contiguous()
    return ReferenceNetwork(config, converted), {*_TABLES, *expected}


def _names_of_weights(num_layers: int, stage: str) -> list[str]:
    """Names of the weights of a network of this depth, whatever its sizes."""
    with torch.device("meta"):
        network = LatteTransformer(num_layers=num_layers, num_attention_heads=1, attention_head_dim=4, stage=stage)
    return list(network.state_dict())


def _reference_name(name: str) -> str:
    for ours, theirs in _REFERENCE_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _our_part(name: str, tensor: torch.Tensor) -> torch.Tensor:
    for part, layer in enumerate(("to_q", "to_k", "to_v")):
        if f".{layer}." in name:
            return tensor.chunk(3)[part]
    if name.startswith("norm_out."):
        shift, scale = tensor.chunk(2)
        return torch.cat([scale, shift])  # diffusers' order
    return tensor


def _infer_config(
    state_dict: Mapping[str, torch.Tensor], num_layers: int, stage: str, num_attention_heads: int | None
) -> dict[str, Any]:
    """The arguments of `LatteTransformer` that give the shapes in the file."""
    width, in_channels, patch_size, _ = state_dict["x_embedder.proj.weight"].shape
    num_patches, num_steps = state_dict["pos_embed"].shape[1], state_dict["temp_embed"].shape[1]
    rows = math.isqrt(num_patches)
    if rows**2 != num_patches:
        raise FrameBridgeError(f"pos_embed has {num_patches} places, which make no square picture")
    if num_attention_heads is None:
        heads = [size[2] for size in LATTE_SIZES.values() if size[:2] == (num_layers, width)]
        if not heads:
            raise FrameBridgeError(
                f"{num_layers} blocks of width {width} are none of the sizes {', '.join(LATTE_SIZES)}; "
                "say how many attention heads it has (--heads)"
            )
        num_attention_heads = heads[0]
    if width % num_attention_heads:
        raise FrameBridgeError(f"{num_attention_heads} attention heads do not divide the width {width}")
    return {
        "num_layers": num_layers,
        "num_attention_heads": num_attention_heads,
        "attention_head_dim": width // num_attention_heads,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": state_dict["final_layer.linear.weight"].shape[0] // patch_size**2,
        "sample_height": rows * patch_size,
        "sample_width": rows * patch_size,
        "num_frames": num_steps - 1 if stage == "bridge" else num_steps,
        "num_classes": state_dict["y_embedder.embedding_table.weight"].shape[0] - 1,
        "class_names": None,
        "stage": stage,
    }


def _check_tables(state_dict: Mapping[str, torch.Tensor], config: dict[str, Any]) -> None:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    rows, num_steps = config["sample_height"] // config["patch_size"], state_dict["temp_embed"].shape[1]
    shapes = {"pos_embed": (1, rows**2, width), "temp_embed": (1, num_steps, width)}
    tables = {
        "pos_embed": lambda: spatial_positions(rows, rows, width),
        "temp_embed": lambda: temporal_positions(num_steps, width),
    }
    for name, table in tables.items():
        theirs = state_dict[name]
        # Wide enough for a table stored in bfloat16.
        if theirs.shape != shapes[name] or not torch.allclose(theirs[0].float(), table(), rtol=0, atol=5e-3):
            raise FrameBridgeError(f"{name} is not the table of sines and cosines that the authors' Latte has")
