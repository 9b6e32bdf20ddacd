"""What sampling takes of memory, from the configs of a model alone: nothing is loaded.

Layouts: B batch, T latent frames, C channels, h and w height and width of the latents.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from framebridge_plugin.backbones.encoding import meeting_tiles
from framebridge_plugin.backbones.examination import SavedModel
from framebridge_plugin.backbones.facts import BackboneFacts, find_backbone
from framebridge_plugin.backbones.files import read_if_whole
from framebridge_plugin.backbones.memory import Allocations, BlankTokenizer, without_data
from framebridge_plugin.schedulers import FrameBridgeScheduler
from framebridge_plugin.settings.choices import Offload

Clip = tuple[int | None, int | None, int | None]

_META = torch.device("meta")
_FEW_BLOCKS = 2
"""Of a network and a text encoder, of which one block computes after the other; a Latte's two look along space and
time."""
_FEW_FRAMES = 6
_OVERLAP = 1.5
"""What all tiles of a video take, in its own size."""


def sampling_memory(saved: SavedModel, clip: Clip, dtype: torch.dtype) -> SamplingMemory | None:
    """What sampling a model in a precision takes, or None where its configs are not to be seen; `clip` is frames,
    height and width of its videos, None for those that it was trained on.
    """
    facts, network = saved.facts, saved.facts.network
    configs = {part: saved.configs[part] for part in saved.parts if part not in ("scheduler", "tokenizer")}
    folder = saved.folder(network)
    if folder is None or not all(configs.values()):
        return None
    if saved.takes_no_image:
        configs[network] = configs[network] | {"in_channels": 2 * configs[network]["out_channels"]}
    indexes = [read_if_whole(place / "model_index.json") for place in (folder.parent, saved.base) if place is not None]
    sources = [vars(saved.info) if saved.info is not None else {}, *indexes, facts.plain]
    names = zip(("num_frames", "height", "width"), clip, strict=True)
    shape = (given or next((source[name] for source in sources if source.get(name)), None) for name, given in names)
    return _memory(facts.name, json.dumps(configs, sort_keys=True), tuple(shape), dtype)


@functools.lru_cache(maxsize=4)
def _memory(name: str, configs: str, clip: Clip, dtype: torch.dtype) -> SamplingMemory:
    return SamplingMemory(find_backbone(name), json.loads(configs), clip, dtype)


class SamplingMemory:
    """Bytes that sampling a model takes of a device.

    Args:
        facts: What it is.
        configs: Of its components but tokenizer and scheduler.
        clip: Frames, height and width of its videos; a Latte knows them.
        dtype: Precision of its components.

    Attributes:
        weights: Bytes of each component.
        clip: Frames, height and width of the videos.
    """

    def __init__(
        self, facts: BackboneFacts, configs: Mapping[str, Mapping[str, Any]], clip: Clip, dtype: torch.dtype
    ) -> None:
        self.facts, self.adapter, self._dtype = facts, facts.load_adapter(), dtype
        self.weights: dict[str, int] = {}
        self._layers: dict[str, int] = {}
        classes, parts = self.adapter.component_classes(), {}
        with without_data(dtype):
            for part, config in configs.items():
                module = _blank(classes[part], config)
                leaves = [_bytes(leaf) for leaf in module.modules() if not any(True for _ in leaf.children())]
                self.weights[part], self._layers[part] = _bytes(module), max(leaves)
                few = {"num_layers": min(_FEW_BLOCKS, config["num_layers"])} if "num_layers" in config else {}
                parts[part] = _blank(classes[part], {**config, **few}).eval()
        if "scheduler" in facts.parts:
            parts["scheduler"] = FrameBridgeScheduler(alignment="none")
        is_text = facts.condition == "text"
        if is_text:
            parts["tokenizer"] = None
            parts |= dict(zip(("num_frames", "height", "width"), clip, strict=True))
        self._pipeline = facts.load_pipeline()(**parts)
        self._network = getattr(self._pipeline, facts.network)
        config, scale = self._network.config, self._pipeline.video_processor.config.vae_scale_factor
        if is_text:
            self._pipeline.tokenizer = BlankTokenizer()
            # A mask cannot be looked at; that of a whole text masks nothing.
            self._pipeline.text_encoder.register_forward_pre_hook(
                lambda module, tokens, settings: (tokens[:1], {}), with_kwargs=True
            )
        self.clip = frames, height, width = self._pipeline._default_clip()
        num_latents = (frames - 1) // self._pipeline.vae_scale_factor_temporal + 1 if is_text else frames
        self._latents_TChw = (num_latents, config.out_channels, height // scale, width // scale)

    def needed(self, inputs: int, offload: Offload, tiled: bool) -> int:
        """Bytes on the device at once, with so many inputs in a call of the network."""
        first, further = self.network
        working = {
            "text_encoder": self.text,
            "vae": max(self.image, self.decode(tiled)),
            self.facts.network: first + (inputs - 1) * further,
        }
        return max(self.resident(part, offload) + working.get(part, 0) for part in self.weights)

    def inputs_in(self, free: float, offload: Offload) -> int:
        """The most inputs of a call of the network, at least one, for which so many bytes are enough."""
        first, further = self.network
        return max(1, 1 + int((free - self.resident(self.facts.network, offload) - first) / further))

    def resident(self, part: str, offload: Offload) -> int:
        """Bytes of the weights that are on the device while a component computes."""
        if offload == "none":
            return sum(self.weights.values())
        return {"model": self.weights[part], "group": 2 * self._layers[part], "sequential": self._layers[part]}[
            offload
        ]

    @functools.cached_property
    def text(self) -> int:
        """What encoding a text and the empty one takes beside the weights."""
        return self._peak(self._encode_texts) if self.facts.condition == "text" else 0

    @functools.cached_property
    def image(self) -> int:
        """What encoding the still image takes."""
        if self.facts.condition == "class":
            return 0  # one frame: less than decoding

        def encode(latent_frames: int) -> Any:
            frames = (latent_frames - 1) * self._pipeline.vae_scale_factor_temporal + 1
            image = torch.empty(1, 3, *self.clip[1:])
            return self.adapter.encode_still(self._pipeline.vae, image, frames, _META)

        return self._peak_of_frames(encode)

    @functools.cached_property
    def network(self) -> tuple[int, int]:
        """What a call of the network takes with one input, and what each further one takes."""
        with without_data(self._dtype), torch.no_grad():
            is_text = self.facts.condition == "text"
            conditions = self._encode_texts() if is_text else {"class_labels": torch.zeros(1, dtype=torch.int64)}
        one, two = (self._peak(functools.partial(self._call_network, conditions, inputs)) for inputs in (1, 2))
        return one, two - one

    @functools.cache  # noqa: B019 (there are few)
    def decode(self, tiled: bool) -> int:
        """What decoding a video takes, whole or by the autoencoder's tiles."""
        _, channels, *size = self._latents_TChw
        pixels = _OVERLAP * self.clip[0] * 3 * self.clip[1] * self.clip[2] * self._dtype.itemsize if tiled else 0
        if tiled:
            vae, scale = self._pipeline.vae, self._pipeline.video_processor.config.vae_scale_factor
            tile = getattr(vae, "tile_sample_min_size", None)
            tiles = [tile or meeting_tiles(vae)[f"tile_sample_min_{side}"] for side in ("height", "width")]
            size = [min(whole, tile // scale) for whole, tile in zip(size, tiles, strict=True)]

        def decode(latent_frames: int) -> Any:
            return self._pipeline.decode_latents(torch.empty(1, latent_frames, channels, *size), "off")

        return self._peak_of_frames(decode) + round(pixels)

    def is_tiled(self, tiling: str) -> bool:
        """Whether the videos are decoded by tiles."""
        is_large = self.clip[1] * self.clip[2] > self.adapter.largest_whole_frame
        return tiling == "on" or (tiling == "auto" and is_large)

    def _peak(self, call: Callable[[], Any]) -> int:
        with without_data(self._dtype), torch.no_grad(), Allocations() as allocations:
            call()
        return allocations.peak

    def _peak_of_frames(self, call: Callable[[int], Any]) -> int:
        """What a call takes for all latent frames: as autoencoders go through them in turn, few tell of all."""
        frames = self._latents_TChw[0]
        few = _FEW_FRAMES + frames % 2  # they go two by two
        if frames <= few + 2 or self.facts.condition == "class":
            return self._peak(functools.partial(call, frames))
        less, more = (self._peak(functools.partial(call, count)) for count in (few, few + 2))
        return more + (frames - few - 2) * (more - less) // 2

    def _encode_texts(self) -> dict[str, torch.Tensor]:
        length = self.adapter.max_sequence_length(self._network.config)
        settings = {"do_classifier_free_guidance": False, "max_sequence_length": length, "device": _META}
        return self.adapter.text_conditions(self._pipeline.encode_prompt(["", ""], None, **settings))[0]

    def _call_network(self, conditions: Mapping[str, torch.Tensor], inputs: int) -> torch.Tensor:
        conditions = {name: value[:1].repeat_interleave(inputs, dim=0) for name, value in conditions.items()}
        latents, image, prior = (torch.empty(inputs, *self._latents_TChw, dtype=torch.float32) for _ in range(3))
        network = self.adapter.bind(self._network, conditions, image, prior, **self.adapter.call_settings(None))
        return network(latents, torch.zeros(inputs, dtype=torch.float32))


def _blank(component_class: Any, config: Mapping[str, Any]) -> Any:
    if hasattr(component_class, "from_config"):
        return component_class.from_config(dict(config))
    return component_class(component_class.config_class.from_dict(dict(config)))


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in itertools.chain(module.parameters(), module.buffers()))
