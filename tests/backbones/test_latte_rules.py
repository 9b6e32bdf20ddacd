"""Whether the parts of a Latte fit each other, from their configs alone: the one table of what is refused, and why.

That the rules are asked at every height is shown by one test each of recipe, `sample`, specification and pipeline.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from diffusers import AutoencoderKL

from framebridge_plugin.backbones.examination import SavedModel
from framebridge_plugin.backbones.facts import ClipShape, ClipShapeRule, KnownClasses
from framebridge_plugin.backbones.latte.facts import LATTE_BRIDGE, LATTE_NEURAL_PRIOR
from framebridge_plugin.backbones.latte.networks import blank_network
from framebridge_plugin.backbones.latte.rules import LATTE_SIZES, VAE_DEFAULTS
from framebridge_plugin.data import UCF101_CLASSES
from tests.cogvideox_files import write_model_folder
from tests.latte_files import NAMES, write_latte_folder

KINDS = {"bridge": LATTE_BRIDGE, "neural_prior": LATTE_NEURAL_PRIOR, "bridge_neural_prior": LATTE_BRIDGE}
VAE = {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512]}


def network(stage: str, **changes: Any) -> dict[str, Any]:
    shape = {"in_channels": 4, "out_channels": 4, "sample_height": 32, "sample_width": 32, "num_frames": 16}
    return {"stage": stage, **shape, "num_classes": 4, "class_names": list(NAMES)} | changes


def configs_of(kind: str, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Configs of a whole model; `changes` by component."""
    configs = {"vae": VAE | changes.get("vae", {})}
    if kind != "neural_prior":
        takes = {"in_channels": 8} if kind == "bridge_neural_prior" else {}
        configs["transformer"] = network("bridge", **takes) | changes.get("transformer", {})
    if kind != "bridge":
        configs["neural_prior"] = network("neural_prior") | changes.get("neural_prior", {})
    return configs


