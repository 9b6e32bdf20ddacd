"""Models, LoRAs and checkpoints that carry code: no door runs it, whatever the environment says of pickles."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file

from framebridge_plugin import FrameBridgeCogVideoXPipeline
from framebridge_plugin.backbones.cogvideox.adapter import load_bridge_transformer
from framebridge_plugin.backbones.examination import examine
from framebridge_plugin.backbones.folders import LORA_FILE
from framebridge_plugin.backbones.latte.conversion import convert_reference_checkpoint
from framebridge_plugin.cli import main
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.training import FrameBridgeTrainer
from tests.training.bridge_runs import make_inputs, make_specification, run_trainer

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
PICKLES = ("diffusion_pytorch_model.bin", "pytorch_model.bin", "optimizer.bin", "training_args.bin", "model.pkl")


class Payload:
    """What makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, clips, and a run with a LoRA of two updates."""
    folder = make_inputs(tmp_path_factory.mktemp("strangers"))
    run_trainer(FrameBridgeTrainer, folder, folder / "lora", "lora")
    return folder


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the code would make; it is importable from the working directory, and pickles are allowed."""
    marker = tmp_path / "made by the code"
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("HF_HUB_TRUST_REMOTE_CODE", "1")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.syspath_prepend(str(tmp_path / "cwd"))
    write_module(tmp_path / "cwd/evil.py", marker)
    yield marker
    assert "evil" not in sys.modules
    assert not marker.exists()


def write_module(file: Path, marker: Path) -> None:
    names = ("CogVideoXTransformer3DModel", "T5EncoderModel", "FrameBridgeCogVideoXPipeline")
    classes = "".join(f"class {name}: pass\n" for name in names)
    file.write_text(f"import os\nos.mkdir({str(marker)!r})\n{classes}")


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def bring_code(model: Path, marker: Path) -> None:
    """Files with code beside the ones that are read; nothing may even look at them."""
    for part in PARTS:
        write_module(model / part / "evil.py", marker)
        for name in PICKLES:
            (model / part / name).write_bytes(pickle.dumps(Payload(marker)))
    for name in ("evil.py", "pipeline.py", "modeling.py", "__init__.py"):
        write_module(model / name, marker)


def name_remote_code(model: Path, marker: Path) -> None:
    """As transformers' and diffusers' remote code is named."""
    auto_map = {name: "evil.T5EncoderModel" for name in ("AutoConfig", "AutoModel", "AutoTokenizer")}
    for file in model.glob("*/*config.json"):
        change(file, auto_map=auto_map, trust_remote_code=True)
    change(model / "model_index.json", auto_map=auto_map, trust_remote_code=True, custom_pipeline="pipeline")


def name_pipeline(model: Path, marker: Path) -> None:
    change(model / "model_index.json", _class_name=["evil", "FrameBridgeCogVideoXPipeline"])


def name_library(model: Path, marker: Path) -> None:
    change(model / "model_index.json", transformer=["evil", "CogVideoXTransformer3DModel"])


def name_own_module(model: Path, marker: Path) -> None:
    """A module of the environment that does something when it is imported."""
    change(model / "model_index.json", text_encoder=["this", "s"])


def weights_as_pickle(part: str, name: str) -> Callable[[Path, Path], None]:
    def change_model(model: Path, marker: Path) -> None:
        for file in (model / part).glob("*.safetensors*"):
            file.unlink()
        torch.save({"weight": Payload(marker)}, model / part / name)

    return change_model


def vocabulary_as_pickle(model: Path, marker: Path) -> None:
    (model / "tokenizer/spiece.model").write_bytes(pickle.dumps(Payload(marker)))


def scheduler_as_code(model: Path, marker: Path) -> None:
    change(model / "scheduler/scheduler_config.json", _class_name="evil.CogVideoXDDIMScheduler")


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "remote code": name_remote_code,
    "class of a pipeline": name_pipeline,
    "class of a component": name_library,
    "module of the environment": name_own_module,
    "pickled network": weights_as_pickle("transformer", "diffusion_pytorch_model.bin"),
    "pickled autoencoder": weights_as_pickle("vae", "diffusion_pytorch_model.bin"),
    "pickled text encoder": weights_as_pickle("text_encoder", "pytorch_model.bin"),
    "pickled vocabulary": vocabulary_as_pickle,
    "scheduler": scheduler_as_code,
}


def open_to_sample(model: Path) -> None:
    FrameBridgeCogVideoXPipeline.from_pretrained(model)


def load_to_train(model: Path) -> None:
    specification = make_specification(model)
    specification.load_condition_models()
    specification.load_latent_models()
    specification.load_diffusion_models()


def look_at(model: Path) -> None:
    list(examine(model).findings())


def load_network(model: Path) -> None:
    load_bridge_transformer(str(model), subfolder="transformer")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_code(inputs, tmp_path, marker, kind):
    model = shutil.copytree(inputs / "model", tmp_path / "model")
    bring_code(model, marker)
    KINDS[kind](model, marker)
    for door in (look_at, open_to_sample, load_to_train, load_network):
        with contextlib.suppress(FrameBridgeError):
            door(model)
        assert not marker.exists(), door


