"""Latents that are encoded once: the store, the stream out of it, and what fills it."""
