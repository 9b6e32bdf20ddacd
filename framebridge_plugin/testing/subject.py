"""The specification that is put through the suite: how it is made, and the clips that it is shown.

The clips go the way that they go in a training run: written to disk, read by finetrainers' own data set, batched by
its loader. What a specification's methods are called with is therefore what a trainer calls them with.
"""

from __future__ import annotations

import copy
import csv
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from framebridge_plugin.backbones.facts import BackboneFacts
from framebridge_plugin.media import write_video
from framebridge_plugin.training.finetrainers.arguments import lora_targets

CAPTIONS = (
    "a red square moves to the right",
    "a blue square moves to the left",
    "a green square falls down",
    "a white square climbs up",
)
"""What the clips are called where the model does not name the classes that it knows."""

SEED = 42
_DEFAULT_CLIP_SHAPE = (9, 64, 64)
_TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out.0")
_PRECISIONS = ("text_encoder_dtype", "text_encoder_2_dtype", "text_encoder_3_dtype", "transformer_dtype", "vae_dtype")


class Subject:
    """A finetrainers ModelSpecification under test.

    Args:
        make: Makes the specification, anew at every call and always alike. It takes no arguments: the suite sets the
            precisions (`transformer_dtype`, ...) on the instance.
        folder: An empty folder to work in.
        name: What failures call the specification; by default the name of its class.
        model_name: The name under which finetrainers knows the model, if it has one.
        clip_shape: (frames, height, width) of the clips; by default what the model's config says that it was trained
            on, else 9 frames of 64 x 64, or what its backbone allows that is nearest.
        captions: Their captions; by default the classes that the model knows, else short sentences.
        target_modules: Names of the layers that LoRA adapts, or a pattern; by default the backbone's own, else those
            of attention.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        folder: str | Path,
        *,
        name: str | None = None,
        model_name: str | None = None,
        clip_shape: tuple[int, int, int] | None = None,
        captions: Sequence[str] | None = None,
        target_modules: Sequence[str] | None = None,
    ) -> None:
        self.make = make
        self.folder = Path(folder)
        self.model_name = model_name
        specification = make()
        self.specification_class = type(specification)
        self.name = name or self.specification_class.__name__
        # Others than this package's have no adapter.
        facts = specification.adapter.facts if hasattr(specification, "adapter") else None
        self.clip_shape = clip_shape or _native_clip_shape(specification, facts)
        self.captions = tuple(captions or _class_names(specification, facts) or CAPTIONS)
        own_targets = None if facts is None else facts.defaults.get("lora.target_modules")
        self.target_modules = lora_targets(target_modules or own_targets or _TARGET_MODULES)
        self._folders = 0

    def specification(self, dtype: torch.dtype = torch.float32) -> Any:
        """A new specification, which loads every network in this precision."""
        specification = self.make()
        for precision in _PRECISIONS:
            setattr(specification, precision, dtype)
        return specification

    def new_folder(self, name: str) -> Path:
        """Makes a folder that no other check writes to, with this beginning of its name."""
        self._folders += 1
        folder = self.folder / f"{name}-{self._folders}"
        folder.mkdir(parents=True)
        return folder

    @functools.cached_property
    def is_image_model(self) -> bool:
        """Whether it trains on images: its latents then differ in two dimensions and not in three."""
        return all(len(dims) < 3 for dims in self.make()._resolution_dim_keys.values())

    @functools.cached_property
    def dataset(self) -> Path:
        """A folder of four short clips (or images) with their captions in metadata.csv."""
        return _write_dataset(self.new_folder("data"), self.clip_shape, self.captions, image=self.is_image_model)

    @property
    def dataset_options(self) -> dict[str, Any]:
        """What a dataset config says of the clips, besides where they are."""
        frames, height, width = self.clip_shape
        if self.is_image_model:
            return {"image_resolution_buckets": [[height, width]], "reshape_mode": "bicubic"}
        return {"video_resolution_buckets": [[frames, height, width]], "reshape_mode": "bicubic"}

    @property
    def dataset_type(self) -> str:
        """`video` or `image`, as finetrainers calls it."""
        return "image" if self.is_image_model else "video"

    @functools.cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Two samples, each as finetrainers' loader hands it to a specification: a batch of one."""
        from finetrainers import data

        dataset = data.initialize_dataset(
            str(self.dataset), self.dataset_type, streaming=True, infinite=True, _caption_options={}
        )
        dataset = data.wrap_iterable_dataset_for_preprocessing(dataset, self.dataset_type, self.dataset_options)
        loader = iter(torch.utils.data.DataLoader(dataset, batch_size=1))
        return [next(loader), next(loader)]

    def prepared(
        self, specification: Any, compute_posterior: bool = True
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """What `prepare_conditions` and `prepare_latents` return, one entry for each sample."""
        generator = torch.Generator().manual_seed(SEED)
        models = specification.load_condition_models()
        conditions = [
            specification.prepare_conditions(**sample, **models, generator=generator) for sample in self.samples
        ]
        models = specification.load_latent_models()
        latents = [
            specification.prepare_latents(compute_posterior=compute_posterior, **sample, **models, generator=generator)
            for sample in self.samples
        ]
        return conditions, latents

    def batch(self, specification: Any, compute_posterior: bool = True) -> Batch:
        """Both samples as one batch, in the precision of the network."""
        from finetrainers import utils

        conditions, latents = self.prepared(specification, compute_posterior)
        dtype = specification.transformer_dtype
        return Batch(
            utils.align_device_and_dtype(specification.collate_conditions(conditions), "cpu", dtype),
            utils.align_device_and_dtype(specification.collate_latents(latents), "cpu", dtype),
            compute_posterior,
        )


class Batch(NamedTuple):
    """Two samples, collated, with which a network can be evaluated again and again with the same draws."""

    conditions: Mapping[str, Any]
    latents: Mapping[str, Any]
    compute_posterior: bool

    def evaluate(self, specification: Any, network: torch.nn.Module, scheduler: Any) -> Any:
        """What `forward` returns, called as the stock trainer calls it."""
        from finetrainers import utils

        sigmas = utils.prepare_sigmas(
            scheduler=scheduler,
            sigmas=utils.get_scheduler_sigmas(scheduler).float(),
            batch_size=2,
            num_train_timesteps=scheduler.config.num_train_timesteps,
            device="cpu",
            generator=torch.Generator().manual_seed(SEED),
        )
        sigmas = utils.expand_tensor_dims(sigmas, self.latents["latents"].ndim)
        with torch.random.fork_rng(devices=[]):
            # The stock trainer passes no generator: a specification draws from the global one.
            torch.manual_seed(SEED)
            # Some specifications take entries out of the dictionaries that they are given.
            return specification.forward(
                transformer=network,
                scheduler=scheduler,
                condition_model_conditions=copy.copy(self.conditions),
                latent_model_conditions=copy.copy(self.latents),
                sigmas=sigmas,
                compute_posterior=self.compute_posterior,
            )

    def loss(self, specification: Any, network: torch.nn.Module, scheduler: Any) -> torch.Tensor:
        """The loss of finetrainers' training loop on this batch, a scalar."""
        from finetrainers import utils

        prediction, target, sigmas = self.evaluate(specification, network, scheduler)
        alphas = utils.get_scheduler_alphas(scheduler)
        weights = utils.prepare_loss_weights(
            scheduler=scheduler,
            alphas=alphas[(sigmas * 1000.0).long()] if alphas is not None else None,
            sigmas=sigmas,
            flow_weighting_scheme="none",
        )
        weights = utils.expand_tensor_dims(weights, prediction.ndim)
        return (weights.float() * (prediction.float() - target.float()).square()).mean()


def _entry(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _class_names(specification: Any, facts: BackboneFacts | None) -> Sequence[str]:
    """The classes that a model knows, by their names or numbers; none for one that takes text."""
    if facts is None:
        return _entry(specification.transformer_config, "class_names") or ()
    classes = facts.known_classes(specification.transformer_config)
    return () if classes is None else classes.names or [str(number) for number in range(classes.number)]


def _native_clip_shape(specification: Any, facts: BackboneFacts | None) -> tuple[int, int, int]:
    """Frames, height and width in pixels that the configs of network and autoencoder tell."""
    config, vae_config = specification.transformer_config, specification.vae_config
    frames = _entry(config, "sample_frames") or _entry(config, "num_frames")
    size = _entry(config, "sample_height"), _entry(config, "sample_width")
    levels = _entry(vae_config, "block_out_channels")
    if None in (frames, *size, levels):
        shape = _DEFAULT_CLIP_SHAPE
        return shape if facts is None else facts.clip_rule(vae_config, config).nearest(*shape)
    scale = 2 ** (len(levels) - 1)
    return frames, size[0] * scale, size[1] * scale


def _write_dataset(folder: Path, shape: tuple[int, int, int], captions: Sequence[str], *, image: bool) -> Path:
    names = [f"{index}.{'png' if image else 'mp4'}" for index in range(4)]
    for index, name in enumerate(names):
        video_FHWC = _moving_square(index, *shape)
        if image:
            Image.fromarray(video_FHWC[0]).save(folder / name)
        else:
            write_video(video_FHWC, folder / name)
    with open(folder / "metadata.csv", "w", newline="") as file:
        rows = [(name, captions[index % len(captions)]) for index, name in enumerate(names)]
        csv.writer(file).writerows([("file_name", "caption"), *rows])
    return folder


def _moving_square(index: int, frames: int, height: int, width: int) -> np.ndarray:
    """Bytes [F, H, W, 3]: a square of one colour that crosses a ground of another."""
    generator = np.random.default_rng(index)
    colour, ground = generator.integers(0, 256, (2, 3))
    side = max(2, min(height, width) // 4)
    video_FHWC = np.broadcast_to(ground, (frames, height, width, 3)).astype(np.uint8).copy()
    for frame in range(frames):
        left = round((width - side) * frame / max(1, frames - 1))
        left = left if index % 2 else width - side - left
        top = (height - side) // 2
        video_FHWC[frame, top : top + side, left : left + side] = colour
    return video_FHWC
