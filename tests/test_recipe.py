from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from framebridge_plugin.errors import UsageError
from framebridge_plugin.recipe import find_recipe, load_recipe, recipe_summary, resolve_recipe, shipped_recipes
from framebridge_plugin.recipe_schema import FrameBridgeSection, Recipe
from framebridge_plugin.recipe_yaml import read_yaml
from tests.cogvideox_files import write_clips, write_model_folder, write_webvid

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def model(tmp_path):
    return write_model_folder(tmp_path / "model")


@pytest.fixture
def minimal(tmp_path, model):
    """A recipe with nothing but what is required, and a function that writes variations of it."""
    sections = {
        "model": {"pretrained_model_name_or_path": str(model)},
        "training": {"training_type": "full-finetune"},
        "checkpoints": {"output_dir": str(tmp_path / "run")},
        "framebridge": {
            "data": {"data_root": str(write_clips(tmp_path / "clips")), "num_frames": 17, "height": 64, "width": 96}
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def problems_of(path, *overrides, environment=None) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load_recipe(path, overrides, environment)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


# ------------------------------------------------------------------------------------------- the shipped recipes


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
    if name == "cogvideox_bridge_lora":
        return [f"framebridge.data.data_root={write_clips(tmp_path / 'clips')}"]
    table, videos = write_webvid(tmp_path / "webvid")
    return [f"framebridge.data.csv={table}", f"framebridge.data.video_root={videos}"]


def test_there_are_four_shipped_recipes():
    assert [path.name for path in sorted((ROOT / "recipes").iterdir())] == [
        "cogvideox_bridge.yaml",
        "cogvideox_bridge_lora.yaml",
        "cogvideox_diffusion_baseline.yaml",
        "quickstart.yaml",
    ]
    assert list(shipped_recipes()) == [path.stem for path in sorted((ROOT / "recipes").iterdir())]


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipe_is_right_and_says_how_to_use_it(name, tmp_path):
    overrides = overrides_for_shipped(name, tmp_path)
    recipe = load_recipe(name, overrides)
    load_recipe(name, overrides, {"WORLD_SIZE": str(recipe.parallelism.dp_degree)})
    text = find_recipe(name).read_text()
    comment = re.match(r"(#.*\n)+", text).group()
    assert recipe_summary(find_recipe(name)).endswith(".")
    for part in ("Inputs", "Launch", "An override", "finetrainers train --recipe", "torchrun --nproc-per-node 8"):
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
    assert (optimization.lr_scheduler, optimization.lr_num_cycles) == ("cosine_with_restarts", 1)
    assert optimization.lr_warmup_steps == 200
    assert optimization.train_steps == 30 * math.ceil(2_500_000 / 64)
    assert recipe.training.batch_size * recipe.parallelism.dp_degree == 64
    assert (recipe.training.training_type, recipe.training.gradient_accumulation_steps) == ("full-finetune", 1)
    precision = recipe.precision
    assert {precision.transformer_dtype, precision.vae_dtype, precision.text_encoder_dtype} == {"fp32"}
    assert (precision.allow_tf32, precision.float32_matmul_precision) == (True, "high")


def test_the_baseline_differs_from_the_bridge_in_its_objective_only(tmp_path):
    overrides = overrides_for_shipped("cogvideox_bridge", tmp_path)
    bridge = load_recipe("cogvideox_bridge", overrides)
    baseline = load_recipe("cogvideox_diffusion_baseline", overrides)
    assert baseline.framebridge.objective == "diffusion"
    same = [f"checkpoints.output_dir={baseline.checkpoints.output_dir}", "framebridge.objective=diffusion"]
    assert load_recipe("cogvideox_bridge", overrides + same) == baseline
    assert bridge != baseline


def test_find_recipe(tmp_path):
    assert find_recipe("quickstart") == find_recipe("quickstart.yaml") == ROOT / "recipes" / "quickstart.yaml"
    assert find_recipe(ROOT / "recipes" / "quickstart.yaml").is_file()
    with pytest.raises(UsageError, match=r"nowhere/x\.yaml: no such file"):
        find_recipe("nowhere/x.yaml")
    with pytest.raises(UsageError, match=r"did you mean quickstart\?"):
        find_recipe("quikstart")
    with pytest.raises(UsageError, match="not a file"):
        find_recipe(tmp_path)


# ------------------------------------------------------------------------------------------- values and overrides


def test_overrides_are_typed_as_yaml(minimal):
    recipe = load_recipe(
        minimal,
        [
            "optimization.lr=2e-5",
            "optimization.train_steps=10",
            "framebridge.target=eps_psi",
            "framebridge.snr_aligned=false",
            "precision.layerwise_upcasting_skip_modules_pattern=[norm, '^proj$']",
            "checkpoints.resume_from_checkpoint=latest",
            "optimization.lr=3E+1",
            "model.revision=",
        ],
    )
    assert recipe.optimization.lr == 30.0  # the last one counts
    assert recipe.optimization.train_steps == 10
    assert recipe.framebridge.target == "eps_psi"
    assert recipe.framebridge.snr_aligned is False
    assert recipe.precision.layerwise_upcasting_skip_modules_pattern == ["norm", "^proj$"]
    assert recipe.checkpoints.resume_from_checkpoint == "latest"
    assert recipe.model.revision is None


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", ".1e-4", "0.00001", "+1e-05"])
def test_every_way_to_write_a_small_number(minimal, text):
    minimal.write_text(minimal.read_text() + f"\noptimization: {{lr: {text}}}\n")
    assert load_recipe(minimal).optimization.lr == 1e-5
    assert load_recipe(minimal, [f"optimization.lr={text}"]).optimization.lr == 1e-5


def test_null_takes_a_section_away(minimal):
    lora = ["training.training_type=lora", "lora.rank=8"]
    assert load_recipe(minimal, lora).lora.rank == 8
    assert load_recipe(minimal, [*lora, "lora=null"]).lora.rank == 64


@pytest.mark.parametrize("override", ["optimization.lr", "=3", "optimization lr=3", "--lr=3", ""])
def test_malformed_override(minimal, override):
    assert "an override is dotted.path=value" in problems_of(minimal, override)[0]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optimization=3", "optimization.lr=1e-3"], "optimization.lr: optimization is 3, not a section"),
        (["optimization.train_steps=5", "optimization.train_steps.x=1"], "train_steps is 5, not a section"),
        (["framebridge.data=clips", "framebridge.data.num_frames=9"], "data is 'clips', not a section"),
    ],
)
def test_a_value_in_the_place_of_a_section(minimal, overrides, message):
    (problem,) = problems_of(minimal, *overrides)
    assert problem.startswith(f"command line: {overrides[1].partition('=')[0]}: ")
    assert message in problem


