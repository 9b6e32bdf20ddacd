"""Networks: widening of a pretrained transformer's input channels, and calling it."""

from framebridge_plugin.torchvision_repair import ensure_torchvision_operators

# Before any module of this folder imports diffusers.
ensure_torchvision_operators()
