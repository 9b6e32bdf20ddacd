"""The sections of a recipe: one pydantic model each, help and units beside each field.

The sections only group: the name of a field is the name of finetrainers' argument, except in the section
``framebridge``, which is this package's own. Importing this module imports neither torch nor finetrainers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from framebridge_plugin.backbones.facts import find_backbone
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.settings.base import Count, PathText, Section
from framebridge_plugin.settings.data import BadFilesSection, DataSection

Dtype = Literal["bf16", "fp16", "fp32"]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


def _check_backbone(name: str) -> str:
    try:
        find_backbone(name)
    except FrameBridgeError as error:
        raise ValueError(str(error)) from None
    return name


ModelName = Annotated[str, AfterValidator(_check_backbone)]
LatteSize = Literal[
    "Ti/2", "Ti/4", "Ti/8", "S/2", "S/4", "S/8", "B/2", "B/4", "B/8", "L/2", "L/4", "L/8", "XL/2", "XL/4", "XL/8"
]  # fmt: skip

COMPONENTS = ("transformer", "vae", "text_encoder")
ATTENTION_PROVIDERS_TRAINING = (
    "flash", "flash_varlen", "flex", "native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math",
    "xformers",
)  # fmt: skip
ATTENTION_PROVIDERS_INFERENCE = (
    *ATTENTION_PROVIDERS_TRAINING, "sage", "sage_varlen", "_sage_qk_int8_pv_fp8_cuda",
    "_sage_qk_int8_pv_fp8_cuda_sm90", "_sage_qk_int8_pv_fp16_cuda", "_sage_qk_int8_pv_fp16_triton",
)  # fmt: skip


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _check_resume(value: Any) -> int | str | None:
    if value is None or value == "latest" or (type(value) is int and value >= 0):
        return value
    raise ValueError("should be the number of an update, or 'latest'")


def _check_providers(providers: tuple[str, ...]) -> AfterValidator:
    def check(value: str) -> str:
        component, _, provider = value.partition(":")
        if component not in COMPONENTS or provider not in providers:
            raise ValueError(
                f"should be <component>:<provider>, with a component among {', '.join(COMPONENTS)} and a provider "
                f"among {', '.join(providers)}"
            )
        return value

    return AfterValidator(check)


class ModelSection(Section):
    """Which pretrained model to start from."""

    model_name: ModelName = Field(default="cogvideox_bridge", description="model specification")
    pretrained_model_name_or_path: PathText | None = Field(
        default=None, description="diffusers folder, or id on the Hugging Face Hub; none: from scratch, Latte only"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")
    variant: str | None = Field(default=None, description="refused: finetrainers 0.2.0 reads the plain files only")
    cache_dir: PathText | None = Field(default=None, description="folder for downloads; none: Hugging Face's own")
    tokenizer_id: PathText | None = Field(default=None, description="folder or id that replaces the model's tokenizer")
    tokenizer_2_id: PathText | None = Field(default=None, description="refused: no model here has a second")
    tokenizer_3_id: PathText | None = Field(default=None, description="refused: no model here has a third")
    text_encoder_id: PathText | None = Field(
        default=None, description="folder or id that replaces the model's text encoder"
    )
    text_encoder_2_id: PathText | None = Field(default=None, description="refused: no model here has a second")
    text_encoder_3_id: PathText | None = Field(default=None, description="refused: no model here has a third")
    transformer_id: PathText | None = Field(default=None, description="folder (a fine-tuned transformer/ alone) or id")
    vae_id: PathText | None = Field(
        default=None, description="folder or id that replaces the model's VAE; required from scratch"
    )


class DatasetSection(Section):
    """finetrainers' way to name the data, and its precomputation; `framebridge.data` is the short way."""

    dataset_config: PathText | None = Field(
        default=None, description="JSON file that lists data sets, in finetrainers' format"
    )
    dataset_shuffle_buffer_size: Count = Field(
        default=1, description="without effect: every epoch is a permutation of all clips, whatever the size"
    )
    enable_precomputation: bool = Field(
        default=False, description="encode clips and captions first, then train on the files"
    )
    precomputation_items: Count = Field(default=512, description="clips encoded at a time, per process")
    precomputation_dir: PathText | None = Field(
        default=None, description="folder for the encoded clips; none: in output_dir"
    )
    precomputation_once: bool = Field(default=False, description="encode everything once, before the first update")


