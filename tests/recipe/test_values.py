from __future__ import annotations

import subprocess
import sys

import pytest

from framebridge_plugin.errors import UsageError
from framebridge_plugin.recipe import load_recipe, resolve_recipe
from tests.recipe.helpers import problems_of

TOKEN = "hf_" + "secret" * 6


def test_overrides_are_typed_as_yaml(minimal):
    recipe = load_recipe(
        minimal,
        [
            "optimization.lr=2e-5",
            "optimization.train_steps=10",
            "framebridge.target=eps_psi",
            "framebridge.snr_aligned=false",
            "attention.attn_provider_training=['transformer:native', 'text_encoder:flex']",
            "checkpoints.resume_from_checkpoint=latest",
            "optimization.lr=3E+1",
            "model.revision=",
        ],
    )
    assert recipe.optimization.lr == 30.0  # the last one counts
    assert recipe.optimization.train_steps == 10
    assert recipe.framebridge.target == "eps_psi"
    assert recipe.framebridge.snr_aligned is False
    assert recipe.attention.attn_provider_training == ["transformer:native", "text_encoder:flex"]
    assert recipe.checkpoints.resume_from_checkpoint == "latest"
    assert recipe.model.revision is None


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", ".1e-4", "0.00001", "+1e-05"])
def test_every_way_to_write_a_small_number(minimal, text):
    minimal.write_text(minimal.read_text() + f"\noptimization: {{lr: {text}}}\n")
    assert load_recipe(minimal).optimization.lr == 1e-5
    assert load_recipe(minimal, [f"optimization.lr={text}"]).optimization.lr == 1e-5


def test_null_takes_a_section_away(minimal):
    lora = ["training.training_type=lora", "lora.rank=8"]
    assert load_recipe(minimal, lora).lora.rank == 8
    assert load_recipe(minimal, [*lora, "lora=null"]).lora.rank == 64


@pytest.mark.parametrize("override", ["optimization.lr", "=3", "optimization lr=3", "--lr=3", ""])
def test_malformed_override(minimal, override):
    assert "an override is dotted.path=value" in problems_of(minimal, override)[0]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optimization=3", "optimization.lr=1e-3"], "optimization.lr: optimization is 3, not a section"),
        (["optimization.train_steps=5", "optimization.train_steps.x=1"], "train_steps is 5, not a section"),
        (["framebridge.data=clips", "framebridge.data.num_frames=9"], "data is 'clips', not a section"),
    ],
)
def test_a_value_in_the_place_of_a_section(minimal, overrides, message):
    (problem,) = problems_of(minimal, *overrides)
    assert problem.startswith(f"command line: {overrides[1].partition('=')[0]}: ")
    assert message in problem


def test_a_recipe_resolves_without_its_files(minimal, tmp_path):
    missing = ["framebridge.data.data_root=nowhere", "validation.validation_dataset_file=nowhere.csv"]
    recipe, warnings = resolve_recipe(minimal, missing)
    assert recipe.framebridge.data.data_root == "nowhere"
    assert warnings == problems_of(minimal, *missing)
    assert ["no such" in warning for warning in warnings] == [True, True]
    # What is wrong in any place is an error, and comes with the rest.
    with pytest.raises(UsageError) as caught:
        resolve_recipe(minimal, [*missing, "framebridge.data.num_frames=16"])
    assert str(caught.value).splitlines() == problems_of(minimal, *missing, "framebridge.data.num_frames=16")
    assert resolve_recipe(minimal) == (load_recipe(minimal), [])


def test_the_resolved_recipe_reads_back_as_itself(minimal, tmp_path):
    for overrides in (
        [],
        ["training.training_type=lora", "lora.target_modules=[to_q, to_k]", "optimization.lr=1e-7"],
        ["tracking.tracker_name='1e-5'", "model.revision='true'", "framebridge.data.id_token='null'"],
        ["tracking.tracker_name='08'", "model.revision='1:30'", 'framebridge.data.id_token="\\u202e\\e[2J é"'],
    ):
        recipe = load_recipe(minimal, overrides)
        resolved = tmp_path / "resolved.yaml"
        resolved.write_text(recipe.to_yaml())
        again = load_recipe(resolved)
        assert again == recipe
        assert again.to_yaml() == recipe.to_yaml()


