"""What a run came to, and what it should have come to; options that many runs are given."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from framebridge_plugin.backbones.manifest import read_manifest, write_manifest
from framebridge_plugin.data import ClipStream, load_dataset_config
from framebridge_plugin.randomness import derive_seed
from framebridge_plugin.training.objective import ObjectiveSettings
from tests.training.bridge_runs import make_specification
from tests.training.conftest import SIZE

LORA = ("training.training_type=lora", "lora.rank=4", "lora.lora_alpha=8")
CONSTANT_RATE = ("optimization.lr_scheduler=constant", "optimization.lr_warmup_steps=0")


def succeeded(result: subprocess.CompletedProcess) -> bool:
    assert result.returncode == 0, result.stderr[-3000:]
    return True


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in metrics(run) if "loss" in entry]


def heldout(run: Path) -> dict[int, dict[str, float]]:
    """What was measured on held-out clips, by update."""
    return {entry.pop("step"): entry for entry in metrics(run) if "heldout/loss" in entry}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return {f"{file.relative_to(folder)}:{name}": t for file in files for name, t in load_file(file).items()}


def first_sampled_frame(contact_sheet: Path) -> np.ndarray:
    """Of the eight frames that lie after the input image and below the caption."""
    with Image.open(contact_sheet) as sheet:
        left = sheet.width - (8 * (SIZE + 2) - 2)
        return np.asarray(sheet)[-SIZE:, left : left + SIZE].astype(int)


def assert_same_weights(first: Path, second: Path) -> None:
    expected, actual = weights(first), weights(second)
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []
    # To the byte, headers too: what is the same should have the same digest.
    files = [path.relative_to(first) for path in first.rglob("*.safetensors")]
    assert [file for file in files if (first / file).read_bytes() != (second / file).read_bytes()] == []


def accept_changes(checkpoint: Path, written: int | None = None) -> None:
    """Writes the manifests of a changed checkpoint anew, as if it had been written as it is now."""
    written = read_manifest(checkpoint).written if written is None else written
    for export in checkpoint.glob("*/manifest.json"):
        write_manifest(export.parent)
    write_manifest(checkpoint, written=written)


def write_one_clip(clips_folder: Path, folder: Path) -> tuple[str, ...]:
    """Options with which nothing but index and eps is drawn."""
    folder.mkdir()
    shutil.copy(next(clips_folder.glob("*.mp4")), folder / "a.mp4")
    (folder / "a.txt").write_text("the only clip")
    return (
        f"framebridge.data.data_root={folder}",
        "framebridge.data.window=start",
        "framebridge.image_noise=false",
        "framebridge.prior_noise=false",
        "framebridge.caption_dropout=0",
        "training.batch_size=1",
    )


def expected_update(
    run: Path, model: Path, step: int, places: int, dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """Loss and gradient norm of the untrained network for an update of a run with the options of `one_clip`.

    Args:
        run: The run's folder.
        model: Its model.
        step: The update.
        places: Samples that it is the mean over.
        dtype: The precision of all models.
    """
    from finetrainers import utils

    objective = ObjectiveSettings(image_noise=False, prior_noise=False, caption_dropout=0.0)
    dtypes = dict.fromkeys(("transformer_dtype", "vae_dtype", "text_encoder_dtype"), dtype)
    specification = make_specification(model, objective, **dtypes)
    models = specification.load_diffusion_models()
    network, scheduler = models["transformer"].train(), models["scheduler"]
    sample = next(iter(ClipStream(load_dataset_config(run / "dataset_config.json"), seed=7)))
    prepare = {name: sample[name] for name in ("caption", "video", "sample_seed")}
    conditions = specification.prepare_conditions(**specification.load_condition_models(), **prepare)
    latents = specification.prepare_latents(**specification.load_latent_models(), **prepare)
    losses = []
    for place in range(places):
        generator = torch.Generator().manual_seed(derive_seed("draws", 7, step, place))
        sigmas = utils.prepare_sigmas(
            scheduler=scheduler,
            sigmas=utils.get_scheduler_sigmas(scheduler),
            batch_size=1,
            num_train_timesteps=1000,
            generator=generator,
        )
        prediction, target, _ = specification.forward(
            transformer=network,
            scheduler=scheduler,
            condition_model_conditions=specification.collate_conditions([conditions]),
            latent_model_conditions=specification.collate_latents([latents]),
            sigmas=sigmas,
            generator=generator,
        )
        losses.append((prediction - target).square().mean())
    assert len({loss.item() for loss in losses}) == places
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0).item()
