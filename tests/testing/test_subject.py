"""What a specification is shown where nobody says it: what the facts of its backbone say."""

from __future__ import annotations

from framebridge_plugin.backbones.facts import ClipShape, ClipShapeRule
from framebridge_plugin.testing import Subject
from framebridge_plugin.training import LatteBridgeSpecification, WanBridgeSpecification
from tests.tiny_models import make_tiny_latte
from tests.tiny_wan import make_tiny_wan


def test_layers_and_clips_of_a_backbone(tmp_path):
    make_tiny_wan(tmp_path / "model")
    subject = Subject(lambda: WanBridgeSpecification(str(tmp_path / "model")), tmp_path)
    assert subject.target_modules == "blocks.*(to_q|to_k|to_v|to_out.0)"
    assert subject.clip_shape == (9, 64, 64)
    assert Subject(subject.make, tmp_path, target_modules=["to_q"]).target_modules == ["to_q"]


def test_classes_of_a_model_that_knows_only_their_number(tmp_path):
    make_tiny_latte(tmp_path / "model", class_names=None, num_classes=3, size=32)
    subject = Subject(lambda: LatteBridgeSpecification(str(tmp_path / "model")), tmp_path)
    assert subject.captions == ("0", "1", "2")
    assert subject.clip_shape == (4, 32, 32)
    assert subject.target_modules == ["to_q", "to_k", "to_v", "to_out.0"]


def test_the_nearest_clip_that_fits():
    assert ClipShapeRule(frames_step=8, size_step=48).nearest(9, 64, 80) == (9, 48, 96)
    assert ClipShapeRule(frames_step=4, size_step=16).nearest(7, 7, 256) == (9, 16, 256)
    assert ClipShape(16, 256, 320).nearest(9, 64, 64) == (16, 256, 320)