class DataloaderSection(Section):
    """How clips are read."""

    dataloader_num_workers: int = Field(default=0, ge=0, description="reading processes per training process; 0: none")
    pin_memory: bool = Field(default=False, description="page-locked host memory: faster copies to a GPU")


class DiffusionSection(Section):
    """finetrainers' flow-matching settings; other values are refused, as neither objective here uses them."""

    flow_resolution_shifting: bool = Field(default=False, description="shift timesteps by resolution")
    flow_base_seq_len: Count = Field(default=256, description="tokens")
    flow_max_seq_len: Count = Field(default=4096, description="tokens")
    flow_base_shift: float = Field(default=0.5, description="shift at flow_base_seq_len")
    flow_max_shift: float = Field(default=1.15, description="shift at flow_max_seq_len")
    flow_shift: Positive = Field(default=1.0, description="s -> shift s / (1 + (shift - 1) s)")
    flow_weighting_scheme: Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"] = Field(
        default="none", description="distribution of the timesteps and weight of the loss"
    )
    flow_logit_mean: float = Field(default=0.0, description="mean for logit_normal")
    flow_logit_std: Positive = Field(default=1.0, description="standard deviation for logit_normal")
    flow_mode_scale: float = Field(default=1.29, description="scale for mode")


class TrainingSection(Section):
    """What is trained, and on how much at a time."""

    training_type: Literal["full-finetune", "lora"] = Field(description="all weights, or low-rank adapters")
    seed: int = Field(default=42, ge=0, description="seeds every random draw of the run")
    batch_size: Count = Field(default=1, description="clips per process and micro-step")
    gradient_accumulation_steps: Count = Field(default=1, description="micro-steps per update")
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations: less memory, about 30 % slower"
    )
    max_data_samples: Count = Field(default=2**64, description="clips after which training stops")
    enable_slicing: bool = Field(default=False, description="the VAE takes one clip at a time: less memory")
    enable_tiling: bool = Field(default=False, description="the VAE takes one tile at a time: less memory")


class OptimizationSection(Section):
    """The optimiser, its learning rate, and for how long."""

    train_steps: Count = Field(default=1000, description="updates (not micro-steps)")
    optimizer: Literal[
        "adam", "adamw", "adam-bnb", "adamw-bnb", "adam-bnb-8bit", "adamw-bnb-8bit", "adamw-torchao-8bit"
    ] = Field(
        default="adamw", description="bnb: bitsandbytes' own; torchao: its 8-bit AdamW; neither of them with dp_shards"
    )
    lr: Positive = Field(default=1e-4, description="learning rate after the warm-up")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = Field(default="constant", description="course of the learning rate")
    lr_warmup_steps: int = Field(default=0, ge=0, description="updates over which the rate rises from 0")
    lr_num_cycles: Count = Field(
        default=1, description="cosine_with_restarts: how often the rate falls to 0; cosine: half waves"
    )
    lr_power: Positive = Field(default=1.0, description="power of polynomial")
    beta1: BelowOne = Field(default=0.9, description="decay of the first moment")
    beta2: BelowOne = Field(default=0.95, description="decay of the second moment")
    beta3: BelowOne | None = Field(
        default=None, description="refused: no optimiser of finetrainers 0.2.0 has a third moment"
    )
    weight_decay: NonNegative = Field(default=1e-4, description="decoupled weight decay for the AdamW family")
    epsilon: Positive = Field(default=1e-8, description="keeps the division finite")
    max_grad_norm: Positive = Field(default=1.0, description="gradients are scaled down to this norm, once per update")


class ParallelismSection(Section):
    """How the processes share the work; their product is the number of processes."""

    parallel_backend: Literal["ptd", "accelerate"] = Field(
        default="ptd", description="ptd: torch's own (DDP, FSDP2); accelerate: one process only"
    )
    dp_degree: Count = Field(default=1, description="replicas of the model")
    dp_shards: Count = Field(default=1, description="processes over which each replica is sharded (FSDP2)")
    pp_degree: Count = Field(default=1, description="pipeline stages; only 1 works in finetrainers 0.2.0")
    cp_degree: Count = Field(default=1, description="context parallelism; only 1 works in finetrainers 0.2.0")
    tp_degree: Count = Field(default=1, description="tensor parallelism; no model here has a plan for it: only 1")
    init_timeout: Count = Field(default=300, description="seconds for all processes to meet at the start")
    nccl_timeout: Count = Field(
        default=3600, description="seconds that a collective operation, or a checkpoint written by rank 0, may take"
    )


