"""What every check of a recipe yields."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """Something that keeps a recipe from being run.

    Attributes:
        where: A dotted path.
        message: What is wrong there, and what to do about it.
        on_disk: Whether the recipe itself is fine, and a file, a folder or a process is not there as it says.
    """

    where: str
    message: str
    on_disk: bool = False
