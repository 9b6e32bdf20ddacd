"""From the reference's training step to this package's, one change at a time."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from random_models import SEED, make_parts

from framebridge_plugin.backbones.encoding import encode_frames, encode_video, noisy_pixels
from framebridge_plugin.training.draws import sample_generator
from framebridge_plugin.training.ema import WeightAverage
from framebridge_plugin.training.objective import draw_index

EMA_DECAY = 0.9999
Batch = tuple[dict[str, Any], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Way:
    """How an update is made; the defaults are the reference's."""

    encodes: str = "reference"
    """`reference`, `needed`, or `stored`: precomputed latents and captions."""
    captions_known: bool = False
    """Whether captions were encoded before, and the text encoder is gone from the device."""
    attention: str = "explicit"
    """`explicit`, or `fused`: `scaled_dot_product_attention`."""
    recomputes: bool = False
    fused_optimizer: bool = False
    """Else what torch takes when it is told nothing."""
    average_together: bool = False
    """Whether few operations average all weights, else three for each parameter; of a Latte only."""
    encoder: torch.dtype = torch.float32
    autocast: bool = False


@dataclass(frozen=True)
class Row:
    """One change in addition to all rows above. Its gain is one of arithmetic, of launches (operations, and the memory
    that they pass), or of precision.
    """

    change: str
    gain: str
    way: Way


def rows_of(text: bool) -> dict[str, list[Row]]:
    """The rows of CogVideoX (`text`) or Latte: encoding live, and on a precomputed store; both begin alike."""
    fused = ("AdamW fused", "launches", {"fused_optimizer": True})
    encoder = ("encoder of the clips in bf16", "precision", {"encoder": torch.bfloat16})
    autocast = ("network under bf16 autocast", "precision", {"autocast": True})
    if text:
        # The reference's network is diffusers' own, whose attention is fused.
        start = Way(attention="fused", recomputes=True)
        live = [
            ("still videos encoded as one frame, the unused one not at all", "arithmetic", {"encodes": "needed"}),
            ("each caption encoded once", "arithmetic", {"captions_known": True}),
            fused,
            encoder,
            autocast,
            ("no recomputed activations", "arithmetic", {"recomputes": False}),
        ]
    else:
        start = Way()
        live = [
            ("attention fused", "launches", {"attention": "fused"}),
            ("the first frame encoded once", "arithmetic", {"encodes": "needed"}),
            fused,
            ("average of the weights in few operations", "launches", {"average_together": True}),
            encoder,
            autocast,
        ]
    store = ("nothing encoded", "arithmetic", {"encodes": "stored", "captions_known": True})
    encodes = ({"encodes"}, {"captions_known"}, {"encoder"})
    stored = [store, *(change for change in live if set(change[2]) not in encodes)]
    return {"live": _cumulative(start, live), "precomputed": _cumulative(start, stored)}


def _cumulative(start: Way, changes: Sequence[tuple[str, str, dict[str, Any]]]) -> list[Row]:
    rows = [Row("the reference's arithmetic", "", start)]
    for change, gain, values in changes:
        rows.append(Row(change, gain, dataclasses.replace(rows[-1].way, **values)))
    return rows


