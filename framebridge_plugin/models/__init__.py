"""Networks: widening of a pretrained transformer's input channels."""

from framebridge_plugin.models.widening import load_bridge_transformer, widen_input_channels

__all__ = ["load_bridge_transformer", "widen_input_channels"]
