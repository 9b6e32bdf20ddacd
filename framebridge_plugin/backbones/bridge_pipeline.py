"""What the pipelines of all backbones share: opening what a run left, a call, and the sampling loop on latents.

Layouts: B batch, T latent frames, C channels, H and W height and width (of latents or pixels).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.utils import BaseOutput
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from framebridge_plugin.backbones.adapter import BackboneAdapter
from framebridge_plugin.backbones.encoding import tiles
from framebridge_plugin.backbones.examination import SavedModel
from framebridge_plugin.backbones.facts import working_backbones
from framebridge_plugin.backbones.loading import A_MODEL, loading
from framebridge_plugin.backbones.manifest import MANIFEST_FILE
from framebridge_plugin.backbones.opening import HUB_SETTINGS, find_model, load_components, load_lora
from framebridge_plugin.backbones.sampling_loop import InParts, check_scheduler, sample_latents
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.media import DEFAULT_FPS
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.settings.checking import check_values, unknown_name

_DTYPES = torch.dtype | dict[str, torch.dtype] | None
_LOADING = (
    *(*HUB_SETTINGS, "dtype", "torch_dtype", "variant", "use_safetensors", "disable_mmap", "quantization_config"),
    *("device_map", "max_memory", "offload_folder", "offload_state_dict", "low_cpu_mem_usage", "proxies"),
)
"""What `from_pretrained` takes besides components and settings; what runs code of a model's folder is not among it."""


