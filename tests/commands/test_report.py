"""`finetrainers report`: what the page says of runs in every state, and what Chromium makes of it."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from framebridge_plugin import register
from framebridge_plugin.cli import main
from framebridge_plugin.commands.report import write_report
from framebridge_plugin.commands.report_runs import RunRecord, note_other_clips, read_run, thinned
from framebridge_plugin.commands.report_videos import collect_rows
from framebridge_plugin.media import write_video
from framebridge_plugin.recipe import load_recipe
from framebridge_plugin.training.metrics import MetricsLogger
from framebridge_plugin.training.run import write_run_files
from tests import browser
from tests.cogvideox_files import write_clips, write_model_folder
from tests.tiny_models import moving_square

HOSTILE = "</script><script>document.title='taken'</script>\u202e & \"a\""


class Page(HTMLParser):
    """The parts of a page: what it refers to, and the text of each table row, script and note."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.policy, self.data, self.text = "", {}, path.read_text(encoding="utf-8")
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.notes: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = [("", {})]
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        assert not [name for name in values if name.startswith("on") or name == "style"]
        self.tags.append(tag)
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]
        self.addresses += [values[name] for name in ("src", "href", "poster") if name in values]
        if tag == "tr":
            self.rows.append([])
        if tag not in ("meta", "link", "img", "input"):
            self._open.append((tag, values))

    def handle_data(self, text):
        tag, values = self._open[-1]
        if values.get("id") == "data":
            self.data = json.loads(text)
        elif tag in ("td", "th"):
            self.rows[-1].append(text)
        elif values.get("class") == "nothing" or tag == "li":
            self.notes.append(text)

    def handle_endtag(self, tag):
        while self._open.pop()[0] != tag:
            pass

    def row(self, name: str) -> list[str]:
        return next(cells for first, *cells in self.rows if first == name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, `bridge` and `twin`, as trainings leave them: the first is done, the second was killed."""
    register()
    from framebridge_plugin.training.heldout import summary

    folder = tmp_path_factory.mktemp("report")
    write_model_folder(folder / "model")
    write_clips(folder / "clips")
    truth = folder / "clips/truth.mp4"
    write_video(moving_square(0, 18, 64, 64), truth)
    Image.fromarray(moving_square(0, 1, 64, 64)[0]).save(folder / "first.png")
    rows = [
        {"caption": HOSTILE, "image_path": str(folder / "first.png"), "video_path": str(truth)},
        {"caption": "square", "image_path": str(folder / "gone.png")},
    ]
    (folder / "validation.json").write_text(json.dumps({"data": rows}))
    for name, objective in (("bridge", "bridge"), ("twin", "diffusion")):
        run = folder / "runs" / name
        run.mkdir(parents=True)
        sections = {
            "model": {"pretrained_model_name_or_path": str(folder / "model")},
            "training": {"training_type": "full-finetune"},
            "optimization": {"train_steps": 6},
            "checkpoints": {"output_dir": str(run)},
            "framebridge": {
                "objective": objective,
                "data": {"data_root": str(folder / "clips"), "num_frames": 9, "height": 64, "width": 64},
            },
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(sections))
        recipe = load_recipe(folder / "recipe.yaml")
        shown = recipe.validation.model_copy(update={"validation_dataset_file": str(folder / "validation.json")})
        write_run_files(recipe.model_copy(update={"validation": shown}), run)
        with MetricsLogger(run, enabled=True) as metrics:
            metrics.log_text(0, "heldout/clips", f"1 clips of digest {name}, weights: raw")
            for step in range(1, 7):
                numbers = {"loss": 1 / step, "lr": 1e-3, "samples_per_second": 4.0, "samples_seen": 2.0 * step}
                metrics.log(step, numbers)
                if step % 2 == 0:
                    errors = {(0, band): ((band + 1) / step, 0.5 / step, 1.0) for band in range(10)}
                    metrics.log(step, summary(errors, 10))
        for number, label in ((0, "step000002"), (1, "step000002"), (0, "step000004"), (0, "final"), (1, "final")):
            path = run / f"validation/{label}-{number:02d}.mp4"
            if name == "bridge" or label != "final":
                write_video(moving_square(number, 9, 64, 64), path)
    twin = folder / "runs/twin"
    lines = (twin / "metrics.jsonl").read_text().splitlines(keepends=True)
    # Killed in update 6; the run went back to update 3, took other clips, and was killed in the line of update 5.
    again = [json.dumps({"step": step, "loss": 9.0}) + "\n" for step in (4, 5)]
    again.insert(1, json.dumps({"step": 4, "heldout/clips": "2 clips of digest other, weights: raw"}) + "\n")
    (twin / "metrics.jsonl").write_text("".join([*lines, "no JSON\n", *again])[:-9])
    (twin / "bad_files.jsonl").write_text(json.dumps({"path": "/<b>.mp4", "kind": "empty", "reason": "it is empty"}))
    measures = {
        "psnr": {"mean": 20.5, "standard_error": 0.25},
        "repeated.psnr": {"mean": 21.0, "standard_error": None},
    }
    protocol = {"sampling": {"steps": 25}, "weights": {"transformer/x.safetensors": "00", "vae/x.safetensors": "11"}}
    evaluation = {"protocol": protocol, "evaluated": 8, "trained_on": 3, "measures": measures, "clips": []}
    (twin / "model").mkdir()
    files = {"transformer/x.safetensors": [1, "22"], "vae/x.safetensors": [1, "11"]}
    (twin / "model/manifest.json").write_text(json.dumps({"files": files}))
    for run, content in (("twin", evaluation), ("bridge", {"psnr": 1.0})):
        (folder / f"runs/{run}/evaluation").mkdir()
        (folder / f"runs/{run}/evaluation/evaluation.json").write_text(json.dumps(content))
        shutil.copy(folder / "first.png", folder / f"runs/{run}/evaluation/evaluation.png")
    return folder


@pytest.fixture(scope="module")
def both(folder):
    runs = folder / "runs"
    output = folder / "both.html"
    assert main(["report", "--run", f"{runs}/bridge", "--compare", f"{runs}/twin", "--output", str(output)]) == 0
    return output


def test_two_runs_side_by_side(both):
    page = Page(both)
    assert page.row("state") == ["done", "incomplete"]
    assert page.row("updates") == ["6 of 6", "4 of 6"]
    assert page.row("held-out loss") == ["0.9167, lowest 0.9167 at 6", "2.75, lowest 2.75 at 2"]
    assert page.row("held-out clips")[1] == "2 clips of digest other, weights: raw"
    before = "held-out losses are of others from update 4 on, before: 1 clips of digest twin, weights: raw"
    assert before in page.notes
    assert page.row("framebridge.objective") == ["bridge", "diffusion"]
    names = [first for first, *_ in page.rows]
    assert names.index("framebridge.objective") < names.index("PSNR to the true clip, dB")
    assert names.count("optimization.lr") == 1  # they share it: it stands among all settings alone
    assert page.row("PSNR to the true clip, dB") == ["-", "20.50 ± 0.25"]
    assert page.row("PSNR to the true clip, dB; of the image repeated") == ["-", "21.0"]
    assert page.row("sampling.steps") == ["-", "25"]
    assert page.row("trained_on") == ["-", "3"]
    assert "its held-out losses are of other clips than bridge's" in page.notes
    other = "evaluation/evaluation.json is of other weights than the run's model: of a checkpoint, or of before"
    assert other in page.notes
    assert any(
        note.endswith("evaluation.json is no file of `finetrainers evaluate`, and left out") for note in page.notes
    )
    assert page.row("/<b>.mp4") == ["empty", "it is empty"]
    assert page.row("torch")[0] == page.row("torch")[1]

    assert [chart["title"] for chart in page.data["charts"]][:2] == ["Loss", "Held-out loss"]
    assert not [chart["title"] for chart in page.data["charts"] if "/" in chart["title"]]
    for bands in page.data["charts"][-2:]:
        assert [panel["label"] for panel in bands["panels"]] == [f"band {band}" for band in range(10)]
    bridge, twin = page.data["runs"]
    assert bridge["series"]["loss"]["values"] == [1.0, 0.5, 0.33333, 0.25, 0.2, 0.16667]
    assert twin["series"]["loss"] == {"steps": [1, 2, 3, 4], "values": [1.0, 0.5, 0.33333, 9.0], "block": 1}
    assert twin["series"]["heldout/loss"]["steps"] == [2]
    assert twin["restarts"] == [3]
    assert "the run went back to update 3, and on from there" in page.notes
    assert "the last line of metrics.jsonl was cut short, as by a kill, and is left out" in page.notes
    assert "metrics.jsonl: lines that name no step are left out, 1 of them" in page.notes


def test_a_page_holds_all_that_it_shows_and_obeys_nothing_else(both, folder):
    page = Page(both)
    allowed = dict(part.split(" ", 1) for part in page.policy.split("; "))
    assert allowed["default-src"] == allowed["base-uri"] == allowed["form-action"] == "'none'"
    assert allowed["img-src"] == allowed["media-src"] == "data:"
    assert all(re.fullmatch(r"'sha256-[\w+/=]+'", allowed[kind]) for kind in ("script-src", "style-src"))
    assert len(allowed) == 7
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert page.tags.count("script") == 2
    assert page.tags.count("b") == 0
    assert "\u202e" not in page.text
    # Both rows of the first run at three moments less one, of the second at two less one, and the truth.
    videos = [base64.b64decode(text.partition(",")[2]) for text in page.addresses if text.startswith("data:video/")]
    assert len(videos) == 1 + 5 + 3
    assert {path.read_bytes() for path in (folder / "runs").glob("*/validation/*.mp4")} < set(videos)
    assert any(f"{folder}/gone.png (is not here any more)" in note for note in page.notes)


def test_a_run_that_has_just_begun(folder, tmp_path, capsys):
    run = tmp_path / "new"
    run.mkdir()
    (run / "recipe.yaml").write_bytes((folder / "runs/bridge/recipe.yaml").read_bytes())
    (run / ".lock").touch()
    (run / "secret.mp4").symlink_to(folder / "clips/truth.mp4")
    (run / "validation").mkdir()
    (run / "validation/final-00.mp4").symlink_to(folder / "clips/truth.mp4")
    assert main(["report", "--run", str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"report: {run / 'report.html'} (0.0 MB)\n")
    page = Page(run / "report.html")
    assert page.row("state") == ["running"]
    assert page.row("updates") == ["0 of 6"]
    assert "new: no validation has written a video" in page.notes  # that of elsewhere is none
    assert "No update has been logged yet." in page.notes
    os.utime(run / ".lock", (0, 0))  # whoever held it is gone
    write_report([run], run / "report.html")
    assert Page(run / "report.html").row("state") == ["incomplete"]


def test_files_that_are_no_good_are_left_out_and_said(folder, tmp_path):
    run = tmp_path / "damaged"
    run.mkdir()
    lines = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 10**400},
        {"step": -1},
        {"step": 3, "loss": float("nan")},
        [],
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for name in ("recipe.yaml", "versions.json", "bad_files.jsonl", "evaluation.json"):
        (run / name).write_bytes(b'{"a": "\xff')
    (run / "validation").mkdir()
    (run / "validation/final-00.mp4").write_bytes(b"no video")
    write_report([run], run / "report.html")
    page = Page(run / "report.html")
    assert page.data["runs"][0]["series"]["loss"] == {"steps": [1, 3], "values": [1.0, None], "block": 1}
    assert "metrics.jsonl: lines that name no step are left out, 3 of them" in page.notes
    for name in ("recipe.yaml", "versions.json", "bad_files.jsonl", "evaluation.json", "final-00.mp4"):
        assert any(f"damaged/{name}" in note or f"validation/{name}" in note for note in page.notes), name


def test_videos_that_are_too_large_leave_first_and_last(folder):
    run = read_run(folder / "runs/bridge", "bridge")
    sizes = {path.name: path.stat().st_size for path in (run.folder / "validation").iterdir()}
    room = sum(sizes.values()) - 1
    rows, notes = collect_rows([run], room)
    assert [item.label for item in rows[0].samples["bridge"]] == ["update 2", "at the end, update 6"]
    assert "bridge: left out, for a file below 50 MB: samples of updates 4" in notes
    rows, notes = collect_rows([run], sizes["final-00.mp4"])
    assert [[item.label for item in row.samples["bridge"]] for row in rows] == [["at the end, update 6"]]
    assert "bridge: left out, for a file below 50 MB: the last 1 rows of the validation" in notes


def test_long_curves_are_means_of_blocks():
    assert thinned({3: 1.0, 1: 2.0}, most=2) == ([1, 3], [2.0, 1.0], 1)
    assert thinned({1: 1.0, 2: 3.0, 3: float("nan")}, most=2) == ([2, 3], [2.0, None], 2)


def test_what_is_no_run(folder, tmp_path, capsys):
    run = str(folder / "runs/bridge")
    for arguments, message in (
        (["--run", str(tmp_path / "nowhere")], "nowhere: no such folder"),
        (["--run", str(folder / "first.png")], "first.png: it is no folder"),
        (["--run", str(folder / "clips")], "clips: is no run's folder: neither metrics.jsonl nor recipe.yaml is in"),
        (["--run", run, "--compare", f"{run}/../bridge"], "--compare: the same run twice"),
        (["--run", run, "--compare", *map(str, range(6))], "--compare: 7 runs, of 6 at most"),
    ):
        assert main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["report", "--run", run, "--output", str(tmp_path / "file/page.html")]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert main(["report", "--run", run, "--output", str(tmp_path)]) == 2
    assert f"error: --output {tmp_path}: is a folder; name a file" in capsys.readouterr().err


@pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason=browser.MISSING)
def test_a_browser_draws_it_plays_it_and_fetches_nothing(both, tmp_path):
    hostile = tmp_path / "hostile.html"
    injected = f"<img src='{both.with_name('first.png').as_uri()}'><script>document.title = 'taken'</script>"
    hostile.write_text(both.read_text().replace("<main>", f"<main>{injected}"))
    with browser.browser(tmp_path / "profile") as page:
        for width in (1200, 400):
            page.open(both, width)
            videos = "[...document.querySelectorAll('video')]"
            page.run(f"{videos}.at(-1).scrollIntoView()")
            page.wait_for(f"return {videos}.every((video) => video.readyState >= 2)")
            page.wait_for(f"return {videos}.at(-1).currentTime > 0")
            assert page.run(f"return {videos}.map((video) => video.error)") == [None] * 9
            assert page.run("return [...document.images].every((image) => image.naturalWidth > 0)")
            assert page.run("return document.documentElement.scrollWidth") <= width
        page.run("document.getElementById('play').click()")
        page.wait_for(f"return {videos}.every((video) => video.paused)")
        assert page.run("return document.querySelectorAll('#charts svg').length") == 6 + 20
        label = page.run("return document.querySelector('#charts svg').getAttribute('aria-label')")
        assert label == "Loss: bridge, 6 points, from 1 to 0.1667; twin, 4 points, from 1 to 9"
        page.run("document.querySelector('#charts svg').onkeydown(new KeyboardEvent('keydown', {key: 'ArrowLeft'}))")
        assert "at 6: bridge 0.1667 (" in page.run("return document.querySelector('#charts output').textContent")
        paths = "return document.querySelectorAll('#charts svg path:not(.raw)').length"
        assert page.run(paths) == 2 * 26
        page.run("document.querySelector('#legend button').click()")
        assert page.run(paths) == 26
        assert page.messages() == []
        fetched = [address for address in page.requested() if not address.startswith("data:")]
        assert fetched == [both.as_uri()] * 2

        page.open(hostile)
        said = page.messages()
        assert len(said) == 2
        assert all("Content Security Policy" in line for line in said)
        assert page.run("return document.title") != "taken"


def test_evaluations_of_other_clips_are_said():
    runs = [
        RunRecord(Path(name), name, protocol={"count": count, "seed": name})
        for name, count in zip("abc", "225", strict=True)
    ]
    note_other_clips(runs)
    assert [run.notes for run in runs[:2]] == [[], []]
    assert runs[2].notes == [f"its evaluation is of other clips than {name}'s: another count" for name in "ab"]
