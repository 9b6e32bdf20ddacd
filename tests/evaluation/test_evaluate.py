"""`finetrainers evaluate` on tiny models: what it writes, what decides about it, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from PIL import Image

from framebridge_plugin.cli import main
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.evaluation.vbench import names_of
from tests.evaluation.test_networks import write_detector
from tests.tiny_models import CLASS_NAMES, make_tiny_latte, moving_square, write_video
from tests.training.conftest import LAUNCH_VARIABLES

FRAMES, SIZE, CLIPS = 4, 64, 8


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an evaluation needs of a run's folder, a model and the recipe; beside it clips and other models."""
    folder = tmp_path_factory.mktemp("evaluation")
    for label, name in enumerate(CLASS_NAMES):
        (folder / "clips" / name).mkdir(parents=True)
        for number in range(CLIPS // len(CLASS_NAMES)):
            frames = moving_square(2 * label + number, 2 * FRAMES, SIZE, SIZE)
            write_video(folder / "clips" / name / f"{number}.mp4", frames)
    make_tiny_latte(folder / "run/model")
    make_tiny_latte(folder / "prior", "neural_prior")
    make_tiny_latte(folder / "diffusion", "diffusion")
    data = {"class_root": str(folder / "clips"), "num_frames": FRAMES, "height": SIZE, "width": SIZE}
    recipe = {
        "model": {"model_name": "latte_bridge", "pretrained_model_name_or_path": str(folder / "gone")},
        "training": {"training_type": "full-finetune"},
        "checkpoints": {"output_dir": str(folder / "run")},
        "framebridge": {"data": data | {"horizontal_flip": True}},
        "validation": {"heldout": {"clips": 2}},  # of a fold's other half, which other data have not
    }
    (folder / "run/recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(autouse=True)
def _not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def evaluate(folder: Path, output: Path, *options: str, model: str = "run") -> dict:
    """Evaluates by the run's recipe; returns what the JSON says."""
    recipe = f"--recipe={folder / 'run/recipe.yaml'}"
    assert main(["evaluate", f"--model={folder / model}", recipe, f"--output={output}", *options]) == 0
    return json.loads((output / "evaluation.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_it_writes_what_it_found_and_the_whole_protocol(run_folder, tmp_path, capsys):
    found = evaluate(run_folder, tmp_path / "all", "--steps=2", "--seed=5")
    said = capsys.readouterr()
    table = (tmp_path / "all/evaluation.md").read_text()
    assert said.out == table
    assert table.startswith(f"# {CLIPS} videos of {FRAMES} frames of {SIZE}x{SIZE}\n")
    assert "| squared error to the true clip" in table
    protocol = found["protocol"]
    assert found["model"] == str(run_folder / "run")
    assert found["data"][0]["class_root"] == str(run_folder / "clips")
    assert protocol["clips"][0]["split"] == "all"
    assert found["trained_on"] == CLIPS
    assert f"The model was trained on {CLIPS} of the clips." in table
    assert f"warning: {CLIPS} of these {CLIPS} clips are what the run was trained on" in said.err
    assert (protocol["resolution"], protocol["frames"], protocol["count"]) == ([SIZE, SIZE], FRAMES, CLIPS)
    assert (protocol["sampling"]["steps"], protocol["sampling"]["sampler"], protocol["seed"]) == (2, "sde", 5)
    assert protocol["clips"][0]["clip"]["horizontal_flip"] is False
    weights = "transformer/diffusion_pytorch_model.safetensors"
    digest = subprocess.run(["sha256sum", run_folder / "run/model" / weights], capture_output=True, text=True).stdout
    assert protocol["weights"][weights] == digest.split()[0]

    clips = found["clips"]
    assert [clip["number"] for clip in clips] == list(range(CLIPS))
    assert [clip["seed"] for clip in clips] == [5 + number for number in range(CLIPS)]
    assert {Path(clip["source"]).parent.name for clip in clips} == {clip["condition"] for clip in clips}
    assert len({clip["source"] for clip in clips}) == CLIPS
    for name in ("error", "psnr", "first_psnr", "true.motion", "repeated.error"):
        figure, values = found["measures"][name], torch.tensor([clip[name] for clip in clips]).double()
        assert figure["mean"] == pytest.approx(values.mean().item())
        assert figure["standard_error"] == pytest.approx(values.std().item() / CLIPS**0.5)
    assert found["measures"]["motion_ratio"]["mean"] == pytest.approx(
        found["measures"]["motion"]["mean"] / found["measures"]["true.motion"]["mean"]
    )
    with Image.open(tmp_path / "all/evaluation.png") as sheet:
        assert sheet.height == 6 * (SIZE + 2 + 14) - 2


def test_a_clip_is_the_same_whatever_the_others_are(run_folder, tmp_path):
    """Of fewer clips, in other batches: equal to rounding; of the first ones alone: the same bits."""
    options = ("--steps=2", "--batch-size=4")
    whole = evaluate(run_folder, tmp_path / "whole", *options)["clips"]
    first = evaluate(run_folder, tmp_path / "first", *options, "--count=4")["clips"]
    assert first == whole[:4]
    alone = evaluate(run_folder, tmp_path / "alone", "--steps=2", "--batch-size=1")["clips"]
    for one, other in zip(whole, alone, strict=True):
        assert one["source"] == other["source"]
        assert one["psnr"] == pytest.approx(other["psnr"], abs=0.02)
    others = evaluate(run_folder, tmp_path / "others", *options, "--count=4", "--clip-seed=1")["clips"]
    assert [clip["source"] for clip in others] != [clip["source"] for clip in first]
    again = evaluate(run_folder, tmp_path / "again", *options, "--count=4", "--seed=9")["clips"]
    assert [clip["true.motion"] for clip in again] == [clip["true.motion"] for clip in first]
    assert [clip["psnr"] for clip in again] != [clip["psnr"] for clip in first]


def test_a_killed_evaluation_in_two_processes_becomes_an_unbroken_one_in_one(run_folder, tmp_path):
    options = ("--steps=14", "--batch-size=2")
    evaluate(run_folder, tmp_path / "whole", *options)
    killed, recipe = tmp_path / "killed", f"--recipe={run_folder / 'run/recipe.yaml'}"
    command = ["evaluate", f"--model={run_folder / 'run'}", recipe, f"--output={killed}", *options, "--nproc=2"]
    environment = os.environ | {"OMP_NUM_THREADS": str(2 * torch.get_num_threads())}  # two processes share them
    with subprocess.Popen([sys.executable, "-m", "framebridge_plugin", *command], env=environment) as process:
        while not list(killed.glob("parts/*.safetensors")):
            assert process.poll() is None
            time.sleep(0.005)
        started = psutil.Process(process.pid).children()
        assert len(started) == 2
        process.kill()
    psutil.wait_procs(started, timeout=30)
    written = {path.name: path.stat().st_mtime_ns for path in killed.glob("parts/*.safetensors")}
    assert 0 < len(written) < CLIPS
    assert not (killed / "evaluation.json").exists()
    evaluate(run_folder, killed, *options)
    assert {name: (killed / "parts" / name).stat().st_mtime_ns for name in written} == written
    assert contents(killed) == contents(tmp_path / "whole")


def test_clips_that_cannot_be_read_are_left_out_and_said(run_folder, tmp_path, capsys):
    clips = shutil.copytree(run_folder / "clips", tmp_path / "clips")
    broken = clips / "up/0.mp4"
    broken.write_bytes(b"no video")
    found = evaluate(run_folder, tmp_path / "out", "--steps=1", f"framebridge.data.class_root={clips}")
    assert [entry["path"] for entry in found["left_out"]] == [str(broken)]
    assert len(found["clips"]) == CLIPS - 1
    assert found["trained_on"] == 0
    assert str(broken) not in [clip["source"] for clip in found["clips"]]
    assert f"1 of {CLIPS} clips cannot be read and are left out." in (tmp_path / "out/evaluation.md").read_text()
    for path in clips.glob("*/*.mp4"):
        path.write_bytes(b"no video")
    arguments = ["evaluate", f"--model={run_folder / 'run'}", f"framebridge.data.class_root={clips}", "--steps=1"]
    assert main([*arguments, f"--output={tmp_path / 'none'}"]) == 1
    assert f"none of the {CLIPS} clips can be read" in capsys.readouterr().err.splitlines()[-1]
    assert main([*arguments, f"--output={tmp_path / 'first'}", "framebridge.bad_files.policy=raise"]) == 1
    assert "cannot read the clip" in capsys.readouterr().err.splitlines()[-1]


def test_fvd_and_what_is_known_of_the_true_clips(run_folder, tmp_path):
    """Networks may come to an evaluation later; what they find of true clips serves the next model, too."""
    detector, cache = tmp_path / "i3d.pt", Path(os.environ["HF_DATASETS_CACHE"], "framebridge-features")
    options = ("--steps=2", f"--fvd-features={detector}", f"--fvd-sha256={write_detector(detector)}")
    first = evaluate(run_folder, tmp_path / "first", *options[:1])
    videos = contents(tmp_path / "first/parts")
    found = evaluate(run_folder, tmp_path / "first", *options, "--also", "vmaf")
    assert contents(tmp_path / "first/parts") == videos
    assert first["measures"].items() <= found["measures"].items()
    assert found["networks"]["fvd"] == {"sha256": options[2].partition("=")[2], "frames": None}
    assert found["measures"]["fvd"]["mean"] > found["measures"]["repeated.fvd"]["mean"] > 0
    assert found["measures"]["vmaf"]["mean"] == pytest.approx(sum(clip["vmaf"] for clip in found["clips"]) / CLIPS)
    known = contents(cache)
    assert len(known) == 1
    other = evaluate(run_folder, tmp_path / "second", *options, model="diffusion")
    assert contents(cache) == known
    assert other["measures"]["repeated.fvd"] == found["measures"]["repeated.fvd"]
    assert other["measures"]["fvd"] != found["measures"]["fvd"]

    clips = shutil.copytree(run_folder / "clips", tmp_path / "clips")
    broken = clips / "up/0.mp4"
    broken.write_bytes(bytes(broken.stat().st_size))  # which is all that is seen of it without reading it
    fewer = evaluate(run_folder, tmp_path / "third", *options, f"framebridge.data.class_root={clips}")
    assert fewer["evaluated"] == CLIPS - 1
    assert fewer["protocol"]["clips"] == found["protocol"]["clips"]
    assert fewer["measures"]["repeated.fvd"] != found["measures"]["repeated.fvd"]


@pytest.mark.parametrize("model", ["prior", "diffusion"])
def test_models_of_other_kinds(run_folder, tmp_path, model):
    steps = () if model == "prior" else ("--steps=2",)
    found = evaluate(run_folder, tmp_path / "out", *steps, "--count=2", model=model)
    assert found["evaluated"] == 2
    assert found["protocol"]["sampling"].get("scheduler") == {"diffusion": "CogVideoXDDIMScheduler"}.get(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps=2",), "out holds another evaluation: sampling.steps is 1 there and 2 here; set that back"),
        (("--count=9",), f"--count 9: the data has {CLIPS} clips; take no more"),
        (("--count=0",), "--count 0: "),
        (("framebridge.data.num_frames=5",), "framebridge.data.num_frames: this model was trained on 4"),
        (("framebridge.data.num_frames=1",), "framebridge.data.num_frames: videos of one frame do not move"),
        (("framebridge.data.class_root=nowhere",), "framebridge.data.class_root: no such folder: nowhere"),
        (("--order=2",), "--order: "),
        (("--fvd-features=nowhere.pt",), "--fvd-features nowhere.pt: no such file"),
        (("--fvd-frames=4",), "--fvd-frames: has an effect with --fvd-features only"),
        (("--recipe=nowhere",), "no such file, nor a shipped recipe"),
        (("--model=nowhere",), "--model no such folder: nowhere"),
        (("--output=clips",), "clips holds something else; name another folder"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(run_folder, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(run_folder)
    if not Path("out").exists():
        evaluate(run_folder, Path("out"), "--steps=1", "--count=1")
    capsys.readouterr()
    assert main(["evaluate", "--model=run", "--count=1", "--steps=1", "--output=out", *options]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of two pictures, and a table of these and a clip."""
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        picture = Image.fromarray(moving_square(number, 1, SIZE, SIZE + 16)[0])
        picture.save(tmp_path / f"pictures/{number}.png")
    return tmp_path / "pictures"


def test_images_alone_and_their_export_for_vbench(run_folder, tmp_path, pictures, capsys):
    rows = [("up", pictures / "0.png"), ("up", pictures / "1.png"), ("left", run_folder / "clips/left/0.mp4")]
    table = tmp_path / "images.csv"
    table.write_text("\n".join(["caption,image_path", *(f"{caption},{path}" for caption, path in rows)]))
    arguments = ["evaluate", f"--model={run_folder / 'run'}", f"--output={tmp_path / 'out'}", "--steps=2"]
    more = [f"--images={table}", "--num-videos=2", f"--vbench={tmp_path / 'vbench'}"]
    assert main([*arguments, *more]) == 0
    found = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert [clip["source"] for clip in found["clips"]] == [str(path) for _, path in rows for _ in range(2)]
    assert {"first_psnr", "motion", "block_residual"} < found["measures"].keys()
    assert not {"psnr", "error", "shift_correlation", "true.motion"} & found["measures"].keys()
    assert "what compares with true clips is left out" in (tmp_path / "out/evaluation.md").read_text()
    names = sorted(path.name for path in (tmp_path / "vbench").glob("*/*"))
    videos = [f"{name}-{index}.mp4" for name in ("left", "up 0", "up 1") for index in range(2)]
    assert names == sorted([*videos, "left.jpg", "up 0.jpg", "up 1.jpg"])
    said = capsys.readouterr().err
    assert f"--ratio 1-1 --videos_path {tmp_path / 'vbench/videos'} --custom_image_folder" in said
    assert main([*arguments, f"--images={pictures}", "--class-name=up", f"--output={tmp_path / 'folder'}"]) == 0
    assert len(json.loads((tmp_path / "folder/evaluation.json").read_text())["clips"]) == 2


@pytest.mark.parametrize("caption", ["a/b", "x" * 241, ""])
def test_captions_that_vbench_cannot_have_as_names(caption):
    assert names_of(["cat", "cat", "100%"], ["a.png", "b.png", "a.png"]) == ["cat 0", "cat 1", "100%"]
    with pytest.raises(FrameBridgeError, match="--vbench: .* cannot be the name of a file"):
        names_of(["cat", caption], ["a.png", "b.png"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images={pictures}",), "--class-name: give one for all images, or one for each"),
        (("--images={pictures}", "--class-name=upp"), "--class-name upp: the model knows no class 'upp'"),
        (("--images={pictures}", "--label", "0", "1", "2"), "--images: 3 conditions for 2 images"),
        (("--images={pictures}", "--label=0", "--also=vmaf"), "--also: needs true clips"),
        (("--images={pictures}", "--label=0", "--clip-seed=3"), "--clip-seed: is for clips"),
        (("--images={pictures}", "--label=0", "--count=3"), "--count 3: there are 2 images"),
        (("--images={pictures}", "--label=0", "--num-frames=5"), "--num-frames: this model was trained on 4"),
        (("--images={pictures}/2.png", "--label=0"), "2.png: no such file"),
        (("--images={pictures}/..", "--label=0"), "no pictures or videos are in it"),
        (("--images={pictures}", "framebridge.data.split=test"), "leave --recipe and overrides out"),
        (("--class-name=up",), "--class-name: clips have their own; leave it out"),
        (("--num-videos=2",), "--num-videos: is for --images"),
        (("--height=64",), "--height: of clips it is framebridge.data.height=..."),
        (("--preset=ucf101",), "--preset ucf101: is for FVD of clips; give --fvd-features"),
    ],
)
def test_what_does_not_go_with_images_or_clips(run_folder, tmp_path, pictures, capsys, options, message):
    arguments = ["evaluate", f"--model={run_folder / 'run'}", f"--output={tmp_path / 'out'}", "--steps=1"]
    assert main([*arguments, *(option.format(pictures=pictures) for option in options)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_preset_says_what_it_sets(run_folder, tmp_path, capsys):
    detector = tmp_path / "i3d.pt"
    options = [f"--fvd-features={detector}", f"--fvd-sha256={write_detector(detector)}", "--preset=msrvtt"]
    options += ["--count=4", "--steps=1", *(f"framebridge.data.{name}={SIZE}" for name in ("height", "width"))]
    found = evaluate(run_folder, tmp_path / "out", *options, "--fvd-frames=3")
    said = "preset msrvtt: --count 2048 --fvd-frames 16 framebridge.data.height=256 framebridge.data.width=256"
    assert said in capsys.readouterr().err
    assert found["networks"]["fvd"]["frames"] == 3
    assert found["protocol"]["count"] == 4
    assert main(["evaluate", f"--model={run_folder / 'run'}", f"--output={tmp_path / 'other'}", *options]) == 2
    assert "error: --fvd-frames 16: the clips have 4 frames; take no more" in capsys.readouterr().err


def test_a_model_alone_does_not_say_where_clips_are(run_folder, capsys):
    assert main(["evaluate", f"--model={run_folder / 'prior'}", "--output=out"]) == 2
    assert "say by --recipe where the clips are" in capsys.readouterr().err


def test_captions_that_are_no_classes_of_the_model(run_folder, tmp_path, capsys):
    shutil.copytree(run_folder / "clips/up", tmp_path / "clips/upwards")
    options = [f"framebridge.data.class_root={tmp_path / 'clips'}", f"--output={tmp_path / 'out'}"]
    assert main(["evaluate", f"--model={run_folder / 'run'}", *options]) == 2
    assert "the clips: the model knows no class 'upwards'" in capsys.readouterr().err
