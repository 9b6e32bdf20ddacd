from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from framebridge_plugin.data import UCF101_CLASSES
from framebridge_plugin.errors import UsageError
from framebridge_plugin.recipe import find_recipe, load_recipe, recipe_summary, resolve_recipe, shipped_recipes
from framebridge_plugin.recipe.yaml_text import read_yaml
from framebridge_plugin.settings.finetrainers import LoraSection
from tests.cogvideox_files import write_clips, write_model_folder, write_webvid
from tests.recipe.helpers import write_class_folders
from tests.tiny_models import make_tiny_image_vae, make_tiny_latte

ROOT = Path(__file__).resolve().parents[2]


def overrides_for_shipped(name, tmp_path) -> list[str]:
    """What a user has to supply before a shipped recipe can run."""
    if name == "quickstart":
        # The shipped model has 2 levels in its VAE and compresses time by 2.
        model = write_model_folder(tmp_path / "model", temporal_compression=2, vae_levels=2)
        return [
            f"model.pretrained_model_name_or_path={model}",
            f"framebridge.data.data_root={write_clips(tmp_path / 'clips')}",
            "validation.validation_dataset_file=null",
        ]
    if name in ("cogvideox_bridge_lora", "ltx_bridge_lora", "wan_bridge_lora"):
        return [f"framebridge.data.data_root={write_clips(tmp_path / 'clips')}"]
    if name.startswith(("ucf101", "motion", "doom")):
        return overrides_for_latte(name, tmp_path)
    table, videos = write_webvid(tmp_path / "webvid")
    return [f"framebridge.data.csv={table}", f"framebridge.data.video_root={videos}"]


def overrides_for_latte(name, tmp_path) -> list[str]:
    # UCF-101's own classes, so that the classes of a prior trained on some of them are those of all of them.
    classes = write_class_folders(tmp_path / "classes", UCF101_CLASSES[:3])
    overrides = [f"framebridge.data.class_root={classes}", "validation.validation_dataset_file=null"]
    data = find_recipe_data(name)
    if not name.startswith("ucf101"):
        make_tiny_image_vae(compression=4).save_pretrained(tmp_path / "vae")
        overrides.append(f"model.vae_id={tmp_path / 'vae'}")
    if "split" in data:  # these clips have no lists
        overrides += ["framebridge.data.split=all", "validation.heldout=null"]
    if name.endswith("bridge_neural_prior"):
        prior = make_tiny_latte(
            tmp_path / "prior",
            "neural_prior",
            class_names=UCF101_CLASSES,
            num_frames=data["num_frames"],
            size=data["height"],
            compression=4 if "motion" in name else 8,
        )
        overrides.append(f"framebridge.neural_prior={prior}")
    return overrides


def find_recipe_data(name) -> dict:
    return read_yaml(find_recipe(name).read_text()).data["framebridge"]["data"]


def test_the_shipped_recipes():
    assert [path.name for path in sorted((ROOT / "recipes").iterdir())] == [
        "cogvideox_bridge.yaml",
        "cogvideox_bridge_lora.yaml",
        "cogvideox_diffusion_baseline.yaml",
        "doom_bridge.yaml",
        "ltx_bridge_lora.yaml",
        "motion_bridge.yaml",
        "motion_bridge_neural_prior.yaml",
        "motion_neural_prior.yaml",
        "quickstart.yaml",
        "ucf101_bridge.yaml",
        "ucf101_bridge_neural_prior.yaml",
        "ucf101_diffusion_baseline.yaml",
        "ucf101_neural_prior.yaml",
        "wan_bridge.yaml",
        "wan_bridge_lora.yaml",
    ]
    assert list(shipped_recipes()) == [path.stem for path in sorted((ROOT / "recipes").iterdir())]


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipe_is_right_and_says_how_to_use_it(name, tmp_path):
    overrides = overrides_for_shipped(name, tmp_path)
    recipe = load_recipe(name, overrides)
    load_recipe(name, overrides, {"WORLD_SIZE": str(recipe.parallelism.dp_degree or 8)})
    text = find_recipe(name).read_text()
    comment = re.match(r"(#.*\n)+", text).group()
    assert recipe_summary(find_recipe(name)).endswith(".")
    for part in ("Inputs", "Launch", "An override", "finetrainers train --recipe", "--nproc 8"):
        assert part in comment


