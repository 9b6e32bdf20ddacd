"""`finetrainers conformance`: its table, its exit code, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from framebridge_plugin import register
from framebridge_plugin.cli import main
from tests.testing.broken import LosesAlpha, Whole
from tests.tiny_models import make_tiny_cogvideox, make_tiny_latte

register()

from finetrainers.config import SUPPORTED_MODEL_CONFIGS  # noqa: E402

NAMES = sorted(getattr(name, "value", name) for name in SUPPORTED_MODEL_CONFIGS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_tiny_cogvideox(folder / "tiny", sample_size=32, max_text_length=226)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], str]:
    capsys.readouterr()
    code = main(["conformance", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_it_prints_a_table(model, capsys):
    only = ("interface", "latents", "lora-alpha")
    code, lines, err = run(capsys, "--model-name", "cogvideox", "--model", model, "--only", *only)
    assert (code, err) == (0, "")
    assert lines[0] == f"CogVideoXModelSpecification with {model}, clips of 9 frames of 32 x 32"
    assert [line.split()[:2] for line in lines[1:4]] == [[only[0], "ok"], [only[1], "ok"], [only[2], "known"]]
    assert "finetrainers writes lora_alpha under a key" in lines[3]
    assert lines[4:] == ["2 ok, 1 known"]


def test_a_name_stands_for_all_checks_that_begin_so(model, capsys):
    options = ("--only", "co", "--clip-shape", 5, 16, 32)
    code, lines, _ = run(capsys, "--model-name", "cogvideox_bridge", "--model", model, *options)
    assert code == 0
    assert lines[0].endswith("clips of 5 frames of 16 x 32")
    assert [line.split()[0] for line in lines[1:-1]] == ["conditions", "collation"]


@pytest.fixture
def broken_model(tmp_path, monkeypatch) -> Path:
    Whole.folder = make_tiny_latte(tmp_path / "tiny", size=32)

    def make(pretrained_model_name_or_path: str) -> LosesAlpha:
        assert pretrained_model_name_or_path == str(Whole.folder)
        return LosesAlpha()

    monkeypatch.setitem(SUPPORTED_MODEL_CONFIGS, "broken", {"lora": make})
    return Whole.folder


def test_a_failure_ends_with_1(broken_model, capsys):
    arguments = ("--model-name", "broken", "--model", broken_model, "--only", "lora")
    code, lines, err = run(capsys, *arguments)
    assert (code, err) == (1, "")
    assert lines[1].split()[:2] == ["lora-export", "ok"]
    assert lines[2].split()[:2] == ["lora-alpha", "FAILED"]
    assert "lora-alpha: LosesAlpha: " in lines[2]
    assert lines[-1] == "1 ok, 1 FAILED"
    assert "Traceback" in run(capsys, *arguments, "--debug")[2]


@pytest.mark.parametrize("name", NAMES)
def test_it_knows_every_model_and_refuses_a_folder_without_one(name, tmp_path, capsys):
    code, lines, err = run(capsys, "--model-name", name, "--model", tmp_path)
    assert (code, lines) == (1, [])
    assert err.count("\n") == 1
    assert str(tmp_path) in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model-name", "cogvideo", "--model", "."), "--model-name: finetrainers knows no 'cogvideo'; it knows cog"),
        (("--model-name", "cogvideox", "--model", "./nowhere"), "--model: nowhere: no such folder"),
        (
            ("--model-name", "cogvideox", "--model", ".", "--only", "x"),
            "--only: no check is called 'x'; there are in",
        ),
    ],
)
def test_what_it_is_told_wrong(arguments, message, capsys):
    code, lines, err = run(capsys, *arguments)
    assert (code, lines) == (2, [])
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
