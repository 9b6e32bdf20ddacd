"""What a user does with a backbone of another package, in a process that has it on its path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler
from mini_bridge.network import MiniTransformer
from mini_bridge.pipeline import FrameBridgeMiniPipeline
from PIL import Image

from framebridge_plugin.cli import main
from tests.tiny_models import CAPTIONS, make_clips, make_tiny_cogvideox

SIZE, NUM_FRAMES = 32, 9


def make_model(folder: Path) -> None:
    """Writes a plain Mini with random weights, text encoder and autoencoder of a tiny CogVideoX."""
    make_tiny_cogvideox(folder)
    for part in ("transformer", "scheduler"):
        shutil.rmtree(folder / part)
    torch.manual_seed(0)
    MiniTransformer().save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "_class_name": "MiniPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["mini_bridge.network", "MiniTransformer"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def write_recipe(folder: Path, training_type: str) -> Path:
    """A recipe of three updates, with a validation after the last."""
    columns = "caption,image_path,num_inference_steps,num_frames,height,width\n"
    row = f"{CAPTIONS[0]},{folder / 'red.png'},2,{NUM_FRAMES},{SIZE},{SIZE}\n"
    (folder / "validation.csv").write_text(columns + row)
    recipe = {
        "model": {"model_name": "mini_bridge", "pretrained_model_name_or_path": str(folder / "model")},
        "framebridge": {
            "data": {
                "data_root": str(folder / "clips"),
                "num_frames": NUM_FRAMES,
                "height": SIZE,
                "width": SIZE,
            }
        },
        "training": {"training_type": training_type, "seed": 7},
        "optimization": {"train_steps": 3, "lr": 1e-2, "lr_scheduler": "constant", "lr_warmup_steps": 0},
        "precision": dict.fromkeys(("text_encoder_dtype", "transformer_dtype", "vae_dtype"), "fp32"),
        "checkpoints": {"output_dir": str(folder / training_type), "checkpointing_steps": 3},
        "validation": {"validation_dataset_file": str(folder / "validation.csv"), "validation_steps": 3},
    }
    if training_type == "lora":
        recipe["lora"] = {"rank": 4, "lora_alpha": 8}
    path = folder / f"{training_type}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def command(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0, arguments


def use(folder: Path) -> None:
    """Trains, samples, opens and checks, by the commands."""
    make_model(folder / "model")
    make_clips(folder / "clips", count=4, frames=NUM_FRAMES, size=SIZE)
    Image.new("RGB", (SIZE, SIZE), (200, 30, 30)).save(folder / "red.png")
    for training_type in ("lora", "full-finetune"):
        command("train", f"--recipe={write_recipe(folder, training_type)}")
        request = (f"--image={folder / 'red.png'}", f"--prompt={CAPTIONS[0]}", "--steps=2", "--use-dynamic-cfg")
        command("sample", f"--model={folder / training_type}", *request, f"--output={folder / training_type}.mp4")
        pipeline = FrameBridgeMiniPipeline.from_pretrained(folder / training_type)
        video = pipeline(folder / "red.png", CAPTIONS[0], output_type="latent").frames
        torch.save(video, folder / f"{training_type}.pt")
    from framebridge_plugin.training.specifications import specification_of

    assert specification_of("mini_bridge") is specification_of("mini_bridge")
    checks = ("interface", "models", "forward", "lora-export", "run-full-ptd-precomputed")
    command("conformance", "--model-name=mini_bridge", f"--model={folder / 'model'}", "--only", *checks)
