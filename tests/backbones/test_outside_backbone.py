"""A backbone of another package, found by its entry point, in real processes that have it on their path.

The steps are those of "Add a backbone" in CONTRIBUTING.md; the package is in tests/data/outside_backbone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from framebridge_plugin.backbones.examination import examine
from framebridge_plugin.backbones.facts import backbone_names
from framebridge_plugin.errors import FrameBridgeError

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "tests/data/outside_backbone"
USER = """
import sys
from pathlib import Path
import framebridge_plugin  # before diffusers: it repairs torchvision
from tests.backbones.outside_user import use
use(Path(sys.argv[1]))
"""


def run(*arguments: object, packages: tuple[Path, ...] = (PACKAGE,)) -> subprocess.CompletedProcess[str]:
    """Runs python with packages on its path, as if they were installed."""
    path = os.pathsep.join(map(str, (*packages, REPOSITORY)))
    program = [sys.executable, *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What a user's commands wrote and printed."""
    folder = tmp_path_factory.mktemp("outside")
    result = run("-c", USER, folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result.stdout


def test_a_recipe_trains_layers_that_see_the_image(used):
    layers = load_file(used[0] / "lora/lora/pytorch_lora_weights.safetensors")
    assert {name.rpartition(".lora_")[0] for name in layers} == {"transformer.proj_in", "transformer.blocks.0.to_q"}
    change = layers["transformer.proj_in.lora_B.weight"].flatten(1).unflatten(1, (8, -1))
    assert change[:, :4].any()
    assert change[:, 4:].any()


def test_a_recipe_trains_the_widened_network(used):
    before = load_file(used[0] / "model/transformer/diffusion_pytorch_model.safetensors")
    after = load_file(used[0] / "full-finetune/model/transformer/diffusion_pytorch_model.safetensors")
    assert after["proj_in.weight"].shape[1] == 8
    assert after["proj_in.weight"][:, 4:].any()
    assert not torch.equal(after["proj_out.weight"], before["proj_out.weight"])


@pytest.mark.parametrize("training_type", ["lora", "full-finetune"])
def test_a_run_is_validated_sampled_and_opened(used, training_type):
    folder, _ = used
    assert [path.suffix for path in (folder / training_type / "validation").glob("*.mp4")] == [".mp4"]
    assert (folder / f"{training_type}.mp4").stat().st_size > 0
    latents = torch.load(folder / f"{training_type}.pt")
    assert latents.shape == (1, 3, 4, 4, 4)
    assert latents.isfinite().all()


def test_it_conforms(used):
    lines = used[1].splitlines()[-7:]
    assert lines[0].startswith("MiniBridgeSpecification with ")
    assert [line.split()[1] for line in lines[1:-1]] == ["ok"] * 5
    assert lines[-1] == "5 ok"


def install(folder: Path, name: str, place: str, module: str = "") -> Path:
    """Writes a package whose entry point brings a backbone of a name from a place; `module` is its code."""
    metadata = folder / f"{folder.name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {folder.name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[framebridge_plugin.backbones]\n{name} = {place}\n")
    (folder / f"{folder.name}_module.py").write_text(module)
    return folder


@pytest.fixture
def packages(tmp_path: Path) -> tuple[Path, ...]:
    """The outside package, and four that are broken."""
    return (
        PACKAGE,
        install(tmp_path / "raising", "raising_bridge", "raising_module:FACTS", "raise OSError('no\\nlicence')"),
        install(tmp_path / "other", "other_bridge", "other_module:FACTS", "FACTS = {'name': 'other_bridge'}"),
        install(tmp_path / "renamed", "renamed_bridge", "mini_bridge.facts:MINI"),
        install(tmp_path / "second", "mini_bridge", "second_module:FACTS"),
        install(tmp_path / "own", "cogvideox_bridge", "own_module:FACTS"),
    )


@pytest.mark.parametrize(
    ("model_name", "told"),
    [
        ("raising_bridge", ["raising_module:FACTS", "OSError: no licence"]),
        ("other_bridge", ["other_module:FACTS", "no BackboneFacts"]),
        ("renamed_bridge", ["mini_bridge.facts:MINI", "no BackboneFacts of that name"]),
        ("mini_bridge", ["2 backbones", "mini_bridge.facts:MINI of mini", "second_module:FACTS of second"]),
        ("cogvideox_bridge", ["2 backbones", "COGVIDEOX of framebridge-plugin", "own_module:FACTS of own"]),
        ("raisin_bridge", ["did you mean raising_bridge?"]),
    ],
)
def test_a_wrong_backbone_is_refused_in_one_line(packages, tmp_path, model_name, told):
    recipe = f"model: {{model_name: {model_name}, pretrained_model_name_or_path: {tmp_path}}}\n"
    (tmp_path / "recipe.yaml").write_text(recipe + "training: {training_type: lora}\ncheckpoints: {output_dir: run}\n")
    result = run("-m", "framebridge_plugin", "train", f"--recipe={tmp_path / 'recipe.yaml'}", packages=packages)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if "model_name" in line]
    assert line.startswith(f"error: {tmp_path / 'recipe.yaml'}:1: model.model_name: ")
    assert all(text in line for text in told), line


def test_a_wrong_backbone_leaves_the_others_alone(packages):
    program = "from framebridge_plugin.backbones.facts import *; print(*(facts.name for facts in working_backbones()))"
    found = run("-c", program, packages=packages).stdout.split()
    assert found == [name for name in backbone_names() if name != "cogvideox_bridge"]


def test_a_model_of_a_backbone_that_is_twice_there_or_not_at_all(packages, tmp_path):
    index = {"_class_name": "FrameBridgeMiniPipeline", "transformer": ["mini_bridge.network", "MiniTransformer"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(FrameBridgeError, match=r"install the package that brings it \(mini_bridge\)"):
        examine(tmp_path)
    command = ("-m", "framebridge_plugin", "sample", "--model", tmp_path, "--image", tmp_path, "--output", "a.mp4")
    told = run(*command, packages=(packages[0], packages[4])).stderr
    assert "2 backbones are named 'mini_bridge': mini_bridge.facts:MINI of mini" in told
    assert "does not work here" in told
