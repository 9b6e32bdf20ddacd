"""What a recipe says of a Latte, and what of it arrives at the parser and at the specification."""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing

import pytest
import yaml

from framebridge_plugin.models.latte import LATTE_SIZES, PATCH_SIZES
from framebridge_plugin.recipe import load_recipe, resolve_recipe, shipped_recipes
from framebridge_plugin.recipe.schema import Recipe
from framebridge_plugin.recipe.sections import FrameBridgeSection, LatteSize
from framebridge_plugin.recipe.yaml_text import read_yaml
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
    (problem,) = problems_of(latte, "model.model_name=latte")
    assert "did you mean latte_" in problem
    # What does not depend on the model comes with it.
    assert len(problems_of(latte, "model.model_name=latte", "training.batch_size=0")) == 2


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


# ------------------------------------------------------------------------------------------- the parser


@pytest.fixture(scope="module")
def parse():
    from framebridge_plugin.training.finetrainers.registration import parse_arguments

    return parse_arguments


OVERRIDES = {
    "scratch": [],
    "neural prior": ["model.model_name=latte_neural_prior", "framebridge.latte_size=B/4", "training.seed=7"],
    "as CogVideoX": ["framebridge.snr_aligned=true", "framebridge.target=v", "framebridge.ema_decay=0"],
    "other values": [
        *("framebridge.ema_decay=0.5", "framebridge.ema_start_step=3", "framebridge.max_grad_norm_start_step=4"),
        *("framebridge.beta_min=0.5", "framebridge.beta_max=2", "framebridge.caption_dropout=0"),
        *("framebridge.objective=diffusion", "framebridge.alignment_edge=reference", "framebridge.latte_size=L/8"),
    ],
}


@pytest.mark.parametrize("kind", OVERRIDES)
def test_the_parser_sees_every_value_of_the_section(kind, latte, parse, tmp_path):
    recipe = load_recipe(latte, OVERRIDES[kind])
    (tmp_path / "data.json").write_text("{}")
    argv = recipe.to_finetrainers_argv(tmp_path / "data.json")
    assert "--pretrained_model_name_or_path=" in argv
    args = parse([*argv, *recipe.objective_argv()])
    assert (args.model_name, args.pretrained_model_name_or_path) == (recipe.model.model_name, "")
    assert (args.latte_size, args.neural_prior, args.precomputed) == (recipe.framebridge.latte_size, None, None)
    settings = dataclasses.asdict(args.framebridge_objective) | dataclasses.asdict(args.framebridge_trainer)
    assert settings == recipe.framebridge.model_dump(include=set(settings))
    sent = set(settings) | {"latte_size", "neural_prior", "precomputed", "start_from", "data", "bad_files"}
    assert sent == set(FrameBridgeSection.model_fields)


def test_the_parser_sees_the_neural_prior_and_the_switches_of_cogvideox(minimal, parse, tmp_path):
    (tmp_path / "data.json").write_text("{}")
    section = {"neural_prior": "runs/prior", "ema_decay": 0.25, "prior_noise": False}
    data = yaml.safe_load(minimal.read_text())
    recipe = Recipe.model_validate(data | {"framebridge": section})  # without the rules across fields
    args = parse([*recipe.to_finetrainers_argv(tmp_path / "data.json"), *recipe.objective_argv()])
    assert (args.neural_prior, args.framebridge_trainer.ema_decay) == ("runs/prior", 0.25)
    objective = args.framebridge_objective
    assert (objective.snr_aligned, objective.image_noise, objective.prior_noise) == (True, True, False)


def test_every_argument_of_ours_can_be_set():
    from framebridge_plugin.training.finetrainers.arguments import FrameBridgeArgs

    parser = argparse.ArgumentParser(add_help=False)
    FrameBridgeArgs().add_args(parser)
    assert {action.dest for action in parser._actions} == set(FrameBridgeSection.model_fields) - {"data", "bad_files"}


def test_names_sizes_and_defaults_are_those_of_the_models(parse):
    from finetrainers.config import SUPPORTED_MODEL_CONFIGS

    from framebridge_plugin.training.finetrainers.arguments import TrainerSettings
    from framebridge_plugin.training.objective import ObjectiveSettings

    assert set(typing.get_args(LatteSize)) == {f"{size}/{patch}" for size in LATTE_SIZES for patch in PATCH_SIZES}
    for model_name in ("cogvideox_bridge", "latte_bridge", "latte_neural_prior"):
        specification = SUPPORTED_MODEL_CONFIGS[model_name]["full-finetune"]
        objective = getattr(specification, "default_objective", ObjectiveSettings())
        trainer = getattr(specification, "default_trainer_settings", TrainerSettings())
        recipe = Recipe.model_validate(
            {
                "model": {"model_name": model_name},
                "training": {"training_type": "lora"},
                "checkpoints": {"output_dir": "x"},
            }
        )
        settings = dataclasses.asdict(objective) | dataclasses.asdict(trainer)
        assert settings == recipe.framebridge.model_dump(include=set(settings))
