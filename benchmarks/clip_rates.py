"""Processor time of one clip, from the file to the normalised float tensor, in one process."""

from __future__ import annotations

import bisect
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import decord
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from framebridge_plugin.data import ClipError, ClipSettings, read_clip
from framebridge_plugin.data.clips import frame_window
from framebridge_plugin.data.showing import INTERPOLATION
from framebridge_plugin.errors import UsageError
from framebridge_plugin.resizing import resize_and_crop

# Where the windows of a repetition begin, as shares of the possible starts: together they stand for random windows,
# and the same ones in every repetition leave only the noise of the clock.
POSITIONS = (0.125, 0.375, 0.625, 0.875)

LIMIT, DECODING_LIMIT, WHOLE = "limit", "limit, decoding alone", "whole video"
READ_CLIP: dict[str, dict[str, Any]] = {
    "pyav": {},
    "pyav, resize: decoder": {"resize": "decoder"},
    "pyav, strict": {"strict": True},
    "decord": {"decoder": "decord"},
}


@dataclass(frozen=True)
class Span:
    """What must be decoded for some frames: from the last key frame before them, number `start`, to the last one."""

    seek_to: int | None
    start: int
    numbers: Sequence[int]


class VideoPackets:
    """A video's packets, which say where decoding may begin."""

    def __init__(self, path: Path) -> None:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if packet.size]
            times: Any = [packet.dts if packet.pts is None else packet.pts for packet in packets]
            number_of = {time: number for number, time in enumerate(sorted(times))}
            self.length = len(packets)
            self.keys = {
                number_of[time]: time for packet, time in zip(packets, times, strict=True) if packet.is_keyframe
            }
            self.description = {
                "codec": stream.codec_context.name,
                "size": f"{stream.width}x{stream.height}",
                "frames": self.length,
                "key_frames": len(self.keys),
                "kbit_per_s": round(
                    sum(p.size for p in packets) * 8 / 1000 / self.length * float(stream.average_rate or 0)
                ),
            }

    def span(self, numbers: Sequence[int]) -> Span:
        """The span of these frames."""
        starts = sorted(self.keys)
        start = starts[bisect.bisect_right(starts, numbers[0]) - 1]
        return Span(self.keys[start] if start else None, start, numbers)


def decode_span(path: Path, span: Span) -> Iterator[av.VideoFrame]:
    """The wanted frames, nothing decoded but the span, nothing checked."""
    wanted = set(span.numbers)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        if span.seek_to is not None:
            container.seek(span.seek_to, stream=stream)
        for number, frame in enumerate(container.decode(stream), start=span.start):
            if number in wanted:
                yield frame
            if number == span.numbers[-1]:
                return


def _decode(path: Path, span: Span) -> None:
    for _ in decode_span(path, span):
        pass


def read_limit(path: Path, span: Span, settings: ClipSettings) -> torch.Tensor:
    """The span decoded, and the wanted frames converted, resized and normalised as `read_clip` does."""
    reformatter = VideoReformatter()
    pictures = [
        reformatter.reformat(frame, format="rgb24", interpolation=INTERPOLATION, threads=1).to_ndarray()
        for frame in decode_span(path, span)
    ]
    video_FCHW = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return resize_and_crop(video_FCHW, settings.height, settings.width).mul_(2.0).sub_(1.0)


def read_whole_video(path: Path, settings: ClipSettings) -> torch.Tensor:
    """What finetrainers does: all frames to float, then some of them picked, resized and cropped."""
    reader = decord.VideoReader(str(path), num_threads=1)
    with decord.bridge.use_torch():
        video_FHWC = reader.get_batch(list(range(len(reader))))
    video_FCHW = video_FHWC.permute(0, 3, 1, 2).contiguous()
    video_FCHW = video_FCHW.float() / 127.5 - 1.0
    numbers = torch.linspace(0, len(video_FCHW) - 1, settings.num_frames).long()
    old_height, old_width = video_FCHW.shape[-2:]
    scale = max(settings.height / old_height, settings.width / old_width)
    size = (int(old_height * scale), int(old_width * scale))
    video_FCHW = torch.nn.functional.interpolate(video_FCHW[numbers], size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - settings.height) // 2, (size[1] - settings.width) // 2
    return video_FCHW[..., top : top + settings.height, left : left + settings.width]


