"""A LoRA run's files give back what the trainer had: in our pipeline, and in plain diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from framebridge_plugin.backbones.cogvideox.adapter import call_transformer, load_bridge_transformer
from framebridge_plugin.backbones.cogvideox.pipeline import FrameBridgeCogVideoXPipeline
from framebridge_plugin.backbones.folders import LORA_FILE, LORA_INFO_FILE
from framebridge_plugin.backbones.manifest import MANIFEST_FILE
from framebridge_plugin.commands.sample import open_pipeline
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.training import FrameBridgeTrainer
from framebridge_plugin.training.finetrainers.registration import add_lora_layers
from tests.tiny_models import LATENT_CHANNELS, make_tiny_cogvideox
from tests.training.bridge_runs import SIZE, make_inputs, make_specification, run_trainer


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
    torch.testing.assert_close(output(reloaded.transformer), live, rtol=0, atol=1e-6)
    base = output(base_transformer(inputs))
    assert (base - live).abs().max() > 0.05 * live.abs().max()

    specification = trainer.model_specification
    pipeline = specification.load_pipeline(transformer=trainer.transformer, scheduler=trainer.scheduler)
    torch.testing.assert_close(sampled(reloaded), sampled(pipeline), rtol=0, atol=1e-6)
    assert (reloaded.config.num_frames, reloaded.config.height, reloaded.config.width) == (9, SIZE, SIZE)
    assert reloaded.config.fps == 12.0
    assert settings_of(reloaded.scheduler) == settings_of(trainer.scheduler)


def plain_pipeline(inputs: Path) -> CogVideoXPipeline:
    return CogVideoXPipeline.from_pretrained(inputs / "model", transformer=base_transformer(inputs))


def assert_is(transformer: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(output(transformer), expected, rtol=0, atol=1e-6)


WAYS_TO_LOAD = {
    "folder": lambda pipeline, run: pipeline.load_lora_weights(run / "lora"),
    "folder and name": lambda pipeline, run: pipeline.load_lora_weights(run / "lora", weight_name=LORA_FILE),
    "subfolder": lambda pipeline, run: pipeline.load_lora_weights(run, subfolder="lora"),
    "file": lambda pipeline, run: pipeline.load_lora_weights(run / "lora" / LORA_FILE),
    "network": lambda pipeline, run: pipeline.transformer.load_lora_adapter(run / "lora", weight_name=LORA_FILE),
}


@pytest.mark.parametrize("way", WAYS_TO_LOAD)
def test_plain_diffusers_loads_the_lora_file(trainer, inputs, way):
    """Into a widened transformer, without any code of ours."""
    plain = plain_pipeline(inputs)
    WAYS_TO_LOAD[way](plain, inputs / "run")
    assert_is(plain.transformer, output(trainer.transformer))


def test_plain_diffusers_scales_removes_and_fuses_it(trainer, inputs):
    plain = plain_pipeline(inputs)
    base, live = output(plain.transformer), output(trainer.transformer)
    plain.load_lora_weights(inputs / "run/lora", adapter_name="a")
    for change, undo in (
        (lambda: plain.set_adapters("a", 0.0), lambda: plain.set_adapters("a", 1.0)),
        (plain.disable_lora, plain.enable_lora),
        (lambda: plain.delete_adapters("a"), lambda: plain.load_lora_weights(inputs / "run/lora", adapter_name="a")),
        (plain.unload_lora_weights, lambda: plain.load_lora_weights(inputs / "run/lora", adapter_name="a")),
        (lambda: (plain.fuse_lora(), plain.unfuse_lora(), plain.disable_lora()), plain.enable_lora),
    ):
        change()
        assert_is(plain.transformer, base)
        undo()
        assert_is(plain.transformer, live)
    plain.fuse_lora()
    plain.unload_lora_weights()
    assert_is(plain.transformer, live)


def test_two_loras_do_not_overwrite_each_other(trainer, inputs, tmp_path):
    # Another one: that of the run with B the other way round.
    other = load_file(inputs / "run/lora" / LORA_FILE)
    other = {name: -tensor if ".lora_B." in name else tensor for name, tensor in other.items()}
    with safe_open(inputs / "run/lora" / LORA_FILE, framework="pt") as file:
        save_file(other, tmp_path / LORA_FILE, metadata=file.metadata())
    plain = plain_pipeline(inputs)
    base, live = output(plain.transformer), output(trainer.transformer)
    plain.load_lora_weights(inputs / "run/lora", adapter_name="run")
    plain.load_lora_weights(tmp_path, adapter_name="other")
    plain.set_adapters(["run", "other"], [1.0, 1.0])
    assert_is(plain.transformer, base)
    plain.set_adapters(["run", "other"], [1.0, 0.0])
    assert_is(plain.transformer, live)
    plain.delete_adapters("other")
    assert_is(plain.transformer, live)


def test_the_lora_file_has_its_settings_in_its_header(trainer, inputs):
    with safe_open(inputs / "run/lora" / LORA_FILE, framework="pt") as file:
        header = file.metadata()
    settings = json.loads(header["lora_adapter_metadata"])
    layers = load_file(inputs / "run/lora" / LORA_FILE)
    # 8 channels times a kernel of 2 x 2.
    projection = {"patch_embed.proj": 32}
    assert settings["transformer.r"] == 4
    assert settings["transformer.lora_alpha"] == 8
    assert settings["transformer.rank_pattern"] == settings["transformer.alpha_pattern"] == projection
    assert "8 / 4" in header["scale"]
    assert all(name.startswith("transformer.") and "lora" in name for name in layers)
    assert torch.equal(layers["transformer.patch_embed.proj.lora_A.weight"].flatten(1), torch.eye(32))
    assert sorted(path.name for path in (inputs / "run/lora").iterdir()) == [
        LORA_INFO_FILE,
        MANIFEST_FILE,
        LORA_FILE,
        "scheduler",
    ]


@pytest.mark.parametrize("targets", ["(transformer_blocks).*(to_q|to_k)", ["to_v", "patch_embed.proj"]])
def test_a_file_without_metadata_is_exact_where_alpha_is_the_rank(inputs, tmp_path, targets):
    specification = make_specification(inputs / "model")
    models = specification.load_diffusion_models()
    network = models["transformer"].requires_grad_(False)
    settings = {"r": 4, "lora_alpha": 4, "target_modules": targets}
    add_lora_layers(specification, network, LoraConfig(**settings))
    specification.prepare_trainable_parameters(network, "lora")
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert "patch_embed.proj.lora_B.default.weight" in trained
    assert not any("base_layer" in name or "proj.lora_A" in name for name in trained)
    for parameter in trained.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    layers = get_peft_model_state_dict(network, {name: parameter.detach() for name, parameter in trained.items()})
    metadata = {"lora_config": json.dumps(settings)}
    specification._save_lora_weights(str(tmp_path), layers, models["scheduler"], metadata)
    with safe_open(tmp_path / LORA_FILE, framework="pt") as file:
        assert "scale" not in file.metadata()

    save_file(load_file(tmp_path / LORA_FILE), tmp_path / "bare.safetensors")
    plain = plain_pipeline(inputs)
    for file in (tmp_path / LORA_FILE, tmp_path / "bare.safetensors"):
        plain.load_lora_weights(file)
        assert_is(plain.transformer, output(network))
        plain.unload_lora_weights()


def test_a_pipeline_with_a_lora_is_saved_once_it_is_merged(trainer, reloaded, tmp_path):
    with pytest.raises(FrameBridgeError, match="fuse_lora"):
        reloaded.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    reloaded.fuse_lora(components=["transformer"])
    reloaded.unload_lora_weights()
    reloaded.save_pretrained(tmp_path)
    assert_is(FrameBridgeCogVideoXPipeline.from_pretrained(tmp_path).transformer, output(trainer.transformer))


def test_layers_that_are_not_there_are_refused_although_the_projection_is(inputs):
    specification = make_specification(inputs / "model")
    network = specification.load_diffusion_models()["transformer"]
    with pytest.raises(ValueError, match="nonsense"):
        add_lora_layers(specification, network, LoraConfig(target_modules=["nonsense"]))


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
    torch.testing.assert_close(output(reloaded.transformer), live, rtol=0, atol=1e-6)
    expected = load_file(other / "vae/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in reloaded.vae.state_dict().items())


@pytest.mark.parametrize("damage", ["missing", "truncated", "without the projection"])
def test_a_damaged_lora_file_is_refused_in_one_line(trainer, inputs, tmp_path, damage):
    shutil.copytree(inputs / "run/lora", tmp_path / "lora")
    file = tmp_path / "lora" / LORA_FILE
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        save_file({name: tensor for name, tensor in load_file(file).items() if "patch_embed" not in name}, file)
    with pytest.raises(FrameBridgeError, match=LORA_FILE) as error:
        open_pipeline(str(tmp_path / "lora"))
    assert "\n" not in str(error.value)


def test_a_network_in_half_precision_trains_and_saves_in_float32(inputs):
    validation = (f"--validation_dataset_file={inputs / 'validation.csv'}", "--validation_steps=1")
    options = ("--parallel_backend=ptd", *validation)
    trainer = run_trainer(FrameBridgeTrainer, inputs, inputs / "half", "lora", *options, transformer_dtype="bf16")
    trained = {parameter.dtype for parameter in trainer.transformer.parameters() if parameter.requires_grad}
    frozen = {p.dtype for name, p in trainer.transformer.named_parameters() if "lora_" not in name}
    assert (trained, frozen) == ({torch.float32}, {torch.bfloat16})
    assert {tensor.dtype for tensor in load_file(inputs / "half/lora" / LORA_FILE).values()} == {torch.float32}
    assert len(list((inputs / "half/validation").glob("*.mp4"))) == 2
    live = output(trainer.transformer.eval())
    reloaded = output(open_pipeline(str(inputs / "half"), torch_dtype=torch.bfloat16).transformer)
    torch.testing.assert_close(reloaded, live, rtol=0, atol=0.03 * live.abs().max().item())
