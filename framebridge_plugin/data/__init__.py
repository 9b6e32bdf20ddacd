"""Video clips and captions, from the user's folders to tensors; needs torch, PyAV and Arrow, but not finetrainers."""

from __future__ import annotations

from framebridge_plugin.data.clips import ClipSettings, read_clip
from framebridge_plugin.data.decoding import ClipError, read_frames
from framebridge_plugin.data.folders import ClipIndex, index_dataset, load_dataset_config
from framebridge_plugin.data.stream import ClipStream, Sample

__all__ = [
    "ClipError",
    "ClipIndex",
    "ClipSettings",
    "ClipStream",
    "Sample",
    "index_dataset",
    "load_dataset_config",
    "read_clip",
    "read_frames",
]
