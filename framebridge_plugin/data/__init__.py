"""Video clips and captions, from the user's folders to tensors; needs torch, PyAV and Arrow, but not finetrainers."""

from __future__ import annotations

from framebridge_plugin.data.class_folders import class_names
from framebridge_plugin.data.clips import ClipSettings, read_clip
from framebridge_plugin.data.decoding import ClipError, read_frames
from framebridge_plugin.data.folders import ClipIndex, index_dataset, load_dataset_config
from framebridge_plugin.data.stream import ClipStream, Sample
from framebridge_plugin.data.ucf101 import UCF101_CLASSES

__all__ = [
    "UCF101_CLASSES",
    "ClipError",
    "ClipIndex",
    "ClipSettings",
    "ClipStream",
    "Sample",
    "class_names",
    "index_dataset",
    "load_dataset_config",
    "read_clip",
    "read_frames",
]
