"""Networks: Latte, widening of a pretrained CogVideoX's input channels, and how a network is called."""

from framebridge_plugin.models.latte import LatteTransformer

__all__ = ["LatteTransformer"]
