from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from framebridge_plugin.data import index_dataset, load_dataset_config
from framebridge_plugin.data.validation_rows import read_validation_rows
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.recipe import load_recipe, resolve_recipe
from tests.cogvideox_files import write_webvid
from tests.recipe.helpers import problems_of, write_class_folders


def test_webvid_layout(minimal, tmp_path):
    table, videos = write_webvid(tmp_path / "webvid")
    ours = [
        "framebridge.data.data_root=null",
        f"framebridge.data.csv={table}",
        f"framebridge.data.video_root={videos}",
    ]
    entry = load_recipe(minimal, ours).dataset_config()["datasets"][0]
    assert (entry["csv"], entry["video_root"]) == (str(table), str(videos))
    table.write_text("id,caption\n1,x\n")
    assert "has no column videoid and no name; its columns are id, caption" in problems_of(minimal, *ours)[0]
    table.write_text("")
    (videos / "1.mp4").unlink()
    assert ["is empty" in problem for problem in problems_of(minimal, *ours)] == [True, True]


def test_webvid_in_parts(minimal, tmp_path):
    table, videos = write_webvid(tmp_path / "webvid")
    parts = tmp_path / "parts"
    parts.mkdir()
    table.rename(parts / "part_1.csv")
    section = "framebridge.data"
    ours = [f"{section}.data_root=null", f"{section}.video_root={videos}", f"{section}.refresh_index=true"]
    for given in (parts, parts / "part_*.csv"):
        (entry,) = load_recipe(minimal, [*ours, f"{section}.csv={given}"]).dataset_config()["datasets"]
        assert (entry["csv"], entry["refresh_index"]) == (str(given), True)
        assert len(index_dataset(entry)) == 1
    (problem,) = problems_of(minimal, *ours, f"{section}.csv={parts}/q_*.csv")
    assert f"{section}.csv: no such file: {parts}/q_*.csv" in problem
    (problem,) = problems_of(minimal, f"{section}.refresh_index=true")
    assert "refresh_index: has an effect with csv only" in problem


def test_folds_of_ucf101(minimal, tmp_path):
    root, lists = tmp_path / "UCF-101", tmp_path / "lists"
    (root / "YoYo").mkdir(parents=True)
    lists.mkdir()
    (root / "YoYo" / "v_YoYo_g01_c01.avi").touch()
    (lists / "testlist02.txt").write_text("YoYo/v_YoYo_g01_c01.avi\n")
    section = "framebridge.data"
    ours = [f"{section}.data_root=null", f"{section}.class_root={root}"]
    fold = [f"{section}.split=test", f"{section}.fold=2"]
    (entry,) = load_recipe(minimal, ours).dataset_config()["datasets"]
    assert "split" not in entry
    (entry,) = load_recipe(minimal, [*ours, *fold, f"{section}.splits_dir={lists}"]).dataset_config()["datasets"]
    assert (entry["split"], entry["fold"], entry["splits_dir"]) == ("test", 2, str(lists))
    assert [caption for _, caption in index_dataset(entry)] == ["YoYo"]
    for overrides, message in (
        ([*ours, *fold], f"no such file: {tmp_path}/ucfTrainTestlist/testlist02.txt"),
        ([*ours, fold[1]], "fold: has no effect with split all"),
        ([*ours, f"{section}.splits_dir={lists}"], "splits_dir: has no effect with split all"),
        ([fold[0]], "split: has an effect with class_root only"),
        ([*ours, f"{section}.fold=4"], "fold: should be 1, 2 or 3, not 4"),
    ):
        (problem,) = problems_of(minimal, *overrides)
        assert message in problem


def test_heldout_clips(minimal, tmp_path):
    """They are named like the data, or are the other half of its fold."""
    root, lists = write_class_folders(tmp_path / "UCF-101", ["YoYo"]), tmp_path / "lists"
    lists.mkdir()
    for half in ("train", "test"):
        (lists / f"{half}list02.txt").write_text("YoYo/v_g01_c01.avi\n")
    ours = ["framebridge.data.data_root=null", f"framebridge.data.class_root={root}"]
    fold = ["framebridge.data.split=train", "framebridge.data.fold=2", f"framebridge.data.splits_dir={lists}"]
    assert "heldout" not in load_recipe(minimal, ours).dataset_config()
    found = load_recipe(minimal, [*ours, *fold, "validation.heldout.clips=8"]).dataset_config()["heldout"]
    half = {"class_root": str(root), "split": "test", "fold": 2, "splits_dir": str(lists)}
    assert found == {"clips": 8, **half}
    other = f"validation.heldout.class_root={root}"
    assert load_recipe(minimal, [*ours, other]).dataset_config()["heldout"] == {"clips": 16, "class_root": str(root)}
    (lists / "testlist02.txt").unlink()
    for overrides, message in (
        (["validation.heldout.clips=8"], "validation.heldout: names no clips, and the data is no half of a fold"),
        (["validation.heldout.split=test"], "heldout.split: has no effect without data_root, class_root or csv"),
        ([*ours, other, "validation.heldout.fold=2"], "validation.heldout.fold: has no effect with split all"),
        ([f"validation.heldout.data_root={tmp_path}/no"], "validation.heldout.data_root: no such folder"),
        ([*ours, *fold, "validation.heldout={}"], f"validation.heldout: no such file: {lists}/testlist02.txt"),
    ):
        assert message in problems_of(minimal, *overrides)[0]


