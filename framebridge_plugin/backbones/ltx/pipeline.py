"""Image-to-video with a channel-expanded LTX-Video, as a bridge or as the matched flow-matching baseline."""

from __future__ import annotations

from diffusers import LTXPipeline
from diffusers.pipelines.ltx.pipeline_output import LTXPipelineOutput

from framebridge_plugin.backbones.ltx.adapter import LTXAdapter
from framebridge_plugin.backbones.ltx.facts import FRAMES_PER_LATENT
from framebridge_plugin.backbones.text_pipeline import TextBridgePipeline


class FrameBridgeLTXPipeline(TextBridgePipeline, LTXPipeline):
    """Image-to-video pipeline for an LTX transformer with doubled input channels; see `TextBridgePipeline`."""

    adapter = LTXAdapter
    output_class = LTXPipelineOutput
    vae_scale_factor_temporal = FRAMES_PER_LATENT