def test_code_in_every_place_of_a_run(inputs, tmp_path, marker, monkeypatch):
    """Beside the files of the base model, of a LoRA to begin with, and of the checkpoint that is gone on with."""
    folder = tmp_path / "inputs"
    shutil.copytree(inputs, folder)
    bring_code(folder / "model", marker)
    lora = folder / "lora/lora"
    (lora / "pytorch_lora_weights.bin").write_bytes(pickle.dumps(Payload(marker)))
    write_module(lora / "evil.py", marker)
    options = (f"--start_from={lora}", "--checkpointing_steps=1")
    run_trainer(FrameBridgeTrainer, folder, folder / "run", "lora", *options)
    run_trainer(FrameBridgeTrainer, folder, folder / "full", "full")
    for run in ("run", "full"):
        written = {path.name for path in (folder / run).rglob("*")}
        assert not written & {*PICKLES, "evil.py", "pytorch_lora_weights.bin"}
    assert (folder / "full/model/text_encoder/model.safetensors").is_file()

    for file in [*(folder / "run/checkpoints").rglob("*.safetensors")]:
        for suffix in (".bin", ".pt", ".pkl"):
            file.with_suffix(suffix).write_bytes(pickle.dumps(Payload(marker)))
    run_trainer(
        FrameBridgeTrainer, folder, folder / "run", "lora", "--train_steps=3", "--resume_from_checkpoint=latest"
    )
    out = folder / "video.mp4"
    image = ["--image", str(folder / "red.png"), "--prompt", "a red square", "--steps=1", "--output", str(out)]
    assert main(["sample", "--model", str(folder / "run"), *image]) == 0
    assert out.is_file()


def test_a_lora_that_is_a_pickle(inputs, tmp_path, marker):
    run = shutil.copytree(inputs / "lora/lora", tmp_path / "lora")
    (run / LORA_FILE).rename(tmp_path / "kept")
    for name in ("pytorch_lora_weights.bin", LORA_FILE):
        torch.save({"weight": Payload(marker)}, run / name)
        with pytest.raises(FrameBridgeError, match="is missing|is no safetensors file"):
            FrameBridgeCogVideoXPipeline.from_pretrained(run)
        (run / name).unlink()


def test_a_lora_is_loaded_by_its_tensors_whatever_its_header_says(inputs, tmp_path, marker):
    expected = FrameBridgeCogVideoXPipeline.from_pretrained(inputs / "lora").transformer
    lora = shutil.copytree(inputs / "lora/lora", tmp_path / "lora")
    (lora / "manifest.json").unlink()  # a stranger's fits, or there is none
    file = lora / LORA_FILE
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert settings["transformer.target_modules"] == sorted(
        {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in tensors}
    )
    endless = "(transformer_?b?l?o?c?k?s?.?)+" * 20 + "!"
    settings |= {
        "transformer.target_modules": endless,
        "transformer.exclude_modules": endless,
        "transformer.rank_pattern": {endless: 10**9},
        "transformer.alpha_pattern": {**settings["transformer.alpha_pattern"], endless: 1},
        "transformer.r": 10**9,
        "transformer.megatron_config": {"a": 1},
        "transformer.megatron_core": "evil",
        "transformer.init_lora_weights": "corda",
        "transformer.corda_config": {"cache_file": str(tmp_path / "cwd/evil.py")},
    }
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(settings)})
    found = FrameBridgeCogVideoXPipeline.from_pretrained(lora).transformer
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    for layer in (module for module in found.modules() if isinstance(module, LoraLayer)):
        assert layer.scaling == expected.get_submodule(found_name(found, layer)).scaling
    for name in ("transformer.(a+)+.lora_A.weight", "vae.a.lora_A.weight", "transformer.a.weight", "a" * 10**5):
        save_file({**tensors, name: torch.zeros(1)}, file)
        with pytest.raises(FrameBridgeError, match="which is no layer of a LoRA for the transformer"):
            FrameBridgeCogVideoXPipeline.from_pretrained(lora)


def found_name(network: torch.nn.Module, layer: torch.nn.Module) -> str:
    return next(name for name, module in network.named_modules() if module is layer)


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.ckpt"])
def test_a_checkpoint_to_convert(tmp_path, marker, name):
    torch.save({"ema": {"a": torch.zeros(1)}, "args": Payload(marker)}, tmp_path / name)
    (tmp_path / "bare").write_bytes(pickle.dumps({"ema": Payload(marker)}))
    with zipfile.ZipFile(tmp_path / "module.pt", "w") as archive:  # as torch.jit.save writes, or a package
        archive.writestr("module/data.pkl", pickle.dumps(Payload(marker)))
        archive.writestr("module/code/__torch__.py", f"import os\nos.mkdir({str(marker)!r})\n")
        archive.writestr("module/constants.pkl", pickle.dumps(Payload(marker)))
    for file in (name, "bare", "module.pt"):
        with pytest.raises(FrameBridgeError, match="could run code|not a whole file of torch.save"):
            convert_reference_checkpoint(tmp_path / file, tmp_path / "out")
