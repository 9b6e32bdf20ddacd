"""Each repair does what its line says, and leaves alone what is healthy."""

from __future__ import annotations

import importlib
import io
import os
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image

from framebridge_plugin import register
from framebridge_plugin.errors import UsageError
from framebridge_plugin.training.finetrainers.compat import repair_status
from framebridge_plugin.training.finetrainers.repairs import defaults, devices, saving
from framebridge_plugin.training.finetrainers.repairs.upstream_modules import (
    MISSING_MODULES,
    control_channel_concat,
    load_lora_weights,
    patch_diffusers_rms_norm_forward,
    patch_peft_move_adapter_to_device_of_base_layer,
)

register()

from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel  # noqa: E402
from diffusers.models.normalization import RMSNorm  # noqa: E402
from finetrainers import BaseArgs, SFTTrainer, utils  # noqa: E402
from finetrainers.data import ValidationDataset  # noqa: E402
from finetrainers.state import TrainState  # noqa: E402
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="repairs a machine without a GPU")


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)


# Importing


def test_register_makes_finetrainers_importable_from_several_threads_at_once(tmp_path):
    """In silence, without the packages that are slow to load; and decord, which comes with it, spoils no encoder."""
    code = f"""
import sys, threading
sys.setswitchinterval(1e-5)
from framebridge_plugin import register
failures = []
def attempt():
    try:
        register()
        import finetrainers
        assert "cogvideox_bridge" in finetrainers.config.SUPPORTED_MODEL_CONFIGS
    except BaseException as error:
        failures.append(error)
threads = [threading.Thread(target=attempt) for _ in range(6)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
assert not failures, failures
deferred = {{"bitsandbytes.nn", "wandb.sdk", "kornia.core", "torch._inductor.compile_fx"}}
assert not deferred & set(sys.modules), deferred & set(sys.modules)
from finetrainers import BaseArgs
assert sum(type(group).__name__ == "FrameBridgeArgs" for group in BaseArgs()._registered_config_mixins) == 1
from framebridge_plugin.training.finetrainers.repairs.importing import MissingModuleFinder
assert sum(isinstance(finder, MissingModuleFinder) for finder in sys.meta_path) == 1

# decord brings a libvpx of its own, which is found first where it is loaded first.
import av, decord
container = av.open({str(tmp_path / "clip.webm")!r}, "w")
stream = container.add_stream("libvpx", rate=8)
stream.width = stream.height = 64
stream.pix_fmt = "yuv420p"
container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
"""
    result = run(code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_wheel_that_has_its_modules_keeps_them(tmp_path):
    package = tmp_path / "finetrainers"
    for folder in (package, package / "patches", package / "patches/dependencies", package / "patches/models"):
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    (package / "patches/dependencies/peft.py").write_text("origin = 'upstream'\n")
    code = """
import sys
from framebridge_plugin.training.finetrainers.repairs.importing import MissingModuleFinder, REPAIRS
(repair,) = [repair for repair in REPAIRS if repair.name == "missing modules"]
assert not repair.needed()
sys.meta_path.append(MissingModuleFinder())
import finetrainers.patches.dependencies.peft as peft
assert peft.origin == "upstream"
"""
    result = run(code, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr


def test_every_missing_module_can_be_imported():
    for name, functions in MISSING_MODULES.items():
        module = importlib.import_module(name)
        assert all(getattr(module, function) is value for function, value in (functions or {}).items())


def test_repairs_are_listed_by_name_with_one_line():
    names = [repair.name for repair, _ in repair_status()]
    assert len(set(names)) == len(names)
    assert all(needed is not None for _, needed in repair_status())
    assert all("\n" not in repair.reason for repair, _ in repair_status())


# The functions that the wheel lacks


def tiny_transformer() -> CogVideoXTransformer3DModel:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    sizes |= {"time_embed_dim": 8, "text_embed_dim": 8, "sample_width": 4, "sample_height": 4, "sample_frames": 5}
    return CogVideoXTransformer3DModel(**sizes, max_text_seq_length=4).eval()


def add_lora(transformer: CogVideoXTransformer3DModel) -> None:
    config = LoraConfig(r=2, lora_alpha=8, target_modules="transformer_blocks.*(to_q|to_k)")
    transformer.add_adapter(config)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)


@torch.no_grad()
def output(transformer: CogVideoXTransformer3DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return transformer(
        hidden_states=torch.randn(1, 2, 4, 4, 4, generator=generator),
        encoder_hidden_states=torch.randn(1, 4, 8, generator=generator),
        timestep=torch.tensor([500]),
        return_dict=False,
    )[0]


def test_load_lora_weights_restores_a_lora_whose_alpha_is_not_its_rank(tmp_path):
    trained = tiny_transformer()
    before = output(trained)
    add_lora(trained)
    header = (
        '{"r": 2, "lora_alpha": 8, "init_lora_weights": true, "target_modules": "transformer_blocks.*(to_q|to_k)"}'
    )
    CogVideoXPipeline.save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(trained),
        save_function=lambda weights, path: utils.safetensors_torch_save_function(
            weights, path, {"lora_config": header}
        ),
    )

    class Pipeline:
        transformer = tiny_transformer()

    load_lora_weights(Pipeline, tmp_path, "mine")
    assert "mine" in Pipeline.transformer.peft_config
    torch.testing.assert_close(output(Pipeline.transformer), output(trained))
    assert not torch.allclose(before, output(trained), atol=1e-3)


def test_rms_norm_keeps_the_type_of_its_input(monkeypatch):
    monkeypatch.setattr(RMSNorm, "forward", RMSNorm.forward)  # put back at the end
    norm = RMSNorm(8, eps=1e-6)
    hidden = torch.randn(2, 8)
    expected = norm(hidden)
    patch_diffusers_rms_norm_forward()
    patch_diffusers_rms_norm_forward()
    torch.testing.assert_close(norm(hidden), expected)
    assert norm(hidden.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(norm(hidden.bfloat16()).float(), expected, atol=3e-2, rtol=3e-2)


class Network(torch.nn.Module):
    def forward(self, timestep: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * timestep


@pytest.mark.parametrize("by_name", [True, False])
def test_control_channel_concat_appends_while_the_context_lasts(by_name):
    network, hidden, control = Network(), torch.ones(1, 2, 3), torch.zeros(1, 4, 3, dtype=torch.float64)
    arguments = {"timestep": torch.tensor(2.0), "hidden_states": hidden}

    def call() -> torch.Tensor:
        return network(**arguments) if by_name else network(*arguments.values())

    with control_channel_concat(network, ["hidden_states"], [control], dims=[1]):
        torch.testing.assert_close(call(), torch.cat([2 * hidden, control.float()], dim=1))
    torch.testing.assert_close(call(), 2 * hidden)


def test_control_channel_concat_refuses_unknown_inputs():
    context = control_channel_concat(Network(), ["latents"], [torch.zeros(1)], dims=[1])
    with pytest.raises(ValueError, match="no parameter latents"), context:
        pass


def test_adapter_keeps_its_type_beside_an_8_bit_layer(monkeypatch):
    name = "_move_adapter_to_device_of_base_layer"
    found = getattr(BaseTunerLayer, name)  # put back at the end; a run of this process may have changed it
    monkeypatch.setattr(BaseTunerLayer, name, getattr(found, "__wrapped__", found))

    def adapter_type(stored: torch.dtype = torch.float8_e4m3fn) -> torch.dtype:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4)).to(stored)
        inject_adapter_in_model(LoraConfig(r=1, target_modules=["0"]), model)
        return model[0].lora_A["default"].weight.dtype

    assert adapter_type() == torch.float8_e4m3fn
    patch_peft_move_adapter_to_device_of_base_layer()
    assert adapter_type() == torch.float32
    # As what a pipeline opens in half precision later in this process.
    assert adapter_type(torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize("module", ["ltx_video", "wan"])
def test_patches_for_other_models_are_refused_in_one_line(module):
    functions = MISSING_MODULES[f"finetrainers.patches.models.{module}.patch"]
    assert functions
    for name, function in functions.items():
        with pytest.raises(NotImplementedError, match=rf"^finetrainers.*{name} is missing.*not available$"):
            function()


# Videos


@pytest.mark.parametrize("source", ["path", "bytes"])
def test_a_video_column_is_decoded_and_read_whole(clips_folder, source):
    from datasets import Video
    from finetrainers.data import dataset

    path = clips_folder / "0.mp4"
    value = {"path": str(path), "bytes": None} if source == "path" else {"path": None, "bytes": path.read_bytes()}
    video_FCHW = dataset._preprocess_video(Video().decode_example(value))

    with av.open(str(path)) as container:
        expected_FHWC = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert video_FCHW.dtype == torch.float32
    assert video_FCHW.shape == (12, 3, 32, 32)
    actual_FHWC = (video_FCHW.permute(0, 2, 3, 1).numpy() + 1) * 127.5
    # The two decoders convert colours a little differently.
    assert np.abs(actual_FHWC - expected_FHWC).mean() < 2


def test_decoding_leaves_other_values_alone():
    from datasets import Video

    decoded = object()
    assert Video().decode_example(decoded) is decoded
    with pytest.raises(RuntimeError, match="decode=True"):
        Video(decode=False).decode_example("clip.mp4")


# Pictures


def test_pictures_of_a_validation_file_are_read_by_the_range_of_their_type(tmp_path):
    Image.fromarray(np.array([[0, 13107], [32896, 65535]], np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (2, 2), (255, 0, 0, 51)).save(tmp_path / "veiled.png")
    (tmp_path / "v.csv").write_text(
        "caption,image_path\n" + "".join(f"a cat,{tmp_path / name}\n" for name in ("deep.png", "veiled.png"))
    )
    deep, veiled = (np.asarray(row["image"]) for row in ValidationDataset(str(tmp_path / "v.csv")))
    assert deep[..., 0].tolist() == [[0, 51], [128, 255]]
    assert veiled[0, 0].tolist() == [255, 204, 204]


# Devices


@needs_no_cuda
def test_finetrainers_names_the_cpu_and_reports_no_memory():
    from finetrainers.parallel import ptd

    assert ptd._device_type == "cpu"
    assert set(utils.get_memory_statistics().values()) == {None}
    torch.cuda.reset_peak_memory_stats("cpu")


def test_known_memory_figures_are_still_rounded():
    from finetrainers.utils import memory

    assert memory.round(memory.bytes_to_gigabytes(2**29 + 1), ndigits=3) == 0.5


def test_no_device_repair_is_needed_with_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    assert [repair.name for repair in devices.REPAIRS if repair.needed()] == []


# Processes


def arguments(**values: object) -> BaseArgs:
    args = BaseArgs()
    for name, value in values.items():
        setattr(args, name, value)
    return args


def test_arguments_that_were_never_parsed_have_a_list_of_compile_scopes():
    args = BaseArgs()
    assert (args.compile_modules, args.compile_scopes) == ([], [])
    assert not any(repair.needed() for repair in defaults.REPAIRS)


def test_accelerate_with_two_processes_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"2 processes does not synchronise gradients.*use parallel_backend=ptd"):
        SFTTrainer(arguments(parallel_backend="accelerate", dp_degree=2), None)


# Saving


def test_counters_beyond_31_bits_survive_saving():
    state = TrainState(step=3, observed_data_samples=2**33, observed_num_tokens=2**40, log_steps=[1, 3])
    restored = TrainState()
    restored.load_state_dict(state.state_dict())
    assert restored == state


def test_a_checkpoint_with_32_bit_counters_can_still_be_read(tmp_path):
    state = TrainState(step=7, observed_data_samples=14, observed_num_tokens=500, global_avg_losses=[0.5])
    stored = TrainState.state_dict.__wrapped__(state)
    assert stored["step"].dtype == torch.int32
    torch.distributed.checkpoint.save({"train_state": stored}, checkpoint_id=tmp_path, no_dist=True)
    states = {"train_state": TrainState()}
    torch.distributed.checkpoint.load(states, checkpoint_id=tmp_path, no_dist=True)
    assert states["train_state"] == state


def test_the_training_state_loads_with_weights_only():
    file = io.BytesIO()
    torch.save({"train_state": TrainState(step=5, global_avg_losses=[0.1])}, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["train_state"].step == 5


def test_lora_weights_inside_checkpointed_layers_are_saved():
    transformer = tiny_transformer()
    add_lora(transformer)
    expected = get_peft_model_state_dict(transformer)
    utils.apply_activation_checkpointing(transformer)
    for actual in (
        get_peft_model_state_dict(transformer),
        get_peft_model_state_dict(transformer, transformer.state_dict()),
    ):
        assert actual.keys() == expected.keys()
        assert len(actual) == 2 * 2 * 2
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_repairs_are_not_needed_once_upstream_is_healthy():
    # After the repairs the faults are gone, so the conditions must say so.
    repaired = {"counters", "checkpointed LoRA layers", "resume with accelerate"}
    assert [repair.name for repair in saving.REPAIRS if repair.name in repaired and repair.needed()] == []
