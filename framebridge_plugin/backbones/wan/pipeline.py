"""Image-to-video with a channel-expanded Wan, as a bridge or as the matched flow-matching baseline."""

from __future__ import annotations

from typing import Any

from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput

from framebridge_plugin.backbones.text_pipeline import TextBridgePipeline
from framebridge_plugin.backbones.wan.adapter import WanAdapter
from framebridge_plugin.backbones.wan.facts import config_problem
from framebridge_plugin.errors import FrameBridgeError


class FrameBridgeWanPipeline(TextBridgePipeline, WanPipeline):
    """Image-to-video pipeline for a Wan transformer with doubled input channels; see `TextBridgePipeline`."""

    adapter = WanAdapter
    output_class = WanPipelineOutput

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        transformer: Any,
        scheduler: Any,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        fps: float | None = None,
        transformer_2: Any = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        # The last three are in the folders of Wan 2.1 too, empty.
        index = {"boundary_ratio": boundary_ratio, "expand_timesteps": expand_timesteps}
        if problem := config_problem("model_index.json", index):
            raise FrameBridgeError(f"the model {problem}")
        super().__init__(
            tokenizer,
            text_encoder,
            vae,
            transformer,
            scheduler,
            num_frames,
            height,
            width,
            num_inference_steps,
            guidance_scale,
            fps,
        )
