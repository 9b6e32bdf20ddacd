"""Runs on precomputed latents and embeddings are the live runs: real clips, tiny real models."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import T5EncoderModel

from framebridge_plugin.backbones.cogvideox.adapter import CogVideoXAdapter
from framebridge_plugin.data.permutation import KeyedPermutation
from framebridge_plugin.randomness import derive_seed
from framebridge_plugin.training import CogVideoXBridgeSpecification
from framebridge_plugin.training.draws import drops_caption
from framebridge_plugin.training.precomputation.store import LatentStore, Manifest, read_manifest, write_shard
from framebridge_plugin.training.precomputation.stream import StoredCaptions, StoredStream
from framebridge_plugin.training.specification import BridgeSpecification
from tests.tiny_models import CLASS_NAMES, make_clips, make_tiny_latte, moving_square, write_video
from tests.training.run_results import CONSTANT_RATE, assert_same_weights, heldout, losses, metrics, succeeded

SMALL = ("framebridge.data.height=32", "framebridge.data.width=32")
FOLDERS = {"latents": "clips", "captions": "captions"}
LATTE_KINDS = ("bridge_neural_prior", "neural_prior")


@pytest.fixture(scope="module")
def clips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of four captions, one of them empty, and the third a file that is no video."""
    folder = make_clips(tmp_path_factory.mktemp("clips") / "clips", count=6, frames=12)
    with (folder / "metadata.csv").open("w", newline="") as file:
        captions = ["a red square", "a blue square", "a broken file", "", "a red square", "a green square"]
        rows = [(f"{number}.mp4", caption) for number, caption in enumerate(captions)]
        csv.writer(file).writerows([("file_name", "caption"), *rows])
    (folder / "2.mp4").write_text("This is no video.\n")
    return folder


