"""UCF-101's classes and their numbers; needs the standard library alone."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path

from framebridge_plugin.data.class_folders import class_names
from framebridge_plugin.data.tables import read_lines
from framebridge_plugin.errors import FrameBridgeError
from framebridge_plugin.files import check_within

SPLITS_FOLDER = "ucfTrainTestlist"

# In the order of the folder names' code points, which is the order of the labels in the authors' checkpoints. The
# archive's classInd.txt counts from 1 and has Hammering before HammerThrow and JumpingJack before JumpRope.
UCF101_CLASSES = (
    *("ApplyEyeMakeup", "ApplyLipstick", "Archery", "BabyCrawling", "BalanceBeam", "BandMarching", "BaseballPitch"),
    *("Basketball", "BasketballDunk", "BenchPress", "Biking", "Billiards", "BlowDryHair", "BlowingCandles"),
    *("BodyWeightSquats", "Bowling", "BoxingPunchingBag", "BoxingSpeedBag", "BreastStroke", "BrushingTeeth"),
    *("CleanAndJerk", "CliffDiving", "CricketBowling", "CricketShot", "CuttingInKitchen", "Diving", "Drumming"),
    *("Fencing", "FieldHockeyPenalty", "FloorGymnastics", "FrisbeeCatch", "FrontCrawl", "GolfSwing", "Haircut"),
    *("HammerThrow", "Hammering", "HandstandPushups", "HandstandWalking", "HeadMassage", "HighJump", "HorseRace"),
    *("HorseRiding", "HulaHoop", "IceDancing", "JavelinThrow", "JugglingBalls", "JumpRope", "JumpingJack", "Kayaking"),
    *("Knitting", "LongJump", "Lunges", "MilitaryParade", "Mixing", "MoppingFloor", "Nunchucks", "ParallelBars"),
    *("PizzaTossing", "PlayingCello", "PlayingDaf", "PlayingDhol", "PlayingFlute", "PlayingGuitar", "PlayingPiano"),
    *("PlayingSitar", "PlayingTabla", "PlayingViolin", "PoleVault", "PommelHorse", "PullUps", "Punch", "PushUps"),
    *("Rafting", "RockClimbingIndoor", "RopeClimbing", "Rowing", "SalsaSpin", "ShavingBeard", "Shotput"),
    *("SkateBoarding", "Skiing", "Skijet", "SkyDiving", "SoccerJuggling", "SoccerPenalty", "StillRings"),
    *("SumoWrestling", "Surfing", "Swing", "TableTennisShot", "TaiChi", "TennisSwing", "ThrowDiscus"),
    *("TrampolineJumping", "Typing", "UnevenBars", "VolleyballSpiking", "WalkingWithDog", "WallPushups"),
    *("WritingOnBoard", "YoYo"),
)


def ucf101_class_names(root: str | os.PathLike[str]) -> list[str]:
    """The classes of a data set, in the order of their labels.

    Args:
        root: The folder of the class folders.

    Returns:
        `UCF101_CLASSES` where all folders are among them, so that a part of UCF-101 has the labels of the whole, else
        the names of the folders.

    Raises:
        FrameBridgeError: It is no folder, or has no folders in it.
    """
    return label_names(class_names(root))


def label_names(names: Sequence[str]) -> list[str]:
    """All classes of UCF-101 where a data set has no others, else its own."""
    return list(UCF101_CLASSES if set(names) <= set(UCF101_CLASSES) else names)


def foreign_classes(names: Sequence[str]) -> list[str]:
    """What keeps a folder that is mostly UCF-101 from having its labels: the names that are not its classes."""
    known = {name.casefold() for name in UCF101_CLASSES}
    if 2 * sum(name.casefold() in known for name in names) <= len(names):
        return []
    return [name for name in names if name not in UCF101_CLASSES]


def split_list(class_root: Path, split: str, fold: int, splits_dir: str | os.PathLike[str] | None) -> Path:
    """Where the official list of a half of a fold is: by default beside the folder of the classes."""
    lists = class_root.parent / SPLITS_FOLDER if splits_dir is None else Path(splits_dir).expanduser().absolute()
    return lists / f"{split}list{fold:02}.txt"


def read_split(path: Path) -> list[str]:
    """The clips in trainlist01.txt or the like, such as Archery/v_Archery_g01_c01.avi; a label may follow each."""
    if not path.is_file():
        raise FrameBridgeError(
            f"no such file: {path}; unpack UCF101TrainTestSplits-RecognitionTask.zip and give its folder as splits_dir"
        )
    check_within(path, path.parent)
    names = (re.sub(r"\s+\d+$", "", line).replace("\\", "/") for line in read_lines(path) if line)
    return [posixpath.normpath(name) for name in names]
