from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from framebridge_plugin.backbones.cogvideox.facts import COGVIDEOX
from framebridge_plugin.backbones.examination import Finding, SavedModel, examine, read_once
from framebridge_plugin.backbones.facts import BackboneFacts, ClipShapeRule
from framebridge_plugin.backbones.folders import backbone_of, find_part
from framebridge_plugin.backbones.latte.facts import LATTE_BRIDGE, LATTE_NEURAL_PRIOR
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.files import local_path
from tests.cogvideox_files import write_model_folder
from tests.latte_files import write_latte_folder


@pytest.fixture
def model(tmp_path):
    return write_model_folder(tmp_path / "model")


def findings_of(folder: Path, facts: BackboneFacts = COGVIDEOX, **components: Path | None) -> list[Finding]:
    return list(SavedModel(facts, folder, components).findings())


def test_a_whole_folder(model):
    assert findings_of(model) == []
    own = {part: model / part for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")}
    assert list(SavedModel(COGVIDEOX, None, own).findings()) == []


def test_a_sharded_folder(model):
    weights = model / "transformer" / "model.safetensors"
    weights.rename(weights.with_name("model-00001-of-00002.safetensors"))
    index = weights.with_name("model.safetensors.index.json")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index.write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))
    (finding,) = findings_of(model)
    assert "model-00002-of-00002.safetensors is missing, although" in finding.message
    index.write_text(json.dumps({"weight_map": {"a": names[0]}}))
    assert findings_of(model) == []


