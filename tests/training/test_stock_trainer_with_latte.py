"""The Latte specifications under finetrainers' own SFTTrainer, run as finetrainers' own trainer tests run theirs.

Those give a class without arguments, leave every precision at its default (bfloat16), and train on four clips of 4
frames of 64 x 64 with captions that are no classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from framebridge_plugin import FrameBridgeLattePipeline
from tests.tiny_models import make_tiny_latte, write_video
from tests.training.conftest import LAUNCH_VARIABLES
from tests.training.latte_runs import latte_objective, specification_class

STEPS = 4
# The whole table of kinds, backends and precomputation is in the conformance suite's tests, and layerwise upcasting in
# those of finetrainers' own trainer tests.
RUNS = (
    "bridge_neural_prior-lora-accelerate",
    "neural_prior-full-accelerate-precomputed",
    "diffusion-full-ptd",
)
FULL_RUNS = [name for name in RUNS if "full" in name]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock-latte")
    (folder / "clips").mkdir()
    rows = ["file_name,caption"]
    for number in range(4):
        write_video(folder / f"clips/{number}.mp4", np.full((4, 64, 64, 3), 60 * number, dtype=np.uint8), fps=2)
        rows.append(f'{number}.mp4,"a grey wall, number {number}"')
    (folder / "clips/metadata.csv").write_text("\n".join(rows) + "\n")
    entry = {
        "data_root": str(folder / "clips"),
        "dataset_type": "video",
        "video_resolution_buckets": [[4, 64, 64]],
        "reshape_mode": "bicubic",
        "id_token": "TEST",
    }
    (folder / "data.json").write_text(json.dumps({"datasets": [entry]}))
    return folder


def make_class(kind: str, model: Path) -> Callable[[], Any]:
    """A specification class that only fixes the folder; it remembers its network and the losses of its objective."""
    cls = specification_class(kind)

    class Fixed(cls):
        def __init__(self) -> None:
            super().__init__(str(model), objective=latte_objective(kind))
            self.losses: list[float] = []
            self.networks: list[Any] = []

        def load_diffusion_models(self) -> Any:
            loaded = super().load_diffusion_models()
            self.networks.append(loaded["transformer"])  # finetrainers loads another one for its final validation
            return loaded

        def forward(self, **kwargs: Any) -> Any:
            prediction, target, sigmas = super().forward(**kwargs)
            self.losses.append((prediction - target).square().mean().item())
            return prediction, target, sigmas

    return Fixed


def train(inputs: Path, name: str) -> Any:
    from finetrainers import BaseArgs, SFTTrainer, TrainingType
    from finetrainers.trainer.sft_trainer import SFTFullRankConfig, SFTLowRankConfig

    kind, training_type, backend, *options = name.split("-")
    model = make_tiny_latte(inputs / "models" / kind, kind, compression=8)
    args = BaseArgs()
    args.dataset_config = str(inputs / "data.json")
    args.output_dir = str(inputs / name)
    args.parallel_backend, args.report_to, args.compile_scopes = backend, "none", []
    args.train_steps, args.max_data_samples, args.checkpointing_steps = STEPS, 25, STEPS
    args.batch_size, args.lr, args.gradient_checkpointing = 1, 1e-2, True
    args.enable_precomputation = "precomputed" in options
    args.precomputation_items, args.precomputation_dir = 4, str(inputs / name / "precomputed")
    if training_type == "lora":
        args.register_args(SFTLowRankConfig())
        args.training_type, args.rank, args.lora_alpha = TrainingType.LORA, 4, 4
        args.target_modules = ["to_q", "to_k", "to_v", "to_out.0"]
    else:
        args.register_args(SFTFullRankConfig())
        args.training_type = TrainingType.FULL_FINETUNE
    with pytest.MonkeyPatch.context() as patch:
        for variable in LAUNCH_VARIABLES:
            patch.delenv(variable, raising=False)
        trainer = SFTTrainer(args, make_class(kind, model)())
        trainer.run()
    return trainer


@pytest.fixture(scope="module")
def trainers(inputs: Path) -> dict[str, Any]:
    return {name: train(inputs, name) for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_it_trains_on_its_own_loss(trainers, name):
    logged = trainers[name].state.train_state.global_avg_losses
    assert len(logged) == STEPS
    expected = trainers[name].model_specification.losses
    if name.startswith("diffusion"):
        # finetrainers' weight makes up for a factor that depends on the timestep.
        assert all(loss > own for loss, own in zip(logged, expected, strict=True))
    else:
        assert logged == pytest.approx(expected, rel=1e-5)


def network_of(name: str, pipeline: FrameBridgeLattePipeline) -> Any:
    return pipeline.neural_prior if name.startswith("neural_prior") else pipeline.transformer


@pytest.mark.parametrize("name", FULL_RUNS)
def test_a_full_run_saves_the_trained_model_for_the_pipeline(trainers, inputs, name):
    folder = inputs / name / f"model_weights/{STEPS:06d}"
    pipeline = FrameBridgeLattePipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    base = FrameBridgeLattePipeline.from_pretrained(inputs / "models" / name.split("-")[0], torch_dtype=torch.bfloat16)
    saved = network_of(name, pipeline).state_dict()
    network = trainers[name].model_specification.networks[0]
    trained = {key.replace("_checkpoint_wrapped_module.", ""): value for key, value in network.state_dict().items()}
    assert saved.keys() == trained.keys()
    assert all(torch.equal(tensor, trained[key]) for key, tensor in saved.items())
    before = network_of(name, base).state_dict()
    assert not any(torch.equal(saved[key], before[key]) for key in saved if key.endswith("to_q.weight"))


def test_what_the_neural_prior_says_stays_as_it_was(trainers, inputs):
    model = FrameBridgeLattePipeline.from_pretrained(inputs / "models/bridge_neural_prior")
    used = trainers["bridge_neural_prior-lora-accelerate"].model_specification.adapter.prior_network.state_dict()
    assert all(torch.equal(tensor, used[key]) for key, tensor in model.neural_prior.state_dict().items())
