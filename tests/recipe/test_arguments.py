"""What of a recipe arrives in finetrainers' arguments."""

from __future__ import annotations

import argparse
import json

import pytest
import yaml

from framebridge_plugin.recipe import load_recipe
from framebridge_plugin.recipe.schema import FrameBridgeSection, Recipe
from framebridge_plugin.recipe.yaml_text import read_yaml
from framebridge_plugin.settings.finetrainers import WITHOUT_EFFECT
from tests.recipe.helpers import EVERYTHING


def finetrainers_names() -> list[str]:
    """The arguments that a recipe knows under finetrainers' names."""
    sections = [field.annotation for field in Recipe.model_fields.values()]
    return [key for section in sections if section is not FrameBridgeSection for key in section.model_fields]


@pytest.fixture(scope="module")
def recipe_arguments():
    from framebridge_plugin.training.finetrainers.registration import recipe_arguments

    return recipe_arguments


def test_every_argument_of_finetrainers_can_be_set_or_is_known_to_do_nothing(recipe_arguments):
    import framebridge_plugin

    framebridge_plugin.register()
    from finetrainers import args
    from finetrainers.trainer.sft_trainer.config import SFTLowRankConfig

    parser = argparse.ArgumentParser(add_help=False)
    args._add_args(parser)
    args.AttentionProviderArgs().add_args(parser)
    SFTLowRankConfig().add_args(parser)
    names = finetrainers_names()
    assert len(set(names)) == len(names)
    others = {action.dest for action in parser._actions} - set(names)
    assert others | {"diffusion"} == set(WITHOUT_EFFECT)


def test_every_value_arrives(recipe_arguments):
    import torch

    # The rules across fields, which would not let all of this pass at once, are left out.
    recipe = Recipe.model_validate(read_yaml(EVERYTHING).data)
    given = recipe.model_dump(exclude={"framebridge": True, "validation": {"heldout"}})  # which is with the data
    sent = {name: value for section in given.values() for name, value in section.items()}
    assert set(sent) == set(finetrainers_names()) - {"heldout"}
    args = recipe_arguments(recipe, "data.json")
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name, value in sent.items():
        expected = dtypes[value] if name.endswith("_dtype") else value
        expected = {"resume_from_checkpoint": str(value), "dataset_config": "data.json"}.get(name, expected)
        assert getattr(args, name) == expected, name


def test_what_is_not_given(recipe_arguments, minimal):
    recipe = load_recipe(minimal)
    args = recipe_arguments(recipe, "data.json")
    assert (args.parallel_backend, args.optimizer, args.max_data_samples) == ("ptd", "adamw", 2**64)
    assert (args.precomputation_dir, args.compile_scopes) == (f"{recipe.checkpoints.output_dir}/precomputed", [])
    assert (args.attn_provider_training, args.resume_from_checkpoint, args.flow_shift) == ([], "auto", 1.0)
    assert args.dp_degree == 1


@pytest.mark.parametrize(("scope", "expected"), [("null", "regional"), ("full", "full")])
def test_a_network_is_compiled_by_blocks_unless_said_otherwise(recipe_arguments, minimal, scope, expected):
    recipe = load_recipe(minimal, ["compile.compile_modules=[transformer]", f"compile.compile_scopes={scope}"])
    assert recipe_arguments(recipe, "data.json").compile_scopes == [expected]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("[to_q]", ["to_q"]),
        ("to_out.0", ["to_out.0"]),
        ("'attn.*(to_q|to_k)'", "attn.*(to_q|to_k)"),
        ("['attn.*(to_q|to_k)']", "attn.*(to_q|to_k)"),
        ("[to_q, to_k]", ["to_q", "to_k"]),
    ],
)
def test_names_of_lora_layers_and_a_regular_expression(recipe_arguments, minimal, targets, expected):
    recipe = load_recipe(minimal, ["training.training_type=lora", f"lora.target_modules={targets}"])
    assert recipe_arguments(recipe, "data.json").target_modules == expected


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
def test_every_value_of_our_section_arrives(kind, latte, recipe_arguments):
    recipe = load_recipe(latte, OVERRIDES[kind])
    args = recipe_arguments(recipe, "data.json")
    assert (args.model_name, args.pretrained_model_name_or_path) == (recipe.model.model_name, "")
    names = ("latte_size", "neural_prior", "precomputed", "start_from")
    found = {name: getattr(args, name) for name in names}
    found |= args.framebridge_objective.model_dump() | args.framebridge_trainer.model_dump()
    assert found == recipe.framebridge.model_dump(exclude={"data", "bad_files"})
    assert json.loads(json.dumps(args.to_dict()["additional_arguments"]["FrameBridgeArgs"])) == found


def test_the_neural_prior_and_the_switches_of_cogvideox_arrive(minimal, recipe_arguments):
    section = {"neural_prior": "runs/prior", "ema_decay": 0.25, "prior_noise": False}
    data = yaml.safe_load(minimal.read_text())
    recipe = Recipe.model_validate(data | {"framebridge": section})  # without the rules across fields
    args = recipe_arguments(recipe, "data.json")
    assert (args.neural_prior, args.framebridge_trainer.ema_decay) == ("runs/prior", 0.25)
    objective = args.framebridge_objective
    assert (objective.snr_aligned, objective.image_noise, objective.prior_noise) == (True, True, False)
