"""The specification of each backbone, by its name."""

from __future__ import annotations

import functools
from typing import Any

from framebridge_plugin.backbones.facts import find_backbone
from framebridge_plugin.training.specification import BridgeSpecification


@functools.cache
def specification_of(model_name: str) -> type[BridgeSpecification]:
    """The specification of a backbone."""
    own = {cls.model_name: cls for cls in _OWN}
    name = f"{find_backbone(model_name).title}BridgeSpecification"
    return own.get(model_name) or type(name, (BridgeSpecification,), {"model_name": model_name})


class CogVideoXBridgeSpecification(BridgeSpecification):
    """CogVideoX 1.0 (2B, or 5B with rotary embeddings) as a bridge or its diffusion baseline."""

    model_name = "cogvideox_bridge"

    def __init__(self, pretrained_model_name_or_path: str = "THUDM/CogVideoX-2b", **kwargs: Any) -> None:
        super().__init__(pretrained_model_name_or_path, **kwargs)


class LatteBridgeSpecification(BridgeSpecification):
    """Latte, from scratch or from a saved model, as a bridge (on a neural prior or not) or its diffusion baseline."""

    model_name = "latte_bridge"


class NeuralPriorSpecification(BridgeSpecification):
    """The neural prior: a coarse video from an image and a class in one call of Latte, without time and noise."""

    model_name = "latte_neural_prior"


class WanBridgeSpecification(BridgeSpecification):
    """Wan 2.1 text-to-video as a bridge or its flow-matching baseline."""

    model_name = "wan_bridge"

    def __init__(self, pretrained_model_name_or_path: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", **kwargs: Any) -> None:
        super().__init__(pretrained_model_name_or_path, **kwargs)


class LTXBridgeSpecification(BridgeSpecification):
    """LTX-Video 0.9 text-to-video as a bridge or its flow-matching baseline."""

    model_name = "ltx_bridge"

    def __init__(self, pretrained_model_name_or_path: str = "Lightricks/LTX-Video", **kwargs: Any) -> None:
        super().__init__(pretrained_model_name_or_path, **kwargs)


_OWN = (
    CogVideoXBridgeSpecification,
    WanBridgeSpecification,
    LTXBridgeSpecification,
    LatteBridgeSpecification,
    NeuralPriorSpecification,
)
