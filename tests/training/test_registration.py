"""What register() enters into finetrainers' tables, and how command lines are read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from framebridge_plugin import FrameBridgeScheduler, register
from framebridge_plugin.errors import UsageError
from framebridge_plugin.training.finetrainers.arguments import TrainerSettings
from framebridge_plugin.training.finetrainers.registration import parsed_objective

register()

from diffusers import CogVideoXDDIMScheduler  # noqa: E402
from finetrainers import BaseArgs, optimizer, utils  # noqa: E402
from finetrainers.config import SUPPORTED_MODEL_CONFIGS, TrainingType, _get_model_specifiction_cls  # noqa: E402

from framebridge_plugin.training import (  # noqa: E402
    CogVideoXBridgeSpecification,
    LatteBridgeSpecification,
    LTXBridgeSpecification,
    NeuralPriorSpecification,
    WanBridgeSpecification,
)
from framebridge_plugin.training.objective import ObjectiveSettings  # noqa: E402
from tests.training.bridge_runs import parse  # noqa: E402


@pytest.fixture
def command_line(tmp_path: Path) -> list[str]:
    (tmp_path / "data.json").write_text(json.dumps({"datasets": []}))
    required = {"model_name": "cogvideox_bridge", "pretrained_model_name_or_path": "model", "training_type": "lora"}
    required["dataset_config"] = str(tmp_path / "data.json")
    return [part for name, value in required.items() for part in (f"--{name}", value)]


# Tables


@pytest.mark.parametrize("training_type", ["lora", TrainingType.FULL_FINETUNE])
@pytest.mark.parametrize(
    ("model_name", "specification"),
    [
        ("cogvideox_bridge", CogVideoXBridgeSpecification),
        ("latte_bridge", LatteBridgeSpecification),
        ("latte_neural_prior", NeuralPriorSpecification),
        ("wan_bridge", WanBridgeSpecification),
        ("ltx_bridge", LTXBridgeSpecification),
    ],
)
def test_our_model_names_lead_to_our_specifications(model_name, specification, training_type):
    assert SUPPORTED_MODEL_CONFIGS[model_name][training_type] is specification
    assert _get_model_specifiction_cls(model_name, training_type) is specification


def test_our_row_of_the_table_reads_like_any_other():
    row = SUPPORTED_MODEL_CONFIGS["cogvideox_bridge"]
    assert list(row.keys()) == ["lora", "full-finetune"]
    assert set(row.values()) == {row.get("lora")} == {CogVideoXBridgeSpecification}
    assert dict(row.items()) == {"lora": row["lora"], "full-finetune": row["full-finetune"]}
    assert row.get("control-lora") is None
    with pytest.raises(ValueError, match="control-lora not supported"):
        _get_model_specifiction_cls("cogvideox_bridge", "control-lora")


def test_finetrainers_own_models_are_untouched():
    assert _get_model_specifiction_cls("cogvideox", "lora").__module__.startswith("finetrainers.")


def test_registering_again_changes_nothing():
    before = {name: getattr(utils, name) for name in ("prepare_sigmas", "get_scheduler_alphas")}
    groups = len(BaseArgs()._extended_add_arguments)
    register()
    assert before == {name: getattr(utils, name) for name in before}
    assert len(BaseArgs()._extended_add_arguments) == groups


# finetrainers' own parser


def test_plain_parsers_list_our_models(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--list_models"])
    with pytest.raises(SystemExit) as stop:
        BaseArgs().parse_args()
    assert stop.value.code == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("cogvideox_bridge", "latte_bridge", "latte_neural_prior"))


def test_plain_parsers_accept_our_names_and_keep_their_ways(monkeypatch, command_line):
    monkeypatch.setattr(
        sys, "argv", ["train.py", *command_line, "--optimizer", "adamw-torchao-8bit", "--target", "data", "--unknown"]
    )
    for _ in range(2):
        args = BaseArgs().parse_args()
        assert (args.model_name, args.optimizer) == ("cogvideox_bridge", "adamw-torchao-8bit")
        assert args.framebridge_objective == ObjectiveSettings(target="data")
        assert args.to_dict()["additional_arguments"]["FrameBridgeArgs"]["target"] == "data"


def test_arguments_made_without_a_parser_have_the_default_settings():
    args = BaseArgs()
    assert (args.framebridge_objective, args.framebridge_trainer) == (ObjectiveSettings(), TrainerSettings())
    assert (args.latte_size, args.neural_prior) == ("S/2", None)


# Our arguments


def test_defaults_are_those_of_the_objective_and_of_finetrainers(command_line):
    args = parse(command_line)
    assert args.framebridge_objective == ObjectiveSettings()
    assert (args.parallel_backend, args.rank, args.train_steps) == ("accelerate", 64, 1000)


def test_what_is_not_given_has_the_default_of_the_model(command_line):
    assert parse(command_line).framebridge_trainer == TrainerSettings(ema_decay=0.0)
    for model_name in ("latte_bridge", "latte_neural_prior"):
        latte = parse([*command_line, f"--model_name={model_name}"])
        off = {"snr_aligned": False, "image_noise": False, "prior_noise": False}
        assert latte.framebridge_objective == ObjectiveSettings(target="eps_psi", **off)
        assert latte.framebridge_trainer == TrainerSettings(ema_decay=0.9999)
        assert (latte.latte_size, latte.neural_prior) == ("S/2", None)


def test_what_is_given_takes_the_place_of_the_models_default(command_line):
    given = ["--snr_alignment", "--target=v", "--ema_decay=0.5", "--ema_start_step=3", "--max_grad_norm_start_step=4"]
    latte = ["--model_name=latte_bridge", "--latte_size=B/4", "--neural_prior=runs/prior"]
    args = parse([*command_line, *latte, *given])
    off = {"image_noise": False, "prior_noise": False}
    assert args.framebridge_objective == ObjectiveSettings(target="v", snr_aligned=True, **off)
    trainer = {"ema_decay": 0.5, "ema_start_step": 3, "max_grad_norm_start_step": 4}
    assert args.framebridge_trainer == TrainerSettings(**trainer)
    assert (args.latte_size, args.neural_prior) == ("B/4", "runs/prior")
    logged = args.to_dict()["additional_arguments"]["FrameBridgeArgs"]
    assert logged.items() >= {**trainer, "snr_aligned": True, "latte_size": "B/4"}.items()
    # What a specification sees that is made without an objective.
    assert parsed_objective("latte_bridge") == args.framebridge_objective
    assert parsed_objective("cogvideox_bridge") == ObjectiveSettings(target="v")

    switches = ["--no_snr_alignment", "--image_noise", "--prior_noise"]
    both_ways = parse([*command_line, "--no_image_noise", *switches]).framebridge_objective
    assert both_ways == ObjectiveSettings(snr_aligned=False)


def test_every_setting_of_the_objective_has_an_argument(command_line):
    changed = {
        "objective": "diffusion",
        "target": "noise",
        "snr_aligned": False,
        "alignment_edge": "reference",
        "beta_min": 0.02,
        "beta_max": 20.0,
        "image_noise": False,
        "prior_noise": False,
        "noise_log_mean": -2.0,
        "noise_log_std": 0.25,
        "caption_dropout": 0.0,
    }
    assert changed.keys() == ObjectiveSettings.model_fields.keys()
    flags = ["--no_snr_alignment", "--no_image_noise", "--no_prior_noise"]
    flags += [f"--{name}={value}" for name, value in changed.items() if value is not False]
    assert parse(command_line + flags).framebridge_objective == ObjectiveSettings(**changed)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--ema_decay", "1"], r"^ema_decay is 1.0; it should be less than 1$"),
        (["--ema_start_step", "1"], r"^ema_start_step: has no effect with ema_decay 0"),
        (["--max_grad_norm_start_step=-1"], r"^max_grad_norm_start_step is -1; it should be gre"),
        (["--beta_max", "nan"], r"^beta_max is nan; it should be a finite number$"),
        (["--noise_log_std", "50"], r"^noise_log_std is 50.0; it should be less than or equal to 3$"),
    ],
)
def test_wrong_values_are_refused_as_in_a_recipe(command_line, extra, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse(command_line + extra)
    assert "\n" not in str(caught.value)


# Scheduler


def test_the_training_loop_knows_the_bridge_scheduler():
    scheduler = FrameBridgeScheduler()
    count = scheduler.config.num_train_timesteps
    sigmas = utils.get_scheduler_sigmas(scheduler)
    assert sigmas.dtype == torch.float32
    assert torch.equal((sigmas * count).round(), torch.arange(count, dtype=torch.float32))
    assert utils.get_scheduler_alphas(scheduler) is None

    def draw(seed: int) -> torch.Tensor:
        return utils.prepare_sigmas(
            scheduler=scheduler,
            sigmas=sigmas,
            batch_size=20000,
            num_train_timesteps=count,
            flow_weighting_scheme="none",
            flow_logit_mean=0.0,
            flow_logit_std=1.0,
            flow_mode_scale=1.29,
            device=torch.device("cpu"),
            generator=torch.Generator().manual_seed(seed),
        )

    drawn = draw(0)
    assert torch.equal(drawn, draw(0))
    assert not torch.equal(drawn, draw(1))
    assert drawn.unique().tolist() == sigmas.tolist()
    assert abs(drawn.mean() - sigmas.mean()) < 0.01
    weights = utils.prepare_loss_weights(
        scheduler=scheduler, alphas=None, sigmas=drawn[:3, None], flow_weighting_scheme="none"
    )
    assert torch.equal(weights, torch.ones(3))


def test_other_schedulers_get_finetrainers_own_answers():
    scheduler = CogVideoXDDIMScheduler()
    for name in ("get_scheduler_sigmas", "get_scheduler_alphas"):
        function = getattr(utils, name)
        assert torch.equal(function(scheduler), function.__wrapped__(scheduler))
    alphas = utils.get_scheduler_alphas(scheduler)[:4]
    assert torch.equal(utils.prepare_loss_weights(scheduler=scheduler, alphas=alphas, sigmas=alphas), 1 / (1 - alphas))


# Optimiser

SETTINGS = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "beta3": 0.999, "epsilon": 1e-8, "weight_decay": 1e-4}


@pytest.mark.parametrize("backend", ["accelerate", "ptd"])
def test_torchao_optimiser_learns_with_8_bit_states(backend):
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(128, 64)
    with torch.no_grad():
        model.weight.normal_(generator=generator)
    inputs = torch.randn(16, 128, generator=generator)
    learner = optimizer.get_optimizer(
        parallel_backend=backend, name="adamw-torchao-8bit", model_parts=[model], **SETTINGS
    )
    schedule = optimizer.get_lr_scheduler(
        parallel_backend=backend, name="linear", optimizer=learner, num_warmup_steps=0, num_training_steps=10
    )
    losses = []
    for _ in range(5):
        loss = model(inputs).square().mean()
        loss.backward()
        learner.step()
        schedule.step()
        learner.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    inner = learner.optimizers[0] if backend == "ptd" else learner
    assert type(inner.state[model.weight]["exp_avg"]).__name__ == "OptimState8bit"
    assert inner.param_groups[0]["lr"].item() == pytest.approx(0.005)
    assert (inner.param_groups[0]["betas"], inner.param_groups[0]["weight_decay"]) == ((0.9, 0.95), 1e-4)


def test_finetrainers_own_optimisers_are_untouched():
    model = torch.nn.Linear(2, 2)
    learner = optimizer.get_optimizer(parallel_backend="accelerate", name="adamw", model_parts=[model], **SETTINGS)
    assert type(learner) is torch.optim.AdamW
    with pytest.raises(ValueError, match="Unsupported optimizer: adamw-torchao-2bit"):
        optimizer.get_optimizer(
            parallel_backend="accelerate", name="adamw-torchao-2bit", model_parts=[model], **SETTINGS
        )
