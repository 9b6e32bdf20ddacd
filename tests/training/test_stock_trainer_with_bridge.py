"""Our specification under finetrainers' own SFTTrainer, as anybody's finetrainers program would use it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from framebridge_plugin.pipelines.cogvideox import FrameBridgeCogVideoXPipeline
from framebridge_plugin.pipelines.sampling import open_pipeline
from framebridge_plugin.pipelines.saving import LORA_FILE, PROJECTION_FILE
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.training import CogVideoXBridgeSpecification
from framebridge_plugin.training.objective import ObjectiveSettings
from framebridge_plugin.training.registration import parse_arguments
from tests.tiny_models import LATENT_CHANNELS, make_clips, make_tiny_cogvideox
from tests.training.conftest import LAUNCH_VARIABLES

STEPS = 2
TYPES = {"full": "full-finetune", "lora": "lora"}
RUNS = [
    f"{kind}-{backend}{precomputed}"
    for kind, backend, precomputed in itertools.product(TYPES, ("accelerate", "ptd"), ("", "-precomputed"))
]
LORA_RUNS = [name for name in RUNS if "lora" in name]
FULL_RUNS = [name for name in RUNS if "full" in name]


class Recorded(CogVideoXBridgeSpecification):
    """The specification, which also remembers what its objective returned and what the network was given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []
        self.keys: set[str] = set()

    def forward(self, **kwargs: Any) -> Any:
        self.keys |= set(kwargs["latent_model_conditions"])
        prediction, target, sigmas = super().forward(**kwargs)
        self.losses.append((prediction - target).square().mean().item())
        return prediction, target, sigmas


class Trained:
    """One run: its folder and what was recorded."""

    def __init__(self, folder: Path, name: str) -> None:
        from finetrainers import SFTTrainer

        kind, backend, *precomputed = name.split("-")
        types = [f"--{part}_dtype=fp32" for part in ("text_encoder", "transformer", "vae")]
        self.output = folder / name
        args = parse_arguments(
            [
                "--model_name=cogvideox_bridge",
                f"--pretrained_model_name_or_path={folder / 'model'}",
                f"--dataset_config={folder / 'data.json'}",
                f"--output_dir={self.output}",
                f"--training_type={TYPES[kind]}",
                f"--parallel_backend={backend}",
                f"--train_steps={STEPS}",
                f"--checkpointing_steps={STEPS}",
                "--batch_size=2",
                "--seed=3",
                "--lr=1e-2",
                "--lr_scheduler=constant",
                *types,
                *(["--rank=4", "--lora_alpha=8"] if kind == "lora" else []),
                *(["--enable_precomputation", "--precomputation_items=4"] if precomputed else []),
                # Once in the middle of the training: it must leave what is trained alone.
                *(
                    [f"--validation_dataset_file={folder / 'validation.csv'}", "--validation_steps=1"]
                    if name in ("lora-accelerate", "full-ptd")
                    else []
                ),
            ]
        )
        self.specification = Recorded(args.pretrained_model_name_or_path, transformer_dtype=torch.float32,
            text_encoder_dtype=torch.float32, vae_dtype=torch.float32, objective=ObjectiveSettings())  # fmt: skip
        trainer = SFTTrainer(args, self.specification)
        trainer.run()
        self.losses: list[float] = trainer.state.train_state.global_avg_losses


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    folder = tmp_path_factory.mktemp("stock")
    make_tiny_cogvideox(folder / "model")
    clips = make_clips(folder / "clips", count=4, frames=9, size=64)
    dataset = {"data_root": str(clips), "dataset_type": "video", "video_resolution_buckets": [[9, 64, 64]]}
    (folder / "data.json").write_text(json.dumps({"datasets": [dataset]}))
    Image.new("RGB", (64, 64), (200, 30, 30)).save(folder / "red.png")
    columns = "caption,image_path,num_inference_steps,num_frames\n"
    (folder / "validation.csv").write_text(f"{columns}a red square,{folder / 'red.png'},1,9\n")
    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCH_VARIABLES:
            patch.delenv(name, raising=False)
        return {name: Trained(folder, name) for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_the_logged_loss_is_the_unweighted_bridge_loss(runs, name):
    assert len(runs[name].losses) == STEPS
    assert runs[name].losses == pytest.approx(runs[name].specification.losses, rel=1e-5)
    assert runs[name].specification.keys == {"latents", "image_latents", "prior_latents"}


@pytest.mark.parametrize("name", FULL_RUNS)
def test_a_full_fine_tune_saves_a_folder_that_the_pipeline_opens(runs, name):
    folder = runs[name].output / f"model_weights/{STEPS:06d}"
    pipeline = FrameBridgeCogVideoXPipeline.from_pretrained(folder)
    assert isinstance(pipeline.scheduler, FrameBridgeScheduler)
    base = load_file(folder.parents[2] / "model/transformer/diffusion_pytorch_model.safetensors")
    trained = pipeline.transformer.state_dict()
    assert all(not torch.equal(trained[key], base[key]) for key in base if key.endswith("to_q.weight"))
    assert trained["patch_embed.proj.weight"][:, LATENT_CHANNELS:].abs().sum() > 0


@pytest.mark.parametrize("name", LORA_RUNS)
def test_lora_trains_the_projection_and_saves_it_beside(runs, name):
    folder = runs[name].output / f"lora_weights/{STEPS:06d}"
    layers, projection = load_file(folder / LORA_FILE), load_file(folder / PROJECTION_FILE)
    assert layers
    assert all("lora" in key for key in layers)
    assert all(tensor.abs().sum() > 0 for tensor in layers.values())
    base = load_file(folder.parents[2] / "model/transformer/diffusion_pytorch_model.safetensors")
    assert not torch.equal(projection["weight"][:, :LATENT_CHANNELS], base["patch_embed.proj.weight"])
    assert projection["weight"][:, LATENT_CHANNELS:].abs().sum() > 0
    assert not torch.equal(projection["bias"], base["patch_embed.proj.bias"])

    pipeline = open_pipeline(str(folder))
    assert torch.equal(pipeline.transformer.patch_embed.proj.weight, projection["weight"])
    assert isinstance(pipeline.scheduler, FrameBridgeScheduler)


@pytest.mark.parametrize("name", ["lora-accelerate", "full-ptd"])
def test_it_validates_from_images(runs, name):
    videos = sorted(path.name.split("-")[:2] for path in runs[name].output.glob("*.mp4"))
    assert videos == [["final", "2"], ["validation", "1"], ["validation", "2"]]
