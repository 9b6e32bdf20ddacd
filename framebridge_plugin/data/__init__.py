"""Video clips and captions, from the user's folders to tensors; needs torch, PyAV and `datasets`, not finetrainers.

Importing this package imports none of them: its attributes load on first use, so that a recipe's folders can be
listed before torch is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from framebridge_plugin.imports import lazy_attributes

# ruff: noqa: F401 (for type checkers alone)
if TYPE_CHECKING:
    from framebridge_plugin.data.bad_files import BadFilePolicy, BadFileTracker, load_bad_file_policy
    from framebridge_plugin.data.clips import ClipSettings, read_clip
    from framebridge_plugin.data.decoding.errors import ClipError
    from framebridge_plugin.data.decoding.exact import read_frames
    from framebridge_plugin.data.folders import ClipIndex, index_dataset, load_dataset_config
    from framebridge_plugin.data.stream import ClipStream, Sample
    from framebridge_plugin.data.ucf101 import load_ucf101
    from framebridge_plugin.data.ucf101_classes import UCF101_CLASSES, ucf101_class_names
    from framebridge_plugin.data.webvid import load_webvid

__getattr__, __dir__, __all__ = lazy_attributes(
    __name__,
    {
        "bad_files": ("BadFilePolicy", "BadFileTracker", "load_bad_file_policy"),
        "clips": ("ClipSettings", "read_clip"),
        "decoding.errors": ("ClipError",),
        "decoding.exact": ("read_frames",),
        "folders": ("ClipIndex", "index_dataset", "load_dataset_config"),
        "stream": ("ClipStream", "Sample"),
        "ucf101": ("load_ucf101",),
        "ucf101_classes": ("UCF101_CLASSES", "ucf101_class_names"),
        "webvid": ("load_webvid",),
    },
)