class Stepper:
    """Makes updates of one network in any way; weights, optimizer state and average are the same for all.

    Args:
        args: finetrainers' arguments.
        specification: The model's.
        device: Where it is trained; meta to count only.
        batch_size: Clips of an update.
    """

    def __init__(self, args: Any, specification: Any, device: torch.device, batch_size: int = 1) -> None:
        self.specification, self.adapter, self.device = specification, specification.adapter, device
        self.parts = make_parts(specification, device)
        self.network = self.parts[self.adapter.facts.network]
        self.text = {name: self.parts[name] for name in ("tokenizer", "text_encoder") if name in self.parts}
        self.scheduler = specification.load_scheduler()
        self.videos, self.captions = _clips(specification, batch_size, device)
        self._parameters = [p for p in self.network.parameters() if p.requires_grad]
        self._start = [parameter.detach().clone() for parameter in self._parameters]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=args.lr, betas=(args.beta1, args.beta2), weight_decay=args.weight_decay
        )
        self._average = None if self.text else WeightAverage(self.network, EMA_DECAY)
        self._vaes = {torch.float32: self.parts["vae"]}
        self.stored = self._encode(Way(encodes="needed"))

    def held_bytes(self, way: Way) -> int:
        """Bytes that lie on the device when an update of this way begins."""
        modules = [self.network]
        if way.encodes != "stored":
            modules.append(self._vae(way.encoder))
            if self.text and not way.captions_known:
                modules.append(self.text["text_encoder"])
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        tensors += [value for state in self._optimizer.state.values() for value in state.values()]
        tensors += [] if self._average is None else list(self._average.tensors.values())
        return sum(tensor.nbytes for tensor in tensors)

    def start_anew(self) -> None:
        """Puts the weights back to where they were, and forgets the optimizer's state."""
        with torch.no_grad():
            for parameter, value in zip(self._parameters, self._start, strict=True):
                parameter.copy_(value)
        self._optimizer.state.clear()
        if self._average is not None:
            self._average.update(0)

    def update(self, way: Way) -> torch.Tensor:
        """Makes an update; its loss, left on the device."""
        loss = self.gradients(way)
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if way.average_together and self._average is not None:
            self._average.update(1)
        elif self._average is not None:
            with torch.no_grad():
                for average, parameter in zip(self._average.tensors.values(), self._parameters, strict=True):
                    average.mul_(EMA_DECAY).add_(parameter, alpha=1 - EMA_DECAY)
        return loss.detach()

    def gradients(self, way: Way) -> torch.Tensor:
        """Encodes, and makes an update's gradients; its loss."""
        loss = self.loss(way, *self._encode(way))
        loss.backward()
        return loss

    def loss(self, way: Way, conditions: dict[str, Any], latents: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch; index and noise are the same in every call."""
        place = torch.device("cpu") if self.device.type == "meta" else self.device
        draws = [torch.Generator(place).manual_seed(SEED + i) for i in range(len(self.videos))]
        index = draw_index(self.scheduler, draws).to(self.device)
        precision = torch.autocast(self.device.type, torch.bfloat16) if way.autocast else contextlib.nullcontext()
        with precision:
            prediction, target = self.specification.loss_terms(
                self.network, self.scheduler, conditions, latents, index, draws
            )
        return torch.nn.functional.mse_loss(prediction, target)

    def prepare(self, way: Way) -> None:
        """Arranges network and optimizer as the way has them; what costs time here belongs to no update."""
        self._optimizer.param_groups[0]["fused"] = way.fused_optimizer or None
        for parameter, state in self._optimizer.state.items():
            state["step"] = state["step"].to(parameter.device if way.fused_optimizer else "cpu")
        if way.recomputes:
            self.network.enable_gradient_checkpointing()
        elif self.text:
            self.network.disable_gradient_checkpointing()
        processor = AttnProcessor if way.attention == "explicit" else AttnProcessor2_0
        for module in self.network.modules():
            if isinstance(module, Attention) and not self.text:
                module.set_processor(processor())
        self._vae(way.encoder)

    def _vae(self, dtype: torch.dtype) -> Any:
        if dtype not in self._vaes:
            self._vaes[dtype] = copy.deepcopy(self.parts["vae"]).to(dtype)
        return self._vaes[dtype]

    def _encode(self, way: Way) -> Batch:
        if way.encodes == "stored":
            return self.stored
        latents, conditions, vae = [], [], self._vae(way.encoder)
        for number, (video, caption) in enumerate(zip(self.videos, self.captions, strict=True)):
            encode = self._encode_as_reference if way.encodes == "reference" else self.specification.prepare_latents
            latents.append(encode(vae=vae, video=video, sample_seed=SEED + number))
            if not way.captions_known:
                conditions.append(self.encode_caption(caption))
        known = self.stored[0] if way.captions_known else self.specification.collate_conditions(conditions)
        return known, self.specification.collate_latents(latents)

    @torch.no_grad()
    def encode_caption(self, caption: str) -> dict[str, Any]:
        """The condition of a caption."""
        return self.adapter.encode_caption(self.text, caption, dropped=False)

    @torch.no_grad()
    def _encode_as_reference(self, vae: Any, video: torch.Tensor, sample_seed: int) -> dict[str, torch.Tensor]:
        """CogVideoX: four videos are encoded, two of them stills, one of which is not used. Latte: the first frame is
        encoded once more than the others.
        """
        video_BFCHW = video.unsqueeze(0)
        if not self.text:
            first = sample_generator(sample_seed, "first frame", None)
            encode_frames(vae, video_BFCHW[:, :1], first)
            return self.specification.prepare_latents(vae=vae, video=video, sample_seed=sample_seed)
        image_BCHW, frames = video_BFCHW[:, 0], video_BFCHW.shape[1]
        noisy = noisy_pixels(
            image_BCHW, frames, self.adapter.objective, lambda purpose: sample_generator(sample_seed, purpose, None)
        )
        stills = [image.unsqueeze(1).expand_as(video_BFCHW) for image in (image_BCHW, noisy["image"])]
        encode_video(vae, stills[0])
        return {
            "latents": encode_video(vae, video_BFCHW),
            "image_latents": encode_video(vae, stills[1]),
            "prior_latents": encode_video(vae, noisy["prior"]),
        }


def _clips(specification: Any, count: int, device: torch.device) -> tuple[list[torch.Tensor], list[str]]:
    """Clips [F, 3, H, W] in [-1, 1], pictures that a bar crosses, and what they show."""
    frames, height, width = specification.clip_shape
    generator = torch.Generator().manual_seed(SEED)
    videos = []
    for _ in range(count):
        video = torch.rand(1, 3, height, width, generator=generator).repeat(frames, 1, 1, 1) * 2 - 1
        for frame in range(frames):
            left = frame * width // frames
            video[frame, :, :, left : left + width // 8] = 1.0
        videos.append(video.to(device))
    names = getattr(specification.adapter, "class_names", None) or [f"picture {i}" for i in range(count)]
    return videos, list(names[:count])
