from __future__ import annotations

import json
import sys

import pytest

from framebridge_plugin.recipe import load_recipe
from framebridge_plugin.recipe.schema import Recipe
from framebridge_plugin.recipe.sections import FrameBridgeSection
from framebridge_plugin.recipe.yaml_text import read_yaml
from tests.recipe.helpers import EVERYTHING


def finetrainers_names() -> set[str]:
    """The arguments that a recipe knows under finetrainers' names."""
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    ours = {key for section in sections.values() if section is not FrameBridgeSection for key in section.model_fields}
    return ours


def test_sections_do_not_share_a_name():
    count = sum(
        len(field.annotation.model_fields)
        for field in Recipe.model_fields.values()
        if field.annotation is not FrameBridgeSection
    )
    assert count == len(finetrainers_names())


@pytest.fixture(scope="module")
def finetrainers_args():
    import framebridge_plugin

    framebridge_plugin.register()
    from finetrainers import args

    return args


def test_every_argument_of_finetrainers_can_be_set(finetrainers_args):
    import argparse

    from finetrainers.trainer.sft_trainer.config import SFTLowRankConfig

    parser = argparse.ArgumentParser(add_help=False)
    finetrainers_args._add_args(parser)
    finetrainers_args.AttentionProviderArgs().add_args(parser)
    SFTLowRankConfig().add_args(parser)
    assert finetrainers_names() == {action.dest for action in parser._actions}


def parse_with_finetrainers(module, argv, monkeypatch):
    from finetrainers.trainer.sft_trainer.config import SFTLowRankConfig

    args = module.BaseArgs()
    if any(argument.startswith("--rank") for argument in argv):
        args.register_args(SFTLowRankConfig())
    monkeypatch.setattr(sys, "argv", ["finetrainers", *argv])
    return args.parse_args()


def test_finetrainers_parser_sees_every_value(finetrainers_args, tmp_path, monkeypatch):
    import torch

    # The rules across fields, which would not let all of this pass at once, are left out.
    data, validation = tmp_path / "data.json", tmp_path / "validation.csv"
    data.write_text("{}")
    validation.write_text("caption,image_path\n")
    text = EVERYTHING.replace("DATA", str(data)).replace("VALIDATION", str(validation))
    # This one works with a single process only.
    offload = text.replace("enable_model_cpu_offload: false", "enable_model_cpu_offload: true")
    offload = offload.replace("dp_degree: 2, dp_shards: 2", "dp_degree: 1, dp_shards: 1")
    for variant in (text, offload):
        recipe = Recipe.model_validate(read_yaml(variant).data)
        values = recipe.model_dump(exclude={"framebridge"})
        sent = {name: value for section in values.values() for name, value in section.items()}
        assert set(sent) == finetrainers_names()
        parsed = parse_with_finetrainers(finetrainers_args, recipe.to_finetrainers_argv(), monkeypatch)
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        dtypes["float8_e5m2"] = torch.float8_e5m2
        for name, value in sent.items():
            expected = dtypes[value] if name.endswith("_dtype") else value
            expected = str(value) if name == "resume_from_checkpoint" else expected
            assert getattr(parsed, name) == expected, name


def test_defaults_pass_finetrainers_parser(finetrainers_args, minimal, tmp_path, monkeypatch):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(load_recipe(minimal).dataset_config()))
    parsed = parse_with_finetrainers(finetrainers_args, load_recipe(minimal).to_finetrainers_argv(data), monkeypatch)
    assert parsed.model_name == "cogvideox_bridge"
    assert parsed.dataset_config == str(data)
    assert parsed.parallel_backend == "ptd"
    assert parsed.optimizer == "adamw"
    assert parsed.max_data_samples == 2**64