def test_a_recipe_resolves_without_its_files(minimal, tmp_path):
    missing = ["framebridge.data.data_root=nowhere", "validation.validation_dataset_file=nowhere.csv"]
    recipe, warnings = resolve_recipe(minimal, missing)
    assert recipe.framebridge.data.data_root == "nowhere"
    assert warnings == problems_of(minimal, *missing)
    assert ["no such" in warning for warning in warnings] == [True, True]
    # What is wrong in any place is an error, and comes with the rest.
    with pytest.raises(UsageError) as caught:
        resolve_recipe(minimal, [*missing, "framebridge.data.num_frames=16"])
    assert str(caught.value).splitlines() == problems_of(minimal, *missing, "framebridge.data.num_frames=16")
    assert resolve_recipe(minimal) == (load_recipe(minimal), [])


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_resolve_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, warnings = resolve_recipe(name)
    assert recipe.checkpoints.output_dir == f"runs/{name}"
    assert {"no such" in warning for warning in warnings} == {True}


def test_the_resolved_recipe_reads_back_as_itself(minimal, tmp_path):
    for overrides in (
        [],
        ["training.training_type=lora", "lora.target_modules=[to_q, to_k]", "optimization.lr=1e-7"],
        ["tracking.tracker_name='1e-5'", "model.revision='true'", "framebridge.data.id_token='null'"],
    ):
        recipe = load_recipe(minimal, overrides)
        resolved = tmp_path / "resolved.yaml"
        resolved.write_text(recipe.to_yaml())
        again = load_recipe(resolved)
        assert again == recipe
        assert again.to_yaml() == recipe.to_yaml()


