"""What diffusers' scripts, Hugging Face's Trainer, SimpleTuner and diffusion-pipe call the keys of a recipe."""

from __future__ import annotations

SYNONYMS = {
    "optimization.lr": "learning_rate base_lr transformer_lr unet_lr",
    "optimization.train_steps": (
        "max_train_steps max_steps num_train_steps total_steps num_steps steps iterations max_iters epochs "
        "num_epochs num_train_epochs max_train_epochs"
    ),
    "optimization.lr_scheduler": "scheduler lr_scheduler_type lr_schedule",
    "optimization.lr_warmup_steps": "warmup warmup_steps num_warmup_steps warmup_ratio",
    "optimization.optimizer": "optim optimizer_type optim_type use_8bit_adam",
    "optimization.beta1": "adam_beta1 betas",
    "optimization.beta2": "adam_beta2",
    "optimization.weight_decay": "adam_weight_decay wd decay",
    "optimization.epsilon": "eps adam_epsilon",
    "optimization.max_grad_norm": (
        "grad_clip gradient_clipping gradient_clip clip_grad_norm max_norm gradient_clip_val"
    ),
    "training.batch_size": (
        "train_batch_size per_device_train_batch_size micro_batch_size_per_gpu batch bs local_batch_size "
        "global_batch_size train_micro_batch_size_per_gpu"
    ),
    "training.gradient_accumulation_steps": (
        "gradient_accumulation grad_accum grad_accumulation accumulation_steps accumulate_grad_batches "
        "grad_accum_steps"
    ),
    "training.gradient_checkpointing": "activation_checkpointing grad_checkpointing",
    "training.training_type": "train_type finetuning_type model_type lora_type tuning_type",
    "training.seed": "random_seed manual_seed global_seed",
    "training.enable_slicing": "vae_slicing enable_vae_slicing use_slicing",
    "training.enable_tiling": "vae_tiling enable_vae_tiling use_tiling vae_enable_tiling",
    "lora.rank": "lora_rank r lora_r network_dim lora_dim dim",
    "lora.lora_alpha": "alpha network_alpha",
    "lora.target_modules": "lora_target_modules lora_modules targets lora_layers lora_target",
    "checkpoints.output_dir": "output out_dir save_dir output_path output_folder save_path run_dir results_dir",
    "checkpoints.checkpointing_steps": (
        "save_steps save_every save_every_n_steps checkpoint_steps save_freq checkpoint_every "
        "checkpoint_step_interval checkpointing_interval ckpt_every"
    ),
    "checkpoints.checkpointing_limit": (
        "checkpoints_total_limit save_total_limit keep_last max_checkpoints keep_last_n"
    ),
    "checkpoints.resume_from_checkpoint": "resume resume_from load_from_checkpoint",
    "model.pretrained_model_name_or_path": (
        "model_path model_id base_model checkpoint_path ckpt_path pretrained_model "
        "pretrained_model_path model_name_or_path ckpt pretrained"
    ),
    "framebridge.data.data_root": (
        "data_dir instance_data_dir instance_data_root train_data_dir dataset_path video_dir "
        "data_path dataset_dir video_folder dataset_name train_data dataset_root"
    ),
    "framebridge.data.num_frames": (
        "frames max_num_frames n_frames video_length clip_length frame_count target_frames sample_n_frames"
    ),
    "framebridge.data.height": "resolution image_size video_size sample_size size h",
    "framebridge.data.width": "w",
    "framebridge.data.frame_stride": (
        "stride frame_interval sample_stride frame_skip skip_frames fps target_fps sample_fps"
    ),
    "framebridge.data.horizontal_flip": "random_flip flip hflip",
    "framebridge.data.id_token": "trigger_word trigger instance_prompt id_tokens",
    "framebridge.ema_decay": "ema use_ema ema_rate",
    "framebridge.precomputed": "cache_latents latents_dir latent_cache cache_latents_to_disk",
    "dataloader.dataloader_num_workers": "num_workers workers n_workers",
    "precision.transformer_dtype": (
        "mixed_precision dtype torch_dtype bf16 fp16 fp32 weight_dtype train_dtype model_dtype"
    ),
    "precision.allow_tf32": "tf32",
    "validation.validation_dataset_file": (
        "validation_prompt validation_prompts validation_images validation_file validation_prompt_file "
        "eval_prompts sample_prompts validation_image"
    ),
    "validation.heldout": "eval_dataset val_dataset validation_data validation_data_dir eval_data val_data",
    "validation.validation_steps": (
        "eval_steps validation_step_interval eval_every val_every validation_every validation_epochs "
        "sample_every eval_every_n_steps"
    ),
    "tracking.report_to": "tracker logger log_with use_wandb wandb trackers",
    "tracking.tracker_name": "project_name wandb_project tracker_project_name project run_name wandb_project_name",
    "tracking.logging_steps": "log_every log_steps log_interval log_every_n_steps",
    "parallelism.dp_degree": "num_gpus gpus n_gpus num_processes nproc_per_node devices world_size",
    "parallelism.dp_shards": "fsdp fsdp_shards zero_stage shard_degree deepspeed",
    "hub.hub_model_id": "repo_id",
    "framebridge.caption_dropout": (
        "caption_dropout_probability prompt_dropout proportion_empty_prompts cfg_dropout uncond_prob"
    ),
}
"""Key of a recipe -> names that mean it, or what it takes to say the same."""


def synonym_of(name: str) -> str | None:
    """The key that a name of another trainer stands for, whatever its case; None if it is not known."""
    plain = name.lower().replace("-", "_")
    return next((key for key, names in SYNONYMS.items() if plain in names.split()), None)
