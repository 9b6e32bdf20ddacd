from __future__ import annotations

import pytest

from framebridge_plugin.cli import main
from framebridge_plugin.recipe import load_recipe
from tests.cogvideox_files import write_model_folder
from tests.recipe.helpers import problems_of
from tests.tiny_models import moving_square, write_video


@pytest.mark.parametrize(
    "overrides, path, message",
    [
        (
            ["framebridge.objective=diffusion", "framebridge.target=noise"],
            "framebridge.target",
            "is for objective bridge",
        ),
        (["framebridge.beta_min=0", "framebridge.beta_max=0"], "framebridge.beta_max", "no noise at all"),
        (["lora.rank=8"], "lora.rank", "has no effect with training_type full-finetune"),
        (
            ["precision.layerwise_upcasting_modules=[transformer]"],
            "precision.layerwise_upcasting_modules",
            "precision.transformer_quantization=int8 stores frozen weights in 8 bits",
        ),
        (["precision.transformer_quantization=int8"], "precision.transformer_quantization", "cannot be trained"),
        (
            ["precision.transformer_quantization=fp8", "training.training_type=lora"],
            "precision.transformer_quantization",
            "saves nothing: blocks that are not computed again",
        ),
        (
            [
                *("precision.transformer_quantization=int8", "training.training_type=lora"),
                *("training.gradient_checkpointing=true", "training.gradient_checkpointing_every=2"),
            ],
            "precision.transformer_quantization",
            "saves nothing: blocks that are not computed again",
        ),
        (
            [
                *("precision.transformer_quantization=int8", "training.training_type=lora"),
                *("parallelism.dp_shards=2", "training.gradient_checkpointing=true"),
            ],
            "precision.transformer_quantization",
            "weights in 8 bits cannot be sharded: take dp_degree",
        ),
        (
            ["precision.float8_training=rowwise", "training.training_type=lora"],
            "precision.float8_training",
            "is for a full fine-tune",
        ),
        (
            ["precision.float8_training=rowwise", "precision.transformer_dtype=fp32"],
            "precision.float8_training",
            "set precision.autocast=bf16",
        ),
        (["optimization.lr_warmup_steps=5"], "optimization.lr_warmup_steps", "constant_with_warmup"),
        (["precision.allow_tf32=true"], "precision.allow_tf32", "switches TF32 off"),
        (["dataset.precomputation_once=true"], "dataset.precomputation_once", "enable_precomputation"),
        (
            ["training.gradient_checkpointing_every=2"],
            "training.gradient_checkpointing_every",
            "has no effect without gradient_checkpointing=true",
        ),
        (
            ["precision.autocast=bf16", "precision.transformer_dtype=bf16"],
            "precision.autocast",
            "needs transformer_dtype=fp32, not bf16",
        ),
        (
            [
                *("training.training_type=lora", "precision.autocast=bf16", "precision.transformer_dtype=bf16"),
                "parallelism.dp_shards=2",
            ],
            "precision.autocast",
            "has no effect with dp_shards > 1",
        ),
        (["compile.compile_scopes=full"], "compile.compile_scopes", "1 scope(s) for 0"),
        (
            ["parallelism.parallel_backend=accelerate", "parallelism.dp_degree=2"],
            "parallelism.parallel_backend",
            "does not synchronise gradients",
        ),
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
            ["optimization.optimizer=adamw-torchao-4bit", "parallelism.dp_shards=2"],
            "optimization.optimizer",
            "sharded weights",
        ),
        (
            ["optimization.stochastic_rounding=true", "precision.transformer_dtype=fp32"],
            "optimization.stochastic_rounding",
            "weights that are not bf16",
        ),
        (
            ["optimization.stochastic_rounding=true", "training.training_type=lora"],
            "optimization.stochastic_rounding",
            "LoRA layers, float32",
        ),
        (
            ["optimization.stochastic_rounding=true", "optimization.optimizer=adam"],
            "optimization.stochastic_rounding",
            "adam has none: take adamw",
        ),
        (
            ["optimization.offload_optimizer=true", "optimization.optimizer=adamw-torchao-8bit"],
            "optimization.offload_optimizer",
            "works with optimizer adamw",
        ),
        (
            ["optimization.offload_optimizer=true", "parallelism.dp_degree=2"],
            "optimization.offload_optimizer",
            "one process only",
        ),
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
            "a VAE keeps torch's own attention",
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


@pytest.mark.parametrize(
    "where",
    ["model.variant", "parallelism.pp_degree", "optimization.beta3", "diffusion.flow_shift", "training.flow_shift"],
)
def test_what_finetrainers_has_and_does_nothing_here_is_refused_with_the_reason(minimal, where):
    (problem,) = problems_of(minimal, f"{where}=2")
    assert problem.startswith("command line: ")
    assert "finetrainers has it" in problem
    assert "nearest" not in problem


def test_the_recipe_of_an_older_run_says_defaults_of_finetrainers_that_do_nothing(minimal):
    sections = {"model.variant": None, "optimization.beta3": None, "parallelism.tp_degree": 1}
    said = sections | {
        "precision.text_encoder_2_dtype": "bf16",
        "diffusion.flow_shift": 1.0,
        "diffusion.flow_mode_scale": 1.29,
    }
    overrides = [f"{where}={'null' if value is None else value}" for where, value in said.items()]
    assert load_recipe(minimal, overrides) == load_recipe(minimal)


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
    load_recipe(minimal, [], {"WORLD_SIZE": "2"})
    (problem,) = problems_of(minimal, "parallelism.dp_degree=8", environment={})
    assert "and there is one process: start them with --nproc 8, or leave dp_degree out" in problem
    (problem,) = problems_of(minimal, "parallelism.dp_degree=1", environment={"WORLD_SIZE": "2"})
    assert "dp_degree x dp_shards is 1, and there are 2 processes" in problem
    (problem,) = problems_of(minimal, "parallelism.dp_shards=2", environment={"WORLD_SIZE": "3"})
    assert "2 shards need that many processes, or a multiple, and there are 3 processes" in problem
    (problem,) = problems_of(minimal, "validation.enable_model_cpu_offload=true", environment={"WORLD_SIZE": "2"})
    assert "works with one process only" in problem
    (problem,) = problems_of(minimal, "parallelism.parallel_backend=accelerate", environment={"WORLD_SIZE": "2"})
    assert "does not synchronise gradients" in problem
    (problem,) = problems_of(minimal, environment={"WORLD_SIZE": "two"})
    assert "WORLD_SIZE should be a positive number" in problem


def test_a_dry_run_refuses_a_model_that_the_bridge_does_not_know(minimal, tmp_path, capsys):
    """From its configurations alone, where a model that is missing is only warned of."""
    write_video(tmp_path / "clips/a.mp4", moving_square(0, 17, 64, 64))
    model = write_model_folder(tmp_path / "foreign")
    use = f"model.pretrained_model_name_or_path={model}"
    scheduler, transformer = model / "scheduler" / "scheduler_config.json", model / "transformer" / "config.json"
    assert main(["train", "--recipe", str(minimal), "--dry-run", use]) == 0
    scheduler.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    assert main(["train", "--recipe", str(minimal), "--dry-run", use]) == 2
    assert "is for a FlowMatchEulerDiscreteScheduler" in capsys.readouterr().err
    scheduler.write_text("{}")
    assert main(["train", "--recipe", str(minimal), "--dry-run", use]) == 2
    assert "names no scheduler" in capsys.readouterr().err
    scheduler.write_text('{"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"}')
    transformer.write_text('{"_class_name": "CogVideoXTransformer3DModel", "patch_size_t": 2}')
    for option in (use, f"model.transformer_id={model / 'transformer'}"):
        assert main(["train", "--recipe", str(minimal), "--dry-run", option]) == 2
        assert "is a CogVideoX 1.5" in capsys.readouterr().err
