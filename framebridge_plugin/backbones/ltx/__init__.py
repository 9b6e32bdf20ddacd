"""LTX-Video 0.9.x text-to-video."""