def test_cogvideox_bridge_is_the_reference_run(tmp_path):
    recipe = load_recipe("cogvideox_bridge", overrides_for_shipped("cogvideox_bridge", tmp_path))
    data, ours, optimization = recipe.framebridge.data, recipe.framebridge, recipe.optimization
    assert (data.num_frames, data.height, data.width, data.frame_stride) == (17, 256, 256, 3)
    assert (ours.objective, ours.target, ours.snr_aligned) == ("bridge", "v", True)
    assert (ours.beta_min, ours.beta_max) == (0.01, 50.0)
    assert (ours.image_noise, ours.prior_noise, ours.noise_log_mean, ours.noise_log_std) == (True, True, -3.0, 0.5)
    assert ours.caption_dropout == 0.1
    assert (optimization.optimizer, optimization.beta1, optimization.beta2) == ("adamw", 0.9, 0.95)
    assert (optimization.lr, optimization.weight_decay, optimization.max_grad_norm) == (1e-5, 1e-4, 1.0)
    # The reference's cosine covers an eighth of its wave.
    assert (optimization.lr_scheduler, optimization.lr_warmup_steps) == ("constant_with_warmup", 200)
    assert optimization.train_steps == 30 * math.ceil(2_500_000 / 64)
    assert recipe.training.batch_size * recipe.parallelism.dp_degree == 64
    assert (recipe.training.training_type, recipe.training.gradient_accumulation_steps) == ("full-finetune", 1)
    precision = recipe.precision
    assert {precision.transformer_dtype, precision.vae_dtype, precision.text_encoder_dtype} == {"fp32"}
    assert (precision.allow_tf32, precision.float32_matmul_precision) == (True, "high")


REFERENCE = {
    # What the reference has where a recipe may have something else; a recipe names what it has something else for.
    "cogvideox_bridge": {
        "framebridge.alignment_edge": "reference",
        "optimization.lr_scheduler": "cosine_with_restarts",
        "optimization.lr_warmup_steps": 200,
        "training.seed": 42,
        "training.enable_tiling": True,
        "training.enable_slicing": True,
        "training.gradient_checkpointing": True,
        "dataloader.dataloader_num_workers": 0,
        "checkpoints.checkpointing_steps": 1000,
        "checkpoints.checkpointing_limit": None,
        "checkpoints.resume_from_checkpoint": "latest",
        "validation.validation_steps": 10,
    },
    **{
        name: {
            "training.seed": 3407 if name == "ucf101_neural_prior" else 42,
            "optimization.beta1": 0.9,
            "optimization.beta2": 0.999,
            "optimization.lr_warmup_steps": 0,
            "dataloader.dataloader_num_workers": 8,
            "checkpoints.checkpointing_steps": every,
            "checkpoints.checkpointing_limit": None,
            "checkpoints.resume_from_checkpoint": None,
            "validation.validation_steps": None,
        }
        for name, every in (("ucf101_bridge", 100), ("ucf101_neural_prior", 100), ("ucf101_bridge_neural_prior", 1000))
    },
}
FACTS = {
    "cogvideox_bridge": ["9.62e-6", "240x360", "exactly 33 frames", "empty cell", "stretched", "--start clean_prior"],
    **{name: ["0 .. L-49", "1.0667", "different", "the average alone"] for name in list(REFERENCE)[1:]},
}
FACTS["ucf101_bridge_neural_prior"] = [*FACTS["ucf101_bridge_neural_prior"], "flipped"]


@pytest.mark.parametrize("name", REFERENCE)
def test_a_recipe_names_every_departure_from_the_reference(name):
    recipe, _ = resolve_recipe(name)
    comment = re.match(r"(#.*\n)+", find_recipe(name).read_text()).group()
    departures = comment.partition("# Where this differs from the reference, and why")[2]
    for key, reference in REFERENCE[name].items():
        section, value = key.split(".")
        if getattr(getattr(recipe, section), value) != reference:
            assert value in departures, key
    for fact in FACTS[name]:
        assert fact in departures


UCF101_RUNS = {
    # model, learning rate, clips per GPU, objective
    "ucf101_bridge": ("latte_bridge", 1e-5, 8, "bridge"),
    "ucf101_neural_prior": ("latte_neural_prior", 1e-4, 8, "bridge"),
    "ucf101_bridge_neural_prior": ("latte_bridge", 1e-5, 4, "bridge"),
    "ucf101_diffusion_baseline": ("latte_bridge", 1e-5, 8, "diffusion"),
}


