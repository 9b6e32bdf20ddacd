"""All checks, in the order in which they are made: what fails early often explains what fails later."""

from __future__ import annotations

from framebridge_plugin.testing import checks, runs, saving
from framebridge_plugin.testing.outcome import Check

CHECKS: dict[str, Check] = {check.name: check for check in (*checks.CHECKS, *saving.CHECKS, *runs.CHECKS)}
"""Every check by name."""
