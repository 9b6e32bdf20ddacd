"""Cleaning of captions."""

from __future__ import annotations

from itertools import product

# The phrases that finetrainers removes under the same option: language models like to begin captions so.
_SUBJECTS = ("video", "clip", "image", "picture")
_VERBS = ("shows", "depicts", "features", "captures", "highlights", "introduces", "presents")
COMMON_PREFIXES = (
    "In the video,",
    "In this video,",
    "In this video clip,",
    "In the clip,",
    "Caption:",
    *(f"{word} {subject} {verb}" for word, subject, verb in product(("This", "The"), _SUBJECTS, _VERBS)),
    *(f"The animation {verb}" for verb in _VERBS),
)


def clean_caption(caption: str, remove_common_prefixes: bool) -> str:
    """The caption without surrounding white space and, if wanted, without one of `COMMON_PREFIXES`."""
    caption = caption.strip()
    if remove_common_prefixes:
        for prefix in COMMON_PREFIXES:
            if caption.startswith(prefix):
                return caption.removeprefix(prefix).strip()
    return caption
