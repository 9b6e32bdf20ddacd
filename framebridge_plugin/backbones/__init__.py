"""The pretrained models that a bridge is built on, one folder each, and beside them what they share."""
