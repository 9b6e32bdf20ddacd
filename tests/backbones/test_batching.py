"""How many inputs a call of the network has, what is encoded once, and what is decoded by tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from framebridge_plugin import FrameBridgeCogVideoXPipeline, FrameBridgeLattePipeline, FrameBridgeLTXPipeline
from tests.backbones.latte_calls import picture
from tests.tiny_ltx import make_tiny_ltx

TEXTS = ["a red square", "a blue square", "a red square"]


@pytest.fixture(scope="module")
def ltx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_ltx(tmp_path_factory.mktemp("ltx") / "model")


@pytest.fixture(params=["cogvideox", "ltx", "latte"])
def three(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    """A pipeline, and a call of it for three videos with guidance, each with a generator of its own."""
    call: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
    call |= {"image": [picture(0), picture(1), picture(0)]}
    pipeline: Any
    if request.param == "latte":
        folders = request.getfixturevalue("latte_folders")
        pipeline = FrameBridgeLattePipeline.from_pretrained(folders["bridge_neural_prior"])
        call |= {"class_label": ["up", "down", ""]}
    else:
        size = {"height": 64, "width": 64, "num_frames": 9}
        if request.param == "ltx":
            pipeline = FrameBridgeLTXPipeline.from_pretrained(request.getfixturevalue("ltx_folder"))
        else:
            pipeline = FrameBridgeCogVideoXPipeline.from_pretrained(request.getfixturevalue("bridge_folder"))
        call |= {"prompt": TEXTS, "negative_prompt": "grey", "use_dynamic_cfg": True, **size}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, call


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def rows_of_calls(module: torch.nn.Module, most: int = 100) -> list[int]:
    """Notes how many rows each call of a module has; where they are more than `most`, its memory ends."""
    calls: list[int] = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        rows = len(next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)))
        if rows > most:
            raise torch.OutOfMemoryError
        calls.append(rows)

    module.register_forward_pre_hook(note, with_kwargs=True)
    return calls


def test_all_videos_and_both_branches_go_through_the_network_at_once_or_as_many_as_are_said(three):
    pipeline, call = three
    calls = rows_of_calls(pipeline.transformer)
    together = pipeline(**call, generator=generators(5, 6, 7)).frames
    assert calls == [6, 6]
    assert pipeline.last_batch_size == 6
    for batch_size, expected in ((3, [3, 3]), (4, [4, 2]), (1, [1] * 6)):
        calls.clear()
        found = pipeline(**call, generator=generators(5, 6, 7), batch_size=batch_size).frames
        assert calls == expected * 2
        torch.testing.assert_close(found, together, rtol=1e-4, atol=1e-4)
    # Each video is the one that a call for it alone makes.
    alone = {name: [value[1]] for name, value in call.items() if isinstance(value, list)}
    torch.testing.assert_close(
        pipeline(**call | alone, generator=generators(6)).frames, together[1:2], rtol=1e-4, atol=1e-4
    )


def test_where_memory_ends_a_call_goes_on_with_fewer_at_once(three, capsys):
    pipeline, call = three
    together = pipeline(**call, generator=generators(5, 6, 7)).frames
    calls = rows_of_calls(pipeline.transformer, most=2)
    found = pipeline(**call, generator=generators(5, 6, 7)).frames
    torch.testing.assert_close(found, together, rtol=1e-4, atol=1e-4)
    assert calls == [2] * 6
    assert pipeline.last_batch_size == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert ["out of memory: 3 at once" in said[0], "out of memory: 2 at once" in said[1], len(said)] == [True, True, 2]
    rows_of_calls(pipeline.transformer, most=0)
    with pytest.raises(torch.OutOfMemoryError):
        pipeline(**call, generator=generators(5, 6, 7))


def test_a_neural_prior_alone_is_called_in_parts(latte_folders):
    pipeline = FrameBridgeLattePipeline.from_pretrained(latte_folders["neural_prior"])
    call = {"image": [picture(0)] * 3, "class_label": ["up", "down", ""], "output_type": "latent"}
    calls = rows_of_calls(pipeline.neural_prior)
    together = pipeline(**call, generator=generators(5, 6, 7)).frames
    found = pipeline(**call, generator=generators(5, 6, 7), batch_size=2).frames
    torch.testing.assert_close(found, together, rtol=1e-4, atol=1e-4)
    assert calls == [3, 2, 1]
    rows_of_calls(pipeline.neural_prior, most=2)
    assert torch.equal(pipeline(**call, generator=generators(5, 6, 7)).frames, found)
    assert pipeline.last_batch_size == 2


def test_each_text_and_each_picture_is_encoded_once(bridge_folder):
    pipeline = FrameBridgeCogVideoXPipeline.from_pretrained(bridge_folder)
    pipeline.set_progress_bar_config(disable=True)
    texts, pictures = rows_of_calls(pipeline.text_encoder), rows_of_calls(pipeline.vae.encoder)
    call = {"image": [picture(0), picture(1), picture(0)], "num_inference_steps": 1, "output_type": "latent"}
    pipeline(**call, prompt=TEXTS, num_videos_per_prompt=2)
    assert texts == [3]  # with the empty one
    assert pictures == [1, 1]
    texts.clear()
    pipeline(**call, prompt=TEXTS, guidance_scale=1.0)
    assert texts == [2]
    found = [
        pipeline(**call, prompt=TEXTS, negative_prompt=negative, generator=generators(5, 6, 7)).frames
        for negative in ("grey", ["grey"])
    ]
    assert torch.equal(*found)


def test_large_frames_are_decoded_by_tiles(bridge_folder):
    pipeline = FrameBridgeCogVideoXPipeline.from_pretrained(bridge_folder)
    pipeline.vae.enable_tiling(tile_sample_min_height=64, tile_sample_min_width=528, tile_overlap_factor_width=0.02)
    pipeline.vae.disable_tiling()
    noise = torch.randn(1, 1, 4, 8, 130, generator=torch.Generator().manual_seed(0))
    for latents, is_large in ((noise[..., :128], False), (noise, True)):
        found = {tiling: pipeline.decode_latents(latents, tiling) for tiling in ("auto", "on", "off")}
        assert not torch.equal(found["on"], found["off"])
        assert torch.equal(found["auto"], found["on" if is_large else "off"])
        assert not pipeline.vae.use_tiling  # by which images are encoded
    pipeline.vae.enable_tiling()
    assert torch.equal(pipeline.decode_latents(noise), found["on"])
    assert pipeline.vae.use_tiling
