"""How fast clips are read, against reading whole videos and against the least that must be decoded.

    python benchmarks/data_loading.py --videos FOLDER --output benchmarks/results/data_loading_cpu.json

It writes its own videos and a table of 2.5 million clips into a temporary folder, and adds the real videos of FOLDER.
Each way to read a clip is timed in CPU milliseconds beside "limit", which decodes and resizes only the frames that
must be, and "whole video"; `of_limit` and `times_whole_video` compare them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

# One thread, as in the workers of a loader; torch reads it when it is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import av
import torch
from clip_rates import measure_case, print_case
from loader_rates import measure_loader, print_loader
from made_videos import VideoForm, write_video, write_webvid
from start_up import measure_start, print_start

from framebridge_plugin.data import ClipSettings

WEBVID_RULE = ClipSettings(num_frames=17, height=256, width=256, frame_stride=3)
UCF_RULE = ClipSettings(num_frames=16, height=256, width=256, frame_sampling="linspace", window_frames=48)
GOAL_CASE = "640x360, key frame every 12"
WHOLE_VIDEO_GOAL, LIMIT_GOAL = 5, 0.7
LOADER_CASES = (GOAL_CASE, "WebVid-like, key frame every 250", "UCF-like, one key frame")
PARTS = ("clips", "loader", "start")
PACKAGES = ("framebridge-plugin", "torch", "av", "decord", "numpy", "datasets", "pyarrow")


def made_cases(frames: int) -> dict[str, tuple[VideoForm, ClipSettings]]:
    """The forms of the videos that are written here; a clip of UCF-101 has .6 times the frames of one of WebVid."""
    webvid = {key: VideoForm(596, 336, frames, key, 700_000) for key in (12, 30, 250)}
    short = frames * 3 // 5
    ucf = {key: VideoForm(320, 240, short, key, 535_000, "mpeg4", ".avi") for key in (12, 30, 250)}
    return {
        GOAL_CASE: (VideoForm(640, 360, frames, 12, 800_000), WEBVID_RULE),
        **{f"WebVid-like, key frame every {key}": (form, WEBVID_RULE) for key, form in webvid.items()},
        "UCF-like, one key frame": (ucf[250], UCF_RULE),
        **{f"UCF-like, key frame every {key}": (ucf[key], UCF_RULE) for key in (12, 30)},
    }


def environment() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    model = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    libraries = {name: ".".join(map(str, version)) for name, version in av.library_versions.items()}
    return {
        "date": datetime.date.today().isoformat(),
        "processor": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {**versions, **{name: libraries[name] for name in ("libavcodec", "libswscale")}},
        "decoding_threads": 1,
    }


def goals(clips: dict[str, Any]) -> dict[str, Any]:
    """Says where the default way of reading, `pyav`, reaches the two goals, and by how much it misses them."""
    of_limit = {name: case["ways"]["pyav"]["of_limit"] for name, case in clips.items()}
    whole = {name: case["ways"]["pyav"]["times_whole_video"] for name, case in clips.items() if name == GOAL_CASE}
    return {
        "times_whole_video": {"goal": WHOLE_VIDEO_GOAL, "measured": whole},
        "of_limit": {
            "goal": LIMIT_GOAL,
            "reached": {name: share for name, share in of_limit.items() if share >= LIMIT_GOAL},
            "missed": {name: share for name, share in of_limit.items() if share < LIMIT_GOAL},
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="folder of real .mp4 and .avi files, read as WebVid's are")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--frames", type=int, default=300, help="frames of the videos that are written here")
    parser.add_argument("--repetitions", type=int, default=7, help="of each measurement; medians are given")
    parser.add_argument("--loader-clips", type=int, default=24, help="clips per repetition through a loader")
    parser.add_argument("--rows", type=int, default=2_500_000, help="of the generated table")
    parser.add_argument("--samples", type=int, default=2500, help="clips each worker reads before memory is looked at")
    parser.add_argument("--only", default="", help="measure only videos with this in their name")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; all of it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    results: dict[str, Any] = {"environment": environment(), "load_average_before": os.getloadavg()}
    results["repetitions"] = arguments.repetitions
    with tempfile.TemporaryDirectory(prefix="data-loading-") as folder:
        cases: dict[str, tuple[Path, ClipSettings]] = {}
        for number, (name, (form, settings)) in enumerate(made_cases(arguments.frames).items()):
            if arguments.only in name:
                cases[name] = (Path(folder, f"{number}{form.suffix}"), settings)
                write_video(cases[name][0], form)
        if arguments.videos is not None:
            real = sorted(path for path in arguments.videos.iterdir() if path.suffix in (".mp4", ".avi"))
            cases |= {f"real: {path.name}": (path, WEBVID_RULE) for path in real if arguments.only in path.name}

        if "clips" in arguments.parts:
            results["clips"] = {}
            for name, (path, settings) in cases.items():
                results["clips"][name] = measure_case(path, settings, arguments.repetitions)
                print_case(name, results["clips"][name])
            results["goals"] = goals(results["clips"])
            print(f"\nGoals: {json.dumps(results['goals'], indent=2)}")
        if "loader" in arguments.parts:
            results["loader"] = {}
            for name in [name for name in LOADER_CASES if name in cases]:
                path, settings = cases[name]
                results["loader"][name] = measure_loader(path, settings, arguments.repetitions, arguments.loader_clips)
                print_loader(name, results["loader"][name])
        if "start" in arguments.parts:
            table, root = write_webvid(Path(folder, "webvid"), arguments.rows)
            results["start"] = measure_start(table, root, arguments.rows, arguments.samples)
            print_start(results["start"])
    results["load_average_after"] = os.getloadavg()
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
