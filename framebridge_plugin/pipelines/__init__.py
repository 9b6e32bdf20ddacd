"""Image-to-video pipelines in diffusers' conventions, and the conditioning that training shares with them."""

from framebridge_plugin.torchvision_repair import ensure_torchvision_operators

# Before any module of this folder imports diffusers or transformers.
ensure_torchvision_operators()
