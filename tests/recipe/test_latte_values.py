"""What a recipe says of a Latte."""

from __future__ import annotations

import json
import typing

import pytest

from framebridge_plugin.backbones.latte.rules import LATTE_SIZES, scratch_config
from framebridge_plugin.recipe import load_recipe, resolve_recipe, shipped_recipes
from framebridge_plugin.recipe.yaml_text import read_yaml
from framebridge_plugin.settings.bridge import LatteSize
from tests.recipe.helpers import problems_of

LATTE_MODELS = ("latte_bridge", "latte_neural_prior")


@pytest.mark.parametrize("model_name", LATTE_MODELS)
def test_defaults_of_latte(latte, model_name):
    recipe = load_recipe(latte, [f"model.model_name={model_name}"])
    ours = recipe.framebridge
    assert (ours.target, ours.snr_aligned, ours.image_noise, ours.prior_noise) == ("eps_psi", False, False, False)
    assert (ours.ema_decay, ours.ema_start_step, ours.max_grad_norm_start_step) == (0.9999, 0, 0)
    assert (ours.latte_size, ours.neural_prior) == ("S/2", None)
    resolved = read_yaml(recipe.to_yaml()).data["framebridge"]
    assert (resolved["target"], resolved["snr_aligned"], resolved["ema_decay"]) == ("eps_psi", False, 0.9999)


def test_defaults_of_cogvideox(minimal):
    ours = load_recipe(minimal).framebridge
    assert (ours.target, ours.snr_aligned, ours.image_noise, ours.prior_noise) == ("v", True, True, True)
    assert (ours.ema_decay, ours.latte_size, ours.neural_prior) == (0.0, None, None)
    assert load_recipe(minimal, ["model.model_name=cogvideox_bridge"]).framebridge == ours


def test_what_is_given_wins_over_the_models_defaults(latte):
    given = ["framebridge.target=v", "framebridge.snr_aligned=true", "framebridge.ema_decay=0"]
    ours = load_recipe(latte, given).framebridge
    assert (ours.target, ours.snr_aligned, ours.ema_decay) == ("v", True, 0.0)
    given.append("framebridge.ema_decay=")
    assert load_recipe(latte, given).framebridge.ema_decay == 0.9999  # taken away again
    assert load_recipe(latte, [*given, "framebridge.latte_size=XL/8"]).framebridge.latte_size == "XL/8"


def test_one_error_does_not_bring_up_others(latte):
    (problem,) = problems_of(latte, "framebridge=3")
    assert "framebridge: should be a section with keys of its own" in problem
    (problem,) = problems_of(latte, "model.model_name=latte_brige")
    assert problem.endswith("did you mean latte_bridge?")
    # What does not depend on the model comes with it.
    assert len(problems_of(latte, "model.model_name=latte_brige", "training.batch_size=0")) == 2


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_the_resolved_recipe_of_every_shipped_one_reads_back_as_itself(name, tmp_path):
    recipe, warnings = resolve_recipe(name)
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe.to_yaml())
    again, warnings_again = resolve_recipe(path)
    assert again == recipe
    assert len(warnings_again) == len(warnings)


def test_dataset_config_of_class_folders(latte, tmp_path):
    entry = load_recipe(latte, ["framebridge.data.horizontal_flip=true"]).dataset_config()["datasets"][0]
    assert entry == {
        "dataset_type": "video",
        "class_root": str(tmp_path / "classes"),
        "video_resolution_buckets": [[4, 64, 64]],
        "frame_sampling": "linspace",
        "frame_stride": 1,
        "window_frames": 8,
        "window": "random",
        "horizontal_flip": True,
        "decoder": "pyav",
        "strict": False,
        "resize": "torch",
        "isolated": False,
    }


def test_the_data_layer_reads_that_entry(latte, tmp_path):
    from framebridge_plugin.data import load_dataset_config

    (tmp_path / "data.json").write_text(json.dumps(load_recipe(latte).dataset_config()))
    ((index, settings),) = load_dataset_config(tmp_path / "data.json")
    assert index.class_names == ["left", "right", "up"]
    assert (settings.num_frames, settings.frame_sampling, settings.window_frames) == (4, "linspace", 8)


def test_sizes_are_those_of_the_network():
    sizes = typing.get_args(LatteSize)
    assert {size.partition("/")[0] for size in sizes} == LATTE_SIZES.keys()
    for size in sizes:
        assert scratch_config(size, {}, None, None, frozenset())["patch_size"] == int(size[-1])
