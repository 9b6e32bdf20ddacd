"""A LoRA run's files give back what the trainer had: in our pipeline, and in plain diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.model_folders.checks import LORA_INFO_FILE
from framebridge_plugin.models.calling import call_transformer
from framebridge_plugin.models.widening import load_bridge_transformer
from framebridge_plugin.pipelines.cogvideox import FrameBridgeCogVideoXPipeline
from framebridge_plugin.pipelines.sampling import open_pipeline
from framebridge_plugin.pipelines.saving import EXTRA_WEIGHTS_FILE, LORA_FILE
from framebridge_plugin.training import FrameBridgeTrainer
from tests.tiny_models import LATENT_CHANNELS, make_tiny_cogvideox
from tests.training.bridge_runs import SIZE, make_inputs, run_trainer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def trainer(inputs: Path) -> Any:
    """Rank 4 and alpha 8: a scale of 2, which whoever ignores alpha would miss."""
    trainer = run_trainer(FrameBridgeTrainer, inputs, inputs / "run", "lora", "--parallel_backend=ptd")
    trainer.transformer.eval()
    return trainer


@pytest.fixture
def reloaded(trainer: Any, inputs: Path) -> FrameBridgeCogVideoXPipeline:
    return open_pipeline(str(inputs / "run"))


@torch.no_grad()
def output(transformer: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 2 * LATENT_CHANNELS, 8, 8, generator=generator)
    text = torch.randn(2, 16, 16, generator=generator).to(transformer.patch_embed.text_proj.weight.dtype)
    return call_transformer(transformer, latents, torch.tensor([3.5, 965.7]), text)


def settings_of(scheduler: Any) -> dict[str, Any]:
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def sampled(pipeline: FrameBridgeCogVideoXPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    image = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(1)
    return pipeline(image, "a red square", num_inference_steps=3, generator=draws, output_type="latent").frames


def base_transformer(inputs: Path) -> Any:
    return load_bridge_transformer(str(inputs / "model"), subfolder="transformer")


def test_the_reloaded_pipeline_is_the_trainers(trainer, inputs, reloaded):
    live = output(trainer.transformer)
    torch.testing.assert_close(output(reloaded.transformer), live, rtol=0, atol=1e-5)
    base = output(base_transformer(inputs))
    assert (base - live).abs().max() > 0.05 * live.abs().max()

    specification = trainer.model_specification
    pipeline = specification.load_pipeline(transformer=trainer.transformer, scheduler=trainer.scheduler)
    torch.testing.assert_close(sampled(reloaded), sampled(pipeline), rtol=0, atol=1e-5)
    assert (reloaded.config.num_frames, reloaded.config.height, reloaded.config.width) == (9, SIZE, SIZE)
    assert settings_of(reloaded.scheduler) == settings_of(trainer.scheduler)


def test_both_the_layers_and_the_projection_matter(trainer, inputs):
    live = output(trainer.transformer)
    only_layers = base_transformer(inputs)
    only_layers.load_lora_adapter(load_file(inputs / "run/lora" / LORA_FILE), prefix="transformer")
    only_projection = base_transformer(inputs)
    only_projection.load_state_dict(load_file(inputs / "run/lora" / EXTRA_WEIGHTS_FILE), strict=False)
    for part in (only_layers, only_projection):
        assert (output(part) - live).abs().max() > 1e-3


def test_plain_diffusers_loads_the_lora_file(trainer, inputs):
    """Into a widened transformer, with alpha; the projection is one more load_state_dict."""
    lora = inputs / "run/lora"
    plain = CogVideoXPipeline.from_pretrained(inputs / "model", transformer=base_transformer(inputs))
    plain.load_lora_weights(lora)
    (config,) = plain.transformer.peft_config.values()
    assert (config.r, config.lora_alpha) == (4, 8)
    plain.transformer.load_state_dict(load_file(lora / EXTRA_WEIGHTS_FILE), strict=False)
    torch.testing.assert_close(output(plain.transformer), output(trainer.transformer), rtol=0, atol=1e-5)


def test_the_lora_file_has_its_settings_in_its_header(trainer, inputs):
    with safe_open(inputs / "run/lora" / LORA_FILE, framework="pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
        names = list(file.keys())
    assert settings["transformer.r"] == 4
    assert settings["transformer.lora_alpha"] == 8
    assert all(name.startswith("transformer.") and "lora" in name for name in names)


def test_unloading_gives_the_base_model_back(inputs, reloaded):
    expected = output(base_transformer(inputs))
    reloaded.unload_lora_weights()
    torch.testing.assert_close(output(reloaded.transformer), expected, rtol=0, atol=1e-6)
    # And loading again, twice, does not lose it.
    for name in ("first", "second"):
        reloaded.load_lora_weights(inputs / "run/lora", adapter_name=name)
    reloaded.unload_lora_weights()
    torch.testing.assert_close(output(reloaded.transformer), expected, rtol=0, atol=1e-6)


def test_the_run_can_be_opened_from_another_working_folder(trainer, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    info = json.loads((inputs / "run/lora" / LORA_INFO_FILE).read_text())
    assert Path(info["base_model"]) == (inputs / "model").resolve()
    open_pipeline(str(inputs / "run"))


def test_a_lora_on_another_transformer_and_autoencoder_finds_them_again(trainer, inputs, tmp_path):
    other = make_tiny_cogvideox(tmp_path / "other", seed=5, sample_size=SIZE)
    options = [f"--{part}_id={other / part}" for part in ("transformer", "vae")]
    trainer = run_trainer(FrameBridgeTrainer, inputs, tmp_path / "run", "lora", "--parallel_backend=ptd", *options)
    reloaded = open_pipeline(str(tmp_path / "run"))
    live = output(trainer.transformer.eval())
    torch.testing.assert_close(output(reloaded.transformer), live, rtol=0, atol=1e-5)
    expected = load_file(other / "vae/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in reloaded.vae.state_dict().items())


@pytest.mark.parametrize("damage", ["missing", "truncated", "of another model"])
def test_a_projection_that_does_not_fit_is_refused_in_one_line(trainer, inputs, tmp_path, damage):
    shutil.copytree(inputs / "run/lora", tmp_path / "lora")
    file = tmp_path / "lora" / EXTRA_WEIGHTS_FILE
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        save_file({"patch_embed.proj.weight": torch.zeros(8, 8, 2, 2)}, file)
    with pytest.raises(FrameBridgeError, match="cannot load the weights trained beside the LoRA layers") as error:
        open_pipeline(str(tmp_path / "lora"))
    assert "\n" not in str(error.value)


def test_a_network_in_half_precision_trains_and_saves_in_float32(inputs):
    validation = (f"--validation_dataset_file={inputs / 'validation.csv'}", "--validation_steps=1")
    options = ("--parallel_backend=ptd", *validation)
    trainer = run_trainer(FrameBridgeTrainer, inputs, inputs / "half", "lora", *options, transformer_dtype="bf16")
    trained = {parameter.dtype for parameter in trainer.transformer.parameters() if parameter.requires_grad}
    frozen = {parameter.dtype for parameter in trainer.transformer.parameters() if not parameter.requires_grad}
    assert (trained, frozen) == ({torch.float32}, {torch.bfloat16})
    for name in (LORA_FILE, EXTRA_WEIGHTS_FILE):
        assert {tensor.dtype for tensor in load_file(inputs / "half/lora" / name).values()} == {torch.float32}
    assert len(list((inputs / "half/validation").glob("*.mp4"))) == 2
    live = output(trainer.transformer.eval())
    reloaded = output(open_pipeline(str(inputs / "half"), torch_dtype=torch.bfloat16).transformer)
    torch.testing.assert_close(reloaded, live, rtol=0, atol=0.03 * live.abs().max().item())