def damage(model: Path, kind: str) -> None:
    weights = model / "vae" / "model.safetensors"
    if kind == "cut off":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif kind == "cut off in its header":
        weights.write_bytes(weights.read_bytes()[:20])
    elif kind == "no bytes":
        weights.write_bytes(b"")
    elif kind == "another file":
        weights.write_bytes(b"<html>not found</html>" * 10)
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no part":
        weights.unlink()
        (model / "vae" / "config.json").unlink()
        (model / "vae").rmdir()
    elif kind == "no config":
        (model / "vae" / "config.json").unlink()
    elif kind == "another VAE":
        (model / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    elif kind == "another pipeline":
        (model / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    elif kind == "no index":
        (model / "model_index.json").unlink()
    elif kind == "broken index":
        (model / "model_index.json").write_text('{"_class_na')


@pytest.mark.parametrize(
    "kind, message",
    [
        ("cut off", "bytes, its header announces"),
        ("cut off in its header", "cut off in its header; download it again"),
        ("no bytes", "model.safetensors is empty; download it again"),
        ("another file", "is no safetensors file"),
        ("no weights", "holds no weights"),
        ("no part", "no such folder"),
        ("no config", "config.json is missing"),
        ("another VAE", "holds a AutoencoderKL, not a AutoencoderKLCogVideoX"),
        ("another pipeline", "holds a FluxPipeline, not a CogVideoX pipeline"),
        ("no index", "model_index.json is missing; give the folder of a whole CogVideoX model"),
        ("broken index", "model_index.json is not readable JSON"),
    ],
)
def test_damaged_folders(model, kind, message):
    damage(model, kind)
    (finding,) = findings_of(model)
    assert message in finding.message
    assert finding.is_other == (kind in ("another VAE", "another pipeline"))
    assert (finding.part == "") == (kind in ("another pipeline", "no index", "broken index"))


FOREIGN_SCHEDULERS = [
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is for a FlowMatchEulerDiscreteScheduler; the bridge knows"),
    ({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, "is for a DDIMScheduler"),
    ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "is for a DPMSolverMultistepScheduler"),
    ({"_class_name": "CogVideoXDPMScheduler", "use_flow_sigmas": True}, "is for flow matching (use_flow_sigmas)"),
    ({"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "epsilon"}, "has prediction_type epsilon"),
    ({"_class_name": "CogVideoXDDIMScheduler"}, "has prediction_type epsilon"),  # diffusers' default
    (
        {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction", "beta_schedule": "sigmoid"},
        "has beta_schedule sigmoid",
    ),
    (
        {"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction", "num_train_timesteps": 10**12},
        "has 1000000000000 times (num_train_timesteps)",
    ),
    ({"prediction_type": "v_prediction"}, "names no scheduler"),
    ({"_class_name": "FrameBridgeScheduler", "backbone": {"_class_name": "DDIMScheduler"}}, "is for a DDIMScheduler"),
]


@pytest.mark.parametrize("config, message", FOREIGN_SCHEDULERS)
def test_schedulers_that_the_bridge_does_not_know(model, config, message):
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    (finding,) = findings_of(model)
    assert message in finding.message
    assert finding.message.startswith(f"{model / 'scheduler'} ")
    assert (finding.part, finding.is_other) == ("scheduler", True)


def test_schedulers_that_the_bridge_knows(model, tmp_path):
    file = model / "scheduler" / "scheduler_config.json"
    for name in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"):
        config = {"_class_name": name, "prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}
        for content in (config, {"_class_name": "FrameBridgeScheduler", "backbone": config}):
            file.write_text(json.dumps(content))
            assert findings_of(model) == []
    file.rename(file.with_name("config.json"))
    (finding,) = findings_of(model)
    assert "scheduler_config.json is missing" in finding.message
    assert not finding.is_other
    latte = write_latte_folder(tmp_path / "latte")
    (latte / "scheduler" / "scheduler_config.json").write_text(json.dumps(FOREIGN_SCHEDULERS[4][0]))
    assert findings_of(latte, LATTE_BRIDGE) == []  # which predicts the noise


def test_a_cogvideox_1_5_is_told_by_its_config(model):
    file = model / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "patch_size_t": 2}))
    (finding,) = findings_of(model)
    assert finding.message.startswith(f"{model / 'transformer'} is a CogVideoX 1.5 (patch_size_t is set)")
    assert finding.is_other


def test_no_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in {
        "nowhere": "no such folder",
        "empty": "is empty",
        "file": "is a file, not a folder",
    }.items():
        (finding,) = findings_of(tmp_path / name)
        assert message in finding.message


def test_only_the_components_that_are_used_are_looked_at(model, tmp_path):
    other = write_model_folder(tmp_path / "other")
    damage(model, "no part")
    assert findings_of(model, vae=other / "vae") == []
    assert findings_of(model, vae=None) == []  # in memory, or on the hub
    (other / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (finding,) = findings_of(model, vae=other / "vae")
    assert (finding.part, finding.is_other) == ("vae", True)


def test_every_file_is_read_once(model, monkeypatch):
    read = []
    monkeypatch.setattr(Path, "read_text", lambda path, **kwargs: read.append(path) or path.read_bytes().decode())
    saved = examine(model)
    assert list(saved.findings()) == []
    assert not saved.known_classes
    assert list(saved.clip_rule.problems(17, 64, 64)) == []
    assert saved.takes_no_image
    assert sorted(read) == sorted([*model.glob("*/*config.json"), model / "model_index.json"])


def test_another_command_sees_a_file_that_has_changed(model):
    before = examine(model)
    assert list(before.findings()) == []
    (model / "vae" / "config.json").write_text("{}")
    assert list(before.findings()) == []
    assert len(list(examine(model).findings())) == 1
    read = read_once()
    assert read(model / "model_index.json") is read(model / "model_index.json")


@pytest.mark.parametrize(
    "content, message", [('{"_class_name": "FluxPipeline"}', "holds a FluxPipeline"), ("{", "is not readable JSON")]
)
def test_what_is_no_model(tmp_path, content, message):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(FrameBridgeError, match=message):
        examine(tmp_path)


@pytest.mark.parametrize("base", [None, "owner/moved"])
def test_what_a_lora_was_trained_on_is_asked_for_at_its_revision(tmp_path, base):
    info = {"base_model": "owner/base", "revision": "1", "replaced_components": {"vae": "owner/vae"}}
    (tmp_path / "framebridge.json").write_text(json.dumps({**info, "replaced_revisions": {"vae": "2"}}))
    asked = []
    saved = examine(tmp_path, locate=lambda name, revision: asked.append((name, revision)), base=base)
    assert asked == [("owner/base", "1") if base is None else (base, None), ("owner/vae", "2")]
    assert (saved.on_hub, saved.folder("transformer"), saved.folder("vae")) == (True, None, None)


def test_a_component_is_found_around_it(model, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(model, run / "model")
    for folder in (run, run / "model", run / "model/transformer"):
        assert find_part(folder, "transformer") == run / "model/transformer"
    (tmp_path / "nothing").mkdir()
    assert find_part(tmp_path / "nothing", "transformer") == tmp_path / "nothing"


def test_paths_and_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert local_path("zai-org/CogVideoX-2b") is None
    for path in ("models/CogVideoX-2b", "models", "./x/y", "/x/y", "x", "../x", "a/b/c"):
        assert local_path(path) == Path(path)


def test_the_rule_for_clips(model, tmp_path):
    rules = [SavedModel(COGVIDEOX, folder, on_hub=folder is None).clip_rule for folder in (None, model)]
    assert rules == [ClipShapeRule(8, 16)] * 2
    tiny = write_model_folder(tmp_path / "tiny", temporal_compression=2, vae_levels=2, patch_size=1)
    rule = SavedModel(COGVIDEOX, model, {"vae": tiny / "vae", "transformer": tiny / "transformer"}).clip_rule
    assert rule == ClipShapeRule(frames_step=4, size_step=2)
    assert [frames for frames in range(20) if not list(rule.problems(frames, None, None))] == [1, 5, 9, 13, 17]
    (problem,) = ClipShapeRule(8, 16).problems(16, 256, 256)
    assert problem == ("num_frames", "the VAE returns only 8 k + 1 frames, not 16; the nearest is 17")
    assert [name for name, _ in ClipShapeRule(8, 16).problems(None, 5, 250)] == ["height", "width"]
    assert "try 16" in next(iter(ClipShapeRule(8, 16).problems(None, 5, None)))[1]


def test_kinds_of_models(model, tmp_path):
    assert backbone_of(model) is COGVIDEOX
    assert backbone_of(write_latte_folder(tmp_path / "bridge")) is LATTE_BRIDGE
    assert backbone_of(write_latte_folder(tmp_path / "both", "bridge_neural_prior")) is LATTE_BRIDGE
    assert backbone_of(write_latte_folder(tmp_path / "prior", "neural_prior")) is LATTE_NEURAL_PRIOR
    for what, content in {"flux": '{"_class_name": "FluxPipeline"}', "damaged": "{", "none": "{}"}.items():
        (tmp_path / what).mkdir()
        (tmp_path / what / "model_index.json").write_text(content)
        assert backbone_of(tmp_path / what) is None
    for network, expected in {"transformer": LATTE_BRIDGE, "neural_prior": LATTE_NEURAL_PRIOR}.items():
        info = {"pipeline_class": "FrameBridgeLattePipeline", "network_name": network}
        (tmp_path / "damaged" / "framebridge.json").write_text(json.dumps(info))
        assert backbone_of(tmp_path / "damaged") is expected
    (tmp_path / "damaged" / "framebridge.json").write_text('{"base_model": "a/b"}')
    assert backbone_of(tmp_path / "damaged") is COGVIDEOX
