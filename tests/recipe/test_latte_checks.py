"""A Latte's recipe whose parts do not fit each other is refused in one line, before torch is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from framebridge_plugin.cli import main
from framebridge_plugin.errors import UsageError
from framebridge_plugin.recipe import load_recipe, resolve_recipe
from tests.recipe.helpers import problems_of, write_class_folders
from tests.tiny_models import make_tiny_image_vae, make_tiny_latte

CLASSES = ("left", "right", "up")
PRETRAINED = "model.pretrained_model_name_or_path"
SCRATCH_ONLY = ["model.vae_id=null"]


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory) -> Path:
    """Whole folders as our runs save them, one of each kind, on the classes and clips of the recipe `latte`."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("bridge", "neural_prior", "bridge_neural_prior", "diffusion"):
        make_tiny_latte(folder / kind, kind, class_names=CLASSES)
    return folder


@pytest.fixture
def models(saved_models, tmp_path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(saved_models, tmp_path / "models"))


def change_config(path: Path, **values) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


def leave_out(path: Path, *keys: str) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in keys}))


def use(model: Path, *overrides: str) -> list[str]:
    return [*SCRATCH_ONLY, f"{PRETRAINED}={model}", *overrides]


# ------------------------------------------------------------------------------------------- what is right


def test_from_scratch(latte, models):
    assert load_recipe(latte).is_from_scratch
    load_recipe(latte, ["model.model_name=latte_neural_prior"])
    load_recipe(latte, ["framebridge.objective=diffusion"])
    load_recipe(latte, ["framebridge.objective=diffusion", "framebridge.target=v"])
    load_recipe(latte, [f"framebridge.neural_prior={models / 'neural_prior'}"])
    # The prior of another bridge will do.
    load_recipe(latte, [f"framebridge.neural_prior={models / 'bridge_neural_prior'}"])
    load_recipe(latte, ["model.vae_id=stabilityai/sd-vae-ft-ema", "framebridge.neural_prior=owner/prior"])


def test_on_from_a_saved_model(latte, models):
    recipe = load_recipe(latte, use(models / "bridge"))
    assert (recipe.is_from_scratch, recipe.framebridge.latte_size) == (False, None)
    load_recipe(latte, use(models / "bridge", "training.training_type=lora"))
    load_recipe(latte, use(models / "neural_prior", "model.model_name=latte_neural_prior"))
    load_recipe(latte, use(models / "diffusion", "framebridge.objective=diffusion"))
    load_recipe(latte, use(models / "bridge_neural_prior"))
    load_recipe(latte, use(models / "bridge_neural_prior", f"framebridge.neural_prior={models / 'neural_prior'}"))
    load_recipe(latte, use(Path("owner/model")))
    # The network alone needs an autoencoder beside it.
    alone = f"model.transformer_id={models / 'bridge' / 'transformer'}"
    assert not load_recipe(latte, [alone]).is_from_scratch
    assert "model.vae_id: is required" in problems_of(latte, alone, *SCRATCH_ONLY)[0]


def test_the_folder_of_a_run_holds_its_neural_prior(latte, models, tmp_path):
    shutil.copytree(models / "neural_prior", tmp_path / "run" / "model")
    load_recipe(latte, [f"framebridge.neural_prior={tmp_path / 'run'}", f"checkpoints.output_dir={tmp_path / 'new'}"])


def test_a_model_that_knows_its_classes_by_number(latte, tmp_path):
    model = make_tiny_latte(tmp_path / "numbers", class_names=None, num_classes=2)
    (problem,) = problems_of(latte, *use(model))
    assert "framebridge.data.class_root: the model knows its classes by number only, 0 to 1, not 'left'" in problem
    classes = write_class_folders(tmp_path / "by number", ("0", "1"))
    load_recipe(latte, use(model, f"framebridge.data.class_root={classes}"))


