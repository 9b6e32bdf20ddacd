"""Networks: Latte, widening of a pretrained CogVideoX's input channels, and how a network is called."""

from framebridge_plugin.torchvision_repair import ensure_torchvision_operators

# Before any module of this folder imports diffusers.
ensure_torchvision_operators()

from framebridge_plugin.models.latte import LatteTransformer  # noqa: E402

__all__ = ["LatteTransformer"]
