"""What a run takes of a device's memory, found by making an update of tensors that have a shape and no data.

Weights, encoders, LoRA layers, loss and backward pass are those of the run; what they allocate is added up.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from torch import nn
from torch._subclasses import FakeTensorMode

from framebridge_plugin.backbones.files import read_json
from framebridge_plugin.backbones.memory import Allocations, BlankTokenizer, flash_attention
from framebridge_plugin.backbones.published import write_published
from framebridge_plugin.backbones.sampling_memory import SamplingMemory
from framebridge_plugin.data.folders import index_datasets
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.files import NotFetchedError, without_network
from framebridge_plugin.models.projection_adapter import freeze_identity
from framebridge_plugin.recipe import Recipe
from framebridge_plugin.training.blank_parts import CountedUpdate, remade
from framebridge_plugin.training.captions import CaptionCache, distinct_captions
from framebridge_plugin.training.finetrainers.registration import add_lora_layers, recipe_arguments, register
from framebridge_plugin.training.precomputation.store import PARTS, read_manifest
from framebridge_plugin.training.quantization import quantize_blocks, stored_bytes
from framebridge_plugin.training.run import build_specification

META = torch.device("meta")
_PERIOD = 2
"""After how many blocks a network repeats itself: Latte's look along space and time in turn."""


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes on each device of a run.

    Attributes:
        resident: What is there all the time, by its name.
        working: What each part of an update takes besides, by its name; one part at a time.
    """

    resident: Mapping[str, int]
    working: Mapping[str, int]

    @property
    def total(self) -> int:
        """The most that is there at once."""
        return sum(self.resident.values()) + max(self.working.values())


def memory_needs(recipe: Recipe, known: dict[str, Any] | None = None) -> MemoryNeeds:
    """What a run of a recipe takes of each of its devices, beside what CUDA and its libraries take for themselves.

    Args:
        recipe: A checked recipe; its data and its weights need not be there.
        known: What earlier calls for nearly the same recipe have found, which are then quicker.

    Returns:
        The needs, for clips of the shape that the recipe names.

    Raises:
        FrameBridgeError: If the configs of its model are neither on this machine nor known.
    """
    with _specified(recipe) as (args, specification):
        return _Run(recipe, args, specification, {} if known is None else known).needs()


def memory_of_sampling(recipe: Recipe, dtype: torch.dtype) -> SamplingMemory:
    """What sampling from the model of a run takes in a precision, for videos as its clips."""
    with _specified(recipe) as (_, specification):
        adapter = specification.adapter
        configs = {"vae": adapter.vae_config, adapter.facts.network: adapter.blank_network().config}
        configs |= {name: part.config for name, part in adapter.blank_components()}
        if "text_encoder" in adapter.facts.parts:
            configs["text_encoder"] = _text_encoder_config(adapter)
        return SamplingMemory(adapter.facts, configs, specification.clip_shape or (None, None, None), dtype)


@contextlib.contextmanager
def _specified(recipe: Recipe) -> Iterator[tuple[Any, Any]]:
    """A recipe's arguments and its model's specification; what is not here of it is known, or refused."""
    register()  # before finetrainers is imported
    with without_network(), tempfile.TemporaryDirectory() as folder:
        args = recipe_arguments(recipe, "", processes=1)
        try:
            specification = build_specification(recipe, args)
        except NotFetchedError as error:
            _put_published(args, Path(folder), error)
            specification = build_specification(recipe, args)
        yield args, specification


def _text_encoder_config(adapter: Any) -> dict[str, Any]:
    return read_json(adapter.source.local(*adapter.place("text_encoder"), settings_only=True) / "config.json")


def _put_published(args: Any, folder: Path, error: NotFetchedError) -> None:
    """Puts what is known of published models in the place of those that are not here."""
    known = False
    for name in ("pretrained_model_name_or_path", "vae_id", "text_encoder_id"):
        source, copy = getattr(args, name), folder / name
        copy.mkdir()
        if source and write_published(source, copy):
            setattr(args, name, str(copy))
            known = True
    if not known:
        raise FrameBridgeError(
            f"{error}, and its size is not known here; fetch what says it: hf download "
            f"{args.pretrained_model_name_or_path or args.vae_id} --include '*.json'"
        ) from error


class _Update(NamedTuple):
    """Forward and backward pass: the most bytes at once, with the gradients and without, and all gradients."""

    peak: int
    beside_gradients: int
    gradients: int

    def extended(self, shorter: _Update, blocks: int, further: int) -> _Update:
        """That of a network with `further` blocks, out of this one's and that of one with so many `blocks` less."""
        kept, gradients = (
            (longer - less) / blocks
            for longer, less in (
                (self.beside_gradients, shorter.beside_gradients),
                (self.gradients, shorter.gradients),
            )
        )
        beside, whole = self.beside_gradients + further * kept, self.gradients + further * gradients
        # The backward pass begins with what all blocks have kept, and ends with one block's, and nearly all gradients.
        once = shorter.beside_gradients - (_PERIOD - 1) * kept
        return _Update(round(max(beside, once + whole - gradients)), round(beside), round(whole))