# ------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    "overrides, path, message",
    [
        (SCRATCH_ONLY, "model.vae_id", "is required without model.pretrained_model_name_or_path"),
        (["training.training_type=lora"], "training.training_type", "lora needs a trained model to adapt"),
        (["framebridge.data.height=60"], "framebridge.data.height", "a multiple of 8 for this model, not 60; try 64"),
        (["framebridge.latte_size=S/8", "framebridge.data.width=80"], "framebridge.data.width", "a multiple of 32"),
        (["framebridge.image_noise=true"], "framebridge.image_noise", "has no effect: with Latte"),
        (["framebridge.prior_noise=true"], "framebridge.prior_noise", "has no effect: with Latte"),
        (["framebridge.data.id_token=T"], "framebridge.data.id_token", "Latte has no text encoder"),
        (["model.tokenizer_id=a/b"], "model.tokenizer_id", "Latte has no text encoder"),
        (["model.text_encoder_id=a/b"], "model.text_encoder_id", "Latte has no text encoder"),
        (["precision.text_encoder_dtype=fp32"], "precision.text_encoder_dtype", "Latte has no text encoder"),
        (
            ["attention.attn_provider_training=['text_encoder:native']"],
            "attention.attn_provider_training",
            "latte_bridge has no text encoder",
        ),
        (
            ["attention.attn_provider_training=['vae:native']"],
            "attention.attn_provider_training",
            "keeps torch's own",
        ),
        (
            ["framebridge.objective=diffusion", "framebridge.target=data"],
            "framebridge.target",
            "is for objective bridge; diffusion has the backbone's own target: remove it, or take noise or v",
        ),
        (["framebridge.ema_decay=0", "framebridge.ema_start_step=5"], "framebridge.ema_start_step", "no effect"),
        (["framebridge.ema_decay=1"], "framebridge.ema_decay", "less than 1"),
        (["framebridge.ema_start_step=-1"], "framebridge.ema_start_step", "greater than or equal to 0"),
        (["framebridge.max_grad_norm_start_step=1.5"], "framebridge.max_grad_norm_start_step", "valid integer"),
        (
            ["training.gradient_checkpointing=true", "training.gradient_checkpointing_every=13"],
            "training.gradient_checkpointing_every",
            "the network has 12 blocks",
        ),
        (["framebridge.latte_size=M/2"], "framebridge.latte_size", "'S/2'"),
        (["framebridge.neural_prior=./nowhere"], "framebridge.neural_prior", "no such folder: nowhere"),
        (
            ["framebridge.data.frame_stride=2"],
            "framebridge.data.frame_stride",
            "no effect with frame_sampling linspace",
        ),
        (["framebridge.data.window_frames=3"], "framebridge.data.window_frames", "at least num_frames, 4, not 3"),
        (["framebridge.data.window_frames=null"], "framebridge.data.window_frames", "linspace needs it"),
        (["framebridge.data.frame_sampling=stride"], "framebridge.data.window_frames", "no effect with"),
        (["framebridge.data.class_root=nowhere"], "framebridge.data.class_root", "no such folder: nowhere"),
        (["framebridge.data.class_root=flat"], "framebridge.data.class_root", "flat holds no folders"),
        (["framebridge.data.data_root=flat"], "framebridge.data", "not class_root and data_root"),
    ],
)
def test_from_scratch_with_something_wrong(latte, overrides, path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("flat").mkdir()
    Path("flat/a.avi").write_bytes(b"\0")
    (problem,) = problems_of(latte, *overrides)
    assert f" {path}: " in problem
    assert message in problem


def test_a_latte_from_scratch_needs_classes(latte, tmp_path):
    data = ["framebridge.data.class_root=null", f"framebridge.data.data_root={tmp_path / 'classes'}"]
    (problem,) = problems_of(latte, *data)
    assert "framebridge.data: a network from scratch takes its classes from folders: give class_root" in problem
    path = tmp_path / "data.json"
    entry = load_recipe(latte).dataset_config()["datasets"][0]
    use_json = ["framebridge.data=null", f"dataset.dataset_config={path}"]
    path.write_text(json.dumps({"datasets": [entry]}))
    load_recipe(latte, use_json)
    path.write_text(json.dumps({"datasets": [entry, {**entry, "class_root": None, "data_root": "x"}]}))
    (problem,) = problems_of(latte, *use_json)
    assert "dataset.dataset_config: a network from scratch takes its classes from folders" in problem


@pytest.mark.parametrize(
    "override",
    [
        *("objective=diffusion", "target=v", "snr_aligned=true", "alignment_edge=reference", "beta_min=1"),
        *("beta_max=1", "neural_prior=owner/prior"),
    ],
)
def test_settings_of_the_bridge_have_no_effect_on_the_neural_prior(latte, override):
    found = problems_of(latte, "model.model_name=latte_neural_prior", f"framebridge.{override}")
    assert f"framebridge.{override.partition('=')[0]}: has no effect: the neural prior is" in "\n".join(found)


@pytest.mark.parametrize("override", ["latte_size=S/2", "neural_prior=owner/prior"])
def test_settings_of_latte_have_no_effect_on_cogvideox(minimal, override):
    (problem,) = problems_of(minimal, f"framebridge.{override}")
    assert problem.endswith("has no effect: it is for Latte; remove it")


def test_the_size_of_a_saved_model_cannot_be_chosen(latte, models):
    (problem,) = problems_of(latte, *use(models / "bridge", "framebridge.latte_size=S/2"))
    assert "framebridge.latte_size: has no effect: the trained network has its size; remove it" in problem


def test_a_model_of_another_stage(latte, models):
    (problem,) = problems_of(latte, *use(models / "neural_prior"))
    assert f"{PRETRAINED}: {models / 'neural_prior'} is a model of latte_neural_prior, not of latte_bridge" in problem
    (problem,) = problems_of(latte, *use(models / "bridge", "model.model_name=latte_neural_prior"))
    assert f"{PRETRAINED}: {models / 'bridge'} is a model of latte_bridge, not of latte_neural_prior" in problem
    network = models / "neural_prior" / "neural_prior"
    (problem,) = problems_of(latte, f"model.transformer_id={network}")
    assert f"model.transformer_id: {network} holds a neural prior, not a bridge" in problem


def test_a_model_that_is_no_latte_or_not_whole(latte, models, model):
    (problem,) = problems_of(latte, *use(model))
    assert "holds a CogVideoXPipeline, not a FrameBridgeLatte pipeline" in problem
    (models / "bridge" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (problem,) = problems_of(latte, *use(models / "bridge"))
    assert "holds no weights" in problem
    (models / "bridge" / "vae" / "config.json").unlink()
    assert "vae/config.json is missing" in "\n".join(problems_of(latte, f"model.vae_id={models / 'bridge' / 'vae'}"))


@pytest.mark.parametrize(
    "override, message",
    [
        ("num_frames=8", "num_frames: this model was trained on 4 and takes no other, not 8"),
        ("height=32", "height: this model was trained on 64 and takes no other, not 32"),
        ("width=128", "width: this model was trained on 64 and takes no other, not 128"),
    ],
)
def test_clips_of_another_shape_than_the_models(latte, models, override, message):
    (problem,) = problems_of(latte, *use(models / "bridge", f"framebridge.data.{override}"))
    assert f"framebridge.data.{message}" in problem


def test_classes_that_the_model_does_not_know(latte, models, tmp_path):
    classes = write_class_folders(tmp_path / "more", (*CLASSES, "lefts", "jump"))
    (problem,) = problems_of(latte, *use(models / "bridge", f"framebridge.data.class_root={classes}"))
    assert "framebridge.data.class_root: the model knows no class 'jump'" in problem
    assert problem.endswith("(and 1 more of the data)")
    entry = load_recipe(latte).dataset_config()["datasets"][0] | {"class_root": str(classes)}
    (tmp_path / "data.json").write_text(json.dumps({"datasets": [entry]}))
    overrides = ["framebridge.data=null", f"dataset.dataset_config={tmp_path / 'data.json'}"]
    (problem,) = problems_of(latte, *use(models / "bridge", *overrides))
    assert "dataset.dataset_config: the model knows no class 'jump'" in problem


def test_an_autoencoder_of_other_latents(latte, models, tmp_path):
    change_config(tmp_path / "vae", latent_channels=16)
    overrides = [f"{PRETRAINED}={models / 'bridge'}", f"model.vae_id={tmp_path / 'vae'}"]
    (problem,) = problems_of(latte, *overrides)
    assert (
        f"{PRETRAINED}: {models / 'bridge/transformer'} is for latents of 4 channels, the autoencoder has" in problem
    )


def test_a_run_may_start_from_an_earlier_one(latte, models):
    """In place of a seed; its size need not be said, and is checked if it is."""
    start = f"framebridge.start_from={models / 'bridge'}"
    recipe = load_recipe(latte, [start])
    assert (recipe.is_from_scratch, recipe.framebridge.latte_size) == (False, None)
    assert recipe.transformer_source == str(models / "bridge/transformer")
    (problem,) = problems_of(latte, start, "framebridge.latte_size=S/2")
    assert "framebridge.latte_size: the trained network has another size than S/2" in problem
    change_config(models / "bridge/transformer", num_layers=12, num_attention_heads=6, attention_head_dim=64)
    load_recipe(latte, [start, "framebridge.latte_size=S/2"])
    (problem,) = problems_of(latte, f"framebridge.start_from={models / 'neural_prior'}")
    assert "framebridge.start_from: " in problem
    assert "is not from a run of latte_bridge" in problem
    change_config(models / "bridge/transformer", class_names=["left", "right", "down"])
    (problem,) = problems_of(latte, start)
    assert "the model knows no class 'up'" in problem


# ------------------------------------------------------------------------------------------- dry runs


def is_resolved(recipe: Path, *overrides: str) -> bool:
    """Whether a dry run prints the recipe all the same, because only files are not there."""
    problems_of(recipe, *overrides)
    try:
        resolve_recipe(recipe, overrides)
    except UsageError:
        return False
    return True


def test_a_dry_run_refuses_a_model_of_another_kind(latte, models, model, capsys):
    bridge, prior = models / "bridge", models / "neural_prior"
    (models / "lora").mkdir()
    (models / "lora" / "framebridge.json").write_text(json.dumps({"pipeline_class": "FrameBridgeLattePipeline"}))
    for other in (bridge, model, models / "lora"):
        assert main(["train", "--recipe", str(latte), "--dry-run", f"framebridge.neural_prior={other}"]) == 2
        assert "without neural_prior/" in capsys.readouterr().err
    assert not is_resolved(latte, *use(model))
    assert not is_resolved(latte, *use(prior))
    assert not is_resolved(latte, f"model.transformer_id={bridge / 'vae'}")
    assert not is_resolved(latte, f"model.vae_id={bridge / 'transformer'}")
    change_config(bridge / "transformer", _class_name="CogVideoXTransformer3DModel")
    assert not is_resolved(latte, *use(bridge))
    change_config(prior / "neural_prior", stage="bridge")
    assert not is_resolved(latte, f"framebridge.neural_prior={prior}")
    change_config(prior / "neural_prior", stage="neural_prior", _class_name="LatteTransformer2")
    assert not is_resolved(latte, f"framebridge.neural_prior={prior}")


def test_a_dry_run_resolves_a_model_that_is_missing_or_damaged(latte, models, tmp_path):
    bridge, prior = models / "bridge", models / "neural_prior"
    (tmp_path / "run" / "logs").mkdir(parents=True)
    for name in ("nowhere", "run"):
        assert is_resolved(latte, f"framebridge.neural_prior={tmp_path / name}")
    assert is_resolved(latte, *use(tmp_path / "nowhere"))
    for path in (bridge / "transformer", bridge / "vae", prior / "neural_prior"):
        (path / "diffusion_pytorch_model.safetensors").unlink()
    assert is_resolved(latte, *use(bridge))
    assert is_resolved(latte, f"model.transformer_id={bridge / 'transformer'}")
    assert is_resolved(latte, f"model.vae_id={bridge / 'vae'}")
    assert is_resolved(latte, f"framebridge.neural_prior={prior}")
    (bridge / "transformer" / "config.json").write_text("{")
    assert is_resolved(latte, *use(bridge))
    (prior / "neural_prior" / "config.json").unlink()
    assert is_resolved(latte, f"framebridge.neural_prior={prior}")
    shutil.rmtree(prior / "neural_prior")  # its model_index.json says that it should be there
    assert is_resolved(latte, f"framebridge.neural_prior={prior}")
    (prior / "model_index.json").write_text("{")
    assert is_resolved(latte, f"framebridge.neural_prior={prior}")


# ------------------------------------------------------------------------------------------- the neural prior


@pytest.mark.parametrize("start", ["scratch", "saved"])
def test_a_neural_prior_that_does_not_fit(latte, models, start):
    """The rules of the parts are asked: their table is in tests/backbones/test_latte_rules.py."""
    network = models / "neural_prior" / "neural_prior"
    overrides = [f"framebridge.neural_prior={models / 'neural_prior'}"]
    if start == "saved":
        overrides = use(models / "bridge_neural_prior", *overrides)
    load_recipe(latte, overrides)
    changed = {"num_frames": 8, "sample_height": 8, "num_classes": 2, "class_names": None}
    change_config(network, **changed)
    (problem,) = problems_of(latte, *overrides)
    assert f" framebridge.neural_prior: {network} does not fit the bridge: it has 8 frames, not 4; 8 rows" in problem
    assert "2 classes, not 3" in problem
    assert not is_resolved(latte, *overrides)  # it is no warning of the disk


def test_a_neural_prior_of_another_autoencoder(latte, models, tmp_path):
    prior = f"framebridge.neural_prior={models / 'neural_prior'}"
    leave_out(tmp_path / "vae", "scaling_factor", "shift_factor", "latent_channels")  # as diffusers' defaults are
    load_recipe(latte, [prior])
    change_config(models / "neural_prior" / "vae", scaling_factor=1.5)
    (problem,) = problems_of(latte, prior)
    assert "framebridge.neural_prior: " in problem
    assert "was trained with another autoencoder: scaling_factor is 1.5 there, 0.18215 here" in problem


def test_a_neural_prior_that_is_none(latte, models, model):
    for name, message in (
        ("bridge", "FrameBridgeLatte model without neural_prior/"),
        ("bridge/transformer", "holds a bridge, not a neural prior"),
        (str(model), "CogVideoX model without neural_prior/"),
    ):
        (problem,) = problems_of(latte, f"framebridge.neural_prior={models / name}")
        assert " framebridge.neural_prior: " in problem
        assert message in problem


def test_a_neural_prior_needs_a_bridge_that_takes_it(latte, models):
    prior = f"framebridge.neural_prior={models / 'neural_prior'}"
    (problem,) = problems_of(latte, *use(models / "bridge", prior))
    assert f"framebridge.neural_prior: {models / 'neural_prior/neural_prior'} is for a bridge that takes" in problem
    (problem,) = problems_of(latte, prior, "framebridge.objective=diffusion")
    assert "framebridge.neural_prior: goes with objective bridge, not with diffusion" in problem
    alone = f"model.transformer_id={models / 'bridge_neural_prior' / 'transformer'}"
    (problem,) = problems_of(latte, alone)
    assert f"model.transformer_id: {models / 'bridge_neural_prior/transformer'} takes the video of a neural" in problem
    load_recipe(latte, [alone, prior])


# ------------------------------------------------------------------------------------------- validation samples


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("caption", "down", "caption: the model knows no class 'down'"),
        ("num_frames", "8", "num_frames: this model was trained on 4 and takes no other, not 8"),
        ("height", "128", "height: this model was trained on 64 and takes no other, not 128"),
        ("num_inference_steps", "0", "num_inference_steps should be a whole number, 1 to 1000"),
    ],
)
@pytest.mark.parametrize("start", ["scratch", "saved"])
def test_validation_rows(latte, models, start, column, value, message, tmp_path):
    make_picture(tmp_path / "a.png")
    row = {"caption": "left", "image_path": str(tmp_path / "a.png"), "num_frames": "4", "num_inference_steps": "10"}
    write_rows(tmp_path / "v.csv", [row, row | {"caption": "2"}])
    overrides = [f"validation.validation_dataset_file={tmp_path / 'v.csv'}"]
    overrides = use(models / "bridge", *overrides) if start == "saved" else overrides
    load_recipe(latte, overrides)
    write_rows(tmp_path / "v.csv", [row | {"height": "64"}, row | {"height": "64", column: value}])
    (problem,) = problems_of(latte, *overrides)
    assert f"v.csv: row 2: {message}" in problem


