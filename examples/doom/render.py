"""Render thousands of short clips of a walk through the levels of Freedoom, in the shape of UCF-101.

The class of a clip is the action that is held while it lasts: two turns, two walks, two sidesteps, each at a speed
that is always the same. So what a class predicts is the motion of the whole picture, and how far a thing moves in a
walk or a sidestep depends on how far away it is. Levels are groups (`g01`), and whole levels are held out:

    <output>/clips/<class>/v_<class>_g01_c001.mp4 ...   16 frames of 64x64 pixels each, H.264, hardly compressed
    <output>/ucfTrainTestlist/trainlist01.txt, testlist01.txt    the split, as UCF-101 has it
    <output>/levels/g01.csv ...                         of each clip: its level, place and direction

A level that is finished is not rendered again, so that the command may be interrupted. The same version of ViZDoom
gives the same files. ViZDoom (MIT) runs without a screen; its wheel brings both games of Freedoom, from whose levels,
textures and sprites the pictures are made: copyright the contributors to the Freedoom project, 3-clause BSD licence
(https://github.com/freedoom/freedoom, COPYING.adoc), which lets anyone pass the pictures on with that notice.

    pip install vizdoom==1.3.2
    python examples/doom/render.py --output doom-data
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import os
import random
import struct
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

SIDE, FRAMES, RATE = 64, 16, 8
CLASSES = {  # forward, to the right, turn to the right: in units of the game, and degrees, from frame to frame
    "MoveBackward": (-8, 0, 0),
    "MoveForward": (8, 0, 0),
    "StrafeLeft": (0, -8, 0),
    "StrafeRight": (0, 8, 0),
    "TurnLeft": (0, 0, -3),
    "TurnRight": (0, 0, 3),
}
LEVELS = [("freedoom1", f"E{episode}M{level}") for episode in range(1, 5) for level in range(1, 10)]
# MAP30, a single hall, has crashed the game.
LEVELS += [("freedoom2", f"MAP{level:02d}") for level in range(1, 33) if level != 30]
HELD_OUT_EVERY = 6  # of the levels, the third, the ninth, the fifteenth and so on are held out
FIRST_HELD_OUT = 2

REST = 60  # game steps after which the last clip's walk has come to an end
FRICTION = 0.90625  # what is left of the speed after a step of the game
THRUST = 1 / 32  # speed, in units for each step of the game, that one unit of a button adds in a step
STRONGEST = 50  # units of a button
ATTEMPTS = 40  # for each clip that is asked for
# The depth buffer counts in about 15 units of the game. Nearer pictures are one texture, farther ones hardly move.
MEDIAN_DEPTH, NEAREST_DEPTH = (7, 30), 4
BRIGHTNESS, CONTRAST, LEAST_CHANGE = 40.0, 14.0, 2.5  # of 255: mean, spread, mean difference of successive frames


class Level(NamedTuple):
    """A level, and how its clips are made."""

    group: int
    game: str
    name: str
    clips: int  # of each class, at most
    seed: int
    output: Path


def held_out(group: int) -> bool:
    """Whether nothing of this level is for training."""
    return (group - 1) % HELD_OUT_EVERY == FIRST_HELD_OUT


def read_places(wad: Path, level: str) -> list[tuple[int, int]]:
    """Reads where a level's things and monsters stand: places that one can stand at.

    Args:
        wad: The game's file, of lumps.
        level: Name of the level.

    Returns:
        Their coordinates, each once.
    """
    content = wad.read_bytes()
    _, count, start = struct.unpack_from("<4sii", content)
    lumps = [struct.unpack_from("<ii8s", content, start + 16 * index) for index in range(count)]
    names = [name.rstrip(b"\0").decode() for _, _, name in lumps]
    offset, size, _ = lumps[names.index("THINGS", names.index(level))]
    return sorted({struct.unpack_from("<hh", content, offset + 10 * index) for index in range(size // 10)})


class LevelLeftError(Exception):
    """The walk has come to the level's exit."""


