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
