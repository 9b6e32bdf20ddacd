"""Latte computes what the authors' network computes: outputs, guidance, gradients, and the full-size weights."""

from __future__ import annotations

import json
import re

import pytest
import torch

from framebridge_plugin.backbones.latte.networks import call_latte
from framebridge_plugin.backbones.sampling_loop import guide
from framebridge_plugin.models.latte import LatteTransformer, spatial_positions, temporal_positions
from tests.latte_reference import STAGES, full_size_network, reference_network
from tests.reference_vectors import DATA, load_vectors, relative_error

TOLERANCE = 1e-5
VECTORS, DESCRIPTION = load_vectors("latte_model")
INPUTS = {"bridge": "x", "bridge_neural_prior": "x_np", "nwarp": "x_nwarp"}

# (pattern of our names, the authors' name); q, k and v are one matrix there.
THEIR_NAMES = [
    (r"patch_embed\.proj\.(\w+)", r"x_embedder.proj.\1"),
    (r"time_embedding\.linear_1\.(\w+)", r"t_embedder.mlp.0.\1"),
    (r"time_embedding\.linear_2\.(\w+)", r"t_embedder.mlp.2.\1"),
    (r"class_embedding\.weight", r"y_embedder.embedding_table.weight"),
    (r"transformer_blocks\.(\d+)\.attn\.to_[qkv]\.(\w+)", r"blocks.\1.attn.qkv.\2"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"transformer_blocks\.(\d+)\.norm1\.linear\.(\w+)", r"blocks.\1.adaLN_modulation.1.\2"),
    (r"norm_out\.linear\.(\w+)", r"final_layer.adaLN_modulation.1.\1"),
    (r"proj_out\.(\w+)", r"final_layer.linear.\1"),
]


def their_name(name: str) -> str:
    (found,) = [re.sub(pattern, theirs, name) for pattern, theirs in THEIR_NAMES if re.fullmatch(pattern, name)]
    return found


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, LatteTransformer]:
    return {stage: reference_network(stage, tmp_path_factory.mktemp(stage)) for stage in STAGES}


def run(network: LatteTransformer, stage: str, time: str | None, inputs: torch.Tensor | None = None) -> torch.Tensor:
    inputs = VECTORS[INPUTS[stage]] if inputs is None else inputs
    return network(inputs, None if time is None else VECTORS[time], VECTORS["y"]).sample


@pytest.mark.parametrize("stage", ["bridge", "bridge_neural_prior"])
@pytest.mark.parametrize(("time", "expected"), [("t_int", "out_int"), ("t_frac", "out_frac")])
@torch.no_grad()
def test_output_of_the_bridge(networks, stage, time, expected):
    assert relative_error(run(networks[stage], stage, time), VECTORS[f"{stage}.{expected}"]) < TOLERANCE


@torch.no_grad()
def test_output_of_the_neural_prior(networks):
    assert relative_error(run(networks["nwarp"], "nwarp", None), VECTORS["nwarp.out"]) < TOLERANCE


@torch.no_grad()
def test_loss_of_the_neural_prior(networks):
    target = VECTORS["nwarp.x_start"]
    image = VECTORS["nwarp.condition_frame"].expand_as(target)
    video = call_latte(networks["nwarp"], image, None, VECTORS["y"])
    assert relative_error((video - target).square().mean(dim=(1, 2, 3, 4)), VECTORS["nwarp.loss"]) < TOLERANCE


@pytest.mark.parametrize("stage", ["bridge", "bridge_neural_prior"])
@torch.no_grad()
def test_time_embedding(networks, stage):
    network = networks[stage]
    embedding = network.time_embedding(network.time_proj(VECTORS["t_frac"]))
    assert relative_error(embedding, VECTORS[f"{stage}.t_emb"]) < TOLERANCE


@torch.no_grad()
def test_the_last_label_stands_for_no_class(networks):
    network = networks["bridge"]
    labels = VECTORS["y"].clone()
    labels[0] = network.null_label
    assert torch.equal(network.class_embedding(labels), VECTORS["label_embed.force_drop"])


@pytest.mark.parametrize("stage", ["bridge", "bridge_neural_prior"])
@torch.no_grad()
def test_guided_output(networks, stage):
    network, inputs, labels = networks[stage], VECTORS[INPUTS[stage]], VECTORS["cfg.y"]
    assert labels[2:].tolist() == [network.null_label] * 2
    # Theirs has the unconditional half last, ours first.
    both = network(torch.cat([inputs, inputs]), VECTORS["t_frac"].repeat(2), labels.roll(2)).sample
    guided = guide(both, 7.0)
    assert relative_error(torch.cat([guided, guided]), VECTORS[f"{stage}.out_cfg7"]) < TOLERANCE


@pytest.mark.parametrize("stage", STAGES)
def test_gradients(networks, stage):
    network = networks[stage]
    network.zero_grad()
    inputs = VECTORS[INPUTS[stage]].clone().requires_grad_()
    output = run(network, stage, None if stage == "nwarp" else "t_frac", inputs)
    (output * VECTORS["R"][:, : output.shape[1]]).sum().backward()
    assert relative_error(inputs.grad, VECTORS[f"{stage}.grad_x"]) < TOLERANCE

    squares: dict[str, float] = {}
    for name, parameter in network.named_parameters():
        theirs = their_name(name)
        squares[theirs] = squares.get(theirs, 0.0) + float(parameter.grad.double().square().sum())
    names = [name.removeprefix("nwarp_model.") for name in DESCRIPTION[f"{stage}.grad_param_names"]]
    assert set(names) == set(squares)
    norms = torch.tensor([squares[name] for name in names]).sqrt()
    expected = VECTORS[f"{stage}.grad_norms"]
    assert relative_error(norms, expected) < TOLERANCE
    assert torch.allclose(norms, expected, rtol=1e-4)


def test_positions():
    assert relative_error(spatial_positions(4, 4, 64), VECTORS["sd.pos_embed"][0]) < 1e-6
    assert relative_error(temporal_positions(7, 64), VECTORS["sd.temp_embed"][0]) < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_s2_at_full_size_has_the_weights_of_the_reference(stage):
    reference = json.loads((DATA / "latte_s2_keys.json").read_text())["stages"][stage]
    transformer = full_size_network(stage)
    shapes: dict[str, list[int]] = {}
    for name, tensor in transformer.state_dict().items():
        theirs = their_name(name)
        rows = shapes[theirs][0] if theirs in shapes else 0  # q, k and v, one below the other
        shapes[theirs] = [rows + tensor.shape[0], *tensor.shape[1:]]
    num_steps = 16 if stage == "nwarp" else 17
    tables = {"pos_embed": spatial_positions(16, 16, 384), "temp_embed": temporal_positions(num_steps, 384)}
    prefix = "nwarp_model." if stage == "nwarp" else ""
    shapes |= {name: [1, *table.shape] for name, table in tables.items()}
    assert {prefix + name: shape for name, shape in shapes.items()} == reference["state_dict"]

    trainable = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
    assert trainable == reference["params_trainable"]
    assert trainable + sum(table.numel() for table in tables.values()) == reference["params_total"]
    assert not list(transformer.buffers())


def test_attention_is_torchs_fused_one(networks):
    class Recorder(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            # By name: finetrainers puts its own function in the place of torch's, and calls that.
            self.calls += getattr(function, "__name__", "") == "scaled_dot_product_attention"
            return function(*args, **(kwargs or {}))

    with Recorder() as recorder, torch.no_grad():
        run(networks["bridge"], "bridge", "t_int")
    assert recorder.calls == len(networks["bridge"].transformer_blocks)