def measure_case(path: Path, settings: ClipSettings, repetitions: int) -> dict[str, Any]:
    """Measures one video.

    Returns:
        A description of the video, and for every way of reading it the median over the repetitions of the
        milliseconds of processor time per clip, and of its rate against the three that it is compared with.
    """
    video = VideoPackets(path)
    seeds = [_seed_for(position) for position in POSITIONS]
    windows = [frame_window(video.length, settings, _position(seed)) for seed in seeds]
    spans = [video.span(window) for window in windows if window is not None]
    exact = [_read(path, settings, seed) for seed in seeds]
    for clip, span in zip(exact, spans, strict=True):
        if not torch.equal(clip, read_limit(path, span, settings)):
            raise SystemExit(f"{path}: read_clip gives other pixels than decoding the span")

    ways: dict[str, list[Callable[[], Any]]] = {
        DECODING_LIMIT: [partial(_decode, path, span) for span in spans],
        LIMIT: [partial(read_limit, path, span, settings) for span in spans],
        WHOLE: [partial(read_whole_video, path, settings)],
    }
    refused: dict[str, str] = {}
    for name, options in READ_CLIP.items():
        chosen = ClipSettings(**settings.model_dump() | options)
        try:
            _read(path, chosen, seeds[0])
        except (ClipError, UsageError) as error:
            refused[name] = error.reason if isinstance(error, ClipError) else str(error)
        else:
            ways[name] = [partial(_read, path, chosen, seed) for seed in seeds]

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for repetition in range(repetitions):
        # In turns, and in another order each time: what else the machine does, and what one way leaves behind for
        # the next, falls on all of them.
        random.Random(repetition).shuffle(names)
        for name in names:
            if name != WHOLE:
                ways[name][0]()
            started = time.process_time()
            for way in ways[name]:
                way()
            seconds[name].append((time.process_time() - started) / len(ways[name]))
    return {
        "video": video.description,
        "clip": {key: value for key, value in settings.fingerprint().items() if value},
        "frames_decoded_at_least": [span.numbers[-1] - span.start + 1 for span in spans],
        "ways": {name: _summary(name, seconds) for name in ways},
        "refused": refused,
    }


def _summary(name: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    def rate_against(other: str) -> float:
        # Pairs of one repetition are measured within seconds of each other.
        return round(statistics.median(b / a for a, b in zip(seconds[name], seconds[other], strict=True)), 3)

    return {
        "cpu_ms_per_clip": round(statistics.median(seconds[name]) * 1000, 2),
        "cpu_ms_range": [round(value * 1000, 2) for value in (min(seconds[name]), max(seconds[name]))],
        "clips_per_cpu_second": round(1 / statistics.median(seconds[name]), 2),
        "of_limit": rate_against(LIMIT),
        "of_decoding_limit": rate_against(DECODING_LIMIT),
        "times_whole_video": rate_against(WHOLE),
    }


def _read(path: Path, settings: ClipSettings, seed: int) -> torch.Tensor:
    return read_clip(str(path), settings, torch.Generator().manual_seed(seed))


def _position(seed: int) -> float:
    # What `read_clip` draws first.
    return float(torch.rand(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[0])


def _seed_for(position: float) -> int:
    return next(seed for seed in itertools.count() if abs(_position(seed) - position) < 0.005)


def print_case(name: str, case: dict[str, Any]) -> None:
    """Prints one video's table."""
    print(f"\n{name} ({', '.join(f'{key} {value}' for key, value in case['video'].items())})")
    print(f"  {'':24}{'ms of CPU':>10}{'clips/CPU s':>13}{'of limit':>10}{'of decoding':>13}{'x whole video':>15}")
    for way, row in case["ways"].items():
        print(
            f"  {way:24}{row['cpu_ms_per_clip']:10.1f}{row['clips_per_cpu_second']:13.1f}{row['of_limit']:10.0%}"
            f"{row['of_decoding_limit']:13.0%}{row['times_whole_video']:15.1f}"
        )
    for way, reason in case["refused"].items():
        print(f"  {way:24}refused: {reason}")