class PrecisionSection(Section):
    """Number formats."""

    transformer_dtype: Dtype = Field(
        default="bf16",
        description="the trained network; time stays float32, and so do LoRA layers, except with dp_shards > 1: "
        "finetrainers then casts them to this as well",
    )
    vae_dtype: Dtype = Field(default="bf16", description="the VAE")
    text_encoder_dtype: Dtype = Field(default="bf16", description="the text encoder; CogVideoX only")
    text_encoder_2_dtype: Dtype = Field(default="bf16", description="without effect: no model here has a second")
    text_encoder_3_dtype: Dtype = Field(default="bf16", description="without effect: no model here has a third")
    allow_tf32: bool = Field(default=False, description="float32 products in TF32 on GPUs that have it")
    float32_matmul_precision: Literal["highest", "high", "medium"] = Field(
        default="highest", description="float32 matrix products; high: TF32"
    )
    layerwise_upcasting_modules: list[Literal["transformer"]] = Field(
        default=[], description="stored in fp8, LoRA only"
    )
    layerwise_upcasting_storage_dtype: Literal["float8_e4m3fn", "float8_e5m2"] = Field(
        default="float8_e4m3fn", description="storage format for layerwise_upcasting_modules"
    )
    layerwise_upcasting_skip_modules_pattern: Annotated[list[Text], Field(min_length=1)] = Field(
        default=["patch_embed", "pos_embed", "x_embedder", "context_embedder", "^proj_in$", "^proj_out$", "norm"],
        description="regular expressions for the modules that keep their precision",
    )


class CheckpointsSection(Section):
    """Where the run writes, and how often."""

    output_dir: PathText = Field(description="folder of the run: model, checkpoints, logs, the resolved recipe")
    checkpointing_steps: Count = Field(default=500, description="updates between checkpoints")
    checkpointing_limit: Count | None = Field(default=None, description="checkpoints to keep; none: all")
    resume_from_checkpoint: Annotated[int | str | None, BeforeValidator(_check_resume)] = Field(
        default=None, description="number of an update, or 'latest'; none: start afresh"
    )


class ValidationSection(Section):
    """Sampling during training."""

    validation_dataset_file: PathText | None = Field(
        default=None,
        description=".csv, .json, .parquet or .arrow with columns caption and image_path; none: no validation",
    )
    validation_steps: Count = Field(default=500, description="updates between validations")
    enable_model_cpu_offload: bool = Field(
        default=False, description="one process with an accelerator only: less memory, slower"
    )


class TrackingSection(Section):
    """What is logged; JSON lines and TensorBoard are always written."""

    report_to: Literal["none", "wandb"] = Field(default="none", description="further tracker")
    tracker_name: Text = Field(default="finetrainers", description="project name at the tracker")
    logging_dir: Text = Field(default="logs", description="folder inside output_dir")
    logging_steps: Count = Field(default=1, description="updates between log entries")
    verbose: int = Field(
        default=0,
        ge=0,
        le=3,
        description="messages of transformers and diffusers; 0: warnings, 1: info, 2: debug, 3: debug on every "
        "process; finetrainers' own are at info (environment variable FINETRAINERS_LOG_LEVEL)",
    )


class HubSection(Section):
    """Upload of the result to the Hugging Face Hub."""

    push_to_hub: bool = Field(default=False, description="upload at the end")
    hub_token: str | None = Field(
        default=None, repr=False, description="better: `hf auth login`; never written to output_dir"
    )
    hub_model_id: str | None = Field(default=None, description="repository; none: the name of output_dir")


class CompileSection(Section):
    """torch.compile."""

    compile_modules: list[Literal["transformer", "vae", "text_encoder"]] = Field(
        default=[], description="components to compile"
    )
    compile_scopes: Annotated[list[Literal["regional", "full"]] | None, BeforeValidator(_one_or_many)] = Field(
        default=None, description="one for all, or one per module; none: regional"
    )


