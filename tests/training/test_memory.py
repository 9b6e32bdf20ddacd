"""What a run takes of memory, at the sizes of published models, of which nothing is here but their configs."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from framebridge_plugin.cli import main
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.recipe import resolve_recipe
from framebridge_plugin.training import memory

GIB = 2**30
LARGE = (
    *(f"framebridge.data.{name}" for name in ("num_frames=49", "height=480", "width=720")),
    "training.batch_size=1",
)
ALONE = ("parallelism.dp_degree=1",)


def needs(recipe: str, *overrides: str, known: dict[str, Any] | None = None) -> memory.MemoryNeeds:
    return memory.memory_needs(resolve_recipe(recipe, overrides)[0], known)


def test_a_lora_of_the_2b_model_at_its_own_size(clips_folder):
    """19.0 GiB live and 7.2 precomputed, as computed by hand from the sizes of weights, blocks and activations, with
    positions in bfloat16; diffusers has them in float64.
    """
    known: dict[str, Any] = {}
    live = needs("cogvideox_bridge_lora", *LARGE, known=known)
    stored = needs("cogvideox_bridge_lora", *LARGE, "framebridge.precomputed=latents", known=known)
    positions = (226 + 13 * 30 * 45) * 1920
    assert (live.total - 6 * positions) / GIB == pytest.approx(19.0, rel=0.03)
    assert (stored.total - 6 * positions) / GIB == pytest.approx(7.2, rel=0.03)
    # 4.76 billion weights of T5-XXL's encoder in bfloat16, .216 of the autoencoder; 1.69 of the network.
    assert live.resident["text encoder"] / 2 == pytest.approx(4.76e9, rel=0.01)
    assert live.resident["autoencoder"] / 2 == pytest.approx(0.216e9, rel=0.01)
    layers = 30 * 4 * 2 * 64 * 1920 + 1920 * 32 * 2 * 2
    assert live.resident["network"] == pytest.approx(2 * 1.69e9 + 4 * layers + 8 * positions, rel=0.01)
    assert live.resident["optimizer"] == 8 * layers
    assert not {"text encoder", "autoencoder", "encoding a clip"} & {*stored.resident, *stored.working}
    eight = [f"precision.{part}_quantization=int8" for part in ("text_encoder", "transformer")]
    small = needs("cogvideox_bridge_lora", *LARGE, *eight, known=known)
    # All but embeddings; a scale for each output, which may have as few as 1920 inputs.
    assert small.resident["text encoder"] == pytest.approx(4.63e9 + 2 * 0.13e9, rel=0.005)
    assert small.resident["network"] == pytest.approx(1.69e9 + 4 * layers + 8 * positions, rel=0.06)
    beside = needs("cogvideox_bridge_lora", *LARGE, "framebridge.text_encoder_device=cpu", known=known)
    assert live.total - beside.total == live.resident["text encoder"]
    assert not {"text encoder", "encoding a caption"} & {*beside.resident, *beside.working}

    # Of data that are here it is known that all captions are embedded first; the text encoder is gone then.
    first = needs("cogvideox_bridge_lora", *LARGE, f"framebridge.data.data_root={clips_folder}", known=known)
    text = "text encoder and encoding a caption, before the first update"
    assert first.resident == {name: size for name, size in live.resident.items() if name != "text encoder"}
    assert first.working[text] == live.resident["text encoder"] + live.working["encoding a caption"]
    assert live.total - first.total == max(live.working.values()) - live.working["encoding a caption"] > 0
    # In advance: what encodes is never beside what trains, and the network waits in main memory.
    ahead = needs("cogvideox_bridge_lora", *LARGE, "dataset.enable_precomputation=true", known=known)
    assert ahead.resident == stored.resident
    text_ahead = "text encoder and encoding a caption, in advance, less the network"
    assert ahead.working[text_ahead] == first.working[text] - live.resident["network"]
    assert stored.total < ahead.total < first.total


@pytest.mark.parametrize(
    "overrides",
    [("training.gradient_checkpointing=false",), ("precision.autocast=bf16",)],
    ids=["plain", "checkpointed, autocast"],
)
def test_few_blocks_tell_of_all(overrides, monkeypatch):
    known = needs("cogvideox_bridge", *ALONE, "framebridge.precomputed=latents", *overrides)
    monkeypatch.setattr(memory, "_PERIOD", 30)
    made = needs("cogvideox_bridge", *ALONE, "framebridge.precomputed=latents", *overrides)
    assert known.resident == made.resident
    assert known.total == pytest.approx(made.total, rel=0.005)


def test_what_settings_change():
    """Of the 1.69 billion weights in float32, 6.3 GiB each for weights and gradients, 12.6 for the optimizer."""
    known: dict[str, Any] = {}
    change = functools.partial(needs, "cogvideox_bridge", known=known)
    large = ("framebridge.precomputed=latents", *ALONE, "training.batch_size=1")
    alone = change(*large)
    assert alone.resident.keys() == {"network", "optimizer"}
    averaged = change(*large, "framebridge.ema_decay=0.999")
    assert averaged.total - alone.total == averaged.resident["average of the weights"]
    eight_bits = change(*large, "optimization.optimizer=adamw-torchao-8bit")
    assert alone.resident["optimizer"] / eight_bits.resident["optimizer"] == pytest.approx(4, rel=0.05)
    replicas = change(*large[:1], "training.batch_size=1")
    assert replicas.resident["gradients"] == alone.resident["optimizer"] / 2
    sharded = change(*large[:1], "training.batch_size=1", "parallelism.dp_shards=8", *ALONE)
    assert sharded.resident["gradients"] * 8 == replicas.resident["gradients"]
    assert sharded.total < replicas.total / 3
    every_third = change(*large, "training.gradient_checkpointing_every=3")
    assert every_third.total > alone.total


@pytest.mark.parametrize("recipe", ["wan_bridge", "ltx_bridge_lora", "ucf101_bridge", "cogvideox_diffusion_baseline"])
def test_every_backbone_is_known(recipe):
    found = needs(recipe)
    assert found.resident["autoencoder"] > 0
    assert min(found.working.values()) > 0


def test_a_model_that_is_not_here_and_not_known():
    with pytest.raises(
        FrameBridgeError, match="owner/model is not in the hub's cache.*hf download owner/model --incl"
    ):
        needs("cogvideox_bridge", "model.pretrained_model_name_or_path=owner/model")


def test_the_doctor_says_it(capfd):
    recipe = ["--recipe", "cogvideox_bridge_lora", "framebridge.data.num_frames=9"]
    assert main(["doctor", *recipe]) == 0
    printed = capfd.readouterr().out
    assert "needs 14." in printed
    assert "text encoder" in printed
    assert "framebridge.precomputed=FOLDER" in printed
    sampling = printed[printed.index("Sampling 9 frames of 256 x 256 from it, in bf16") :].splitlines()[1:]
    whole, *less = (float(line.split()[0]) for line in sampling)
    assert whole > 13 > 11 > max(less)
    assert "precision.transformer_quantization=int8" in printed
    assert main(["doctor", "framebridge.data.num_frames=9"]) == 2
    assert "give --recipe" in capfd.readouterr().err
    # Exit code 1 says that the card has less.
    assert main(["doctor", *recipe, "model.pretrained_model_name_or_path=no/such/folder"]) == 2
    assert "no/such/folder" in capfd.readouterr().err
