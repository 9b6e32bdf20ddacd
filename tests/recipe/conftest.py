from __future__ import annotations

import pytest
import yaml

from tests.cogvideox_files import write_clips, write_model_folder
from tests.recipe.helpers import write_class_folders
from tests.tiny_models import make_tiny_image_vae


@pytest.fixture
def model(tmp_path):
    return write_model_folder(tmp_path / "model")


@pytest.fixture
def minimal(tmp_path, model):
    """A recipe with nothing but what is required, and a function that writes variations of it."""
    sections = {
        "model": {"pretrained_model_name_or_path": str(model)},
        "training": {"training_type": "full-finetune"},
        "checkpoints": {"output_dir": str(tmp_path / "run")},
        "framebridge": {
            "data": {"data_root": str(write_clips(tmp_path / "clips")), "num_frames": 17, "height": 64, "width": 96}
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.fixture
def latte(tmp_path):
    """A recipe of a Latte from scratch with nothing but what is required, on three classes."""
    make_tiny_image_vae(compression=4).save_pretrained(tmp_path / "vae")
    classes = write_class_folders(tmp_path / "classes", ("left", "right", "up"))
    sections = {
        "model": {"model_name": "latte_bridge", "vae_id": str(tmp_path / "vae")},
        "training": {"training_type": "full-finetune"},
        "checkpoints": {"output_dir": str(tmp_path / "run")},
        "framebridge": {
            "data": {
                "class_root": str(classes),
                "num_frames": 4,
                "height": 64,
                "width": 64,
                "frame_sampling": "linspace",
                "window_frames": 8,
            }
        },
    }
    path = tmp_path / "latte.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path