def test_data_on_the_hub(minimal):
    (entry,) = load_recipe(minimal, ["framebridge.data.data_root=someone/clips"]).dataset_config()["datasets"]
    assert entry["data_root"] == "someone/clips"


def test_dataset_json(minimal, tmp_path):
    table = tmp_path / "data.json"
    use_table = ["framebridge.data=null", f"dataset.dataset_config={table}"]
    entry = {"data_root": "clips", "dataset_type": "video", "video_resolution_buckets": [[17, 64, 96]]}
    table.write_text(json.dumps({"datasets": [entry]}))
    assert load_recipe(minimal, use_table).dataset_config()["datasets"] == [entry]
    assert "named twice" in problems_of(minimal, f"dataset.dataset_config={table}")[0]
    for content, message in (
        (json.dumps({"datasets": [entry | {"video_resolution_buckets": [[16, 64, 96]]}]}), "8 k + 1"),
        (json.dumps({"datasets": []}), "no data sets in it"),
        (json.dumps({"datasets": [entry | {"frame_strid": 3}]}), "did you mean 'frame_stride'"),
        ("[]", "no data sets in it"),
        ('{"datasets', "is no valid JSON"),
        ('{"datasets": [], "datasets": []}', "the key 'datasets' stands twice in one object"),
        ('{"datasets": ' + 60 * "[" + 60 * "]" + "}", "it is nested too deeply"),
    ):
        table.write_text(content)
        assert message in problems_of(minimal, *use_table)[0]
    table.unlink()
    assert "data.json cannot be read: No such file" in problems_of(minimal, *use_table)[0]


def test_decoders(minimal):
    section = "framebridge.data"
    ours = [
        f"{section}.decoder=pyav",
        f"{section}.strict=true",
        f"{section}.resize=decoder",
        f"{section}.isolated=true",
    ]
    entry = load_recipe(minimal, ours).dataset_config()["datasets"][0]
    assert [entry[name] for name in ("decoder", "strict", "resize", "isolated")] == ["pyav", True, "decoder", True]
    problems = problems_of(minimal, *ours, f"{section}.decoder=decord")
    assert [problem.split(": ")[1] for problem in problems] == [f"{section}.resize", f"{section}.strict"]
    assert all("does not go with decoder decord" in problem for problem in problems)
    load_recipe(minimal, [f"{section}.decoder=decord", f"{section}.isolated=true"])
    (problem,) = problems_of(minimal, f"{section}.decoder=torchcodec")
    assert "should be 'pyav' or 'decord', not 'torchcodec'" in problem


