"""A folder that looks like a CogVideoX model from outside: what is checked before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CLASSES = {
    "transformer": "CogVideoXTransformer3DModel",
    "vae": "AutoencoderKLCogVideoX",
    "text_encoder": "T5EncoderModel",
}


def write_model_folder(
    folder: Path, *, temporal_compression: int = 4, vae_levels: int = 4, patch_size: int = 2, in_channels: int = 16
) -> Path:
    configs = {
        "transformer": {"patch_size": patch_size, "in_channels": in_channels, "out_channels": 16},
        "vae": {
            "temporal_compression_ratio": temporal_compression,
            "block_out_channels": [16] * vae_levels,
        },
        "text_encoder": {},
    }
    for part, config in configs.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps({"_class_name": CLASSES[part], **config}))
        save_file({"weight": np.zeros(4, np.float32)}, folder / part / "model.safetensors")
    scheduler = {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"}
    for part, file, content in (("tokenizer", "spiece.model", {}), ("scheduler", "scheduler_config.json", scheduler)):
        (folder / part).mkdir()
        (folder / part / file).write_text(json.dumps(content))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "CogVideoXPipeline"}))
    return folder


def write_clips(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"\0")
    (folder / "a.txt").write_text("a caption")
    return folder


def write_webvid(folder: Path) -> tuple[Path, Path]:
    folder.mkdir()
    table, videos = folder / "results_2M_train.csv", folder / "2M_train"
    table.write_text("videoid,contentUrl,duration,page_dir,name\n1,,,,a caption\n")
    videos.mkdir()
    (videos / "1.mp4").write_bytes(b"\0")
    return table, videos
