"""What several tests of recipes need."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from framebridge_plugin.errors import UsageError
from framebridge_plugin.recipe import load_recipe


def problems_of(path, *overrides, environment=None) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load_recipe(path, overrides, environment)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def write_class_folders(folder: Path, classes: Iterable[str]) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        (folder / name / "v_g01_c01.avi").write_bytes(b"\0")
    return folder


# A value other than the default wherever a recipe allows one.
EVERYTHING = """
model: {pretrained_model_name_or_path: MODEL, revision: main, cache_dir: cache, tokenizer_id: a/a,
  text_encoder_id: a/d, transformer_id: a/g, vae_id: a/h, model_name: cogvideox_bridge}
dataset: {dataset_config: DATA, enable_precomputation: true, precomputation_items: 3,
  precomputation_dir: pre, precomputation_once: true}
dataloader: {dataloader_num_workers: 2, pin_memory: true}
training: {training_type: lora, seed: 7, batch_size: 2, gradient_accumulation_steps: 2, gradient_checkpointing: true,
  max_data_samples: 99, enable_slicing: true, enable_tiling: true}
optimization: {train_steps: 5, optimizer: adam-bnb-8bit, lr: 1e-6, lr_scheduler: polynomial, lr_warmup_steps: 4,
  lr_num_cycles: 2, lr_power: 2.0, beta1: 0.8, beta2: 0.9, weight_decay: 0.0, epsilon: 1e-9,
  max_grad_norm: 0.5}
parallelism: {parallel_backend: ptd, dp_degree: 2, dp_shards: 2, init_timeout: 1, nccl_timeout: 2}
precision: {transformer_dtype: fp32, vae_dtype: fp16, text_encoder_dtype: fp32, allow_tf32: true,
  float32_matmul_precision: high,
  text_encoder_quantization: fp8, transformer_quantization: int8, float8_training: rowwise}
checkpoints: {output_dir: out, checkpointing_steps: 3, checkpointing_limit: 2, resume_from_checkpoint: 4}
validation: {validation_dataset_file: VALIDATION, validation_steps: 9, enable_model_cpu_offload: false}
tracking: {report_to: wandb, tracker_name: mine, logging_dir: l, logging_steps: 2, verbose: 2}
hub: {push_to_hub: true, hub_model_id: me/x, private: false}
compile: {compile_modules: [transformer], compile_scopes: full}
attention: {attn_provider_training: ["transformer:flash"], attn_provider_inference: ["transformer:sage", "vae:native"]}
lora: {rank: 8, lora_alpha: 16, target_modules: [to_q, to_k]}
"""
