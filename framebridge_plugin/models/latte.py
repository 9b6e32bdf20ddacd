"""Latte, a small video transformer with class labels, trained from scratch as a bridge or as the neural prior.

Latte (arXiv 2401.03048, variant 1) cuts every frame into patches and alternates two kinds of attention: within a
frame, and along time at one place of the picture. FrameBridge (arXiv 2410.15371) puts the clean first frame in front
of the noisy ones as one more frame, and learns a coarse video, the neural prior, with the same network without time
and without that frame.

Layouts: B batch, F frames, C channels, h and w rows and columns of the latent, N patches of a frame, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps, get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from torch import nn

from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.settings.checking import checked
from framebridge_plugin.settings.choices import Count

Stage = Literal["bridge", "neural_prior"]
_TIME_CHANNELS = 256


class LatteBlock(nn.Module):
    """Self-attention over space or over time, then a feed-forward layer, both modulated and gated (adaLN-Zero)."""

    def __init__(self, num_attention_heads: int, attention_head_dim: int, is_temporal: bool) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.is_temporal = is_temporal
        self.norm1 = AdaLayerNormZero(width)
        self.attn = Attention(width, heads=num_attention_heads, dim_head=attention_head_dim, bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(width, activation_fn="gelu-approximate")

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Transforms the tokens of whole videos."""
        normed, gate_attn, shift_ff, scale_ff, gate_ff = self.norm1(hidden_states, emb=conditioning)
        hidden_states = hidden_states + gate_attn[:, None] * self._attend(normed, num_frames)
        normed = self.norm2(hidden_states) * (1 + scale_ff[:, None]) + shift_ff[:, None]
        return hidden_states + gate_ff[:, None] * self.ff(normed)

    def _attend(self, tokens: torch.Tensor, num_frames: int) -> torch.Tensor:
        tokens_BFND = tokens.unflatten(1, (num_frames, -1))
        if self.is_temporal:
            tokens_BNFD = tokens_BFND.transpose(1, 2)
            attended_BNFD = self.attn(tokens_BNFD.flatten(0, 1)).unflatten(0, tokens_BNFD.shape[:2])
            attended_BFND = attended_BNFD.transpose(1, 2)
        else:
            attended_BFND = self.attn(tokens_BFND.flatten(0, 1)).unflatten(0, tokens_BFND.shape[:2])
        return attended_BFND.flatten(1, 2)


class LatteTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The Latte network of the bridge, of the bridge on a neural prior, and of the neural prior itself.

    The constructor leaves the weights as torch's layers make them; `from_scratch` and `initialize_weights` give those
    that training from scratch starts with, from a seed.

    Args:
        num_layers: Number of blocks, even: spatial and temporal ones in turn.
        num_attention_heads: Number of heads.
        attention_head_dim: Width of a head; their product, the network's width, is a multiple of 4.
        patch_size: Rows and columns of a patch.
        in_channels: Channels of the latent, or twice as many for a bridge that is shown a neural prior's video too.
        out_channels: Channels of the latent.
        sample_height: Rows of the latent it is trained on, a multiple of the patch size. The network takes others.
        sample_width: Columns of the latent it is trained on.
        num_frames: Frames of the video it is trained on, without the image in front.
        num_classes: Number of classes; one more label, the last, stands for no class.
        class_names: Names of the classes in the order of their labels, or None where only the numbers are known.
        stage: "bridge", or "neural_prior" for a network without time and without the image in front.

    Raises:
        FrameBridgeError: If two of the numbers do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LatteBlock"]  # noqa: RUF012 (diffusers' way to say it)
    _repeated_blocks = ["LatteBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["patch_embed", "time_embedding", "class_embedding", "norm"]  # noqa: RUF012

    @checked
    @register_to_config
    def __init__(
        self,
        num_layers: Count = 12,
        num_attention_heads: Count = 6,
        attention_head_dim: Count = 64,
        patch_size: Count = 2,
        in_channels: Count = 4,
        out_channels: Count = 4,
        sample_height: Count = 32,
        sample_width: Count = 32,
        num_frames: Count = 16,
        num_classes: Count = 101,
        class_names: list[str] | None = None,
        stage: Stage = "bridge",
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        _check_config(self.config, width)

        self.patch_embed = PatchEmbed(
            sample_height, sample_width, patch_size, in_channels, embed_dim=width, pos_embed_type=None
        )
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.time_proj = None
        self.time_embedding = None
        if stage == "bridge":
            self.time_proj = Timesteps(_TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
            self.time_embedding = TimestepEmbedding(_TIME_CHANNELS, width)
        self.transformer_blocks = nn.ModuleList(
            LatteBlock(num_attention_heads, attention_head_dim, is_temporal=index % 2 == 1)
            for index in range(num_layers)
        )
        self.norm_out = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(width, patch_size**2 * out_channels)
        self.gradient_checkpointing = False

    @classmethod
    def from_scratch(cls, config: Mapping[str, Any], seed: int) -> LatteTransformer:
        """Builds a network to be trained from scratch; equal arguments give equal weights.

        Args:
            config: Arguments of this class.
            seed: What the weights are drawn from; torch's global generator is left alone.

        Returns:
            The network, in float32 on the CPU.
        """
        # On the meta device, since the layers' constructors draw from the global generator.
        with torch.device("meta"):
            transformer = cls.from_config(dict(config))
        transformer.to_empty(device="cpu")
        transformer.initialize_weights(seed)
        return transformer

    @property
    def null_label(self) -> int:
        """The label that stands for no class."""
        return self.config.num_classes

    @property
    def takes_neural_prior(self) -> bool:
        """Whether the input has a neural prior's video as further channels."""
        return self.config.in_channels != self.config.out_channels

    def label_of(self, name: str) -> int | None:
        """The label of a class.

        Args:
            name: Name of the class, or its label in digits.

        Returns:
            The label in [0, num_classes), or None if there is no such class.
        """
        class_names = self.config.class_names or []
        if name in class_names:
            return class_names.index(name)
        if name.isdecimal() and int(name) < self.config.num_classes:
            return int(name)
        return None

    @torch.no_grad()
    def initialize_weights(self, seed: int) -> None:
        """Draws all weights anew, as DiT and Latte do: residual branches and output at zero, so the output is 0.

        Args:
            seed: What they are drawn from; torch's global generator is left alone.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) or name.startswith("time_embedding.linear"):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
            elif name.endswith(("norm1.linear", "norm_out.linear", "proj_out")):
                nn.init.zeros_(module.weight)
            elif name.endswith((".to_q", ".to_k", ".to_v")):
                # As thirds of one matrix of width x 3 width, which is how Latte draws them.
                nn.init.xavier_uniform_(module.weight, gain=0.5**0.5, generator=generator)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | None,
        class_labels: torch.Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Runs the network.

        Args:
            hidden_states: Latent frames [B, F', in_channels, h, w] in the precision of the weights; rows and columns
                are multiples of the patch size. F' = 1 + F for a bridge, the image in front, and F for the neural
                prior.
            timestep: Times [B] in the backbone's units (bridge indices without alignment), real-valued in float32 or
                integers, whatever the precision of the weights; None for the neural prior.
            class_labels: Labels [B], int64, in [0, num_classes]; num_classes is no class.
            return_dict: Return an output object, not a tuple.

        Returns:
            The output for every frame, that of the image too, [B, F', out_channels, h, w].

        Raises:
            FrameBridgeError: If the time is missing, or is given to a neural prior.
        """
        if (timestep is None) != (self.time_embedding is None):
            raise FrameBridgeError(
                f"a Latte network of stage {self.config.stage!r} {'needs a' if timestep is None else 'takes no'} "
                "timestep; use the network of the other stage"
            )
        num_frames = hidden_states.shape[1]
        rows, columns = (size // self.config.patch_size for size in hidden_states.shape[-2:])

        conditioning = self.class_embedding(class_labels)
        if self.time_proj is not None and self.time_embedding is not None:
            # The sines and cosines are taken in float32: bfloat16 would turn 965.7 into 964.
            conditioning = conditioning + self.time_embedding(self.time_proj(timestep).to(hidden_states.dtype))

        tokens_BFND = self.patch_embed(hidden_states.flatten(0, 1)).unflatten(0, (-1, num_frames))
        # In the precision of the input, and not of what autocast makes of it, which the blocks' sums keep.
        width, device, dtype = tokens_BFND.shape[-1], tokens_BFND.device, hidden_states.dtype
        tokens_BFND = tokens_BFND + spatial_positions(rows, columns, width, device).to(dtype)
        tokens = tokens_BFND.flatten(1, 2)
        for index, block in enumerate(self.transformer_blocks):
            if index == 1:  # The first that looks along time.
                positions_FD = temporal_positions(num_frames, width, device).to(dtype)
                tokens = tokens + positions_FD.repeat_interleave(rows * columns, dim=0)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, conditioning, num_frames)
            else:
                tokens = block(tokens, conditioning, num_frames)

        patches = self.proj_out(self.norm_out(tokens, conditioning))
        sample = self._assemble_patches(patches, num_frames, rows, columns)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _assemble_patches(self, patches: torch.Tensor, num_frames: int, rows: int, columns: int) -> torch.Tensor:
        """[B, F * rows * columns, patch * patch * C] -> [B, F, C, rows * patch, columns * patch]."""
        patch = self.config.patch_size
        # b frames, r c rows and columns of patches, y x inside the patch
        cells_BFrcyxC = patches.unflatten(2, (patch, patch, -1)).unflatten(1, (num_frames, rows, columns))
        return cells_BFrcyxC.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def spatial_positions(rows: int, columns: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Sines and cosines of a patch's place in its frame."""
    by_column = temporal_positions(columns, width // 2, device)[None].expand(rows, -1, -1)
    by_row = temporal_positions(rows, width // 2, device)[:, None].expand(-1, columns, -1)
    return torch.cat([by_column, by_row], dim=-1).flatten(0, 1)


def temporal_positions(num_frames: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Sines, then cosines, of a frame's number at `width / 2` wavelengths from 2 pi to nearly 20000 pi."""
    return get_timestep_embedding(torch.arange(num_frames, device=device), width, downscale_freq_shift=0)


def _check_config(config: Any, width: int) -> None:
    problem = None
    if config.num_layers % 2:
        problem = f"num_layers={config.num_layers} must be even, for there are as many spatial as temporal blocks"
    elif width % 4:
        problem = f"the width {width} (heads x head width) must be a multiple of 4"
    elif config.sample_height % config.patch_size or config.sample_width % config.patch_size:
        problem = (
            f"latents of {config.sample_height} x {config.sample_width} cannot be cut into patches of "
            f"{config.patch_size} x {config.patch_size}; choose another clip size or patch size"
        )
    elif config.class_names is not None and len(config.class_names) != config.num_classes:
        problem = f"{len(config.class_names)} class_names for num_classes={config.num_classes}"
    elif config.in_channels not in (config.out_channels, 2 * config.out_channels):
        problem = (
            f"in_channels={config.in_channels} must be out_channels={config.out_channels}, or twice that for a bridge "
            "on a neural prior"
        )
    elif config.stage == "neural_prior" and config.in_channels != config.out_channels:
        problem = "a neural prior cannot take a neural prior's video as input"
    if problem:
        raise FrameBridgeError(f"LatteTransformer: {problem}")