class _Encoded(NamedTuple):
    """What the encoders return for a sample, and what they take."""

    conditions: dict[str, Any]
    latents: dict[str, torch.Tensor]
    resident: dict[str, int]
    working: dict[str, int]


class _Run:
    """The parts of a run without their weights."""

    def __init__(self, recipe: Recipe, args: Any, specification: Any, known: dict[str, Any]) -> None:
        self.recipe, self.args, self.known = recipe, args, known
        self.specification, self.adapter = specification, specification.adapter
        # Autocast leaves tensors of the meta device alone; fake ones of a CPU take four times as long.
        self.mode = FakeTensorMode(allow_non_fake_inputs=True) if args.autocast and args.dp_shards == 1 else None
        self.device = META if self.mode is None else torch.device("cpu")
        if specification.clip_shape is None:
            raise FrameBridgeError("the shape of the recipe's clips is not to be seen; give framebridge.data")
        self.scheduler = specification.load_scheduler()
        with META:
            self.network = self._network()
        with self.mode or contextlib.nullcontext():
            remade(self.network, None, self.device)
            if args.transformer_quantization is not None:
                quantize_blocks(self.network, args.transformer_quantization)
            own = self.adapter.blank_components()
            self.own = {name: remade(part, torch.float32, self.device) for name, part in own}
        self.trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def _network(self) -> Any:
        from finetrainers import utils

        from framebridge_plugin.training.finetrainers.preparation import (
            AUTOCAST_DTYPES,
            autocast_calls,
            prepared_as_said,
        )

        args, specification = self.args, self.specification
        # FSDP2 gathers shards in the precision that it computes in.
        computes = AUTOCAST_DTYPES.get(args.autocast) if args.dp_shards > 1 else None
        network = remade(self.adapter.blank_network(), computes or args.transformer_dtype, META)
        if args.training_type == "lora":
            network.requires_grad_(False)
            config = LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, target_modules=args.target_modules)
            add_lora_layers(specification, network, config)
            if (projection := self.adapter.facts.input_projection) is not None:
                freeze_identity(network, projection)
            layers = [parameter for parameter in network.parameters() if parameter.requires_grad]
            if args.dp_shards == 1:
                for parameter in layers:
                    parameter.data = parameter.data.float()
        if args.gradient_checkpointing:
            with prepared_as_said(args):
                utils.apply_activation_checkpointing(network, checkpointing_type="full")
        autocast_calls(network, args, self.device)
        return network.train()

    def _vae(self) -> Any:
        with META:
            vae = self.adapter.vae_class.from_config(self.adapter.vae_config)
        if self.args.enable_slicing:
            vae.enable_slicing()
        if self.args.enable_tiling:
            vae.enable_tiling()
        return remade(vae.eval(), self.args.vae_dtype, META)

    def _text_encoder(self) -> Any:
        if "text_encoder" not in self.adapter.facts.parts:
            return None
        kind = self.adapter.text_encoder_class
        with META:
            encoder = kind(kind.config_class.from_dict(_text_encoder_config(self.adapter)))
        # A mask cannot be looked at; that of a whole caption masks nothing.
        encoder.register_forward_pre_hook(lambda module, args: args[:1])
        encoder = remade(encoder.eval(), self.args.text_encoder_dtype, META)
        with META:
            return self.specification.quantized.with_text_encoder({"text_encoder": encoder})["text_encoder"]

    # What they take

    def needs(self) -> MemoryNeeds:
        """What all of it takes."""
        args = self.args
        of_text = ("text_encoder_dtype", "text_encoder_quantization")
        encoded = self._once("vae_dtype", *of_text, "enable_slicing", "enable_tiling", made=self._encoded)
        names = (
            *("training_type", "rank", "target_modules", "transformer_dtype", "autocast", "batch_size", "dp_shards"),
            *("gradient_checkpointing", "gradient_checkpointing_every", "transformer_quantization"),
        )
        update = self._once(*names, made=lambda: self._update(*self._batch(encoded)))
        shards, trained = args.dp_shards, sum(parameter.numel() for parameter in self.trained)
        size = args.transformer_dtype.itemsize if shards > 1 else None
        weights = sum(tensor.numel() * size if size else stored_bytes(tensor) for tensor in _tensors(self.network))
        gradients = sum(p.numel() * (size or p.itemsize) for p in self.trained)
        state = sum(p.numel() * _state_bytes(args, size or p.itemsize) for p in self.trained)
        resident = {"network": weights, "optimizer": state}
        if args.framebridge_trainer.ema_decay > 0.0:
            resident["average of the weights"] = 4 * trained
        if shards > 1 or args.dp_degree > 1 or args.gradient_accumulation_steps > 1:
            # They stay while the next clips are encoded, or lie in what the processes exchange.
            resident["gradients"] = gradients
            working = {"forward and backward": update.beside_gradients + self._gathered()}
        else:
            working = {"forward, backward and gradients": update.peak}
        resident = {name: part / shards for name, part in resident.items()}
        resident |= {name.replace("_", " "): _bytes(_tensors(part)) for name, part in self.own.items()}
        # finetrainers has the network in main memory while a single process encodes in advance.
        waits = resident["network"] if args.enable_precomputation and shards == args.dp_degree == 1 else 0
        for encoder, work in self._encoders(encoded):
            size, peak = encoded.resident[encoder], encoded.working[work]
            if args.enable_precomputation:
                phase = "in advance, less the network" if waits else "in advance"
                working[f"{encoder} and {work}, {phase}"] = max(0, size + peak - waits)
            elif encoder == "text encoder" and self._embeds_first(encoded.conditions):
                working[f"{encoder} and {work}, before the first update"] = size + peak
            else:
                resident[encoder], working[work] = size, peak
        return MemoryNeeds(*({name: round(part) for name, part in parts.items()} for parts in (resident, working)))

    def _encoders(self, encoded: _Encoded) -> Iterator[tuple[str, str]]:
        """Yields what encodes on the device, and its work."""
        manifest = None if self.args.precomputed is None else read_manifest(Path(self.args.precomputed))
        unknown = () if self.args.precomputed is None else PARTS
        stored = unknown if manifest is None else manifest.holds
        if "latents" not in stored:
            yield "autoencoder", "encoding a clip"
        on_cpu = self.args.framebridge_trainer.text_encoder_device is not None
        if "captions" not in stored and "text encoder" in encoded.resident and not on_cpu:
            yield "text encoder", "encoding a caption"

    def _embeds_first(self, conditions: Mapping[str, Any]) -> bool:
        """Whether a run embeds all captions first and then has no text encoder; not where its data are not here."""
        args, cache = self.args, CaptionCache(self.args.framebridge_trainer.caption_cache_gib)
        samples = args.train_steps * args.batch_size * args.gradient_accumulation_steps * args.dp_degree
        try:
            content = self.recipe.dataset_config()
            datasets = self._once(repr(content), made=lambda: index_datasets(content, "the recipe's data"))
        except FrameBridgeError:
            return False
        return distinct_captions(datasets, min(cache.room(conditions), samples * args.dp_shards)) is not None

    def _once(self, *names: str, made: Callable[[], Any]) -> Any:
        """What depends on these arguments (or on what a name says itself), made where no earlier call has."""
        key = repr([(name, getattr(self.args, name, None)) for name in names])
        if key not in self.known:
            self.known[key] = made()
        return self.known[key]

    def _encoded(self) -> _Encoded:
        vae, text_encoder = self._vae(), self._text_encoder()
        frames, height, width = self.specification.clip_shape
        video = torch.empty(1, frames, 3, height, width, dtype=self.args.vae_dtype, device=META)
        with torch.no_grad(), flash_attention():
            with Allocations() as captions:
                models = {"tokenizer": BlankTokenizer(), "text_encoder": text_encoder}
                conditions = self.adapter.encode_caption(models, "", False)
            with Allocations() as clips:
                latents = self.adapter.encode_clip(vae, video, lambda purpose: None)
        frozen = {"autoencoder": vae} | ({} if text_encoder is None else {"text encoder": text_encoder})
        resident = {name: _bytes(_tensors(part)) for name, part in frozen.items()}
        working = {"encoding a clip": clips.peak}
        working |= {} if text_encoder is None else {"encoding a caption": captions.peak}
        return _Encoded(conditions, latents, resident, working)

    def _update(self, conditions: Mapping[str, Any], latents: Mapping[str, torch.Tensor]) -> _Update:
        """What forward and backward pass take; computed from those of few blocks, since all are alike."""
        names = [name for name, child in self.network.named_children() if isinstance(child, nn.ModuleList)]
        blocks = getattr(self.network, names[0]) if len(names) == 1 else ()
        few, more = _PERIOD, 2 * _PERIOD
        if len(blocks) <= more:
            return self._made_update(conditions, latents)
        made = []
        for count in (few, more):
            setattr(self.network, names[0], blocks[:count])
            made.append(self._made_update(conditions, latents))
        setattr(self.network, names[0], blocks)
        return made[1].extended(made[0], more - few, len(blocks) - more)

    def _made_update(self, conditions: Mapping[str, Any], latents: Mapping[str, torch.Tensor]) -> _Update:
        args, specification, update = self.args, self.specification, CountedUpdate()
        hooks = [parameter.register_post_accumulate_grad_hook(update.keep) for parameter in self.trained]
        with self.mode or contextlib.nullcontext(), flash_attention(), update:
            index = torch.zeros(args.batch_size, dtype=torch.int64, device=META)  # one of a CPU is looked at
            prediction, target = specification.loss_terms(self.network, self.scheduler, conditions, latents, index)
            nn.functional.mse_loss(prediction, target).backward()
        for hook in hooks:
            hook.remove()
        self.network.zero_grad()
        return _Update(update.peak, update.peak_beside_gradients, update.gradients)

    def _batch(self, encoded: _Encoded) -> tuple[dict[str, Any], dict[str, Any]]:
        """Conditions and latents of a batch, in the precision and on the device that the network gets them on."""
        count, dtype = self.args.batch_size, self.args.transformer_dtype
        conditions = self.specification.collate_conditions([encoded.conditions] * count)
        latents = self.specification.collate_latents([encoded.latents] * count)
        with self.mode or contextlib.nullcontext():
            return self._here(conditions, dtype), self._here(latents, torch.float32)

    def _here(self, values: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        return {
            name: torch.empty(
                value.shape, dtype=dtype if value.is_floating_point() else value.dtype, device=self.device
            )
            if isinstance(value, torch.Tensor)
            else value
            for name, value in values.items()
        }

    def _gathered(self) -> int:
        """What FSDP2 gathers of the shards: two blocks and what is beside them, and gradients to be exchanged."""
        if self.args.dp_shards == 1:
            return 0
        blocks = [block for child in self.network.children() if isinstance(child, nn.ModuleList) for block in child]
        largest = max((_bytes(block.parameters()) for block in blocks), default=0)
        beside = _bytes(self.network.parameters()) - sum(_bytes(block.parameters()) for block in blocks)
        return 3 * largest + beside


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(map(stored_bytes, tensors))


_STATE = {
    **dict.fromkeys(("adam-bnb", "adamw-bnb"), 8.0),
    **dict.fromkeys(("adam-bnb-8bit", "adamw-bnb-8bit"), 2 * (1 + 4 / 256)),
    **dict.fromkeys(("adamw-torchao-8bit", "adamw-torchao-fp8"), 2 * (1 + 4 / 256)),
    "adamw-torchao-4bit": 2 * (0.5 + 4 / 128),
}
"""Bytes for each weight of the optimizers whose state has not the precision of the weights: blocks share a scale."""


def _state_bytes(args: Any, weight: int) -> float:
    """Bytes of the optimizer's state for a weight of so many bytes."""
    if getattr(args, "offload_optimizer", False):
        return 0.0
    return _STATE.get(args.optimizer, 2 * weight)
