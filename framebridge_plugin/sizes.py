"""Sizes of pictures; without torch, so that decoding processes need not load it."""

from __future__ import annotations

from fractions import Fraction


def cover_size(old_height: int, old_width: int, height: int, width: int) -> tuple[int, int]:
    """The size at which a picture just covers another size, its proportions kept."""
    scale = max(height / old_height, width / old_width)
    return max(round(old_height * scale), height), max(round(old_width * scale), width)


def square_pixel_size(height: int, width: int, pixel_aspect: Fraction) -> tuple[int, int]:
    """The size at which a picture is shown: nothing of it is made smaller."""
    if pixel_aspect >= 1:
        return height, round(width * pixel_aspect)
    return round(height / pixel_aspect), width