@pytest.fixture(scope="module")
def latte_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips for each of three classes, and the models of two stages."""
    folder = tmp_path_factory.mktemp("latte")
    for label, name in enumerate(CLASS_NAMES[:3]):
        (folder / "clips" / name).mkdir(parents=True)
        for number in range(2):
            write_video(folder / f"clips/{name}/{number}.mp4", moving_square(2 * label + number, 8, 64, 64))
    for kind in LATTE_KINDS:
        make_tiny_latte(folder / kind, kind)
    return folder


def bad_files(folder: Path) -> list[tuple[str, str]]:
    entries = [json.loads(line) for line in (folder / "bad_files.jsonl").read_text().splitlines()]
    return [(Path(entry["path"]).name, entry["kind"]) for entry in entries]


def refuse_to_load(*args: object, **kwargs: object) -> None:
    raise AssertionError("the run has no use for this model")


def test_cogvideox_on_a_store_is_the_live_run(train, precompute, tmp_path, monkeypatch):
    # A constant rate, so that a run of two updates is the beginning of a longer one.
    # Half of the captions are dropped; ten samples go into the second epoch of six.
    options = ("framebridge.caption_dropout=0.5", "optimization.train_steps=5", *CONSTANT_RATE, *SMALL)
    assert succeeded(train(*options, output="live"))
    # Captions are dropped when they are read, whatever the store is made with.
    assert succeeded(precompute("--variants=2", "--shard-size=4", "framebridge.caption_dropout=0.9", *SMALL))

    for name in ("load_condition_models", "load_latent_models"):
        monkeypatch.setattr(CogVideoXBridgeSpecification, name, refuse_to_load)
    stored = (*options, f"framebridge.precomputed={tmp_path / 'store'}")
    assert succeeded(train(*stored, "dataloader.dataloader_num_workers=1", output="stored"))
    assert losses(tmp_path / "stored") == losses(tmp_path / "live")
    assert len(losses(tmp_path / "stored")) == 5
    assert_same_weights(tmp_path / "stored/model", tmp_path / "live/model")
    indexes = [json.loads((tmp_path / run / "model/model_index.json").read_text()) for run in ("live", "stored")]
    assert [index["fps"] for index in indexes] == [12.0, 12.0]
    assert bad_files(tmp_path / "stored") == bad_files(tmp_path / "live") == [("2.mp4", "not_video")]
    assert metrics(tmp_path / "stored")[-1]["bad_files"] == metrics(tmp_path / "live")[-1]["bad_files"] == 1

    # As an earlier release wrote it, which knew of no parts.
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())
    old = {name: value for name, value in manifest.items() if name not in ("holds", "caption_dtype")} | {"format": 1}
    (tmp_path / "store/manifest.json").write_text(json.dumps(old))
    assert succeeded(train(*stored, "optimization.train_steps=2", output="parts"))
    assert succeeded(train(*stored, "checkpoints.resume_from_checkpoint=latest", output="parts"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "live")
    assert_same_weights(tmp_path / "parts/model", tmp_path / "live/model")


def test_what_a_store_lacks_is_encoded_as_the_run_goes(train, precompute, tmp_path, monkeypatch):
    options = ("framebridge.caption_dropout=0.5", "optimization.train_steps=2", *CONSTANT_RATE, *SMALL)
    assert succeeded(train(*options, output="live"))
    kept = f"framebridge.caption_cache_dir={tmp_path / 'kept'}"
    # Captions are the same whatever the clips are, and clips whatever embeds the captions.
    for part, unused, elsewhere in (
        ("captions", "load_condition_models", "precision.vae_dtype=bf16"),
        ("latents", "load_vae", "precision.text_encoder_dtype=bf16"),
    ):
        assert succeeded(precompute(f"--only={part}", elsewhere, kept, *SMALL, store=part))
        assert {path.name for path in (tmp_path / part).iterdir() if path.is_dir()} == {FOLDERS[part]}
        with monkeypatch.context() as patch:
            patch.setattr(CogVideoXAdapter, unused, refuse_to_load)
            for until in (1, 2):  # the second resumes the first
                steps = f"optimization.train_steps={until}"
                stored = f"framebridge.precomputed={tmp_path / part}"
                assert succeeded(train(*options, stored, steps, output=f"on-{part}"))
        assert losses(tmp_path / f"on-{part}") == losses(tmp_path / "live")
        assert_same_weights(tmp_path / f"on-{part}/model", tmp_path / "live/model")
    # The other part is added.
    assert succeeded(precompute("--only=latents", *SMALL, store="captions"))
    with monkeypatch.context() as patch:
        patch.setattr(T5EncoderModel, "forward", refuse_to_load)
        assert succeeded(precompute(*SMALL, kept, store="whole"))
    there, whole = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.safetensors")}
        for name in ("captions", "whole")
    )
    assert there == whole
    assert read_manifest(tmp_path / "captions") == read_manifest(tmp_path / "whole")


def test_bridge_and_diffusion_baseline_share_a_store(train, precompute, tmp_path, monkeypatch):
    options, baseline = ("optimization.train_steps=2", *SMALL), "framebridge.objective=diffusion"
    assert succeeded(train(*options, baseline, output="live"))
    assert succeeded(precompute(*SMALL))
    with monkeypatch.context() as patch:
        for name in ("load_condition_models", "load_vae"):
            patch.setattr(CogVideoXAdapter, name, refuse_to_load)
        assert succeeded(train(*options, baseline, f"framebridge.precomputed={tmp_path / 'store'}", output="stored"))
    assert losses(tmp_path / "stored") == losses(tmp_path / "live")

    assert succeeded(precompute(*SMALL, baseline, store="of-baseline"))
    result = train(*options, f"framebridge.precomputed={tmp_path / 'of-baseline'}", output="refused")
    assert result.returncode == 2
    assert "it was made for the diffusion baseline, without the noisy prior of this bridge" in result.stderr
    # A bridge without pixel noise has none.
    clean = ("framebridge.image_noise=false", "framebridge.prior_noise=false")
    assert succeeded(precompute(*SMALL, *clean, baseline, store="clean"))
    assert succeeded(train(*options, *clean, output="clean-live"))
    assert succeeded(train(*options, *clean, f"framebridge.precomputed={tmp_path / 'clean'}", output="clean-stored"))
    assert losses(tmp_path / "clean-stored") == losses(tmp_path / "clean-live")


@pytest.mark.parametrize(("dtype", "largest", "root_mean_square"), [("fp8", 2**-4, 0.03), ("bf16", 2**-8, 0.003)])
def test_captions_in_fewer_bits_are_nearly_the_same(train, precompute, tmp_path, dtype, largest, root_mean_square):
    names, only = ("exact", "store"), "--only=captions"
    assert succeeded(precompute(*SMALL, only, store="exact"))
    assert succeeded(precompute(*SMALL, only, f"--caption-dtype={dtype}"))
    stores = [LatentStore(tmp_path / name, read_manifest(tmp_path / name).fingerprint) for name in names]
    for number in range(stores[0].manifest.captions):
        exact, stored = (store.caption(number)["encoder_hidden_states"].float() for store in stores)
        # Numbers of fp8 below its smallest normal one have a step of their own.
        step = exact.abs().amax(-1, keepdim=True) / 448 * 2**-10
        assert ((stored - exact).abs() <= largest * exact.abs() + step).all()
        assert (stored - exact).square().mean().sqrt() < root_mean_square * exact.square().mean().sqrt()
    for name in names:
        stored = f"framebridge.precomputed={tmp_path / name}"
        assert succeeded(train(stored, "optimization.train_steps=1", *SMALL, output=f"on-{name}"))
    assert losses(tmp_path / "on-store") == pytest.approx(losses(tmp_path / "on-exact"), rel=1e-3)
    assert losses(tmp_path / "on-store") != losses(tmp_path / "on-exact")
    resumed = train(f"framebridge.precomputed={tmp_path / 'exact'}", *SMALL, output="on-store")
    assert resumed.returncode == 1
    assert f"it was trained with stored captions '{dtype}'; " in resumed.stderr
    # The other way round, as if such captions were added to the run's own store.
    resumed = train(f"framebridge.precomputed={tmp_path / 'store'}", *SMALL, output="on-exact")
    assert resumed.returncode == 1
    assert "it was trained with captions as the text encoder gave them; resume with " in resumed.stderr
    assert "recipe.yaml (if its store has grown since, with one without captions in fewer bits), or" in resumed.stderr
    other = train(f"framebridge.precomputed={tmp_path / 'store'}", *SMALL, "precision.text_encoder_dtype=bf16")
    assert other.returncode == 2
    assert "its captions are not those of this run: precision.text_encoder_dtype is torch.float32" in other.stderr
    again = precompute(*SMALL, f"--caption-dtype={'bf16' if dtype == 'fp8' else 'fp8'}")
    assert again.returncode == 2
    assert f"has captions in {dtype}; leave it out" in again.stderr


def test_latte_bridge_and_neural_prior_share_a_store(
    train, precompute, recipe_file, latte_inputs, tmp_path, monkeypatch
):
    recipe = yaml.safe_load(recipe_file.read_text())
    recipe["model"] = {"model_name": "latte_bridge"}
    recipe["framebridge"] = {
        "data": {"class_root": str(latte_inputs / "clips"), "num_frames": 4, "height": 64, "width": 64},
        "caption_dropout": 0.5,
    }
    del recipe["precision"]["text_encoder_dtype"]
    recipe_file.write_text(yaml.safe_dump(recipe))
    model = f"model.pretrained_model_name_or_path={latte_inputs}"
    assert succeeded(precompute("--variants=2", "--shard-size=4", f"{model}/bridge_neural_prior"))
    for kind in LATTE_KINDS:
        name = "latte_neural_prior" if kind == "neural_prior" else "latte_bridge"
        chosen = (f"model.model_name={name}", f"{model}/{kind}")
        assert succeeded(train(*chosen, output=f"{kind}-live"))
        with monkeypatch.context() as patch:
            patch.setattr(BridgeSpecification, "load_latent_models", refuse_to_load)
            assert succeeded(train(*chosen, f"framebridge.precomputed={tmp_path / 'store'}", output=f"{kind}-stored"))
        for run in ("live", "stored"):
            assert json.loads((tmp_path / f"{kind}-{run}/model/model_index.json").read_text())["fps"] == 8.0
        assert losses(tmp_path / f"{kind}-stored") == losses(tmp_path / f"{kind}-live")
        assert_same_weights(tmp_path / f"{kind}-stored/model", tmp_path / f"{kind}-live/model")


def test_validation_loads_what_the_run_itself_does_not_need(train, precompute, validation_file, tmp_path, caplog):
    assert succeeded(precompute(*SMALL))
    clips = make_clips(tmp_path / "heldout", count=2, frames=9, size=32, captions=("held out",))
    (clips / "0.mp4").write_text("no video")
    (clips / "metadata.csv").write_text("file_name,caption\n0.mp4,first\n1.mp4,held out\n")
    measuring = (f"validation.heldout.data_root={clips}", "validation.heldout.clips=1")
    shown = f"validation.validation_dataset_file={validation_file}"
    options = (shown, *measuring, "optimization.train_steps=1", *SMALL)
    assert succeeded(train(*options, output="live"))
    caplog.clear()
    assert succeeded(train(f"framebridge.precomputed={tmp_path / 'store'}", *options))
    assert (tmp_path / "run/validation/final-00.mp4").is_file()
    assert heldout(tmp_path / "run") == heldout(tmp_path / "live")
    assert caplog.text.count("heldout/0.mp4: not a video file") == 1


SEED, ROWS, VARIANTS = 3, 7, 2


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    """A store whose latents say which variant and row they are of, and whose embeddings the row of their caption."""
    manifest = Manifest(
        rows=ROWS, variants=VARIANTS, captions=ROWS + 1, empty_caption=ROWS, shard_size=3, fingerprint={"seed": SEED}
    )
    manifest.write(tmp_path)
    for shard in manifest.caption_shards():
        rows = [{"row": torch.tensor([number])} for number in range(shard.first, shard.first + shard.count)]
        write_shard(tmp_path / shard.name, rows)
    for shard in manifest.clip_shards():
        places = [divmod(position, ROWS) for position in range(shard.first, shard.first + shard.count)]
        numbers = [KeyedPermutation(ROWS, SEED, variant)[offset] for variant, offset in places]
        pairs = zip(places, numbers, strict=True)
        rows = [{"latents": torch.tensor([[variant, row]], dtype=torch.bfloat16)} for (variant, _), row in pairs]
        write_shard(tmp_path / shard.name, rows, numbers)
    return LatentStore(tmp_path, {"seed": SEED})


def read(store: LatentStore, count: int, dropout: float = 0.0, workers: int = 0, **place: int) -> list[tuple]:
    place = {"rank": 0, "world_size": 1, "start": 0, **place}
    captions = StoredCaptions(store, dropout, lambda own, empty: empty)
    stream = StoredStream(store, SEED, captions, **place)
    samples = iter(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers))
    read = [next(samples) for _ in range(count)]
    return [(*map(int, sample["latents"]["latents"][0]), int(sample["conditions"]["row"])) for sample in read]


def test_epochs_have_their_own_order_and_repeat_the_variants(store):
    samples = read(store, 5 * ROWS)
    for epoch in range(5):
        order = [KeyedPermutation(ROWS, SEED, epoch)[offset] for offset in range(ROWS)]
        assert samples[epoch * ROWS : (epoch + 1) * ROWS] == [(epoch % VARIANTS, row, row) for row in order]


def test_captions_are_dropped_anew_in_every_epoch(store):
    samples = read(store, 6 * ROWS, dropout=0.5)
    dropped = {divmod(number, ROWS)[0]: set() for number in range(6 * ROWS)}
    for number, (_, row, caption) in enumerate(samples):
        epoch = number // ROWS
        drops = drops_caption(0.5, derive_seed(SEED, epoch, row))
        assert caption == (ROWS if drops else row)
        dropped[epoch] |= {row} if drops else set()
    assert len({frozenset(dropped[epoch]) for epoch in range(0, 6, VARIANTS)}) > 1  # all of one variant


def test_ranks_workers_and_resumed_runs_share_one_sequence(store):
    samples = read(store, 24, dropout=0.5)
    assert read(store, 24, dropout=0.5, workers=2) == samples
    assert read(store, 20, dropout=0.5, start=4) == samples[4:]
    for rank in range(3):
        assert read(store, 6, dropout=0.5, rank=rank, world_size=3, start=5) == samples[5 + rank : 23 : 3]


def test_rows_that_are_not_alike_are_refused(tmp_path):
    rows = [{"latents": torch.zeros(1, 2)}, {"latents": torch.zeros(1, 3)}]
    with pytest.raises(ValueError, match="the rows are not alike"):
        write_shard(tmp_path / "shard.safetensors", rows)
    assert list(tmp_path.iterdir()) == []