class Walker:
    """Somebody who can be put anywhere in a level, and looks and walks."""

    def __init__(self, level: Level) -> None:
        import vizdoom

        button, variable = vizdoom.Button, vizdoom.GameVariable
        folder = Path(vizdoom.__file__).parent
        self.places = read_places(folder / f"{level.game}.wad", level.name)
        self.game = game = vizdoom.DoomGame()
        game.set_doom_game_path(str(folder / f"{level.game}.wad"))
        game.set_doom_map(level.name)
        # The engine keeps its settings in a file, by default in the working directory.
        game.set_doom_config_path(str(Path(tempfile.mkdtemp(prefix="doom-")) / "vizdoom.ini"))
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_256X192)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_window_visible(False)
        game.set_depth_buffer_enabled(True)
        for part in (
            "hud",
            "crosshair",
            "weapon",
            "decals",
            "particles",
            "effects_sprites",
            "screen_flashes",
            "messages",
        ):
            getattr(game, f"set_render_{part}")(False)
        buttons = (button.MOVE_FORWARD_BACKWARD_DELTA, button.MOVE_LEFT_RIGHT_DELTA, button.TURN_LEFT_RIGHT_DELTA)
        game.set_available_buttons(list(buttons))
        for each in buttons:
            game.set_button_max_value(each, 0)
        game.set_available_game_variables([variable.POSITION_X, variable.POSITION_Y, variable.ANGLE])
        game.set_episode_timeout(0)
        game.set_seed(level.seed)
        game.add_game_args("-nomonsters +sv_cheats 1 +movebob 0")
        game.add_game_args("+cl_showsecretmessage 0 +con_notifytime 0")  # texts that would cover the picture
        game.init()
        self.enter()

    def enter(self) -> None:
        """Begins the level anew."""
        self.game.new_episode()
        self.game.send_game_command("god")
        self.walked = False  # in the last clip, so that speed is left

    def act(self, forward: float, right: float, turn: float, steps: int = 1) -> None:
        """Holds an action for some steps of the game, of which no picture is made."""
        self.game.set_action([forward, right, turn])
        self.game.advance_action(steps, False)

    def see(self, forward: float, right: float, turn: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One step: the middle of the picture [SIDE, SIDE, 3] as bytes, its depth [192, 192], place and direction."""
        self.game.make_action([forward, right, turn])
        state = self.game.get_state()
        if state is None:
            raise LevelLeftError
        fine = state.screen_buffer[:, 32:224].astype(np.uint16)
        rows = fine[::3] + fine[1::3] + fine[2::3]
        picture = ((rows[:, ::3] + rows[:, 1::3] + rows[:, 2::3] + 4) // 9).astype(np.uint8)
        return picture, state.depth_buffer[:, 32:224], np.array(state.game_variables)

    def clip(self, class_name: str, place: tuple[int, int], direction: float) -> list[np.ndarray] | None:
        """Goes to a place, and looks while an action is held.

        Args:
            class_name: One of CLASSES.
            place: Coordinates in the level.
            direction: Degrees to turn by beforehand.

        Returns:
            FRAMES pictures, or None where there is little to see, or something is in the way.
        """
        forward, right, turn = CLASSES[class_name]
        if self.walked:
            self.act(0, 0, 0, REST)
            self.walked = False
        self.game.send_game_command(f"warp {place[0]} {place[1]}")
        self.act(0, 0, direction)
        picture, depth, _ = self.see(0, 0, 0)
        if not MEDIAN_DEPTH[0] <= np.median(depth) <= MEDIAN_DEPTH[1] or np.percentile(depth, 10) < NEAREST_DEPTH:
            return None
        if picture.mean() < BRIGHTNESS or picture.mean(2).std() < CONTRAST:
            return None
        # Run up; after that the button makes up for what friction takes, and the speed is always the same.
        speed, full = 0.0, math.hypot(forward, right)
        self.walked = full > 0
        while full - speed > 0.01:
            push = min(STRONGEST, (full - FRICTION * speed) / THRUST)
            self.act(push * forward / full, push * right / full, turn)
            speed = FRICTION * speed + push * THRUST
        hold = [part * (1 - FRICTION) / THRUST for part in (forward, right)]
        picture, _, before = self.see(*hold, turn)
        pictures = [picture]
        while len(pictures) < FRAMES:
            picture, depth, after = self.see(*hold, turn)
            travel = math.hypot(*(after - before)[:2])
            # Something in the way, a slide along a wall, or a teleporter.
            if abs(travel - full) > 0.1 * full + 0.01:
                return None
            pictures.append(picture)
            before = after
        change = np.abs(np.diff(np.stack(pictures).astype(float), axis=0)).mean((1, 2, 3))
        if change.min() < LEAST_CHANGE or np.median(depth) < MEDIAN_DEPTH[0] / 2:
            return None
        return pictures


def write_clip(path: Path, pictures: list[np.ndarray]) -> None:
    """Writes H.264 in full colour resolution, compressed so little that it is hardly visible."""
    with av.open(str(path), "w") as container:
        # With mbtree, or several threads, x264 does not give the same bits on every run.
        options = {"crf": "10", "preset": "veryfast", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv444p"
        stream.codec_context.thread_count = 1
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def render_level(level: Level) -> tuple[str, int, int]:
    """Renders one level and writes its table, by which it is known to be finished.

    Args:
        level: The level.

    Returns:
        Its name, how many clips there are, and how many attempts they took.
    """
    walker = Walker(level)
    draw = random.Random(f"{level.seed} {level.game} {level.name}")
    rows, attempts = [], 0
    for class_name in CLASSES:
        number = 0
        for _ in range(level.clips * ATTEMPTS):
            if number == level.clips:
                break
            attempts += 1
            place, direction = draw.choice(walker.places), draw.uniform(-180.0, 180.0)
            try:
                pictures = walker.clip(class_name, place, direction)
            except LevelLeftError:
                walker.enter()
                continue
            if pictures is None:
                continue
            number += 1
            name = f"{class_name}/v_{class_name}_g{level.group:02d}_c{number:03d}.mp4"
            write_clip(level.output / "clips" / name, pictures)
            rows.append((name, level.game, level.name, *place, round(direction, 3)))
    walker.game.close()
    table = level.output / "levels" / f"g{level.group:02d}.csv"
    with open(table.with_suffix(".part"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("clip", "game", "level", "x", "y", "direction"))
        writer.writerows(rows)
    os.replace(table.with_suffix(".part"), table)
    return f"{level.game} {level.name}", len(rows), attempts


def write_lists(output: Path) -> tuple[int, int]:
    """Writes the lists of the split, and of the classes; returns the clips to train on and the held-out ones."""
    lists = output / "ucfTrainTestlist"
    lists.mkdir(exist_ok=True)
    clips: dict[bool, list[str]] = {True: [], False: []}
    for table in sorted((output / "levels").glob("g*.csv")):
        with open(table, newline="", encoding="utf-8") as file:
            clips[held_out(int(table.stem[1:]))] += [row["clip"] for row in csv.DictReader(file)]
    for name, names in (("testlist01", clips[True]), ("trainlist01", clips[False])):
        (lists / f"{name}.txt").write_text("".join(f"{clip}\n" for clip in sorted(names)))
    (lists / "classInd.txt").write_text("".join(f"{number} {name}\n" for number, name in enumerate(CLASSES, 1)))
    return len(clips[False]), len(clips[True])


def main() -> None:
    """Render what is not there yet, and say what is there."""
    parser = argparse.ArgumentParser(description="Render clips of a walk through Freedoom's levels.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, or to go on with")
    parser.add_argument("--clips", type=int, default=36, help="clips of each class and level, at most")
    parser.add_argument("--levels", type=int, default=len(LEVELS), help="how many of the levels, from the first on")
    parser.add_argument("--seed", type=int, default=0, help="of the places and directions")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="levels that are rendered at a time")
    arguments = parser.parse_args()
    if arguments.levels <= FIRST_HELD_OUT:
        parser.error(f"--levels {arguments.levels}: the first that is held out is the {FIRST_HELD_OUT + 1}rd")
    output = arguments.output
    for folder in ("levels", *(f"clips/{name}" for name in CLASSES)):
        (output / folder).mkdir(parents=True, exist_ok=True)
    made_with = {"clips": arguments.clips, "seed": arguments.seed}
    note = output / "levels" / "made_with.json"
    if note.exists() and json.loads(note.read_text()) != made_with:
        sys.exit(f"{output} was begun with {note.read_text().strip()}; give the same, or another folder")
    note.write_text(json.dumps(made_with) + "\n")
    levels = [
        Level(group, game, name, arguments.clips, arguments.seed, output)
        for group, (game, name) in enumerate(LEVELS[: arguments.levels], 1)
        if not (output / "levels" / f"g{group:02d}.csv").exists()
    ]
    # A process for each level: ViZDoom leaves memory behind.
    with multiprocessing.get_context("spawn").Pool(arguments.workers, maxtasksperchild=1) as pool:
        for done, (level, clips, attempts) in enumerate(pool.imap_unordered(render_level, levels), 1):
            print(f"{done} of {len(levels)} levels: {level}, {clips} clips out of {attempts} attempts", flush=True)
    print("clips to train on and held out: {} and {}".format(*write_lists(output)))


if __name__ == "__main__":
    main()