def test_the_resolved_recipe_does_not_hold_the_token(minimal):
    recipe = load_recipe(minimal, ["hub.hub_token=hf_secret"])
    assert "hf_secret" not in recipe.to_yaml()
    assert "hf_secret" not in repr(recipe)
    assert "--hub_token=hf_secret" in recipe.to_finetrainers_argv("data.json")


def test_dataset_config_has_absolute_paths(minimal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(
        minimal, ["framebridge.data.data_root=clips", "framebridge.data.frame_stride=2", "framebridge.data.id_token=T"]
    )
    assert recipe.dataset_config() == {
        "datasets": [
            {
                "dataset_type": "video",
                "data_root": str(tmp_path / "clips"),
                "video_resolution_buckets": [[17, 64, 96]],
                "frame_stride": 2,
                "window": "random",
                "horizontal_flip": False,
                "id_token": "T",
            }
        ]
    }


# ------------------------------------------------------------------------------------------- errors


def test_all_errors_at_once_with_path_nearest_name_and_line(minimal, tmp_path):
    minimal.write_text(
        minimal.read_text() + "optimization:\n"
        "  lr: fast\n"
        "  learning_rate: 1\n"
        "  beta1: 1.5\n"
        "  lr: 1e-4\n"
        "  optimizer: adamv\n"
        "optimisation: {}\n"
        "tracking: {report_to: tensorboard, rank: 3}\n"
        "lora: {target_modules: [to_q, 3]}\n"
    )
    first = minimal.read_text().splitlines().index("optimization:") + 1
    found = problems_of(minimal, "framebridge.data.num_frames=16", "validation.validation_dataset_file=nowhere.csv")
    expected = [
        ("command line", "framebridge.data.num_frames", "the nearest is 17"),
        ("command line", "validation.validation_dataset_file", "no such file: nowhere.csv"),
        (first + 2, "optimization.learning_rate", "unknown key; the nearest is optimization."),
        (first + 3, "optimization.beta1", "less than 1"),
        (first + 4, "optimization.lr", f"again, after line {first + 1}"),
        (first + 5, "optimization.optimizer", "did you mean adam"),
        (first + 6, "optimisation", "the nearest is optimization"),
        (first + 7, "tracking.rank", "the nearest is lora.rank"),
        (first + 7, "tracking.report_to", "'none' or 'wandb'"),
        (first + 8, "lora.target_modules.1", "in quotes"),
    ]
    assert len(found) == len(expected)
    for problem, (place, path, text) in zip(found, expected, strict=True):
        assert problem.startswith(f"{place}: {path}: " if isinstance(place, str) else f"{minimal}:{place}: {path}: ")
        assert text in problem


def test_what_is_required(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert [problem.split(": ", 1)[1] for problem in problems_of(path)] == [
        "checkpoints.output_dir: is required",
        "framebridge.data: the recipe names no data: give framebridge.data, or dataset.dataset_config",
        "model.pretrained_model_name_or_path: is required",
        "training.training_type: is required",
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a: [1\nb: 2\n", "line 2: "),
        (b"- a\n- b\n", "a recipe is a mapping of sections"),
        (b"x: &a {y: *a}\n", r"aliases \(\*name\) are not used"),
        (b"a: 1\n---\nb: 2\n", "single document"),
        (b"? [a]\n: 1\n", "line 1: a key must be a word"),
        (b"a: !!python/object/apply:os.system ['true']\n", "unknown key"),  # the tag is not obeyed
        (b"a: !!python/name:os.system\n", "could not determine a constructor"),
        (b"\xff\xfe\x00\x01", "is not a text file"),
        (b"a: \x07\n", "special characters are not allowed"),
        (b"[" * 100_000, "nested too deeply"),
        (b"#" * 2_000_000, "too large for a recipe"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert re.search(message, "\n".join(problems_of(path)))


@pytest.mark.parametrize(
    "override, path, message",
    [
        ("training.batch_size=1.5", "training.batch_size", "valid integer"),
        ("training.batch_size=true", "training.batch_size", "valid integer"),
        ("training.batch_size='4'", "training.batch_size", "without quotes"),
        ("training.batch_size=0", "training.batch_size", "greater than or equal to 1"),
        ("training.gradient_checkpointing=1", "training.gradient_checkpointing", "boolean"),
        ("optimization.lr=.nan", "optimization.lr", "finite number"),
        ("optimization.lr=0", "optimization.lr", "greater than 0"),
        ("model.revision=1.0", "model.revision", "in quotes"),
        ("training=lora", "training", "a section with keys of its own"),
        ("training.training_type=control-lora", "training.training_type", "'full-finetune' or 'lora'"),
        ("checkpoints.resume_from_checkpoint=best", "checkpoints.resume_from_checkpoint", "'latest'"),
        ("checkpoints.resume_from_checkpoint=true", "checkpoints.resume_from_checkpoint", "'latest'"),
        ("attention.attn_provider_training=[flash]", "attention.attn_provider_training.0", "<component>:<provider>"),
        (
            "attention.attn_provider_training=['transformer:sage']",
            "attention.attn_provider_training.0",
            "a provider among flash,",
        ),
        (
            "attention.attn_provider_training=['unet:native']",
            "attention.attn_provider_training.0",
            "a component among transformer, vae, text_encoder",
        ),
        ("compile.compile_modules=[transfomer]", "compile.compile_modules.0", "did you mean transformer?"),
        ("compile.compile_modules=[unet]", "compile.compile_modules.0", "'transformer', 'vae' or 'text_encoder'"),
        ("framebridge.noise_log_mean=3.5", "framebridge.noise_log_mean", "less than or equal to 3"),
        ("framebridge.noise_log_mean=-21", "framebridge.noise_log_mean", "greater than or equal to -20"),
        ("framebridge.noise_log_std=4", "framebridge.noise_log_std", "less than or equal to 3"),
        ("framebridge.caption_dropout=1", "framebridge.caption_dropout", "less than 1"),
        ("framebridge.prior_nose=1", "framebridge.prior_nose", "framebridge.prior_noise"),
        ("train_steps=10", "train_steps", "optimization.train_steps"),
        ("training.lr=10", "training.lr", "optimization.lr"),
        ("zzz=10", "zzz", "the nearest is"),
    ],
)
def test_wrong_values(minimal, override, path, message):
    (problem,) = problems_of(minimal, override)
    assert problem.startswith(f"command line: {path}: ")
    assert message in problem


@pytest.mark.parametrize(
    "overrides, path, message",
    [
        (["framebridge.objective=diffusion", "framebridge.target=noise"], "framebridge.target", "predicts v"),
        (["framebridge.beta_min=0", "framebridge.beta_max=0"], "framebridge.beta_max", "no noise at all"),
        (["lora.rank=8"], "lora.rank", "has no effect with training_type full-finetune"),
        (
            ["precision.layerwise_upcasting_modules=[transformer]"],
            "precision.layerwise_upcasting_modules",
            "cannot be trained",
        ),
        (["optimization.lr_warmup_steps=5"], "optimization.lr_warmup_steps", "constant_with_warmup"),
        (["precision.allow_tf32=true"], "precision.allow_tf32", "switches TF32 off"),
        (["dataset.precomputation_once=true"], "dataset.precomputation_once", "enable_precomputation"),
        (["compile.compile_scopes=full"], "compile.compile_scopes", "1 scope(s) for 0"),
        (
            ["parallelism.parallel_backend=accelerate", "parallelism.dp_degree=2"],
            "parallelism.parallel_backend",
            "does not synchronise gradients",
        ),
        (["parallelism.pp_degree=2"], "parallelism.pp_degree", "only 1 is supported"),
        (["parallelism.cp_degree=2"], "parallelism.cp_degree", "only 1 is supported"),
        (["parallelism.tp_degree=2"], "parallelism.tp_degree", "only 1 is supported"),
        (
            ["validation.enable_model_cpu_offload=true", "parallelism.dp_shards=2"],
            "validation.enable_model_cpu_offload",
            "one process only",
        ),
        (
            ["optimization.optimizer=adamw-torchao-8bit", "parallelism.dp_shards=2"],
            "optimization.optimizer",
            "does not work on sharded weights: take adamw",
        ),
        (["optimization.optimizer=adamw-bnb", "parallelism.dp_shards=2"], "optimization.optimizer", "sharded weights"),
        (
            ["attention.attn_provider_training=['transformer:flash_varlen']"],
            "attention.attn_provider_training",
            "transformer:flash_varlen needs the package flash-attn: `pip install flash-attn`",
        ),
        (
            ["attention.attn_provider_inference=['transformer:_sage_qk_int8_pv_fp8_cuda']"],
            "attention.attn_provider_inference",
            "pip install sageattention",
        ),
        (
            ["attention.attn_provider_training=['vae:native']"],
            "attention.attn_provider_training",
            "CogVideoX's VAE has no attention",
        ),
        (["framebridge.data.height=100"], "framebridge.data.height", "multiple of 16"),
        (["framebridge.data.num_frames=21"], "framebridge.data.num_frames", "8 k + 1"),
        (["framebridge.data.csv=x.csv"], "framebridge.data", "not csv and data_root"),
        (["framebridge.data.data_root=nowhere"], "framebridge.data.data_root", "no such folder: nowhere"),
        (["framebridge.data=null"], "framebridge.data", "names no data"),
        (["model.pretrained_model_name_or_path=./nowhere"], "model.pretrained_model_name_or_path", "no such folder"),
        (["model.transformer_id=/nowhere"], "model.transformer_id", "no such folder"),
        (["validation.validation_dataset_file=x.txt"], "validation.validation_dataset_file", "should end in .csv"),
    ],
)
def test_impossible_combinations(minimal, overrides, path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [problem for problem in problems_of(minimal, *overrides) if f" {path}: " in problem]
    assert len(found) == 1
    assert message in found[0]


def test_an_attention_provider_with_its_package(minimal, tmp_path, monkeypatch):
    use_flash = ["attention.attn_provider_training=['transformer:flash']"]
    assert "pip install flash-attn" in problems_of(minimal, *use_flash)[0]
    (tmp_path / "flash_attn.py").write_text("raise AssertionError('must not be imported to be found')")
    monkeypatch.syspath_prepend(tmp_path)
    load_recipe(minimal, use_flash)
    # These come with torch, whatever their names say.
    load_recipe(minimal, ["attention.attn_provider_training=['transformer:_native_flash', 'text_encoder:flex']"])


@pytest.mark.parametrize("optimizer", ["adamw-torchao-8bit", "adam-bnb", "adamw-bnb-8bit"])
def test_quantised_optimizers_work_on_replicas(minimal, optimizer):
    load_recipe(minimal, [f"optimization.optimizer={optimizer}", "parallelism.dp_degree=2"])


WITHOUT_EFFECT = [
    *(f"model.{name}" for name in ("variant", "tokenizer_2_id", "tokenizer_3_id", "text_encoder_2_id")),
    *("model.text_encoder_3_id", "optimization.beta3"),
    *(f"diffusion.{name}" for name in Recipe.model_fields["diffusion"].annotation.model_fields),
]


@pytest.mark.parametrize("where", WITHOUT_EFFECT)
def test_what_has_no_effect_is_refused(minimal, where):
    section, name = where.split(".")
    value = read_yaml(EVERYTHING).data[section][name]
    (problem,) = problems_of(minimal, f"{where}={yaml.safe_dump(value)}")
    assert problem.startswith(f"command line: {where}: has no effect: ")
    assert problem.endswith("; remove it")
    default = Recipe.model_fields[section].annotation.model_fields[name].default
    load_recipe(minimal, [f"{where}={yaml.safe_dump(default)}"])  # a resolved recipe holds it


def test_gradient_accumulation_is_allowed(minimal):
    assert load_recipe(minimal, ["training.gradient_accumulation_steps=4"]).training.gradient_accumulation_steps == 4


def test_the_rule_for_clips_comes_from_the_model(minimal, tmp_path):
    tiny = write_model_folder(tmp_path / "tiny", temporal_compression=2, vae_levels=2)
    use_tiny = [f"model.pretrained_model_name_or_path={tiny}", "framebridge.data.height=60"]
    load_recipe(minimal, [*use_tiny, "framebridge.data.num_frames=5"])
    (problem,) = problems_of(minimal, *use_tiny, "framebridge.data.num_frames=7")
    assert "4 k + 1" in problem
    # A replaced VAE brings its own rule.
    load_recipe(minimal, [f"model.vae_id={tiny / 'vae'}", "framebridge.data.num_frames=5"])
    # A hub id cannot be looked into: CogVideoX's own rule holds.
    hub = "model.pretrained_model_name_or_path=zai-org/CogVideoX-2b"
    assert "8 k + 1" in problems_of(minimal, hub, "framebridge.data.num_frames=5")[0]


def test_the_number_of_processes(minimal):
    load_recipe(minimal, ["parallelism.dp_degree=8"])  # not asked without a launch
    load_recipe(minimal, ["parallelism.dp_degree=2", "parallelism.dp_shards=4"], {"WORLD_SIZE": "8"})
    load_recipe(minimal, [], {})
    (problem,) = problems_of(minimal, "parallelism.dp_degree=8", environment={})
    assert "torchrun --nproc-per-node 8 --no-python finetrainers" in problem
    (problem,) = problems_of(minimal, environment={"WORLD_SIZE": "2"})
    assert "set parallelism.dp_degree=2" in problem
    (problem,) = problems_of(minimal, "parallelism.parallel_backend=accelerate", environment={"WORLD_SIZE": "2"})
    assert "does not synchronise gradients" in problem
    (problem,) = problems_of(minimal, environment={"WORLD_SIZE": "two"})
    assert "WORLD_SIZE should be a positive number" in problem


def test_webvid_layout(minimal, tmp_path):
    table, videos = write_webvid(tmp_path / "webvid")
    ours = [
        "framebridge.data.data_root=null",
        f"framebridge.data.csv={table}",
        f"framebridge.data.video_root={videos}",
    ]
    entry = load_recipe(minimal, ours).dataset_config()["datasets"][0]
    assert (entry["csv"], entry["video_root"]) == (str(table), str(videos))
    table.write_text("id,caption\n1,x\n")
    assert "has no column name and videoid, only id, caption" in problems_of(minimal, *ours)[0]
    table.write_text("")
    (videos / "1.mp4").unlink()
    assert ["is empty" in problem for problem in problems_of(minimal, *ours)] == [True, True]


def test_dataset_json(minimal, tmp_path):
    table = tmp_path / "data.json"
    use_table = ["framebridge.data=null", f"dataset.dataset_config={table}"]
    entry = {"data_root": "clips", "dataset_type": "video", "video_resolution_buckets": [[17, 64, 96]]}
    table.write_text(json.dumps({"datasets": [entry]}))
    recipe = load_recipe(minimal, use_table)
    assert f"--dataset_config={table}" in recipe.to_finetrainers_argv()
    assert "named twice" in problems_of(minimal, f"dataset.dataset_config={table}")[0]
    for content, message in (
        (json.dumps({"datasets": [entry | {"video_resolution_buckets": [[16, 64, 96]]}]}), "8 k + 1"),
        (json.dumps({"datasets": []}), "should hold a list 'datasets'"),
        ("[]", "should hold a JSON object"),
        ('{"datasets', "not readable JSON"),
    ):
        table.write_text(content)
        assert message in problems_of(minimal, *use_table)[0]
    table.unlink()
    assert "data.json is missing" in problems_of(minimal, *use_table)[0]


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A working directory with a picture, and half a picture."""
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((64, 64), 50).save("cat.png")
    Path("half.png").write_bytes(Path("cat.png").read_bytes()[:1000])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("v.csv", "caption,image_path\na cat,cat.png\na dog,dog.png\n", "row 2: image_path: no such file: dog.png"),
        (
            "v.csv",
            "caption,image_path\na cat,cat.png\na cat,half.png\n",
            "row 2: image_path: half.png: cannot be read",
        ),
        ("v.csv", "caption,image_path,video_path\na cat,cat.png,x.mp4\n", "row 1: video_path: no such file: x.mp4"),
        ("v.csv", "prompt,image_path\na cat,cat.png\n", "row 1: lacks caption"),
        ("v.csv", "caption,image_path\na cat,\n", "row 1: lacks caption, or image_path"),
        ("v.csv", "caption,image_path\n", "has no rows"),
        ("v.csv", "", "is empty"),
        ("v.csv", b"\xff\xfe", "cannot be read"),
        ("v.json", '{"data": [{"caption": "a cat", "image_path": "dog.png"}]}', "no such file: dog.png"),
        ("v.json", '{"rows": []}', "a list 'data'"),
        ("v.json", "[", "not readable JSON"),
    ],
)
def test_validation_file(minimal, pictures, name, content, message):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (problem,) = problems_of(minimal, f"validation.validation_dataset_file={name}")
    assert message in problem


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("num_frames", 16, "num_frames: the VAE returns only 8 k + 1 frames, not 16"),
        ("num_frames", -7, "num_frames should be a whole number, 1 or more, not -7"),
        ("num_frames", 17.0, "num_frames should be a whole number, 1 or more, not 17.0"),
        ("height", 100, "height: should be a multiple of 16"),
        ("width", "wide", "width should be a whole number, 1 or more, not 'wide'"),
        ("num_inference_steps", 0, "num_inference_steps should be a whole number, 1 to 1000, not 0"),
        ("num_inference_steps", 1001, "not 1001"),
        ("num_inference_steps", True, "1 to 1000, not"),
        ("guidance_scale", -1, "guidance_scale should be a number of 0 or more, not -1"),
        ("guidance_scale", "inf", "guidance_scale should be a number of 0 or more"),
        ("export_fps", "fast", "export_fps should be a whole number, 1 or more"),
    ],
)
def test_validation_rows_that_cannot_be_sampled(minimal, pictures, column, value, message):
    Path("v.csv").write_text(f"caption,image_path,{column}\na cat,cat.png,\na cat,cat.png,{value}\n")
    row = {"caption": "a cat", "image_path": "cat.png"}
    Path("v.json").write_text(json.dumps({"data": [row, row | {column: value}]}))
    for name in ("v.csv", "v.json"):
        (problem,) = problems_of(minimal, f"validation.validation_dataset_file={name}")
        assert f"validation.validation_dataset_file: {name}: row 2: " in problem
        assert message in problem


def test_validation_rows_that_can_be_sampled(minimal, pictures):
    Path("v.csv").write_text(
        "caption,image_path,video_path,num_frames,height,width,num_inference_steps,guidance_scale,export_fps\n"
        "a cat,cat.png,,17,64,96,50,6.0,8\n"
        "2024,,cat.png,1,16,16,1,0,1\n"
        "a cat,http://localhost/cat.png,,9,16,16,1000,1e1,1\n"
    )
    load_recipe(minimal, ["validation.validation_dataset_file=v.csv"])


def test_home_folder(minimal, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(minimal, ["framebridge.data.data_root=~/clips", "checkpoints.output_dir=~/run"])
    assert recipe.checkpoints.output_dir == str(tmp_path / "run")
    assert recipe.framebridge.data.data_root == str(tmp_path / "clips")


def test_output_folder(minimal, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in problems_of(minimal, f"checkpoints.output_dir={tmp_path / 'file' / 'run'}")[0]


# ------------------------------------------------------------------------------------------- finetrainers' parser


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


# A value other than the default wherever a recipe allows one.
EVERYTHING = """
model: {pretrained_model_name_or_path: MODEL, revision: main, variant: fp16, cache_dir: cache, tokenizer_id: a/a,
  tokenizer_2_id: a/b, tokenizer_3_id: a/c, text_encoder_id: a/d, text_encoder_2_id: a/e, text_encoder_3_id: a/f,
  transformer_id: a/g, vae_id: a/h, model_name: cogvideox_bridge}
dataset: {dataset_config: DATA, dataset_shuffle_buffer_size: 2, enable_precomputation: true, precomputation_items: 3,
  precomputation_dir: pre, precomputation_once: true}
dataloader: {dataloader_num_workers: 2, pin_memory: true}
diffusion: {flow_resolution_shifting: true, flow_base_seq_len: 2, flow_max_seq_len: 3, flow_base_shift: -1e-7,
  flow_max_shift: -2, flow_shift: 2.5, flow_weighting_scheme: mode, flow_logit_mean: -0.5, flow_logit_std: 2.0,
  flow_mode_scale: 0.5}
training: {training_type: lora, seed: 7, batch_size: 2, gradient_accumulation_steps: 2, gradient_checkpointing: true,
  max_data_samples: 99, enable_slicing: true, enable_tiling: true}
optimization: {train_steps: 5, optimizer: adam-bnb-8bit, lr: 1e-6, lr_scheduler: polynomial, lr_warmup_steps: 4,
  lr_num_cycles: 2, lr_power: 2.0, beta1: 0.8, beta2: 0.9, beta3: 0.7, weight_decay: 0.0, epsilon: 1e-9,
  max_grad_norm: 0.5}
parallelism: {parallel_backend: ptd, dp_degree: 2, dp_shards: 2, pp_degree: 1, cp_degree: 1, tp_degree: 1,
  init_timeout: 1, nccl_timeout: 2}
precision: {transformer_dtype: fp32, vae_dtype: fp16, text_encoder_dtype: fp32, text_encoder_2_dtype: fp16,
  text_encoder_3_dtype: fp32, allow_tf32: true, float32_matmul_precision: high,
  layerwise_upcasting_modules: [transformer], layerwise_upcasting_storage_dtype: float8_e5m2,
  layerwise_upcasting_skip_modules_pattern: [norm, ^proj$]}
checkpoints: {output_dir: out, checkpointing_steps: 3, checkpointing_limit: 2, resume_from_checkpoint: 4}
validation: {validation_dataset_file: VALIDATION, validation_steps: 9, enable_model_cpu_offload: false}
tracking: {report_to: wandb, tracker_name: mine, logging_dir: l, logging_steps: 2, verbose: 2}
hub: {push_to_hub: true, hub_token: t, hub_model_id: me/x}
compile: {compile_modules: [transformer], compile_scopes: full}
attention: {attn_provider_training: ["transformer:flash"], attn_provider_inference: ["transformer:sage", "vae:native"]}
lora: {rank: 8, lora_alpha: 16, target_modules: [to_q, to_k]}
"""


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


def test_reading_a_recipe_imports_neither_torch_nor_numpy(minimal):
    code = (
        "import sys; from framebridge_plugin.recipe import load_recipe; load_recipe(sys.argv[1]).to_yaml(); "
        "print(sorted({'torch', 'numpy', 'diffusers', 'finetrainers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(minimal)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
