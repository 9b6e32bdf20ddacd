from __future__ import annotations

import re

import pytest

from framebridge_plugin.recipe.loading import _keys
from framebridge_plugin.recipe.schema import Recipe
from framebridge_plugin.recipe.synonyms import SYNONYMS
from tests.recipe.helpers import problems_of


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
        (first + 2, "optimization.learning_rate", "unknown key; the nearest is optimization.lr"),
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


def test_of_very_many_errors_the_first_are_said(minimal):
    first = len(minimal.read_text().splitlines()) + 1
    minimal.write_text(minimal.read_text() + "".join(f"lines_{number}: 1\n" for number in range(10_000)))
    found = problems_of(minimal)
    assert [line.split(": ")[0] for line in found[:-1]] == [f"{minimal}:{first + n}" for n in range(20)]
    assert all("unknown key; " in line for line in found[:-1])
    assert found[-1] == "and 9980 more errors"


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
        (b"#" * 200_001, "too large for a recipe"),
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
        ("tracking.logging_dir=../logs", "tracking.logging_dir", "inside output_dir"),
        ("tracking.logging_dir=/tmp/logs", "tracking.logging_dir", "inside output_dir"),
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
        ("compile.compile_modules=[vae]", "compile.compile_modules.0", "should be 'transformer'"),
        ("framebridge.noise_log_mean=3.5", "framebridge.noise_log_mean", "less than or equal to 3"),
        ("framebridge.noise_log_mean=-21", "framebridge.noise_log_mean", "greater than or equal to -20"),
        ("framebridge.noise_log_std=4", "framebridge.noise_log_std", "less than or equal to 3"),
        ("framebridge.caption_dropout=1", "framebridge.caption_dropout", "less than 1"),
        ("framebridge.prior_nose=1", "framebridge.prior_nose", "framebridge.prior_noise"),
        ("train_steps=10", "train_steps", "optimization.train_steps"),
        ("training.lr=10", "training.lr", "optimization.lr"),
        ("zzz=10", "zzz", "unknown key; a recipe has model, framebridge, dataset, "),
        ("model.model_name=mochi_bridge", "model.model_name", "no installed package brings a backbone 'mochi_bridge'"),
        ("lora.use_dora=true", "lora.use_dora", "unknown key; lora has rank, lora_alpha, target_modules"),
        ("learning_rate=1", "learning_rate", "the nearest is optimization.lr"),
        ("LR=1", "LR", "the nearest is optimization.lr"),
        ("framebridge.data.fps=8", "framebridge.data.fps", "the nearest is framebridge.data.frame_stride"),
        ("training.max_train_steps=1", "training.max_train_steps", "the nearest is optimization.train_steps"),
        ("training.num_train_epochs=1", "training.num_train_epochs", "the nearest is optimization.train_steps"),
        ("optimization.warmup_steps=1", "optimization.warmup_steps", "the nearest is optimization.lr_warmup_steps"),
        ("batch_size_=1", "batch_size_", "the nearest is training.batch_size"),
        ("training.train_batch_size=1", "training.train_batch_size", "the nearest is training.batch_size"),
        ("training.grad_accum=1", "training.grad_accum", "the nearest is training.gradient_accumulation_steps"),
        ("lora.alpha=1", "lora.alpha", "the nearest is lora.lora_alpha"),
        ("lora.r=1", "lora.r", "the nearest is lora.rank"),
        ("training.Output_Dir=x", "training.Output_Dir", "the nearest is checkpoints.output_dir"),
        ("checkpoints.save_steps=1", "checkpoints.save_steps", "the nearest is checkpoints.checkpointing_steps"),
        ("mixed_precision=bf16", "mixed_precision", "the nearest is precision.transformer_dtype"),
        ("framebridge.data.instance_data_dir=x", "framebridge.data.instance_data_dir", "framebridge.data.data_root"),
    ],
)
def test_wrong_values(minimal, override, path, message):
    (problem,) = problems_of(minimal, override)
    assert problem.startswith(f"command line: {path}: ")
    assert message in problem


def test_every_synonym_stands_for_a_key_and_for_one_alone():
    keys, names = set(_keys(Recipe)), [name for text in SYNONYMS.values() for name in text.split()]
    assert set(SYNONYMS) <= keys
    assert len(names) == len(set(names))
    assert not {key.rpartition(".")[2] for key in keys} & set(names)
