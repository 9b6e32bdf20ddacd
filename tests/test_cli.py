from __future__ import annotations

import subprocess
import sys
import tempfile

import pytest
import yaml
from PIL import Image

from framebridge_plugin import __version__
from framebridge_plugin.cli import main
from framebridge_plugin.recipe import load_recipe, shipped_recipes
from tests.cogvideox_files import write_clips, write_model_folder
from tests.tiny_models import moving_square, write_video


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "framebridge_plugin", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture
def recipe(tmp_path):
    sections = {
        "model": {"pretrained_model_name_or_path": str(write_model_folder(tmp_path / "model"))},
        "training": {"training_type": "full-finetune"},
        "checkpoints": {"output_dir": str(tmp_path / "run")},
        "framebridge": {
            "data": {"data_root": str(write_clips(tmp_path / "clips")), "num_frames": 17, "height": 64, "width": 64}
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["train", "--help"], ["sample", "--help"], ["convert", "--help"], ["--version"]),
        *(["data", "check", "--help"], ["prepare", "ucf101", "--help"], ["report", "--help"], ["evaluate", "--help"]),
    ],
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom framebridge_plugin.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'yaml', 'PIL', 'finetrainers'} & set(sys.modules)\n"
        "heavy |= {'importlib.metadata'} & set(sys.modules) if sys.argv[1] == '--help' else set()\n"
        "heavy |= {'pydantic'} & set(sys.modules) if sys.argv[1] not in ('sample', 'evaluate') else set()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout


def test_version_and_commands():
    assert run("--version").stdout.strip() == f"framebridge-plugin {__version__}"
    help_text = run("--help").stdout
    assert all(command in help_text for command in ("train", "sample", "convert", "recipes", "doctor"))


def test_console_script(tmp_path):
    script = f"{sys.exec_prefix}/bin/finetrainers"
    process = subprocess.run([script, "recipes"], capture_output=True, text=True, cwd=tmp_path)
    assert [line.split()[0] for line in process.stdout.splitlines()] == list(shipped_recipes())
    assert "the reference's run, value for value" in process.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "--recipe"),
        (["train", "--recipe", "quickstart", "--dryrun"], "unknown argument --dryrun"),
        (["train", "--recipe", "quickstart", "--dry"], "unknown argument --dry"),
        (["train", "--recipe", "nowhere.yaml"], "no such file, nor a shipped recipe"),
        (["recipes", "all"], "unknown argument all"),
        (["sample", "--model", "x"], "--output"),
        (["sample", "--model", "x", "--output", "x.mp4"], "one of the arguments --image --data-index is required"),
        (["sample", "--image", "x", "--data-index", "1"], "--data-index: not allowed with argument --image"),
        (["sample", "--prompt", "x", "--label", "1"], "--label: not allowed with argument --prompt"),
        (["sample", "--sampler", "ode"], "invalid choice: 'ode'"),
    ],
)
def test_a_wrong_command_line(arguments, message, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_dry_run_prints_the_resolved_recipe(recipe, tmp_path, capsys):
    overrides = ["optimization.lr=2e-5", "framebridge.target=noise"]
    # Overrides may stand anywhere.
    command = ["train", overrides[0], "--recipe", str(recipe), "--dry-run", overrides[1]]
    assert main(command) == 1
    assert f"{tmp_path / 'clips/a.mp4'}: not_video" in capsys.readouterr().err
    write_video(tmp_path / "clips/a.mp4", moving_square(0, 17, 64, 64))
    assert main(command) == 0
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(capsys.readouterr().out)
    assert load_recipe(resolved) == load_recipe(recipe, overrides)
    assert not (tmp_path / "run").exists()


def test_dry_run_prints_the_recipe_and_refuses_what_a_start_would(recipe, tmp_path, capsys):
    missing = ["framebridge.data.data_root=nowhere", "model.pretrained_model_name_or_path=./nowhere"]
    missing.append("parallelism.dp_degree=2")
    assert main(["train", "--recipe", str(recipe), "--dry-run", *missing]) == 2
    output = capsys.readouterr()
    (tmp_path / "mine.yaml").write_text(output.out)
    lines = output.err.splitlines()
    assert lines[:2] == [
        "error: command line: framebridge.data.data_root: no such folder: nowhere",
        "error: command line: model.pretrained_model_name_or_path: no such folder: nowhere",
    ]
    assert "start them with --nproc 2" in lines[2]
    assert main(["train", "--recipe", str(tmp_path / "mine.yaml")]) == 2
    assert [line.partition("mine.yaml")[2] for line in capsys.readouterr().err.splitlines()] != lines
    assert main(["train", "--recipe", str(recipe), "--dry-run", *missing, "training.batch_size=0"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert all(line.startswith("error: ") for line in output.err.splitlines())


def test_a_wrong_recipe_is_refused_before_torch_is_imported(recipe):
    code = (
        "import sys\nfrom framebridge_plugin.cli import main\ncode = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    overrides = ["optimization.lrr=1", "training.batch_size=x", "parallelism.dp_degree=2"]
    command = [sys.executable, "-c", code, "train", "--recipe", str(recipe), *overrides]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    lines = process.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: command line: ") for line in lines)
    assert "the nearest is optimization.lr" in process.stderr
    assert "start them with --nproc 2" in process.stderr


def test_sample_refuses_before_torch_is_imported(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    arguments = ["--model", "/nowhere", "--image", str(tmp_path / "a.png"), "--prompt", "x", "--output", "x.mp4"]
    code = (
        "import sys\nfrom framebridge_plugin.cli import main\ncode = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    command = [sys.executable, "-c", code, "sample", *arguments, "--order", "2"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.splitlines() == [
        "error: --order: the sampler sde has order 1, not 2; take the sampler dbim",
        "error: --model no such folder: /nowhere",
    ]


def test_an_unforeseen_error_ends_in_one_line_and_keeps_its_traceback(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert main(["train", "--recipe", str(recipe)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    crash = tmp_path / "run" / "crash-rank0.txt"
    assert line.startswith("error: FileNotFoundError: ")
    assert line.endswith(f"(traceback: {crash})")
    assert crash.read_text().startswith("Traceback")
    assert main(["train", "--recipe", str(recipe), "--debug"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.splitlines()[-1].startswith("error: FileNotFoundError: ")


def test_debug_by_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FRAMEBRIDGE_DEBUG", "1")
    assert main(["train", "--recipe", "nowhere.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.splitlines()[-1].startswith("error: --recipe nowhere.yaml")


def test_interrupt(tmp_path):
    recipe = tmp_path / "long.yaml"
    recipe.write_text("a: [" + "1, " * 60_000 + "1]\n")  # seconds of reading
    code = (
        "import signal, sys\nfrom framebridge_plugin.cli import main\nimport framebridge_plugin.recipe\n"
        "signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.1)\n"
        "sys.exit(main(['train', '--recipe', sys.argv[1], '--dry-run']))"
    )
    process = subprocess.run([sys.executable, "-c", code, str(recipe)], capture_output=True, text=True)
    assert process.returncode == 130
    assert process.stderr == "interrupted\n"
