"""What finetrainers has, under the names of its arguments, in the sections of a recipe."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from framebridge_plugin.settings.base import PathText, Section
from framebridge_plugin.settings.choices import ANEW, REFUSED, BelowOne, Count, NonNegative
from framebridge_plugin.settings.data import HeldoutSection

Dtype = Literal["bf16", "fp16", "fp32"]
Positive = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]

COMPONENTS = ("transformer", "vae", "text_encoder")
ATTENTION_PROVIDERS_TRAINING = (
    "flash", "flash_varlen", "flex", "native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math",
    "xformers",
)  # fmt: skip
ATTENTION_PROVIDERS_INFERENCE = (
    *ATTENTION_PROVIDERS_TRAINING, "sage", "sage_varlen", "_sage_qk_int8_pv_fp8_cuda",
    "_sage_qk_int8_pv_fp8_cuda_sm90", "_sage_qk_int8_pv_fp16_cuda", "_sage_qk_int8_pv_fp16_triton",
)  # fmt: skip

_ONE_TEXT_ENCODER = "no model here has more than one text encoder"
_TIMES = "bridge and baseline draw their times uniformly, by the model's shift"
_UPCASTING = "precision.transformer_quantization=int8 stores frozen weights in 8 bits, with scales"
_FLOW = {
    "flow_resolution_shifting": False,
    "flow_base_seq_len": 256,
    "flow_max_seq_len": 4096,
    "flow_base_shift": 0.5,
    "flow_max_shift": 1.15,
    "flow_shift": 1.0,
    "flow_weighting_scheme": "none",
    "flow_logit_mean": 0.0,
    "flow_logit_std": 1.0,
    "flow_mode_scale": 1.29,
}
_IDS = ("tokenizer_2_id", "tokenizer_3_id", "text_encoder_2_id", "text_encoder_3_id")
WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "variant": (None, "finetrainers 0.2.0 reads the plain weight files only, and precision sets the number formats"),
    **dict.fromkeys(_IDS, (None, _ONE_TEXT_ENCODER)),
    **dict.fromkeys(("text_encoder_2_dtype", "text_encoder_3_dtype"), ("bf16", _ONE_TEXT_ENCODER)),
    "dataset_shuffle_buffer_size": (1, "every epoch is a permutation of all clips, whatever the size"),
    "hub_token": (None, "the token is that of `hf auth login`, or HF_TOKEN"),
    "beta3": (None, "no optimiser of finetrainers 0.2.0 has a third moment"),
    **dict.fromkeys(("pp_degree", "cp_degree", "tp_degree"), (1, "share the work by dp_degree and dp_shards")),
    **{name: (value, _TIMES) for name, value in _FLOW.items()},
    "diffusion": ({}, _TIMES),
    "layerwise_upcasting_modules": ([], _UPCASTING),
    "layerwise_upcasting_storage_dtype": (..., _UPCASTING),
    "layerwise_upcasting_skip_modules_pattern": (..., _UPCASTING),
}
"""Arguments of finetrainers, and the section of others, that would do nothing here: what they are by default, as the
recipes in the folders of older runs say it (`...`: whatever they are), and why another value is refused."""


def has_no_effect(name: str, value: Any) -> bool:
    """Whether an argument of `WITHOUT_EFFECT` is as if it was not there."""
    return name in WITHOUT_EFFECT and WITHOUT_EFFECT[name][0] in (value, ...)


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _check_resume(value: Any) -> int | str:
    if value is None:  # as the recipes in the folders of older runs say it
        return "auto"
    if value in ("auto", "latest") or (type(value) is int and value >= 0):
        return value
    raise ValueError("should be the number of an update, 'auto' or 'latest'")


def _check_inside(value: str) -> str:
    if PurePath(value).is_absolute() or ".." in PurePath(value).parts:
        raise ValueError("should be a folder inside output_dir")
    return value


def _check_limit(value: Any) -> int | None:
    if value is None or (type(value) is int and value >= 2):
        return value
    raise ValueError("should be 2 or more: a checkpoint written just before a NaN holds what leads to it")


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

    on_resume = "base", {"model_name": REFUSED, "cache_dir": ANEW, "verify_files": ANEW}

    model_name: str = Field(default="cogvideox_bridge", description="which backbone; the error of another lists them")
    pretrained_model_name_or_path: PathText | None = Field(
        default=None, description="diffusers folder, or id on the Hugging Face Hub; none: from scratch, Latte only"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")
    cache_dir: PathText | None = Field(default=None, description="folder for downloads; none: Hugging Face's own")
    tokenizer_id: PathText | None = Field(default=None, description="folder or id that replaces the model's tokenizer")
    text_encoder_id: PathText | None = Field(
        default=None, description="folder or id that replaces the model's text encoder"
    )
    transformer_id: PathText | None = Field(default=None, description="folder (a fine-tuned transformer/ alone) or id")
    vae_id: PathText | None = Field(
        default=None, description="folder or id that replaces the model's VAE; required from scratch"
    )
    verify_files: bool = Field(
        default=False, description="compare every byte of its weights on a resume, not blocks of them"
    )


class DatasetSection(Section):
    """finetrainers' way to name the data, and its precomputation; `framebridge.data` is the short way."""

    on_resume = "data", {"precomputation_dir": ANEW}

    dataset_config: PathText | None = Field(
        default=None, description="JSON file that lists data sets, in finetrainers' format"
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

    on_resume = ANEW, {}

    dataloader_num_workers: int = Field(default=0, ge=0, description="reading processes per training process; 0: none")
    pin_memory: bool = Field(default=False, description="page-locked host memory: faster copies to a GPU")


class TrainingSection(Section):
    """What is trained, and on how much at a time."""

    on_resume = (
        ANEW,
        {
            "training_type": REFUSED,
            "seed": "seed",
            "batch_size": "batch",
            "gradient_accumulation_steps": "batch",
            "enable_tiling": "data",
        },
    )

    training_type: Literal["full-finetune", "lora"] = Field(description="all weights, or low-rank adapters")
    seed: int = Field(default=42, ge=0, description="seeds every random draw of the run")
    batch_size: Count = Field(default=1, description="clips per process and micro-step")
    gradient_accumulation_steps: Count = Field(default=1, description="micro-steps per update")
    gradient_checkpointing: bool = Field(
        default=False,
        description="recompute the network's activations: less memory, a third more of its arithmetic (LoRA: half)",
    )
    gradient_checkpointing_every: Count = Field(
        default=1, description="recompute those of every n-th block only, where there is memory for the others"
    )
    max_data_samples: Count = Field(default=2**64, description="clips after which training stops")
    enable_slicing: bool = Field(default=False, description="the VAE takes one clip at a time: less memory")
    enable_tiling: bool = Field(default=False, description="the VAE takes one tile at a time: less memory")


class OptimizationSection(Section):
    """The optimiser, its learning rate, and for how long."""

    on_resume = ANEW, {"optimizer": REFUSED, "stochastic_rounding": "precision"}

    train_steps: Count = Field(default=1000, description="updates (not micro-steps)")
    optimizer: Literal[
        "adam", "adamw", "adam-bnb", "adamw-bnb", "adam-bnb-8bit", "adamw-bnb-8bit",
        "adamw-torchao-8bit", "adamw-torchao-4bit", "adamw-torchao-fp8",
    ] = Field(
        default="adamw",
        description="bnb: bitsandbytes' own; torchao: its AdamW with moments of 8 or 4 bits, or in fp8 (no GPU below "
        "compute capability 8.9); neither of them with dp_shards",
    )  # fmt: skip
    stochastic_rounding: bool = Field(
        default=False,
        description="weights trained in bf16 are rounded up or down at random, by how near they are, with adamw or "
        "torchao's; to the nearest, most updates of a low rate are lost",
    )
    offload_optimizer: bool = Field(
        default=False,
        description="moments of adamw in main memory, where the update is made: 8 bytes on the GPU for each trained "
        "parameter less in float32, 4 in bf16; slower; one process with a GPU only",
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
    weight_decay: NonNegative = Field(default=1e-4, description="decoupled weight decay for the AdamW family")
    epsilon: Positive = Field(default=1e-8, description="keeps the division finite")
    max_grad_norm: Positive = Field(default=1.0, description="gradients are scaled down to this norm, once per update")


class ParallelismSection(Section):
    """How the processes share the work."""

    on_resume = ANEW, {"dp_degree": "batch", "dp_shards": "batch"}

    parallel_backend: Literal["ptd", "accelerate"] = Field(
        default="ptd", description="ptd: torch's own (DDP, FSDP2); accelerate: one process only"
    )
    dp_degree: Count | None = Field(
        default=None, description="replicas of the model; none: as many as the processes make with dp_shards"
    )
    dp_shards: Count = Field(default=1, description="processes over which each replica is sharded (FSDP2)")
    init_timeout: Count = Field(default=300, description="seconds for all processes to meet at the start")
    nccl_timeout: Count = Field(
        default=3600, description="seconds that a collective operation, or a checkpoint written by rank 0, may take"
    )
    heartbeat_timeout: Count | None = Field(
        default=900,
        description="seconds after which a process that hangs, or is gone, ends the run and is named; none: only "
        "nccl_timeout does. The first update, saving, validation and encoding in advance do not count",
    )


class PrecisionSection(Section):
    """Number formats."""

    on_resume = "precision", {}

    transformer_dtype: Dtype = Field(
        default="bf16",
        description="the trained network; time stays float32, and so do LoRA layers, except with dp_shards > 1: "
        "finetrainers then casts them to this as well",
    )
    autocast: Literal["bf16"] | None = Field(
        default=None,
        description="mixed precision: the network computes in this, in training and validation, by torch.autocast or "
        "with dp_shards > 1 by FSDP2's policy; its weights, the loss and the bridge are float32 (transformer_dtype "
        "fp32; LoRA without shards on bf16 too, whose float32 layers then compute in it). none: as the weights",
    )
    vae_dtype: Dtype = Field(default="bf16", description="the VAE")
    text_encoder_dtype: Dtype = Field(default="bf16", description="the text encoder; models of text only")
    allow_tf32: bool = Field(default=False, description="float32 products in TF32 on GPUs that have it")
    float32_matmul_precision: Literal["highest", "high", "medium"] = Field(
        default="highest", description="float32 matrix products; high: TF32"
    )
    text_encoder_quantization: Literal["int8", "fp8"] | None = Field(
        default=None,
        description="weights of the text encoder's layers in 8 bits, with a scale for each output: half the memory of "
        "bf16; models of text only. docs/running.md says by how much embeddings move",
    )
    transformer_quantization: Literal["int8", "fp8"] | None = Field(
        default=None,
        description="LoRA only, without shards, with gradient_checkpointing of every block: weights of the frozen "
        "network's blocks in 8 bits; what is before and after them and what is trained keep their precision, and the "
        "LoRA is for the base as it was. docs/running.md says by how much prediction, gradients and loss move",
    )
    float8_training: Literal["tensorwise", "rowwise"] | None = Field(
        default=None,
        description="full fine-tune only, with a network that computes in bf16: products of its blocks in float8, by "
        "this recipe of torchao for its scales; weights stay as they are. Needs a CUDA GPU of compute capability 8.9 "
        "(rowwise: 9.0), and pays only with compile.compile_modules=[transformer]",
    )


class CheckpointsSection(Section):
    """Where the run writes, and how often."""

    on_resume = ANEW, {}

    output_dir: PathText = Field(description="folder of the run: model, checkpoints, logs, the resolved recipe")
    checkpointing_steps: Count = Field(default=500, description="updates between checkpoints")
    checkpointing_limit: Annotated[int | None, BeforeValidator(_check_limit)] = Field(
        default=3, description="checkpoints to keep, 2 or more; none: all"
    )
    resume_from_checkpoint: Annotated[int | str, BeforeValidator(_check_resume)] = Field(
        default="auto",
        description="auto: go on from the last checkpoint, or start where there is none (latest: the same, and says "
        "so); or the number of an update. To start anew, choose another output_dir",
    )
    stop_on_sigusr1: bool = Field(
        default=False,
        description="SIGUSR1 stops the run as SIGTERM does, after a checkpoint, with exit code 0: for a scheduler "
        "that starts the same command again",
    )


class ValidationSection(Section):
    """Sampling, and the loss on held-out clips, during training."""

    on_resume = ANEW, {}

    validation_dataset_file: PathText | None = Field(
        default=None,
        description=".csv, .json, .parquet or .arrow with columns caption and image_path; none: no videos",
    )
    heldout: HeldoutSection | None = Field(default=None, description="clips for the held-out loss; none: no such loss")
    validation_steps: Count = Field(default=500, description="updates between validations")
    enable_model_cpu_offload: bool = Field(
        default=False, description="one process with an accelerator only: less memory, slower"
    )


class TrackingSection(Section):
    """What is logged; JSON lines and TensorBoard are always written."""

    on_resume = ANEW, {}

    report_to: Literal["none", "wandb"] = Field(default="none", description="further tracker")
    tracker_name: Text = Field(default="finetrainers", description="project name at the tracker")
    logging_dir: Annotated[Text, AfterValidator(_check_inside)] = Field(
        default="logs", description="folder inside output_dir"
    )
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

    on_resume = ANEW, {}

    push_to_hub: bool = Field(
        default=False, description="upload the model at the end, by the login of `hf auth login`, or HF_TOKEN"
    )
    hub_model_id: Text | None = Field(default=None, description="repository; none: the name of output_dir")
    private: bool = Field(default=True, description="only those see the repository to whom its owner shows it")


class CompileSection(Section):
    """torch.compile."""

    on_resume = ANEW, {}

    compile_modules: list[Literal["transformer"]] = Field(
        default=[], max_length=1, description="[transformer], or nothing; no encoder can be compiled so"
    )
    compile_scopes: Annotated[list[Literal["regional", "full"]] | None, BeforeValidator(_one_or_many)] = Field(
        default=None, description="block by block, or as a whole, which takes several times as long; none: regional"
    )


class AttentionSection(Section):
    """Attention implementations, as <component>:<provider>."""

    on_resume = ANEW, {}

    attn_provider_training: list[Annotated[str, _check_providers(ATTENTION_PROVIDERS_TRAINING)]] | None = Field(
        default=None, description="such as transformer:flash; none: torch's own"
    )
    attn_provider_inference: list[Annotated[str, _check_providers(ATTENTION_PROVIDERS_INFERENCE)]] | None = Field(
        default=None, description="the same, in validation"
    )


class LoraSection(Section):
    """Low-rank adapters; only with training_type: lora."""

    on_resume = REFUSED, {}

    rank: Count = Field(default=64, description="rank of the adapters")
    lora_alpha: Count = Field(default=64, description="the adapters are scaled by lora_alpha / rank")
    target_modules: Annotated[list[Text], BeforeValidator(_one_or_many), Field(min_length=1)] = Field(
        default=["(transformer_blocks|single_transformer_blocks).*(to_q|to_k|to_v|to_out.0)"],
        description="one regular expression for whole names, or names and ends of names such as to_q",
    )
