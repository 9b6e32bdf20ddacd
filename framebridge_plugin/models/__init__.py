"""Networks: Latte, widening of a pretrained network's input channels, and the time of a network that is called."""

from framebridge_plugin.models.latte import LatteTransformer

__all__ = ["LatteTransformer"]
