"""The authors' checkpoints: the three stages are told apart, and what is not a whole one is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch

from framebridge_plugin.backbones.latte.reference_checkpoints import read_reference_checkpoint
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.models.latte import LatteTransformer, spatial_positions, temporal_positions
from tests.latte_reference import HEADS, STAGES, full_size_network, reference_weights, write_checkpoint
from tests.reference_vectors import DATA

SHARED = {
    "num_layers": 4,
    "num_attention_heads": HEADS,
    "attention_head_dim": 16,
    "patch_size": 2,
    "out_channels": 4,
    "sample_height": 8,
    "sample_width": 8,
    "num_frames": 6,
    "num_classes": 11,
    "class_names": None,
}


def refusal(file: Path, **settings) -> str:
    with pytest.raises(FrameBridgeError) as caught:
        read_reference_checkpoint(file, **{"num_attention_heads": HEADS, **settings})
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(file))
    return message


@pytest.mark.parametrize("stage", STAGES)
def test_the_three_stages(tmp_path, stage):
    weights = reference_weights(stage)
    file = write_checkpoint(tmp_path / "checkpoint.pt", weights)
    checkpoint = read_reference_checkpoint(file, num_attention_heads=HEADS)
    is_prior = stage == "nwarp"
    assert checkpoint.stage == ("neural_prior" if is_prior else stage)
    ((name, network),) = checkpoint.networks.items()
    assert name == ("neural_prior" if is_prior else "transformer")
    assert network.config == SHARED | {
        "stage": "neural_prior" if is_prior else "bridge",
        "in_channels": 8 if stage == "bridge_neural_prior" else 4,
    }
    assert checkpoint.leftover_keys == []
    assert checkpoint.describe() == (
        f"{checkpoint.stage} ({name}), weights 'ema': 4 blocks of width 64, patch 2, 6 frames of 8x8 latents, "
        "11 classes; no keys missing, none left over"
    )
    # Every weight is there, once; which is which, the outputs tell (test_latte_reference).
    trained = [tensor for key, tensor in weights.items() if not key.endswith("_embed")]
    converted = network.state_dict.values()
    assert sum(tensor.numel() for tensor in converted) == sum(tensor.numel() for tensor in trained)
    ours, theirs = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (converted, trained))
    assert torch.equal(ours.sort().values, theirs.sort().values)


def test_a_bridges_file_may_hold_its_neural_prior(tmp_path):
    both = reference_weights("bridge_neural_prior") | reference_weights("nwarp")
    alone = write_checkpoint(tmp_path / "prior.pt", reference_weights("nwarp"))
    checkpoint = read_reference_checkpoint(write_checkpoint(tmp_path / "both.pt", both), num_attention_heads=HEADS)
    prior = read_reference_checkpoint(alone, num_attention_heads=HEADS).networks["neural_prior"]
    assert (checkpoint.stage, list(checkpoint.networks)) == ("bridge_neural_prior", ["transformer", "neural_prior"])
    assert checkpoint.networks["neural_prior"].config == prior.config
    assert checkpoint.networks["neural_prior"].state_dict.keys() == prior.state_dict.keys()
    assert checkpoint.leftover_keys == []


def test_the_averaged_weights_are_preferred(tmp_path):
    weights, zeros = reference_weights("bridge"), {}
    for name, tensor in weights.items():
        zeros[name] = tensor if name.endswith("_embed") else torch.zeros_like(tensor)
    for file, expected, is_zero in [
        (write_checkpoint(tmp_path / "both.pt", zeros, "model", ema=weights), "ema", False),
        (write_checkpoint(tmp_path / "raw.pt", zeros, "model"), "model", True),
    ]:
        checkpoint = read_reference_checkpoint(file, num_attention_heads=HEADS)
        assert checkpoint.weights == expected
        assert f"weights '{expected}'" in checkpoint.describe()
        largest = max(tensor.abs().max() for tensor in checkpoint.networks["transformer"].state_dict.values())
        assert (largest == 0) == is_zero


def test_weights_become_float32(tmp_path):
    halved = {name: tensor.bfloat16() for name, tensor in reference_weights("bridge").items()}
    checkpoint = read_reference_checkpoint(write_checkpoint(tmp_path / "half.pt", halved), num_attention_heads=HEADS)
    assert {tensor.dtype for tensor in checkpoint.networks["transformer"].state_dict.values()} == {torch.float32}


@pytest.mark.parametrize(("count", "kept"), [(11, True), (10, False)])
def test_class_names_are_taken_where_there_are_as_many(tmp_path, count, kept):
    names = [f"class {number}" for number in range(count)]
    file = write_checkpoint(tmp_path / "checkpoint.pt", reference_weights("bridge"))
    checkpoint = read_reference_checkpoint(file, class_names=tuple(names), num_attention_heads=HEADS)
    assert checkpoint.networks["transformer"].config["class_names"] == (names if kept else None)


@pytest.mark.parametrize("stage", STAGES)
def test_full_size_checkpoints(tmp_path, stage):
    shapes = json.loads((DATA / "latte_s2_keys.json").read_text())["stages"][stage]["state_dict"]
    prefix = "nwarp_model." if stage == "nwarp" else ""
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    weights[f"{prefix}pos_embed"] = spatial_positions(16, 16, 384)[None]
    weights[f"{prefix}temp_embed"] = temporal_positions(shapes[f"{prefix}temp_embed"][1], 384)[None]
    checkpoint = read_reference_checkpoint(write_checkpoint(tmp_path / "checkpoint.pt", weights))
    (network,) = checkpoint.networks.values()
    expected = full_size_network(stage)
    assert network.config == {name: expected.config[name] for name in network.config}
    assert {name: tensor.shape for name, tensor in network.state_dict.items()} == {
        name: tensor.shape for name, tensor in expected.state_dict().items()
    }
    assert checkpoint.leftover_keys == []


def test_another_depth_or_width_needs_its_number_of_heads(tmp_path):
    file = write_checkpoint(tmp_path / "checkpoint.pt", reference_weights("bridge"))
    message = refusal(file, num_attention_heads=None)
    assert "4 blocks of width 64 are none of the sizes Ti, S, B, L, XL; say how many attention heads it has" in message
    assert "5 attention heads do not divide the width 64" in refusal(file, num_attention_heads=5)


# What is not a whole checkpoint


@pytest.mark.parametrize("stage", STAGES)
def test_missing_keys_are_named(tmp_path, stage):
    prefix = "nwarp_model." if stage == "nwarp" else ""
    weights = reference_weights(stage)
    gone = ["temp_embed", "x_embedder.proj.weight", "blocks.1.attn.qkv.bias", "final_layer.linear.weight"]
    for name in gone:
        del weights[prefix + name]
    message = refusal(write_checkpoint(tmp_path / "checkpoint.pt", weights))
    assert f"keys are missing: {', '.join(gone)}; take the file" in message


def test_very_many_missing_keys_make_one_line(tmp_path):
    weights = {"blocks.3.attn.proj.bias": torch.zeros(64)}
    message = refusal(write_checkpoint(tmp_path / "checkpoint.pt", weights))
    assert re.search(r"keys are missing: pos_embed, temp_embed, .* and \d+ more; take the file", message)


@pytest.mark.parametrize("stage", STAGES)
def test_leftover_keys_are_named(tmp_path, stage):
    weights = reference_weights(stage)
    last_block = "nwarp_model.blocks.3." if stage == "nwarp" else "blocks.3."
    weights |= {"text_embedder.weight": torch.zeros(3), f"{last_block}attn.q_norm.weight": torch.zeros(64)}
    checkpoint = read_reference_checkpoint(
        write_checkpoint(tmp_path / "checkpoint.pt", weights), num_attention_heads=HEADS
    )
    assert checkpoint.leftover_keys == ["text_embedder.weight", f"{last_block}attn.q_norm.weight"]
    assert checkpoint.describe().endswith(
        f"; no keys missing, left over: text_embedder.weight, {last_block}attn.q_norm.weight"
    )


def test_a_neural_prior_in_the_file_of_a_plain_bridge_is_left_over(tmp_path):
    prior = reference_weights("nwarp")
    file = write_checkpoint(tmp_path / "checkpoint.pt", reference_weights("bridge") | prior)
    checkpoint = read_reference_checkpoint(file, num_attention_heads=HEADS)
    assert (checkpoint.stage, list(checkpoint.networks)) == ("bridge", ["transformer"])
    assert checkpoint.leftover_keys == list(prior)


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    weights = reference_weights("bridge")
    weights["blocks.2.mlp.fc1.bias"] = torch.zeros(128)
    message = refusal(write_checkpoint(tmp_path / "checkpoint.pt", weights))
    assert "blocks.2.mlp.fc1.bias has the shape [128], which does not fit the other weights" in message


@pytest.mark.parametrize("table", ["pos_embed", "temp_embed"])
def test_another_table_of_positions_is_refused(tmp_path, table):
    weights = reference_weights("bridge")
    weights[table] = weights[table].flip(1)
    message = refusal(write_checkpoint(tmp_path / "checkpoint.pt", weights))
    assert f"{table} is not the table of sines and cosines" in message


def test_a_picture_that_is_no_square_is_refused(tmp_path):
    weights = reference_weights("bridge")
    weights["pos_embed"] = weights["pos_embed"][:, :15]
    assert "15 places, which make no square" in refusal(write_checkpoint(tmp_path / "checkpoint.pt", weights))


def test_another_network_is_refused(tmp_path):
    file = write_checkpoint(tmp_path / "checkpoint.pt", {"layers.0.weight": torch.zeros(3)})
    assert "no Latte network in 'ema': it has keys such as layers.0.weight, and none that begin" in refusal(file)


class Code:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_file_with_code_is_refused_and_nothing_is_run(tmp_path):
    weights = reference_weights("bridge")
    folder = tmp_path / "made by the code"
    file = write_checkpoint(tmp_path / "checkpoint.pt", weights, args=Code(folder))
    assert "refused, for it holds more than weights" in refusal(file)
    bare = tmp_path / "bare.pkl"
    bare.write_bytes(pickle.dumps({"ema": Code(folder)}))
    assert "refused, for it holds more than weights" in refusal(bare)
    assert not folder.exists()


def test_a_file_of_an_old_torch(tmp_path):
    weights = reference_weights("bridge")
    expected = read_reference_checkpoint(write_checkpoint(tmp_path / "new.pt", weights), num_attention_heads=HEADS)
    torch.save({"ema": weights}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    found = read_reference_checkpoint(tmp_path / "old.pt", num_attention_heads=HEADS)
    for name, tensor in expected.networks["transformer"].state_dict.items():
        assert torch.equal(found.networks["transformer"].state_dict[name], tensor)


@pytest.mark.parametrize("is_archive", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_a_truncated_file_is_refused(tmp_path, kept, is_archive):
    file = tmp_path / "checkpoint.pt"
    torch.save({"ema": reference_weights("bridge")}, file, _use_new_zipfile_serialization=is_archive)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    assert "not a whole file of torch.save" in refusal(file)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"more": torch.zeros(()).expand(2**40)}, "its tensors are larger than the file"),
        ({f"copy {number}": "x_embedder.proj.weight" for number in range(50)}, "its tensors are larger than the file"),
        ({"blocks.999999999.attn.qkv.weight": torch.zeros(1)}, "it numbers more than 500 blocks"),
        ({"nwarp_model.blocks.999999999.a": torch.zeros(1)}, "it numbers more than 500 blocks"),
        ({"a" * 301: torch.zeros(1)}, "its keys are none of a network"),
        ({1: torch.zeros(1)}, "its keys are none of a network"),
        (dict.fromkeys(map(str, range(20_000)), torch.zeros(0)), "its keys are none of a network"),
        ({"a": torch.zeros(1).to_sparse()}, "it has tensors that are not dense"),
        ({"x_embedder.proj.weight": torch.zeros(4)}, "its shapes are not those of a Latte"),
        ({"x_embedder.proj.weight": torch.zeros(0, 0, 0, 0)}, "its shapes are not those of a Latte"),
        ({"pos_embed": torch.zeros(1)}, "its shapes are not those of a Latte"),
        ({"pos_embed": torch.zeros(1, 10**6, 0)}, "pos_embed is not the table"),
    ],
)
def test_a_file_that_would_eat_the_machine(tmp_path, changes, message):
    weights = reference_weights("bridge")
    changes = {name: weights[value] if isinstance(value, str) else value for name, value in changes.items()}
    assert message in refusal(write_checkpoint(tmp_path / "checkpoint.pt", weights | changes))


def test_a_file_that_is_compressed(tmp_path):
    file = write_checkpoint(tmp_path / "plain.pt", {"a": torch.zeros(10**6)})
    with zipfile.ZipFile(file) as plain, zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert "it is compressed" in refusal(tmp_path / "a.pt")


def test_a_missing_file_is_named(tmp_path):
    assert "there is no such file" in refusal(tmp_path / "nothing.pt")
    assert "not a whole file of torch.save" in refusal(tmp_path)


@pytest.mark.parametrize("content", [{"opt": {}}, [1], {"ema": {"a": 1}}, {"model": torch.zeros(1)}, torch.zeros(2)])
def test_other_content_is_refused(tmp_path, content):
    file = tmp_path / "checkpoint.pt"
    torch.save(content, file)
    assert "expected a dictionary with the weights under 'ema' or 'model'" in refusal(file)


def test_the_config_makes_a_network(tmp_path):
    file = write_checkpoint(tmp_path / "checkpoint.pt", reference_weights("bridge"))
    (network,) = read_reference_checkpoint(file, num_attention_heads=HEADS).networks.values()
    assert not any(LatteTransformer(**network.config).load_state_dict(network.state_dict))
