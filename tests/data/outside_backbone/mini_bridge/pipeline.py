"""Image-to-video with the widened network."""

from __future__ import annotations

from diffusers import CogVideoXPipeline
from diffusers.pipelines.cogvideo.pipeline_output import CogVideoXPipelineOutput

from framebridge_plugin.backbones.text_pipeline import TextBridgePipeline
from mini_bridge.adapter import MiniAdapter


class FrameBridgeMiniPipeline(TextBridgePipeline, CogVideoXPipeline):
    """The pipeline of a Mini; CogVideoX's own encodes its captions."""

    adapter = MiniAdapter
    output_class = CogVideoXPipelineOutput
