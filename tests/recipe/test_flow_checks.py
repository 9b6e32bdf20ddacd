"""Recipes of flow-matching backbones: what they fill in, and what they refuse before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from framebridge_plugin.recipe import load_recipe
from tests.cogvideox_files import write_clips
from tests.recipe.helpers import problems_of
from tests.tiny_ltx import make_tiny_ltx
from tests.tiny_wan import make_tiny_wan


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("flow")
    clips = write_clips(folder / "clips")
    models = {"wan": make_tiny_wan(folder / "wan", unipc=True), "ltx": make_tiny_ltx(folder / "ltx")}
    paths = {}
    for name, model in models.items():
        recipe = {
            "model": {"model_name": f"{name}_bridge", "pretrained_model_name_or_path": str(model)},
            "framebridge": {"data": {"data_root": str(clips), "num_frames": 9, "height": 64, "width": 64}},
            "training": {"training_type": "lora"},
            "checkpoints": {"output_dir": str(folder / "run")},
        }
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(recipe))
    return paths


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_a_backbones_own_defaults_stand_in_their_sections(recipes, name):
    recipe = load_recipe(recipes[name])
    assert recipe.framebridge.target == "flow"
    (targets,) = recipe.lora.target_modules
    assert targets.startswith("blocks.*" if name == "wan" else "(transformer_blocks|")
    full = load_recipe(recipes[name], ["training.training_type=full-finetune"])
    assert "lora" not in yaml.safe_load(full.to_yaml())
    given = load_recipe(recipes[name], ["lora.target_modules=[to_q]", "framebridge.target=v"])
    assert (given.lora.target_modules, given.framebridge.target) == (["to_q"], "v")


@pytest.mark.parametrize(
    ("name", "override", "problem"),
    [
        ("wan", "framebridge.data.num_frames=8", "4 k + 1 frames"),
        ("wan", "framebridge.data.height=40", "multiple of 16"),
        ("ltx", "framebridge.data.num_frames=13", "8 k + 1 frames"),
        ("ltx", "framebridge.data.width=80", "multiple of 32"),
        ("wan", "framebridge.alignment_edge=reference", "no effect"),
        ("ltx", "framebridge.latte_size=S/2", "no effect"),
    ],
)
def test_what_does_not_fit_is_refused_early(recipes, name, override, problem):
    (line,) = problems_of(recipes[name], override)
    assert override.partition("=")[0] in line
    assert problem in line


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_a_model_of_another_backbone_is_refused_by_its_name(recipes, name):
    model = recipes["ltx"].parent / ("ltx" if name == "wan" else "wan")
    changes = [f"model.model_name={name}_bridge", f"model.pretrained_model_name_or_path={model}"]
    (line,) = problems_of(recipes["wan"], *changes)
    assert "model.pretrained_model_name_or_path" in line
    assert ("LTXPipeline" if name == "wan" else "WanPipeline") in line


def test_an_ltx_is_known_by_the_scheduler_that_its_baseline_is_sampled_with(recipes, tmp_path):
    model = make_tiny_ltx(tmp_path / "ltx")
    file = model / "scheduler/scheduler_config.json"
    config = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    file.write_text(json.dumps(config))
    (problem,) = problems_of(recipes["ltx"], f"model.pretrained_model_name_or_path={model}")
    assert "is for a UniPCMultistepScheduler; the bridge knows" in problem