def test_bad_files(minimal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = "framebridge.bad_files"
    (tmp_path / "folder.jsonl").mkdir()
    quarantine = [f"{section}.policy=quarantine", f"{section}.quarantine_file=lists/bad.jsonl"]
    recipe = load_recipe(minimal, [*quarantine, f"{section}.max_share=0.1"])
    assert recipe.dataset_config()["bad_files"] == {
        "policy": "quarantine",
        "quarantine_file": str(tmp_path / "lists/bad.jsonl"),
        "max_share": 0.1,
        "max_in_a_row": 16,
    }
    os.mkfifo(tmp_path / "pipe.jsonl")
    for overrides, message in (
        (quarantine[:1], "quarantine_file: policy quarantine needs it"),
        ([quarantine[0], f"{section}.quarantine_file={tmp_path}/pipe.jsonl"], "is no file"),
        (quarantine[1:], "quarantine_file: has no effect with policy skip"),
        ([quarantine[0], f"{section}.quarantine_file=folder.jsonl"], "is no file"),
        ([f"{section}.policy=ignore"], "policy: should be 'raise', 'skip' or 'quarantine', not 'ignore'"),
        ([f"{section}.policy=raise", f"{section}.max_in_a_row=3"], "max_in_a_row: has no effect with policy raise"),
        ([f"{section}.max_share=1.5"], "max_share: should be less than or equal to 1"),
        ([f"{section}.max_in_a_row=0"], "max_in_a_row: should be greater than or equal to 1"),
    ):
        (problem,) = problems_of(minimal, *overrides)
        assert message in problem


def test_bad_files_in_the_dataset_json(minimal, tmp_path):
    table = tmp_path / "data.json"
    use_table = ["framebridge.data=null", f"dataset.dataset_config={table}"]
    content = load_recipe(minimal).dataset_config() | {"bad_files": {"max_in_a_row": 3}}
    table.write_text(json.dumps(content))
    assert load_recipe(minimal, use_table).dataset_config() == content
    (problem,) = problems_of(minimal, *use_table, "framebridge.bad_files.policy=raise")
    assert "framebridge.bad_files: " in problem
    assert "data.json has bad_files of its own" in problem
    del content["bad_files"]
    table.write_text(json.dumps(content))
    recipe = load_recipe(minimal, [*use_table, "framebridge.bad_files.max_share=0"])
    assert recipe.dataset_config()["bad_files"] == {"policy": "skip", "max_share": 0.0, "max_in_a_row": 16}


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A working directory with a picture, and half a picture."""
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((64, 64), 50).save("cat.png")
    Path("half.png").write_bytes(Path("cat.png").read_bytes()[:1000])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("v.csv", "caption,image_path\na cat,cat.png\na dog,dog.png\n", "row 2: image_path: no such file: dog.png"),
        (
            "v.csv",
            "caption,image_path\na cat,cat.png\na cat,half.png\n",
            "row 2: image_path: half.png: cannot be read",
        ),
        ("v.csv", "caption,image_path,video_path\na cat,cat.png,x.mp4\n", "row 1: video_path: no such file: x.mp4"),
        ("v.csv", "prompt,image_path\na cat,cat.png\n", "row 1: lacks caption"),
        ("v.csv", "caption,image_path\na cat,\n", "row 1: lacks caption, or image_path"),
        ("v.csv", "caption,image_path\n", "has no rows"),
        ("v.csv", "", "is empty"),
        ("v.csv", b"\xff\xfe", "v.csv:1 is no readable CSV table in UTF-8: it is in UTF-16"),
        ("v.json", '{"data": [{"caption": "a cat", "image_path": "dog.png"}]}', "no such file: dog.png"),
        ("v.json", '{"rows": []}', "a list 'data'"),
        ("v.json", "[", "no valid JSON"),
        ("v.json", r'{"data": [{"caption": "a \ud83d", "image_path": "cat.png"}]}', "half a surrogate pair"),
        (
            "v.json",
            '{"data": [{"caption": 2024, "image_path": "cat.png"}]}',
            "row 1: caption should be text, not 2024",
        ),
        ("v.json", '{"data": [{"Caption": "a", "image_path": "cat.png"}]}', "calls a column 'Caption'"),
        ("v.csv", "caption;image_path\na;cat.png\n", "v.csv:1 has semicolons"),
        ("v.csv", "caption,image_path,Height\na,cat.png,64\n", "v.csv:1 calls a column 'Height'; rename it to height"),
        ("v.csv", 'caption,image_path\n"a,cat.png\nb,cat.png\n', "v.csv:2 .* a quote opens a cell"),
        ("v.parquet", "no", "v.parquet is no readable parquet file"),
        ("v.arrow", "no", "v.arrow is no readable arrow file"),
    ],
)
def test_validation_file(minimal, pictures, name, content, message):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (problem,) = problems_of(minimal, f"validation.validation_dataset_file={name}")
    assert re.search(message, problem)


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("num_frames", 16, "num_frames: the VAE returns only 8 k + 1 frames, not 16"),
        ("num_frames", -7, "num_frames should be a whole number, 1 or more, not -7"),
        ("num_frames", 17.0, "num_frames should be a whole number, 1 or more, not 17.0"),
        ("height", 100, "height: should be a multiple of 16"),
        ("width", "wide", "width should be a whole number, 1 or more, not 'wide'"),
        ("num_inference_steps", 0, "num_inference_steps should be a whole number, 1 to 1000, not 0"),
        ("num_inference_steps", 1001, "not 1001"),
        ("num_inference_steps", True, "1 to 1000, not"),
        ("guidance_scale", -1, "guidance_scale should be a number of 0 or more, not -1"),
        ("guidance_scale", "inf", "guidance_scale should be a number of 0 or more"),
        ("export_fps", "fast", "export_fps should be a whole number, 1 or more"),
    ],
)
def test_validation_rows_that_cannot_be_sampled(minimal, pictures, column, value, message):
    Path("v.csv").write_text(f"caption,image_path,{column}\na cat,cat.png,\na cat,cat.png,{value}\n")
    row = {"caption": "a cat", "image_path": "cat.png"}
    Path("v.json").write_text(json.dumps({"data": [row, row | {column: value}]}))
    for name in ("v.csv", "v.json"):
        (problem,) = problems_of(minimal, f"validation.validation_dataset_file={name}")
        assert f"validation.validation_dataset_file: {name}: row 2: " in problem
        assert message in problem


def test_validation_rows_that_can_be_sampled(minimal, pictures):
    Path("v.csv").write_text(
        "caption,image_path,video_path,num_frames,height,width,num_inference_steps,guidance_scale,export_fps\n"
        "a cat,cat.png,,17,64,96,50,6.0,8\n"
        "2024,,cat.png,1,16,16,1,0,1\n"
        "a cat,http://localhost/cat.png,,9,16,16,1000,1e1,1\n"
    )
    load_recipe(minimal, ["validation.validation_dataset_file=v.csv"])


def test_the_check_and_the_loader_say_the_same(minimal, tmp_path):
    """What is wrong with a text is no matter of files that are still to come: a dry run ends with it."""
    cases = Path(__file__).parents[1] / "data/cases"
    table, videos = cases / "csv_open_quote/t.csv", cases / "csv_open_quote/v"
    no_root = "framebridge.data.data_root=null"
    shutil.copytree(cases / "ucf_bom", tmp_path / "ucf")
    (tmp_path / "ucf/ucfTrainTestlist/trainlist01.txt").write_bytes(b"\xff\xfeA")
    pairs = tmp_path / "pairs"
    shutil.copytree(cases / "upper_case", pairs)
    (pairs / "a.txt").write_bytes(b"\xe9t\xe9")
    for entry in (
        {"csv": str(table), "video_root": str(videos)},
        {"data_root": str(cases / "surrogate")},
        {"data_root": str(pairs)},
        {"class_root": str(tmp_path / "ucf/UCF-101"), "split": "train"},
    ):
        with pytest.raises(FrameBridgeError) as caught:
            index_dataset(entry)
        overrides = [no_root, *(f"framebridge.data.{key}={value}" for key, value in entry.items())]
        with pytest.raises(UsageError) as refused:
            resolve_recipe(minimal, overrides)
        assert str(refused.value).endswith(f": {caught.value}")
        config = tmp_path / "data.json"
        config.write_text(json.dumps({"datasets": [entry | {"video_resolution_buckets": [[17, 64, 96]]}]}))
        with pytest.raises(UsageError) as refused:
            resolve_recipe(minimal, ["framebridge.data=null", f"dataset.dataset_config={config}"])
        assert str(refused.value).endswith(f": {caught.value}")


def test_files_with_a_byte_order_mark(minimal, tmp_path, pictures):
    recipe = tmp_path / "bom.yaml"
    recipe.write_bytes(b"\xef\xbb\xbf" + minimal.read_bytes())
    config = tmp_path / "data.json"
    config.write_text(json.dumps(load_recipe(minimal).dataset_config()), encoding="utf-8-sig")
    Path("v.CSV").write_text("caption,image_path\nnull,cat.png\n,\n", encoding="utf-8-sig")
    overrides = [
        "framebridge.data=null",
        f"dataset.dataset_config={config}",
        "validation.validation_dataset_file=v.CSV",
    ]
    content = load_recipe(recipe, overrides).dataset_config()
    assert content == load_recipe(minimal).dataset_config()
    assert [caption for _, caption in load_dataset_config(config)[0][0]] == [
        caption for _, caption in index_dataset(content["datasets"][0])
    ]


def test_rows_of_a_validation_file_are_text(tmp_path):
    rows = [{"caption": "null", "image_path": "a.png", "height": 64}, {"caption": "NA", "image_path": "b.png"}]
    rows.append({"caption": "2024", "image_path": "1.5", "guidance_scale": 6.0})
    pq.write_table(pa.Table.from_pylist(rows, VALIDATION_SCHEMA), tmp_path / "v.parquet")
    for name, kind in (("v.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with kind(str(tmp_path / name), VALIDATION_SCHEMA) as file:
            file.write_table(pa.Table.from_pylist(rows, VALIDATION_SCHEMA))
    (tmp_path / "v.json").write_text(json.dumps({"data": rows}), encoding="utf-8-sig")
    (tmp_path / "v.csv").write_bytes(
        b"\xef\xbb\xbfcaption,image_path,height,guidance_scale\r\nnull,a.png,64,\r\nNA,b.png,,\r\n2024,1.5,,6.0\r\n,,,\r\n\r\n"
    )
    for name in ("v.csv", "v.json", "v.parquet", "v.arrow", "file.arrow"):
        assert read_validation_rows(tmp_path / name) == rows, name


VALIDATION_SCHEMA = pa.schema(
    {"caption": pa.string(), "image_path": pa.string(), "height": pa.int64(), "guidance_scale": pa.float64()}
)
