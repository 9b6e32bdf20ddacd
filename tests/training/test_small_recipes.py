"""The small shipped recipes of a Latte, one after the other as in the example, each for one update."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from framebridge_plugin.backbones.examination import SavedModel
from framebridge_plugin.backbones.latte.facts import LATTE_BRIDGE, LATTE_NEURAL_PRIOR
from framebridge_plugin.backbones.latte.rules import LATTE_SIZES
from framebridge_plugin.cli import main
from framebridge_plugin.recipe.yaml_text import read_yaml
from tests.tiny_models import make_tiny_image_vae, make_tiny_latte, moving_square, write_video
from tests.training.conftest import LAUNCH_VARIABLES

CLASSES = ("PanLeft", "PanRight", "ZoomIn")
CLIPS_PER_CLASS = 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for number, name in enumerate(CLASSES):
        (folder / "classes" / name).mkdir(parents=True)
        for clip in range(CLIPS_PER_CLASS):
            video_FHWC = moving_square(CLIPS_PER_CLASS * number + clip, 24, 48, 64)
            write_video(folder / "classes" / name / f"v_{name}_g01_c0{clip}.mp4", video_FHWC)
    make_tiny_image_vae(compression=4).save_pretrained(folder / "vae")
    return folder


def test_the_small_recipes_train(inputs, tmp_path, monkeypatch, capfd):
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def train(name: str, *overrides: str) -> Path:
        given = [
            f"checkpoints.output_dir={tmp_path / name}",
            f"framebridge.data.class_root={inputs / 'classes'}",
            f"model.vae_id={inputs / 'vae'}",
            "validation.validation_dataset_file=null",
            *("optimization.train_steps=1", "training.batch_size=2", "dataset.enable_precomputation=false"),
            *("dataset.precomputation_once=false", "optimization.lr_scheduler=constant"),
            "optimization.lr_warmup_steps=0",
        ]
        assert main(["train", "--recipe", name, *given, *overrides]) == 0, capfd.readouterr().err[-3000:]
        return tmp_path / name

    prior = train("motion_neural_prior")
    assert list(SavedModel(LATTE_NEURAL_PRIOR, prior / "model").findings()) == []
    bridge = train("motion_bridge")
    assert list(SavedModel(LATTE_BRIDGE, bridge / "model").findings()) == []
    both = train("motion_bridge_neural_prior", f"framebridge.neural_prior={prior}")
    assert list(SavedModel(LATTE_BRIDGE, both / "model").findings()) == []

    for run, network, factor in (
        (prior, "neural_prior", 1),
        (bridge, "transformer", 1),
        (both, "transformer", 2),
    ):
        resolved = read_yaml((run / "recipe.yaml").read_text()).data
        config = json.loads((run / "model" / network / "config.json").read_text())
        data, size = resolved["framebridge"]["data"], resolved["framebridge"]["latte_size"]
        assert config["class_names"] == list(CLASSES)
        assert (config["num_frames"], config["sample_height"] * 4) == (data["num_frames"], data["height"])
        assert config["in_channels"] == factor * config["out_channels"]
        assert (config["num_layers"], config["patch_size"]) == (LATTE_SIZES[size[:-2]][0], int(size[-1]))
        (entry,) = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
        assert 0 < entry["loss"] < 100
        # The average of the weights is the model, the weights themselves stay in the checkpoint.
        (checkpoint,) = (run / "checkpoints").iterdir()
        raw, average = (load_file(checkpoint / "trainer" / f"{name}.safetensors") for name in ("weights", "ema"))
        model = load_file(run / "model" / network / "diffusion_pytorch_model.safetensors")
        assert raw.keys() == average.keys() == model.keys()
        assert all(torch.equal(model[name], average[name].to(model[name].dtype)) for name in model)
        assert any(not torch.equal(raw[name], average[name]) for name in raw)

    # The frozen prior is saved with the bridge as it came.
    file = Path("neural_prior") / "diffusion_pytorch_model.safetensors"
    assert (both / "model" / file).read_bytes() == (prior / "model" / file).read_bytes()
    for run in (prior, bridge, both):
        shutil.rmtree(run)  # pytest would keep these 2 GB


@pytest.mark.parametrize("kind", ["full-finetune", "lora"])
def test_a_recipe_goes_on_from_a_saved_model(inputs, tmp_path, monkeypatch, capfd, kind):
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    model = make_tiny_latte(tmp_path / "model", "bridge_neural_prior", class_names=CLASSES, size=(48, 48))
    overrides = [
        f"model.pretrained_model_name_or_path={model}",
        "model.vae_id=null",
        "framebridge.latte_size=null",
        f"framebridge.data.class_root={inputs / 'classes'}",
        *("framebridge.data.num_frames=4", "framebridge.data.height=48", "framebridge.data.width=48"),
        *("optimization.train_steps=1", "training.batch_size=2", f"training.training_type={kind}"),
        "dataset.precomputation_items=2",
        f"checkpoints.output_dir={tmp_path / 'run'}",
        "validation.validation_dataset_file=null",
    ]
    assert main(["train", "--recipe", "motion_bridge", *overrides]) == 0, capfd.readouterr().err[-3000:]
    saved = tmp_path / "run" / ("lora" if kind == "lora" else "model")
    if kind == "lora":
        info = json.loads((saved / "framebridge.json").read_text())
        assert Path(info["base_model"]) == model
        assert load_file(saved / "pytorch_lora_weights.safetensors")
    else:
        assert list(SavedModel(LATTE_BRIDGE, saved).findings()) == []
        assert (saved / "neural_prior" / "config.json").is_file()