@pytest.mark.parametrize(
    "override",
    [
        f"hub.hub_token={TOKEN}",
        f"hub={TOKEN}",
        f"tracking.wandb_api_key={TOKEN}",
        f"tracking.tracker_name={TOKEN}",
        f"lora.target_modules=[to_q, 'https://me:{TOKEN}@example.org/x']",
        f"hub.push_to_hub {TOKEN}",
    ],
)
def test_a_token_is_neither_for_recipes_nor_shown(minimal, override):
    problems = problems_of(minimal, override)
    assert TOKEN not in "\n".join(problems)
    assert any("set HF_TOKEN" in problem or "an override is" in problem for problem in problems)


def test_names_that_begin_as_a_token_does_are_no_secrets(minimal, tmp_path):
    folder = tmp_path / "hf_experiment1_of_a_long_name_that_says_all"
    (tmp_path / "clips").rename(folder)
    recipe = load_recipe(minimal, [f"framebridge.data.data_root={folder}", f"checkpoints.output_dir={folder}/run"])
    assert str(folder) in recipe.to_yaml()


@pytest.mark.parametrize("text, steps", [("000010", 10), ("0o10", None), ("08", 8), ("1_000", 1000), ("0x10", 16)])
def test_whole_numbers_are_decimal(minimal, text, steps):
    override = f"optimization.train_steps={text}"
    minimal.write_text(minimal.read_text() + f"\noptimization: {{train_steps: {text}}}\n")
    for overrides in ([override], []):
        if steps is None:
            assert "valid integer" in problems_of(minimal, *overrides)[0]
        else:
            assert load_recipe(minimal, overrides).optimization.train_steps == steps


def test_numbers_of_base_60_and_of_endless_digits_are_refused(minimal):
    (problem,) = problems_of(minimal, "checkpoints.resume_from_checkpoint=1:30")
    assert "1:30 is no number: write it in decimals" in problem
    (problem,) = problems_of(minimal, f"training.seed={'9' * 5000}")
    assert problem.endswith("(a whole number of 5000 digits is too long to be read)")


def test_dataset_config_has_absolute_paths(minimal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(
        minimal, ["framebridge.data.data_root=clips", "framebridge.data.frame_stride=2", "framebridge.data.id_token=T"]
    )
    assert recipe.dataset_config() == {
        "datasets": [
            {
                "dataset_type": "video",
                "data_root": str(tmp_path / "clips"),
                "video_resolution_buckets": [[17, 64, 96]],
                "frame_sampling": "stride",
                "frame_stride": 2,
                "window": "random",
                "horizontal_flip": False,
                "decoder": "pyav",
                "strict": False,
                "resize": "torch",
                "isolated": False,
                "id_token": "T",
            }
        ],
        "bad_files": {"policy": "skip", "max_share": 0.5, "max_in_a_row": 16},
    }


def test_home_folder(minimal, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(minimal, ["framebridge.data.data_root=~/clips", "checkpoints.output_dir=~/run"])
    assert recipe.checkpoints.output_dir == str(tmp_path / "run")
    assert recipe.framebridge.data.data_root == str(tmp_path / "clips")


def test_output_folder(minimal, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in problems_of(minimal, f"checkpoints.output_dir={tmp_path / 'file' / 'run'}")[0]
    assert "/proc is not writable" in problems_of(minimal, "framebridge.caption_cache_dir=/proc/captions")[0]
    assert "is a file" in problems_of(minimal, f"framebridge.caption_cache_dir={tmp_path / 'file' / 'captions'}")[0]


def test_reading_a_recipe_imports_neither_torch_nor_numpy(minimal):
    code = (
        "import sys; from framebridge_plugin.recipe import load_recipe; load_recipe(sys.argv[1]).to_yaml(); "
        "print(sorted({'torch', 'numpy', 'diffusers', 'finetrainers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(minimal)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
