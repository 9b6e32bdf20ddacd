"""Captions are embedded once: the limit, the folder that ranks and runs share, and runs with and without it."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import T5EncoderModel

from framebridge_plugin.backbones.cogvideox.adapter import CogVideoXAdapter
from framebridge_plugin.training.captions import CaptionCache
from tests.tiny_models import CAPTIONS, make_clips
from tests.training.run_results import CONSTANT_RATE, LORA, assert_same_weights, losses, succeeded

FOUR_KIB = {"encoder_hidden_states": torch.zeros(1, 4, 256)}


def embed(cache: CaptionCache, captions: str) -> str:
    """Asks for the captions, one letter each; returns those that had to be encoded."""
    encoded = []
    for number, caption in enumerate(captions):

        def encode(caption: str = caption, number: int = number) -> dict[str, torch.Tensor]:
            encoded.append(caption)
            return {name: value + number for name, value in FOUR_KIB.items()}

        cache.conditions(caption, encode)
    return "".join(encoded)


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_came_first_is_kept_up_to_the_limit(on_disk, tmp_path):
    folder = tmp_path / "kept" if on_disk else None
    cache = CaptionCache(2.5 * 4096 / 2**30, folder)
    assert cache.room(FOUR_KIB) == 2
    assert embed(cache, "abcabcc") == "abccc"
    assert embed(CaptionCache(1.0, folder), "abc") == ("c" if on_disk else "abc")
    assert embed(CaptionCache(0.0), "aa") == "aa"
    assert embed(CaptionCache(1e300, folder), "abab") == ("" if on_disk else "ab")


def test_what_another_process_kept_is_read_and_what_is_damaged_made_anew(tmp_path):
    ours, theirs = CaptionCache(1.0, tmp_path), CaptionCache(1.0, tmp_path)
    assert embed(ours, "ab") == "ab"
    assert embed(theirs, "ba") == ""
    assert torch.equal(theirs.find("b")["encoder_hidden_states"], FOUR_KIB["encoder_hidden_states"] + 1)
    files = sorted(tmp_path.iterdir())
    assert [file.suffix for file in files] == [".safetensors"] * 2
    files[0].write_bytes(files[0].read_bytes()[:100])
    assert len(embed(theirs, "ab")) == 1
    assert embed(ours, "ab") == ""
    whole = files[0].read_bytes()
    caption = next(caption for caption in "ab" if ours._file(caption) == files[0])
    for place in [*range(len(whole) - 4096), len(whole) - 1000]:  # of the header, and of a value
        files[0].write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert ours.find(caption) is None


def test_a_run_embeds_each_caption_once_and_does_without_the_text_encoder(
    train, clips_folder, validation_file, tmp_path, monkeypatch
):
    """With the bits of a run that embeds each as it comes: four of the data, the empty one, one of the validation."""
    calls, forward = [], T5EncoderModel.forward

    def count(self, *args, **kwargs):
        calls.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(T5EncoderModel, "forward", count)
    options = (*LORA, *CONSTANT_RATE, "framebridge.caption_dropout=0.4", "optimization.train_steps=3")
    validation = (f"validation.validation_dataset_file={validation_file}", "validation.validation_steps=2")
    kept = (
        f"framebridge.caption_cache_dir={tmp_path / 'captions'}",
        "framebridge.text_encoder_device=cpu",
        *validation,
    )
    assert succeeded(train(*options, "framebridge.caption_cache_gib=0", output="anew"))
    assert len(calls) == 6
    calls.clear()
    distinct = {*CAPTIONS, "", "null"}
    assert succeeded(train(*options, *kept, output="kept"))
    assert len(calls) == len(distinct)
    (folder,) = (tmp_path / "captions").iterdir()
    assert len(list(folder.glob("*.safetensors"))) == len(distinct)

    def refuse_to_load(*args: object) -> None:
        raise AssertionError("all captions are known")

    monkeypatch.setattr(CogVideoXAdapter, "load_condition_models", refuse_to_load)
    assert succeeded(train(*options, *kept, output="again"))
    for run in ("kept", "again"):
        assert losses(tmp_path / run) == losses(tmp_path / "anew")
        assert_same_weights(tmp_path / run / "lora", tmp_path / "anew/lora")
        assert (tmp_path / run / "validation/step000002-00.mp4").is_file()
        assert (tmp_path / run / "validation/final-00.mp4").is_file()


@pytest.mark.parametrize("others", [(), ("one", "two", "three")])
def test_a_folder_without_room_for_all_captions(others, train, tmp_path):
    """Too many captions, or enough room that another run's captions take: what is not kept is embedded as it comes."""
    size = 16 * 16 * 4
    room = len({*CAPTIONS, ""}) if others else 2
    options = (*CONSTANT_RATE, "optimization.train_steps=3", "framebridge.caption_dropout=0.4")
    kept = (
        f"framebridge.caption_cache_dir={tmp_path / 'captions'}",
        f"framebridge.caption_cache_gib={(room + 0.5) * size / 2**30}",
    )
    if others:
        clips = make_clips(tmp_path / "others", frames=12, size=32, captions=others)
        assert succeeded(train(*options, *kept, f"framebridge.data.data_root={clips}", output="others"))
    assert succeeded(train(*options, "framebridge.caption_cache_gib=0", output="anew"))
    for run in ("first", "second"):  # the second knows the empty caption, and not all others
        assert succeeded(train(*options, *kept, output=run))
        assert losses(tmp_path / run) == losses(tmp_path / "anew")
    (folder,) = (tmp_path / "captions").iterdir()
    assert len(list(folder.glob("*.safetensors"))) == room


def test_the_end_of_a_run_with_a_folder_goes_on(train, tmp_path):
    """It has fewer clips left than there are captions, so that not all are embedded first."""
    folder = f"framebridge.caption_cache_dir={tmp_path / 'captions'}"
    options = (*CONSTANT_RATE, folder, "framebridge.caption_dropout=0")
    assert succeeded(train(*options, "optimization.train_steps=3", output="whole"))
    shutil.rmtree(tmp_path / "captions")
    assert succeeded(train(*options, "optimization.train_steps=2"))
    assert succeeded(train(*options, "optimization.train_steps=3"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_damaged_file_is_replaced_in_a_full_folder(tmp_path):
    cache = CaptionCache(2.5 * 4096 / 2**30, tmp_path)
    assert embed(cache, "ab") == "ab"
    (tmp_path / "left.0-1").touch()
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(b"")
    assert embed(cache, "abab") == "ab"
