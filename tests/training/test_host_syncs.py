"""Between the begin of the forward pass and the end of the backward pass nothing waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from framebridge_plugin.settings.bridge import ObjectiveSettings
from framebridge_plugin.training import CogVideoXBridgeSpecification, LTXBridgeSpecification, WanBridgeSpecification
from framebridge_plugin.training.batches import collated
from framebridge_plugin.training.blank_parts import remade
from tests.tiny_ltx import make_tiny_ltx
from tests.tiny_models import LATENT_CHANNELS, LATTE_KINDS, make_tiny_cogvideox, make_tiny_latte
from tests.tiny_wan import make_tiny_wan
from tests.training.latte_runs import make_latte_specification

META = torch.device("meta")
"""Stands for an accelerator: a value of one of its tensors cannot be had, and its tensors are no CPU's."""


class OfValues(TorchFunctionMode):
    """Notes the tensors of the device that are made of numbers."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and result.device == META and result is not args[0]:
            self.found.append(f"torch.{func.__name__}")
        return result


class Crossings(TorchDispatchMode):
    """Notes the operations that read a value, or have tensors of both sides; one value of a CPU may go as it is."""

    def __enter__(self) -> Any:
        self.of_values = OfValues(self.found)
        self.of_values.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.of_values.__exit__(*error)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            result = func(*args, **(kwargs or {}))
        except (NotImplementedError, RuntimeError):  # a value of the device is asked for
            self.found.append(str(func))
            raise
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        sides = {tensor.device.type for tensor in tensors if tensor.ndim or copies}
        sides |= {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        if len(sides) > 1:
            self.found.append(str(func))
        return result


def test_what_crosses_is_found():
    with Crossings() as crossings:
        on_device, table = torch.zeros(2, device=META), torch.arange(3.0)
        table.to(META)
        table[torch.zeros(2, dtype=torch.int64, device=META)]
        torch.tensor(0.5).to(META)
        with pytest.raises((NotImplementedError, RuntimeError)):
            on_device.sum().item()
        torch.as_tensor([1, 2], device=META)
    names = ("_to_copy", "index", "_to_copy", "_local_scalar_dense", "as_tensor")
    assert tuple(name.split(".")[1] for name in crossings.found) == names
    with Crossings() as crossings:
        torch.tensor(0.5) + on_device
    assert crossings.found == []


def make_model(name: str, folder: Path) -> Path:
    make: dict[str, Callable[[], Path]] = {
        "cogvideox": lambda: make_tiny_cogvideox(folder),
        "cogvideox, rotary": lambda: make_tiny_cogvideox(folder, rotary=True),
        "wan": lambda: make_tiny_wan(folder),
        "ltx": lambda: make_tiny_ltx(folder),
    }
    return make[name]() if name in make else make_tiny_latte(folder, name.removeprefix("latte, "))


def sample(specification: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    if specification.adapter.facts.condition == "class":
        conditions = specification.adapter.encode_caption({}, "1", dropped=False)
    else:
        texts = {"encoder_hidden_states": torch.randn(1, 16, 16), "encoder_attention_mask": torch.ones(1, 16)}
        conditions = {name: texts[name] for name in specification.adapter.embeddings}
    # Not of the size that the network was made for, so that it makes its positions anew.
    latents = torch.randn(1, 3, LATENT_CHANNELS, 4, 6)
    return conditions, {"latents": latents, "image_latents": latents[:, :1]}


MODELS = ("cogvideox", "cogvideox, rotary", "wan", "ltx", *(f"latte, {kind}" for kind in LATTE_KINDS))


@pytest.mark.parametrize("model", MODELS)
def test_nothing_waits_for_the_device(model, tmp_path):
    folder = make_model(model, tmp_path / "model")
    of_classes = model.startswith("latte")
    for objective in ("bridge",) if of_classes else ("bridge", "diffusion"):
        if not of_classes:
            kind = {"wan": WanBridgeSpecification, "ltx": LTXBridgeSpecification}.get(
                model, CogVideoXBridgeSpecification
            )
            target = "v" if kind is CogVideoXBridgeSpecification else "flow"
            edge = "reference" if "rotary" in model else "exact"
            settings = ObjectiveSettings(objective=objective, target=target, alignment_edge=edge)
            specification = kind(str(folder), objective=settings)
        else:
            specification = make_latte_specification(model.removeprefix("latte, "), folder)
        with META:
            network = remade(specification.adapter.blank_network(), torch.float32, META).train()
        for _, part in specification.adapter.blank_components():
            remade(part, torch.float32, META)
        scheduler = specification.load_scheduler()
        crossings = Crossings()
        for _ in range(2):  # tables are copied at the first
            batch = collated(specification, [sample(specification)] * 2, META, torch.float32)
            index = torch.zeros(2, dtype=torch.int64, device=META)
            crossings.found.clear()
            with crossings:
                prediction, target = specification.loss_terms(network, scheduler, *batch, index)
                torch.nn.functional.mse_loss(prediction, target).backward()
        assert crossings.found == []
        assert all(parameter.grad is not None for parameter in network.parameters())
