"""What `finetrainers sample` was asked for, checked before anything slow is loaded."""

from __future__ import annotations

from framebridge_plugin.sample_request.request import SampleRequest

__all__ = ["SampleRequest"]