@pytest.mark.parametrize("name", UCF101_RUNS)
def test_the_ucf101_runs_are_the_references(name):
    recipe, _ = resolve_recipe(name)
    model_name, lr, batch_size, objective = UCF101_RUNS[name]
    data, ours, optimization = recipe.framebridge.data, recipe.framebridge, recipe.optimization
    assert (recipe.model.model_name, recipe.is_from_scratch) == (model_name, True)
    assert recipe.model.vae_id == "stabilityai/sd-vae-ft-ema"
    assert (data.num_frames, data.height, data.width) == (16, 256, 256)
    assert (data.frame_sampling, data.window_frames, data.window, data.horizontal_flip) == (
        *("linspace", 48, "random", True),
    )
    target = "v" if objective == "diffusion" else "eps_psi"
    assert (ours.latte_size, ours.objective, ours.target, ours.snr_aligned) == ("S/2", objective, target, False)
    assert (ours.beta_min, ours.beta_max) == (0.01, 50.0)
    assert (ours.image_noise, ours.prior_noise, ours.caption_dropout) == (False, False, 0.1)
    assert (ours.ema_decay, ours.ema_start_step) == (0.9999, 0)
    assert (optimization.max_grad_norm, ours.max_grad_norm_start_step) == (0.1, 100_000)
    assert (optimization.optimizer, optimization.weight_decay) == ("adamw", 0.0)
    assert (optimization.lr, optimization.lr_scheduler, optimization.train_steps) == (lr, "constant", 1_000_000)
    assert (optimization.beta1, optimization.beta2, optimization.epsilon) == (0.9, 0.999, 1e-8)
    assert (recipe.training.batch_size, recipe.parallelism.dp_degree) == (batch_size, 8)
    assert (recipe.training.training_type, recipe.training.gradient_accumulation_steps) == ("full-finetune", 1)
    precision = recipe.precision
    assert {precision.transformer_dtype, precision.vae_dtype} == {"fp32"}
    assert (precision.allow_tf32, precision.float32_matmul_precision) == (True, "high")
    assert (ours.neural_prior is not None) == (name == "ucf101_bridge_neural_prior")


@pytest.mark.parametrize("name", ["cogvideox_diffusion_baseline", "ucf101_diffusion_baseline"])
def test_a_baseline_differs_from_the_bridge_in_its_objective_only(name):
    bridge_name = name.replace("diffusion_baseline", "bridge")
    bridge, baseline = resolve_recipe(bridge_name)[0], resolve_recipe(name)[0]
    assert baseline.framebridge.objective == "diffusion"
    same = [f"checkpoints.output_dir={baseline.checkpoints.output_dir}", "framebridge.objective=diffusion"]
    # Whatever the bridge of a network from scratch predicts, its twin predicts v.
    same += ["framebridge.target=v"]
    assert resolve_recipe(bridge_name, same)[0] == baseline
    assert bridge != baseline


def test_recipes_of_flow_matching_keep_to_their_clips_and_to_what_is_predicted():
    of_wan, of_ltx = ["blocks.*(to_q|to_k|to_v|to_out.0)"], [LoraSection.model_fields["target_modules"].default[0]]
    for name, targets in (("wan_bridge", None), ("wan_bridge_lora", of_wan), ("ltx_bridge_lora", of_ltx)):
        recipe, _ = resolve_recipe(name)
        data, ours = recipe.framebridge.data, recipe.framebridge
        assert list(recipe.backbone.clip_rule({}, {}).problems(data.num_frames, data.height, data.width)) == []
        assert (ours.objective, ours.target, ours.snr_aligned, ours.beta_min, ours.beta_max) == (
            *("bridge", "flow", True, 0.01, 50.0),
        )
        assert targets is None or recipe.lora.target_modules == targets


def test_the_bridges_with_and_without_neural_prior_share_their_other_values():
    for bridge, changes in (("ucf101_bridge", ["training.batch_size=4"]), ("motion_bridge", [])):
        with_prior, _ = resolve_recipe(f"{bridge}_neural_prior")
        same = [
            f"checkpoints.output_dir={with_prior.checkpoints.output_dir}",
            f"framebridge.neural_prior={with_prior.framebridge.neural_prior}",
        ]
        assert resolve_recipe(bridge, [*changes, *same])[0] == with_prior


def test_the_neural_prior_is_looked_for_where_its_recipe_puts_it():
    for name in ("ucf101", "motion"):
        prior, _ = resolve_recipe(f"{name}_neural_prior")
        bridge, _ = resolve_recipe(f"{name}_bridge_neural_prior")
        assert Path(bridge.framebridge.neural_prior) == Path(prior.checkpoints.output_dir)


def test_find_recipe(tmp_path):
    assert find_recipe("quickstart") == find_recipe("quickstart.yaml") == ROOT / "recipes" / "quickstart.yaml"
    assert find_recipe(ROOT / "recipes" / "quickstart.yaml").is_file()
    with pytest.raises(UsageError, match=r"nowhere/x\.yaml: no such file"):
        find_recipe("nowhere/x.yaml")
    with pytest.raises(UsageError, match=r"did you mean quickstart\?"):
        find_recipe("quikstart")
    with pytest.raises(UsageError, match="not a file"):
        find_recipe(tmp_path)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_resolve_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, warnings = resolve_recipe(name)
    assert recipe.checkpoints.output_dir == f"runs/{name}"
    assert {"no such" in warning for warning in warnings} == {True}