class AttentionSection(Section):
    """Attention implementations, as <component>:<provider>."""

    attn_provider_training: list[Annotated[str, _check_providers(ATTENTION_PROVIDERS_TRAINING)]] | None = Field(
        default=None, description="such as transformer:flash; none: torch's own"
    )
    attn_provider_inference: list[Annotated[str, _check_providers(ATTENTION_PROVIDERS_INFERENCE)]] | None = Field(
        default=None, description="the same, in validation"
    )


class LoraSection(Section):
    """Low-rank adapters; only with training_type: lora."""

    rank: Count = Field(default=64, description="rank of the adapters")
    lora_alpha: Count = Field(default=64, description="the adapters are scaled by lora_alpha / rank")
    target_modules: Annotated[list[Text], BeforeValidator(_one_or_many), Field(min_length=1)] = Field(
        default=["(transformer_blocks|single_transformer_blocks).*(to_q|to_k|to_v|to_out.0)"],
        description="one regular expression, or several names",
    )


class FrameBridgeSection(Section):
    """What is this package's own: the objective, the data, and what finetrainers' trainer has no argument for.

    The defaults here are those of CogVideoX; those of other backbones are in their facts.
    """

    objective: Literal["bridge", "diffusion"] = Field(
        default="bridge",
        description="diffusion: the matched baseline, the backbone's own loss (CogVideoX: on v, Latte: on the noise)",
    )
    target: Literal["v", "eps_psi", "noise", "data"] = Field(
        default="v", description="what the network predicts in a bridge; Latte: eps_psi"
    )
    snr_aligned: bool = Field(default=True, description="SNR-aligned fine-tuning (SAF); Latte: off")
    alignment_edge: Literal["exact", "reference"] = Field(
        default="exact", description="SAF at the 14 indices nearest to the data: exact, or as the authors' release"
    )
    beta_min: NonNegative = Field(default=0.01, description="bridge schedule: g^2 at t = 0")
    beta_max: NonNegative = Field(default=50.0, description="bridge schedule: g^2 at t = 1")
    image_noise: bool = Field(default=True, description="noise on the pixels of the condition image; CogVideoX only")
    prior_noise: bool = Field(
        default=True, description="noise on the pixels of the prior, drawn per frame; CogVideoX only"
    )
    noise_log_mean: float = Field(
        default=-3.0, ge=-20, le=3, description="the noise's std is exp(N(mean, std^2)), pixels in [-1, 1]"
    )
    noise_log_std: float = Field(default=0.5, ge=0, le=3, description="see noise_log_mean")
    caption_dropout: BelowOne = Field(
        default=0.1, description="probability of an empty caption (Latte: of the null label in place of the class)"
    )
    ema_decay: BelowOne = Field(
        default=0.0,
        description="average of the weights over the updates, which becomes the model; 0: off; Latte: .9999",
    )
    ema_start_step: int = Field(default=0, ge=0, description="updates before the average begins")
    max_grad_norm_start_step: int = Field(
        default=0, ge=0, description="updates before gradients are clipped to optimization.max_grad_norm"
    )
    dataloader_prefetch_factor: Count = Field(default=2, description="clips that each reading process holds ready")
    dataloader_timeout: int = Field(
        default=0, ge=0, description="seconds to wait for a reading process before the run ends; 0: for ever"
    )
    latte_size: LatteSize | None = Field(
        default=None, description="size and patch of a Latte from scratch, S/2 if nothing is said"
    )
    neural_prior: PathText | None = Field(
        default=None,
        description="latte_bridge only: run or model of a latte_neural_prior, whose video is where the bridge begins",
    )
    start_from: PathText | None = Field(
        default=None,
        description="earlier run (or its model or LoRA) whose weights the new run begins with, at update 0 and with a "
        "fresh optimizer; LoRA for LoRA, a whole model for either",
    )
    data: DataSection | None = Field(default=None, description="the data; or give dataset.dataset_config")
    bad_files: BadFilesSection = BadFilesSection()
    precomputed: PathText | None = Field(
        default=None, description="folder that `finetrainers precompute` wrote; none: clips are read and encoded"
    )