def problems_of(kind: str, **changes: dict[str, Any]) -> list[tuple[str, str]]:
    return list(KINDS[kind].problems(configs_of(kind, **changes)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_fits(kind, tmp_path):
    assert problems_of(kind) == []
    folder = write_latte_folder(tmp_path / "model", kind)
    assert list(SavedModel(KINDS[kind], folder).findings()) == []


PRIOR_OF_3_CLASSES = {"num_classes": 3, "class_names": NAMES[:3]}
BROKEN = [
    # what is broken, the component that is blamed, the fact
    ("bridge", {"transformer": {"stage": "neural_prior"}}, "transformer", "holds a neural prior, not a bridge"),
    ("neural_prior", {"neural_prior": {"stage": "bridge"}}, "neural_prior", "holds a bridge, not a neural prior"),
    ("bridge", {"transformer": {"stage": None}}, "transformer", "holds a network of stage None"),
    ("bridge", {"transformer": {"num_frames": None}}, "transformer", "whose num_frames is not as it was written"),
    (
        "bridge",
        {"transformer": {"out_channels": 16, "in_channels": 16}},
        "transformer",
        "latents of 16 channels, the autoencoder has 4",
    ),
    (
        "neural_prior",
        {"vae": {"latent_channels": 16}},
        "neural_prior",
        "latents of 4 channels, the autoencoder has 16",
    ),
    ("bridge", {"transformer": {"in_channels": 8}}, "transformer", "and there is none; give its neural_prior"),
    ("bridge_neural_prior", {"transformer": {"in_channels": 4}}, "neural_prior", "takes none; leave it out"),
    ("bridge_neural_prior", {"neural_prior": {"num_frames": 8}}, "neural_prior", "it has 8 frames, not 16"),
    ("bridge_neural_prior", {"neural_prior": {"sample_height": 8}}, "neural_prior", "8 rows of its latents, not 32"),
    ("bridge_neural_prior", {"neural_prior": {"sample_width": 8}}, "neural_prior", "8 columns of its latents, not 32"),
    ("bridge_neural_prior", {"neural_prior": PRIOR_OF_3_CLASSES}, "neural_prior", "3 classes, not 4"),
    (
        "bridge_neural_prior",
        {"neural_prior": {"class_names": ["Archery", "Basketball", "BalanceBeam", "GolfSwing"]}},
        "neural_prior",
        "the class 'Basketball' at label 1, not 'BalanceBeam'",
    ),
]


@pytest.mark.parametrize("kind, changes, part, fact", BROKEN)
def test_what_does_not_fit(kind, changes, part, fact):
    ((blamed, problem),) = problems_of(kind, **changes)
    assert blamed == part
    assert fact in problem
    assert "\n" not in problem


def test_all_differences_are_named_at_once():
    ((_, problem),) = problems_of("bridge_neural_prior", neural_prior=PRIOR_OF_3_CLASSES | {"sample_height": 8})
    assert "it has 8 rows of its latents, not 32; 3 classes, not 4;" in problem


def test_a_neural_prior_that_knows_its_classes_by_number_fits():
    assert problems_of("bridge_neural_prior", neural_prior={"class_names": None}) == []


@pytest.mark.parametrize("unseen", ["vae", "transformer", "neural_prior"])
def test_what_is_not_to_be_seen_is_compared_with_nothing(unseen):
    other = {"neural_prior": {"num_frames": 8}, "vae": {}, "transformer": {}}
    configs = configs_of("bridge_neural_prior", **other)
    found = list(LATTE_BRIDGE.problems({**configs, unseen: {}}))
    assert [part for part, _ in found] == (["neural_prior"] if unseen == "vae" else [])


@pytest.mark.parametrize(
    "theirs, fact",
    [
        (VAE | {"scaling_factor": 1.5}, "scaling_factor is 1.5 there, 0.18215 here"),
        (VAE | {"shift_factor": 0.1}, "shift_factor is 0.1 there, None here"),
        (VAE | {"shift_factor": 0.0}, None),  # what None means
        (VAE | {"scaling_factor": 0.18215}, None),
        ({}, None),
    ],
)
def test_the_autoencoder_that_a_neural_prior_was_trained_with(theirs, fact):
    found = list(LATTE_BRIDGE.problems(configs_of("bridge_neural_prior") | {"neural_prior/vae": theirs}))
    assert [part for part, _ in found] == ([] if fact is None else ["neural_prior"])
    assert fact is None or fact in found[0][1]


def test_what_an_autoencoder_leaves_out_is_as_in_diffusers():
    parameters = inspect.signature(AutoencoderKL.__init__).parameters
    defaults = {key: parameters[key].default for key in VAE_DEFAULTS}
    assert defaults | {"block_out_channels": list(defaults["block_out_channels"])} == VAE_DEFAULTS
    assert (
        list(LATTE_BRIDGE.problems({"vae": {"_class_name": "AutoencoderKL"}, "transformer": network("bridge")})) == []
    )
    assert LATTE_BRIDGE.clip_rule({"_class_name": "AutoencoderKL"}, network("bridge")) == ClipShape(16, 32, 32)


# What a model can be asked for


def test_the_clips_of_a_trained_network_are_of_one_shape():
    shape = LATTE_BRIDGE.clip_rule(VAE, network("bridge", sample_width=40))
    assert shape == LATTE_BRIDGE.clip_rule({}, network("bridge", sample_width=40)) == ClipShape(16, 256, 320)
    assert list(shape.problems(16, 256, 320)) == list(shape.problems(None, None, None)) == []
    assert list(shape.problems(17, None, 256)) == [
        ("num_frames", "this model was trained on 16 and takes no other, not 17"),
        ("width", "this model was trained on 320 and takes no other, not 256"),
    ]


def test_the_clips_of_a_network_from_scratch_fit_its_patches():
    assert LATTE_BRIDGE.clip_rule(VAE, {"patch_size": 4}) == ClipShapeRule(frames_step=1, size_step=32)
    assert LATTE_BRIDGE.clip_rule({}, {"patch_size": 4}) == ClipShapeRule(frames_step=1, size_step=4)
    assert LATTE_BRIDGE.clip_rule({}, {}) == ClipShapeRule(frames_step=1, size_step=1)


@pytest.mark.parametrize("parts", [frozenset(), frozenset({"neural_prior"})])
@pytest.mark.parametrize("size", LATTE_SIZES)
def test_the_config_of_a_network_from_scratch_is_the_one_that_it_gets(size, parts):
    assert LATTE_BRIDGE.scratch_config is not None
    num_layers, width, heads = LATTE_SIZES[size]
    known = LATTE_BRIDGE.scratch_config(f"{size}/4", VAE, (5, 64, 32), NAMES, parts)
    assert known == {
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "patch_size": 4,
        "num_frames": 5,
        "sample_height": 8,
        "sample_width": 4,
        "num_classes": len(NAMES),
        "class_names": NAMES,
        "in_channels": 8 if parts else 4,
        "out_channels": 4,
    }
    assert {name: blank_network(known).config[name] for name in known} == known
    unseen = LATTE_BRIDGE.scratch_config(f"{size}/4", {}, None, None, parts)
    assert unseen.keys() == {"num_layers", "num_attention_heads", "attention_head_dim", "patch_size"}


def test_the_classes_of_a_network():
    assert LATTE_BRIDGE.known_classes(network("bridge")) == KnownClasses(4, tuple(NAMES))
    assert LATTE_BRIDGE.known_classes(network("bridge", class_names=None)) == KnownClasses(4)
    assert LATTE_BRIDGE.known_classes({}) is None


def test_names_of_classes():
    classes = KnownClasses(101, UCF101_CLASSES)
    for known in ("GolfSwing", "YoYo", "0", "100"):
        assert classes.problem(known) is None
    for name, nearest in {
        "golf swing": "GolfSwing",
        "basketball": "Basketball, BasketballDunk",
        "ApplyEyeMakup": "ApplyEyeMakeup",
    }.items():
        assert classes.problem(name).startswith(f"the model knows no class {name!r}; the nearest: {nearest}")
    problem = classes.problem("zzz")
    assert problem == "the model knows no class 'zzz'; it knows 101: ApplyEyeMakeup, ApplyLipstick, Archery, ..."
    assert classes.problem("101") == "the model knows no class 101: its labels run from 0 to 100"
    nameless = KnownClasses(4)
    assert nameless.problem("3") is None
    assert nameless.problem("YoYo") == "the model knows its classes by number only, 0 to 3, not 'YoYo'"


# Folders


def test_the_folders_of_a_model_that_does_not_fit_are_named(tmp_path):
    folder = write_latte_folder(tmp_path / "model", "bridge_neural_prior", neural_prior={"num_frames": 8})
    (finding,) = SavedModel(LATTE_BRIDGE, folder).findings()
    assert (finding.part, finding.is_other) == ("neural_prior", True)
    assert finding.message.startswith(f"{folder / 'neural_prior'} does not fit the bridge")


def test_a_model_of_another_stage(tmp_path):
    prior = write_latte_folder(tmp_path / "prior", "neural_prior")
    (finding,) = SavedModel(LATTE_BRIDGE, prior).findings()
    assert (finding.part, finding.is_other) == ("", True)
    assert f"{prior} is a model of latte_neural_prior, not of latte_bridge" in finding.message


@pytest.mark.parametrize("change", [{"num_frames": None}, {"_class_name": "DiT", "num_frames": None}])
def test_a_config_that_is_not_what_it_should_be_is_not_asked_for_more(tmp_path, change):
    saved = SavedModel(LATTE_BRIDGE, write_latte_folder(tmp_path / "model", bridge={"out_channels": 16, **change}))
    (finding,) = saved.findings()
    assert (finding.part, finding.is_other) == ("transformer", True)
    assert saved.clip_rule == ClipShapeRule(frames_step=1, size_step=8)
    assert saved.known_classes is None


@pytest.mark.parametrize("part", ["vae", "transformer", "neural_prior"])
def test_damaged_parts(tmp_path, part):
    folder = write_latte_folder(tmp_path / "model", "bridge_neural_prior")
    weights = folder / part / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (finding,) = SavedModel(LATTE_BRIDGE, folder).findings()
    assert finding.message.startswith(f"{weights} has ")
    assert (finding.part, finding.is_other) == (part, False)


def test_what_holds_no_neural_prior(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "run/logs").mkdir(parents=True)
    write_latte_folder(tmp_path / "bridge/model", "bridge")
    write_model_folder(tmp_path / "video")
    whole = write_latte_folder(tmp_path / "whole")
    for name, (message, is_other) in {
        "nowhere": ("no such folder", False),
        "file": ("is a file, not a folder", False),
        "run": ("holds no saved model with a neural_prior/", False),
        "bridge": ("holds a FrameBridgeLatte model without neural_prior/", True),
        "video": ("holds a CogVideoX model without neural_prior/", True),
    }.items():
        findings = SavedModel(LATTE_BRIDGE, whole, {"neural_prior": tmp_path / name}).findings()
        found = [finding for finding in findings if message in finding.message]
        assert [(finding.part, finding.is_other) for finding in found] == [("neural_prior", is_other)], name


def test_a_neural_prior_on_the_hub_may_be_beside_the_rest(tmp_path):
    """What is there to be seen is a bridge that takes one, or none."""
    for kind in ("bridge", "bridge_neural_prior"):
        network = write_latte_folder(tmp_path / kind, kind) / "transformer"
        assert list(SavedModel(LATTE_BRIDGE, None, {"transformer": network}, on_hub=True).findings()) == []
    given = {"transformer": tmp_path / "bridge/transformer", "neural_prior": None}
    assert len(list(SavedModel(LATTE_BRIDGE, None, given).findings())) == 1
