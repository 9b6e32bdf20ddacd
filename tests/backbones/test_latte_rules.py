from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from diffusers import AutoencoderKL

from framebridge_plugin.backbones.folders import read_json
from framebridge_plugin.backbones.latte.facts import LATTE_BRIDGE, LATTE_NEURAL_PRIOR
from framebridge_plugin.backbones.latte.rules import (
    VAE_DEFAULTS,
    LatteFacts,
    find_neural_prior,
    latte_folder_problem,
    neural_prior_problem,
    read_latte_facts,
)
from framebridge_plugin.data import UCF101_CLASSES
from tests.cogvideox_files import write_model_folder
from tests.latte_files import NAMES, write_latte_folder

KINDS = {"bridge": LATTE_BRIDGE, "neural_prior": LATTE_NEURAL_PRIOR, "bridge_neural_prior": LATTE_BRIDGE}


@pytest.mark.parametrize("kind", KINDS)
def test_whole_folders(tmp_path, kind):
    assert latte_folder_problem(write_latte_folder(tmp_path / "model", kind), KINDS[kind]) is None


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("bridge", {"bridge": {"stage": "neural_prior"}}, "transformer holds a neural prior, not a bridge"),
        ("neural_prior", {"neural_prior": {"stage": "bridge"}}, "neural_prior holds a bridge, not a neural prior"),
        ("bridge", {"bridge": {"stage": None}}, "holds a network of stage None, not a bridge"),
        ("bridge", {"bridge": {"out_channels": 16, "in_channels": 16}}, "latents of 16 channels, the autoencoder"),
        ("bridge", {"bridge": {"in_channels": 8}}, "takes a neural prior's video, but there is no neural_prior/"),
        ("bridge_neural_prior", {"bridge": {"in_channels": 4}}, "takes no neural prior's video, but"),
        ("bridge_neural_prior", {"neural_prior": {"num_frames": 8}}, "it has 8 frames, not 16; train both"),
        ("bridge_neural_prior", {"neural_prior": {"sample_width": 16}}, "it has 16 columns of its latents, not 32"),
        (
            "bridge_neural_prior",
            {"neural_prior": {"num_classes": 3, "class_names": NAMES[:3], "sample_height": 8}},
            "it has 8 rows of its latents, not 32; 3 classes, not 4",
        ),
        (
            "bridge_neural_prior",
            {"neural_prior": {"class_names": ["Archery", "Basketball", "BalanceBeam", "GolfSwing"]}},
            "it has the class 'Basketball' at label 1, not 'BalanceBeam'",
        ),
    ],
)
def test_parts_that_do_not_fit(tmp_path, kind, changes, message):
    problem = latte_folder_problem(write_latte_folder(tmp_path / "model", kind, **changes), KINDS[kind])
    assert message in problem
    assert "\n" not in problem


def test_a_neural_prior_that_knows_its_classes_by_number_fits(tmp_path):
    folder = write_latte_folder(tmp_path / "model", "bridge_neural_prior", neural_prior={"class_names": None})
    assert latte_folder_problem(folder) is None


@pytest.mark.parametrize("part", ["vae", "transformer", "neural_prior"])
def test_damaged_parts(tmp_path, part):
    folder = write_latte_folder(tmp_path / "model", "bridge_neural_prior")
    weights = folder / part / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert latte_folder_problem(folder).startswith(f"{weights} has ")
    weights.unlink()
    assert f"{folder / part} holds no weights" in latte_folder_problem(folder)


def test_what_a_model_can_be_asked_for(tmp_path):
    folder = write_latte_folder(tmp_path / "model", bridge={"sample_width": 40})
    facts = read_latte_facts(folder / "vae", folder / "transformer")
    assert facts == LatteFacts(16, 256, 320, 4, tuple(NAMES))
    assert read_latte_facts(None, folder / "transformer") == facts
    assert list(facts.problems(16, 256, 320)) == list(facts.problems(None, None, None)) == []
    assert list(facts.problems(17, None, 256)) == [
        ("num_frames", "this model was trained on 16 and takes no other, not 17"),
        ("width", "this model was trained on 320 and takes no other, not 256"),
    ]
    prior = write_latte_folder(tmp_path / "prior", "neural_prior", neural_prior={"class_names": None})
    facts = read_latte_facts(prior / "vae", prior / "neural_prior")
    assert facts == LatteFacts(16, 256, 256, 4)


def test_what_an_autoencoder_leaves_out_is_as_in_diffusers(tmp_path):
    parameters = inspect.signature(AutoencoderKL.__init__).parameters
    defaults = {key: parameters[key].default for key in VAE_DEFAULTS}
    assert defaults | {"block_out_channels": list(defaults["block_out_channels"])} == VAE_DEFAULTS
    folder = write_latte_folder(tmp_path / "model")
    (folder / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    assert latte_folder_problem(folder) is None
    assert read_latte_facts(folder / "vae", folder / "transformer").height == 32


def test_a_configuration_that_lacks_something(tmp_path):
    folder = write_latte_folder(tmp_path / "model")
    config = read_json(folder / "transformer" / "config.json")
    del config["num_frames"]
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"transformer/config\.json is not as it was written"):
        read_latte_facts(None, folder / "transformer")


def test_classes():
    facts = LatteFacts(16, 256, 256, 101, UCF101_CLASSES)
    for known in ("GolfSwing", "YoYo", "0", "100"):
        assert facts.class_problem(known) is None
    for name, nearest in {
        "golf swing": "GolfSwing",
        "basketball": "Basketball, BasketballDunk",
        "ApplyEyeMakup": "ApplyEyeMakeup",
    }.items():
        assert facts.class_problem(name).startswith(f"the model knows no class {name!r}; the nearest: {nearest}")
    problem = facts.class_problem("zzz")
    assert problem == "the model knows no class 'zzz'; it knows 101: ApplyEyeMakeup, ApplyLipstick, Archery, ..."
    assert facts.class_problem("101") == "the model knows no class 101: its labels run from 0 to 100"
    nameless = LatteFacts(16, 256, 256, 4)
    assert nameless.class_problem("3") is None
    assert nameless.class_problem("YoYo") == "the model knows its classes by number only, 0 to 3, not 'YoYo'"


@pytest.mark.parametrize("where", ["model", "run/model", "run/checkpoints/step_000100/model"])
def test_a_neural_prior_is_found_in_a_run(tmp_path, where):
    model = write_latte_folder(tmp_path / where, "neural_prior")
    given = tmp_path / where.split("/")[0]
    assert find_neural_prior(given) == model / "neural_prior"
    bridge = read_json(write_latte_folder(tmp_path / "other", "bridge") / "transformer" / "config.json")
    assert neural_prior_problem(given) is None
    assert neural_prior_problem(given, bridge) is None
    assert neural_prior_problem(given, {"num_frames": 8}).startswith(f"{model / 'neural_prior'}: the neural prior")


def test_what_is_no_neural_prior(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    write_latte_folder(tmp_path / "bridge/model", "bridge")
    write_model_folder(tmp_path / "video")
    for name, message in {
        "nowhere": "no such folder",
        "file": "is a file, not a folder",
        "empty": "holds no saved model; give the folder of a latte_neural_prior run",
        "bridge": "holds a FrameBridgeLatte model without a neural prior",
        "video": "holds a CogVideoX model without a neural prior",
    }.items():
        assert message in neural_prior_problem(tmp_path / name)
    other_stage = write_latte_folder(tmp_path / "np", "neural_prior", neural_prior={"stage": "bridge"})
    assert "holds a bridge, not a neural prior" in neural_prior_problem(Path(other_stage))