class BridgePipeline:
    """The part of a pipeline that does not depend on its backbone; diffusers' own class comes behind it."""

    adapter: ClassVar[type[BackboneAdapter]]
    output_class: ClassVar[type[BaseOutput]]
    vae: Any
    transformer: Any
    scheduler: Any
    components: Any
    config: Any
    register_to_config: Any
    load_lora_weights: Any
    video_processor: Any
    maybe_free_model_hooks: Any
    _execution_device: Any
    last_batch_size: int
    """Rows of a call of the network in the last call of the pipeline: fewer than asked for where memory ended."""

    def _set_up(self, components: Mapping[str, Any], fps: float | None, **settings: Any) -> None:
        """Checks the components, and keeps the settings of a call."""
        classes, scheduler = self.adapter.component_classes(), components["scheduler"]
        for part, component in components.items():
            wanted = classes.get(part, object)
            if issubclass(wanted, PreTrainedTokenizerBase):
                wanted = PreTrainedTokenizerBase  # of tokenizers there are two classes for one vocabulary
            component = getattr(component, "_orig_mod", component)  # of torch.compile
            if component is not None and not isinstance(component, wanted):
                found = f"{component!r}" if isinstance(component, str) else f"a {type(component).__name__}"
                raise FrameBridgeError(f"{type(self).__name__}: {part} is {found}; it should be a {wanted.__name__}")
        if "scheduler" in self.adapter.facts.parts and components[self.adapter.facts.network] is not None:
            check_scheduler(scheduler, self.adapter.facts)
        self._was_bridge = isinstance(scheduler, FrameBridgeScheduler)
        if fps is None:
            fps = self.adapter.facts.plain.get("fps", DEFAULT_FPS)
        self.register_to_config(fps=fps, **settings)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        base_model: str | os.PathLike | None = None,
        allow_other_base: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Opens a run, a model or a LoRA.

        A plain text-to-video model is widened and gets a bridge and a clip's shape, which is said on stderr: what it
        lacks is the training, so load a LoRA or weights into it.

        Args:
            pretrained_model_name_or_path: The folder of a run (of an unfinished one the newest checkpoint is taken),
                of a model or of a LoRA, or the hub id of a model or a LoRA. A LoRA is loaded into the model that it
                was trained on.
            base_model: Where that is now, a folder or a hub id; by default where it was.
            allow_other_base: Whether the LoRA may be loaded into another model than that.
            **kwargs: As in diffusers: `dtype`, `revision`, `cache_dir`, components by their names, ...

        Returns:
            The pipeline, on the CPU.

        Raises:
            FrameBridgeError: If something is missing, damaged or of another kind, or the LoRA's base model is another
                one.
        """
        where = f"{cls.__name__}.from_pretrained"
        if problem := unknown_name(kwargs, {*inspect.signature(cls.__init__).parameters, *_LOADING} - {"self"}):
            raise FrameBridgeError(f"{where}: {problem}")
        check_values(where, dict.fromkeys(("dtype", "torch_dtype"), _DTYPES), kwargs)
        with loading("model", os.fspath(pretrained_model_name_or_path), A_MODEL):
            saved = find_model(
                pretrained_model_name_or_path,
                [facts for facts in working_backbones() if facts.title == cls.adapter.facts.title],
                kwargs,
                base_model=base_model,
                allow_other_base=allow_other_base,
            )
            pipeline = cls._open(saved, kwargs)
            info = saved.info
            if info is not None and info.fps is not None and "fps" not in kwargs:
                pipeline.register_to_config(fps=info.fps)
            if saved.lora is not None:
                load_lora(pipeline, saved.lora, saved.facts.network)
        return pipeline

    @classmethod
    def _open(cls, saved: SavedModel, settings: dict[str, Any]) -> Any:
        components = settings | load_components(saved, cls._loaders(), settings)
        if saved.base is None:
            expected = inspect.signature(cls.__init__).parameters
            return cls(**{name: value for name, value in components.items() if name in expected})
        parent: Any = super()
        return parent.from_pretrained(saved.base, **components, use_safetensors=True)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves the pipeline as diffusers does; refuses LoRA layers, which nothing would open."""
        for name, component in self.components.items():
            if getattr(component, "peft_config", None):
                raise FrameBridgeError(
                    f"the {name} has LoRA layers, which a saved model cannot have; merge them first, by "
                    f'fuse_lora(components=["{name}"]) and then unload_lora_weights(), or unload them alone'
                )
        Path(save_directory, MANIFEST_FILE).unlink(missing_ok=True)  # of what was there
        parent: Any = super()
        parent.save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def _loaders(cls) -> dict[str, Callable[..., Any]]:
        """For each component what loads its folder."""
        classes, name = cls.adapter.component_classes(), cls.adapter.facts.network

        def load_network(folder: Path, **precision: Any) -> Any:
            return cls.adapter.widen(classes[name].from_pretrained(folder, **precision))

        return {**classes, name: load_network}

    def _result(self, latents: torch.Tensor, output_type: str, return_dict: bool, tiling: str) -> Any:
        """What a call returns."""
        video: Any = latents
        if output_type != "latent":
            pixels = self.decode_latents(latents, tiling)
            video = self.video_processor.postprocess_video(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return self.output_class(frames=video) if return_dict else (video,)

    def decode_latents(self, latents: torch.Tensor, tiling: str = "auto") -> torch.Tensor:
        """Decodes normalised latents [B, T, C, h, w] to pixels in about [-1, 1], [B, 3, F, H, W], a video at a time;
        `tiling` as in a call.
        """
        height, width = (size * self.video_processor.config.vae_scale_factor for size in latents.shape[-2:])
        large = height * width > self.adapter.largest_whole_frame
        with tiles(self.vae, tiling == "on" or (tiling == "auto" and (large or self.vae.use_tiling))):
            return self.adapter.decode(self.vae, latents)

    def _denoise(
        self,
        network: Any,
        image_latents: torch.Tensor,
        prior: torch.Tensor,
        conditions: Mapping[str, Any],
        negative_conditions: Mapping[str, Any] | None,
        *,
        guidance_scale: float,
        network_settings: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        **loop: Any,
    ) -> torch.Tensor:
        """The sampling loop: what a call runs between encoding and decoding, see `sample_latents`."""
        end = prior
        if guidance_scale > 1.0:
            assert negative_conditions is not None
            conditions = {name: torch.cat([negative_conditions[name], value]) for name, value in conditions.items()}
            image_latents, end = torch.cat([image_latents] * 2), torch.cat([prior] * 2)
        call = {**self.adapter.call_settings(self.config.fps), **(network_settings or {})}
        parts = InParts(
            lambda part: self.adapter.bind(
                network,
                {name: value[part] for name, value in conditions.items()},
                image_latents[part],
                end[part],
                **call,
            ),
            len(end),
            batch_size,
            may_halve=not isinstance(network, FSDPModule),
        )
        latents = sample_latents(self, parts, prior, guidance_scale=guidance_scale, **loop)
        self.last_batch_size = parts.at_once
        return latents
