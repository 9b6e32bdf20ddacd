"""Latte folders and LoRA files: saved, opened, loaded and taken back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from framebridge_plugin import FrameBridgeLattePipeline
from framebridge_plugin.backbones.lora_folders import LoraInfo
from framebridge_plugin.backbones.saving import save_lora_folder
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.models.latte import LatteTransformer
from tests.backbones.latte_calls import latents_of, open_folder, picture, seeded
from tests.tiny_models import CLASS_NAMES, LATTE_KINDS, latte_config, make_tiny_latte
from tests.training.latte_runs import CLIP_SHAPE, make_latte_specification


@pytest.fixture
def pipeline(latte_folders) -> FrameBridgeLattePipeline:
    return open_folder(latte_folders["bridge"])


@pytest.fixture(params=LATTE_KINDS)
def any_pipeline(request, latte_folders) -> FrameBridgeLattePipeline:
    return open_folder(latte_folders[request.param])


# From scratch


def test_a_specification_from_scratch_draws_its_network_once(latte_folders, monkeypatch):
    """When it is loaded; until then the config will do. It is the network that `from_scratch` gives."""
    size = {"sample_height": 16, "sample_width": 16, "num_frames": 4, "class_names": CLASS_NAMES}
    expected = LatteTransformer.from_scratch(latte_config("S/4", **size), seed=7)
    seeds, draw = [], LatteTransformer.initialize_weights

    def draw_and_count(network, seed):
        seeds.append(seed)
        draw(network, seed)

    monkeypatch.setattr(LatteTransformer, "initialize_weights", draw_and_count)
    settings = {"latte_size": "S/4", "class_names": CLASS_NAMES, "clip_shape": CLIP_SHAPE, "seed": 7}
    specification = make_latte_specification("bridge", vae_id=str(latte_folders["bridge"] / "vae"), **settings)
    assert specification.transformer_config == expected.config
    assert seeds == []
    network = specification.load_diffusion_models()["transformer"]
    assert seeds == [7]
    assert network.config == expected.config
    weights = network.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in expected.state_dict().items())


# Saving and loading


def test_a_saved_pipeline_gives_the_same_frames(any_pipeline, tmp_path):
    expected = any_pipeline(picture(), "up", num_inference_steps=2, generator=seeded(), output_type="pt").frames
    any_pipeline.save_pretrained(tmp_path)
    copy = open_folder(tmp_path)
    for name, component in any_pipeline.components.items():
        assert type(getattr(copy, name)) is type(component)
    assert torch.equal(
        copy(picture(), "up", num_inference_steps=2, generator=seeded(), output_type="pt").frames, expected
    )


def test_components_that_a_folder_does_not_have_are_not_needed_in_its_index(latte_folders, tmp_path):
    """As a run writes it: only what there is."""
    make_tiny_latte(tmp_path, "neural_prior")
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["neural_prior"] == ["framebridge_plugin.models.latte", "LatteTransformer"]
    kept = {key: value for key, value in index.items() if value != [None, None]}
    assert set(kept) - {"num_inference_steps", "guidance_scale"} == {
        "_class_name",
        "_diffusers_version",
        "vae",
        "neural_prior",
        "fps",
    }
    (tmp_path / "model_index.json").write_text(json.dumps(kept))
    assert torch.equal(latents_of(open_folder(tmp_path)), latents_of(open_folder(latte_folders["neural_prior"])))


# LoRA


def write_lora(folder: Path, pipeline: FrameBridgeLattePipeline, name: str) -> Path:
    """As a run writes it, with random layers."""
    network = getattr(pipeline, name)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    network.add_adapter(config)
    draws = seeded(3)
    state = {
        key.replace(".default", ""): torch.randn(value.shape, generator=draws)
        for key, value in network.state_dict().items()
        if "lora_" in key
    }
    network.unload_lora()
    save_lora_folder(
        folder,
        info=LoraInfo("unused", pipeline_class="FrameBridgeLattePipeline", network_name=name),
        lora_state_dict=state,
        adapter_metadata={"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]},
        scheduler=pipeline.scheduler,
    )
    return folder


@pytest.mark.parametrize("kind", ["bridge", "neural_prior"])
def test_lora_layers_are_loaded_scaled_and_unloaded(latte_folders, kind, tmp_path):
    name = "transformer" if kind == "bridge" else "neural_prior"
    pipeline = open_folder(latte_folders[kind])
    plain = latents_of(pipeline)
    write_lora(tmp_path, pipeline, name)
    pipeline.load_lora_weights(tmp_path)
    assert pipeline.get_active_adapters() == ["default_0"]
    network = getattr(pipeline, name)
    assert network.peft_config["default_0"].lora_alpha == 8
    tuned = latents_of(pipeline)
    assert not torch.allclose(tuned, plain, atol=1e-3)

    alone = getattr(open_folder(latte_folders[kind]), name)
    alone.load_lora_adapter(tmp_path, prefix=name, weight_name="pytorch_lora_weights.safetensors")
    own, others = network.state_dict(), alone.state_dict()
    assert all(torch.equal(own[key], others[key]) for key in own)

    pipeline.unload_lora_weights()
    assert torch.equal(latents_of(pipeline), plain)


def test_lora_layers_of_a_network_that_is_not_there_are_refused(latte_folders, tmp_path):
    write_lora(tmp_path, open_folder(latte_folders["neural_prior"]), "neural_prior")
    with pytest.raises(FrameBridgeError, match="for neural_prior, which this pipeline does not have") as error:
        open_folder(latte_folders["bridge"]).load_lora_weights(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(FrameBridgeError, match="for another model"):
        open_folder(latte_folders["bridge"]).load_lora_weights({"unet.to_q.lora_A.weight": torch.zeros(1, 1)})