def make_picture(path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64), (200, 30, 30)).save(path)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


# ------------------------------------------------------------------------------------------- before torch


def test_a_lattes_recipe_is_refused_before_torch_is_imported(latte, models):
    change_config(models / "neural_prior" / "neural_prior", num_frames=8)
    code = (
        "import sys; from framebridge_plugin.errors import UsageError\n"
        "from framebridge_plugin.recipe import load_recipe\n"
        "try:\n    load_recipe(sys.argv[1], sys.argv[2:])\nexcept UsageError as error:\n    print(error)\n"
        "print(sorted({'torch', 'numpy', 'diffusers', 'finetrainers', 'datasets'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(latte), f"framebridge.neural_prior={models / 'neural_prior'}"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "8 frames, not 4" in output[0]
    assert output[1] == "[]"


def test_a_hub_id_for_the_autoencoder_leaves_its_compression_open(latte, tmp_path):
    # 8 pixels a latent would forbid 56, 4 would not.
    hub = ["model.vae_id=owner/vae", "framebridge.data.height=56", "framebridge.data.width=56"]
    load_recipe(latte, hub)
    make_tiny_image_vae(compression=8).save_pretrained(tmp_path / "vae8")
    assert len(problems_of(latte, *hub, f"model.vae_id={tmp_path / 'vae8'}")) == 2
