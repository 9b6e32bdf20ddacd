"""Image-to-video with a channel-expanded CogVideoX, as a bridge or as the matched diffusion baseline."""

from __future__ import annotations

from diffusers import CogVideoXPipeline
from diffusers.pipelines.cogvideo.pipeline_output import CogVideoXPipelineOutput

from framebridge_plugin.backbones.cogvideox.adapter import CogVideoXAdapter
from framebridge_plugin.backbones.text_pipeline import TextBridgePipeline


class FrameBridgeCogVideoXPipeline(TextBridgePipeline, CogVideoXPipeline):
    """Image-to-video pipeline for a CogVideoX transformer with doubled input channels; see `TextBridgePipeline`."""

    adapter = CogVideoXAdapter
    output_class = CogVideoXPipelineOutput

    def _default_clip(self) -> tuple[int, int, int]:
        config, scale = self.transformer.config, self.vae_scale_factor_spatial
        return (
            self.config.num_frames or config.sample_frames,
            self.config.height or config.sample_height * scale,
            self.config.width or config.sample_width * scale,
        )
