"""The cards are valid Hugging Face data set cards, and say of our loaders what is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard

from framebridge_plugin.data.ucf101_classes import UCF101_CLASSES
from framebridge_plugin.data.webvid import WEBVID_COLUMNS

CARDS = sorted((Path(__file__).parents[1] / "datasets_cards").glob("*/README.md"))
SIZES = {"webvid-2m": "1M<n<10M", "ucf101": "10K<n<100K"}


def fields_of(card: DatasetCard) -> list[str]:
    return re.findall(r"^\| `(\w+)` \|", card.text, re.MULTILINE)


def test_there_is_a_card_for_each_corpus():
    assert [path.parent.name for path in CARDS] == sorted(SIZES)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_front_matter(path):
    data = DatasetCard.load(path).data
    assert data.pretty_name
    assert data.license in ("other", "unknown")
    assert data.license != "other" or (data.license_name and data.license_link)
    assert data.size_categories == [SIZES[path.parent.name]]
    assert "image-to-video" in data.task_categories
    assert data.language == ["en"]


def test_the_fields_are_those_of_the_loaders(tmp_path):
    cards = {path.parent.name: DatasetCard.load(path) for path in CARDS}
    assert fields_of(cards["webvid-2m"]) == [*WEBVID_COLUMNS, "path"]
    (tmp_path / UCF101_CLASSES[0]).mkdir()
    (tmp_path / UCF101_CLASSES[0] / "a.avi").touch()
    from framebridge_plugin.data import load_ucf101

    assert fields_of(cards["ucf101"]) == load_ucf101(tmp_path).column_names


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_every_section_is_there(path):
    text = path.read_text()
    for word in ("icence", "obtain" if path.parent.name == "ucf101" else "withdrew", "How clips are read"):
        assert word in text
    for heading in ("## Form", "## Use", "## Known faults", "## Citation"):
        assert heading in text
    assert "@" in text.split("## Citation")[1]
