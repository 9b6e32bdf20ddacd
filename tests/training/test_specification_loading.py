"""What the CogVideoX specification loads, and what it says where it cannot."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from framebridge_plugin.backbones.cogvideox.adapter import load_bridge_transformer
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.schedulers.backbone import build_backbone
from framebridge_plugin.training.objective import ObjectiveSettings
from tests.tiny_models import LATENT_CHANNELS, make_tiny_cogvideox
from tests.training.bridge_runs import make_specification


@pytest.fixture(scope="module")
def rotary_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cogvideox(tmp_path_factory.mktemp("rotary") / "model", rotary=True)


@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_it_loads_a_plain_model_and_widens_it(model_folder, rotary_folder, kind):
    folder = model_folder if kind == "2b" else rotary_folder
    models = make_specification(folder).load_diffusion_models()
    assert models["transformer"].config.in_channels == 2 * LATENT_CHANNELS
    assert isinstance(models["scheduler"], FrameBridgeScheduler)
    backbone = CogVideoXDDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    assert torch.equal(build_backbone(models["scheduler"].config.backbone).alphas_cumprod, backbone.alphas_cumprod)


def test_it_goes_on_from_a_fine_tuned_transformer_alone(model_folder, tmp_path):
    trained = load_bridge_transformer(str(model_folder), subfolder="transformer")
    torch.nn.init.normal_(trained.patch_embed.proj.weight, generator=torch.Generator().manual_seed(4))
    trained.save_pretrained(tmp_path / "transformer")
    specification = make_specification(model_folder, transformer_id=str(tmp_path / "transformer"))
    loaded = specification.load_diffusion_models()["transformer"]
    assert torch.equal(loaded.patch_embed.proj.weight, trained.patch_embed.proj.weight)


def test_every_other_component_can_come_from_a_folder_of_its_own(model_folder, tmp_path):
    other = make_tiny_cogvideox(tmp_path / "other", seed=1)
    parts = {f"{part}_id": str(other / part) for part in ("tokenizer", "text_encoder", "vae")}
    specification = make_specification(model_folder, **parts)
    loaded = specification.load_condition_models() | specification.load_latent_models()
    expected = make_specification(other)
    for name, module in (expected.load_condition_models() | expected.load_latent_models()).items():
        if name != "tokenizer":
            actual = loaded[name].state_dict()
            assert all(torch.equal(tensor, actual[key]) for key, tensor in module.state_dict().items())
    text = specification.prepare_conditions(
        tokenizer=loaded["tokenizer"], text_encoder=loaded["text_encoder"], caption="a red square", sample_seed=1
    )
    assert text["encoder_hidden_states"].shape == (1, 16, 16)


def test_it_goes_on_from_a_bridge_model_with_the_bridge_of_the_recipe(model_folder, tmp_path):
    first = make_specification(model_folder, ObjectiveSettings(beta_max=20.0, target="data"))
    models = first.load_diffusion_models()
    transformer, scheduler = models["transformer"], models["scheduler"]
    first._save_model(str(tmp_path / "model"), transformer, transformer.state_dict(), scheduler)
    again = make_specification(tmp_path / "model").load_diffusion_models()["scheduler"]
    assert (again.config.beta_max, again.config.target) == (50.0, "v")
    assert again.config.backbone == scheduler.config.backbone


LOADERS = {
    "transformer": "load_diffusion_models",
    "text_encoder": "load_condition_models",
    "vae": "load_latent_models",
}
FILES = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


def damage(folder: Path, part: str, how: str) -> None:
    file = folder / part / FILES[part]
    if how == "no such model":
        shutil.rmtree(folder)
    elif how == "missing part":
        shutil.rmtree(folder / part)
    elif how == "empty part":
        shutil.rmtree(folder / part)
        (folder / part).mkdir()
    elif how == "truncated weights":
        file_size = file.stat().st_size
        # A copy first: the file may be a hard link to another model's.
        shutil.copy(file, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)
        os.truncate(file, file_size // 2)
    elif how == "no JSON in the config":
        (folder / part / "config.json").write_text("{")


@pytest.mark.parametrize(
    "how", ["no such model", "missing part", "empty part", "truncated weights", "no JSON in the config"]
)
@pytest.mark.parametrize("part", LOADERS)
def test_what_cannot_be_loaded_is_said_in_one_line(model_folder, tmp_path, part, how):
    """By the constructor, which reads the configs, or when the weights are loaded."""
    shutil.copytree(model_folder, tmp_path / "model")
    damage(tmp_path / "model", part, how)
    with pytest.raises(FrameBridgeError) as error:
        getattr(make_specification(tmp_path / "model"), LOADERS[part])()
    message = str(error.value)
    assert "\n" not in message
    assert str(tmp_path / "model") in message
    if how == "no such model":
        assert message.startswith("no such folder: ")
        return
    assert message.startswith("cannot load ")
    assert "check that the folder is a complete CogVideoX model" in message


@pytest.mark.parametrize("part", LOADERS)
@pytest.mark.parametrize("in_shards", [False, True])
def test_weights_that_lack_a_tensor_are_refused(model_folder, tmp_path, part, in_shards):
    """diffusers and transformers would draw it."""
    shutil.copytree(model_folder, tmp_path / "model")
    models = make_specification(tmp_path / "model")
    module = CogVideoXTransformer3DModel if part == "transformer" else type(getattr(models, LOADERS[part])()[part])
    module = module.from_pretrained(tmp_path / "model" / part)
    shutil.rmtree(tmp_path / "model" / part)
    module.save_pretrained(tmp_path / "model" / part, max_shard_size="50KB" if in_shards else "1GB")
    assert len(list((tmp_path / "model" / part).glob("*.safetensors"))) > 1 or not in_shards or part == "text_encoder"
    getattr(make_specification(tmp_path / "model"), LOADERS[part])()
    file = min((tmp_path / "model" / part).glob("*.safetensors"))
    tensors = load_file(file)
    lacking = min(name for name in tensors if name.endswith("weight"))
    del tensors[lacking]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FrameBridgeError, match=f"lack 1 tensors of a .*, first {lacking}") as error:
        getattr(make_specification(tmp_path / "model"), LOADERS[part])()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["tokenizer", "tokenizer/spiece.model"])
def test_a_missing_tokenizer_is_said_in_one_line(model_folder, tmp_path, missing):
    """transformers would go on with a vocabulary that it made up."""
    shutil.copytree(model_folder, tmp_path / "model")
    path = tmp_path / "model" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FrameBridgeError, match=r"tokenizer has no vocabulary \(spiece.model\)") as error:
        make_specification(tmp_path / "model").load_condition_models()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_scheduler_that_the_bridge_does_not_know_is_said_in_one_line(model_folder, tmp_path, name):
    """It would be read as CogVideoX's."""
    shutil.copytree(model_folder, tmp_path / "model")
    getattr(diffusers, name)().save_pretrained(tmp_path / "model" / "scheduler")
    with pytest.raises(FrameBridgeError, match=f"cannot load scheduler from .*: it is for a {name}") as error:
        make_specification(tmp_path / "model")
    assert "\n" not in str(error.value)


def test_a_cogvideox_1_5_is_refused_from_its_config_alone(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    config = tmp_path / "model" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "patch_size_t": 2}))
    (tmp_path / "model" / "transformer" / FILES["transformer"]).unlink()
    with pytest.raises(FrameBridgeError, match="cannot load transformer from .*: it is a CogVideoX 1.5"):
        make_specification(tmp_path / "model")
    with pytest.raises(FrameBridgeError, match="is a CogVideoX 1.5"):
        load_bridge_transformer(str(tmp_path / "model"), subfolder="transformer")


def test_another_kind_of_model_is_said_in_one_line(model_folder, tmp_path):
    with pytest.raises(FrameBridgeError, match="it is of the class AutoencoderKLCogVideoX") as error:
        make_specification(model_folder, transformer_id=str(model_folder / "vae"))
    assert "\n" not in str(error.value)
