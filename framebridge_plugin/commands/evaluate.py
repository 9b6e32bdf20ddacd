"""`finetrainers evaluate`: videos of held-out clips' first frames, and how good they are.

Every process takes its share of the calls of the model that are missing; what each clip becomes depends on its number
and on the size of a call alone. What is measured goes onto the disk with the videos.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from framebridge_plugin.backbones.fingerprint import component_fingerprint, short_digest
from framebridge_plugin.backbones.folders import LORA_FILE, find_part
from framebridge_plugin.backbones.hub import local_folder
from framebridge_plugin.backbones.manifest import file_facts
from framebridge_plugin.backbones.opening import find_folder, find_model
from framebridge_plugin.backbones.sampling_loop import call_defaults
from framebridge_plugin.commands.evaluate_networks import load_networks, look
from framebridge_plugin.commands.evaluate_request import EvaluateRequest, ImagesRequest, clips_trained_on
from framebridge_plugin.commands.sample import Opened, open_for
from framebridge_plugin.data.bad_files import describe
from framebridge_plugin.data.folders import files_among, index_datasets
from framebridge_plugin.errors import FrameBridgeError, UsageError, print_lines, say
from framebridge_plugin.evaluation.clips import Clip, Images, Inputs, TrueClips
from framebridge_plugin.evaluation.measuring import measure
from framebridge_plugin.evaluation.networks import load_fvd
from framebridge_plugin.evaluation.parts import Part, Parts
from framebridge_plugin.evaluation.report import Looked, write_report
from framebridge_plugin.evaluation.vbench import export, names_of
from framebridge_plugin.files import remove_partial_files
from framebridge_plugin.folder_lock import FolderLock
from framebridge_plugin.processes import first_alone, is_first, of_all_ranks, process_count, rank
from framebridge_plugin.progress import Progress
from framebridge_plugin.training.precomputation.fingerprint import data_fingerprint
from framebridge_plugin.training.rendezvous import met, wait_for_all
from framebridge_plugin.training.run import package_versions


def evaluate(request: EvaluateRequest, content: Mapping[str, Any] | None) -> None:
    """Makes the videos that are not there yet, in this process and the others that were started beside it, and writes
    the report; `content` is that of the dataset file, None for images alone.
    """
    with FolderLock(request.output) if is_first() else contextlib.nullcontext(), met() as device:
        job = first_alone(lambda: _prepare(request, content, device))
        # Every process uses the list that the first one made.
        missing, protocol = of_all_ranks((job.parts.missing(), job.protocol))[0]
        raises = content is not None and content["bad_files"].get("policy") == "raise"
        job.make(missing[rank() :: process_count()], raises)
        wait_for_all()
        looked = Looked({}, {}, {})
        for network in first_alone(lambda: load_networks(request, job.leave_model())):
            look(network, job.parts, job.clips, protocol, looked)
        if is_first():
            data = [] if content is None else content["datasets"]
            about = {"model": request.model, "data": data, "trained_on": job.trained_on}
            paths = write_report(job.parts, protocol, job.clips, looked, about)
            print_lines(paths[1].read_text(encoding="utf-8"))
            say(f"evaluation: {', '.join(map(str, paths))}")
            if request.vbench is not None:
                command = export(job.parts, job.clips, request.vbench, job.opened.pipeline.config.fps)
                say(f"VBench-I2V, in its repository: {command}")


def _prepare(request: EvaluateRequest, content: Mapping[str, Any] | None, device: torch.device) -> _Job:
    """Everything before the first video is made."""
    datasets = [] if content is None else index_datasets(content, "the recipe's data")
    if content is not None:
        clips: Inputs = TrueClips(datasets, request.clip_seed, request.count)
        classes = None if request.saved is None else request.saved.known_classes
        if classes is not None:
            captions = (caption for index, _ in datasets for caption in index.distinct_captions())
            if problem := next(filter(None, map(classes.problem, captions)), None):
                raise UsageError(f"the clips: {problem}")
    opened = open_for(request, device)
    given = (request.num_frames, request.height, request.width)
    frames, height, width = (one or other for one, other in zip(given, opened.pipeline._default_clip(), strict=True))
    if isinstance(request, ImagesRequest):
        clips = Images(request.pairs, request.num_videos, (height, width))
    # That nothing is made before it is refused:
    if request.vbench is not None:
        names_of(*([of(number) for number in range(len(clips))] for of in (clips.condition, clips.source)))
    if request.fvd_features is not None:
        load_fvd(request.fvd_features, request.fvd_sha256, request.fvd_frames, torch.device("cpu"))
    parts = Parts(request.output, len(clips), max(1, request.batch_size // opened.rows))
    protocol, trained_on = {}, None
    if is_first():
        if content is not None:
            trained_on = _trained_on(request.model, clips)
        said: dict[str, Any] = {"count": len(clips), "resolution": [height, width], "frames": frames}
        if isinstance(request, ImagesRequest):
            listed = [[path.name, file_facts(path).sha256, condition] for path, condition in request.pairs]
            said |= {"images": short_digest(listed), "videos_of_an_image": request.num_videos}
        else:
            entries = [] if content is None else content["datasets"]
            said["clip_seed"] = request.clip_seed
            said["clips"] = [
                {"split": entry.get("split", "all"), "fold": entry.get("fold")} | data_fingerprint(*found)
                for entry, found in zip(entries, datasets, strict=True)
            ]
        protocol = _protocol(request, opened, said)
        parts.check_protocol(protocol)
        remove_partial_files(request.output)
    return _Job(request, opened, clips, parts, protocol, trained_on)


def _trained_on(model: str, clips: Inputs) -> int | None:
    """How many of the clips the model's run was trained on, which is said; None where that is not to be seen."""
    if (datasets := clips_trained_on(model)) is None:
        return None
    sources = [clips.source(number) for number in range(len(clips))]
    known = set(files_among(datasets, sources))
    if count := sum(source in known for source in sources):
        what = f"{count} of these {len(sources)} clips are what the run was trained on"
        say(f"warning: {what}; name others, such as framebridge.data.split=test")
    return count


@dataclass(frozen=True)
class _Job:
    """This process's part of the work."""

    request: EvaluateRequest
    opened: Opened
    clips: Inputs
    parts: Parts
    protocol: dict[str, Any]
    trained_on: int | None
    """How many of the clips the model has seen, if that is known; in the first process."""

    def make(self, parts: list[int], raises: bool) -> None:
        """Makes the videos of some parts; of a clip that cannot be read there is none, or an error."""
        share = f" (process 1 of {process_count()})" if process_count() > 1 else ""
        total = sum(len(self.parts.numbers(part)) for part in parts)
        pipeline = self.opened.pipeline
        with Progress(total, f"Videos{share}", unit="video", disable=not (is_first() and parts)) as progress:
            for part in parts:
                numbers = self.parts.numbers(part)
                found = [self.clips.read(number) for number in numbers]
                clips = [clip for clip in found if isinstance(clip, Clip)]
                bad_files = [clip for clip in found if not isinstance(clip, Clip)]
                for bad_file in bad_files:
                    if bad_file["kind"] == "wrong_container":
                        raise UsageError(f"cannot read the clip {bad_file['path']}: {bad_file['reason']}")
                    if raises:
                        raise FrameBridgeError(f"cannot read the clip {describe(bad_file)}")
                    say(f"left out: {describe(bad_file)}")
                desc = f"Videos {numbers[0] + 1} to {numbers[-1] + 1} of {self.parts.count}"
                pipeline.set_progress_bar_config(desc=desc, disable=not is_first())
                self._make_part(part, clips, bad_files)
                progress.update(len(numbers))

    def leave_model(self) -> torch.device:
        """Frees the device's memory of the model, which nothing needs any more; returns the device."""
        device = self.opened.pipeline._execution_device
        if self.request.offload == "none":
            self.opened.pipeline.to("cpu")
        return device

    def _make_part(self, part: int, clips: list[Clip], bad_files: list[Any]) -> None:
        videos, columns = torch.empty(0, dtype=torch.uint8), {}
        if clips:
            made = self.opened.make(
                [clip.frames[0].permute(1, 2, 0).numpy() for clip in clips],
                [clip.condition for clip in clips],
                [self.request.seed + clip.number for clip in clips],
                self.request.batch_size,
            )
            videos = torch.stack([torch.from_numpy(video).permute(0, 3, 1, 2) for video in made])
            device = self.opened.pipeline._execution_device
            true = torch.stack([clip.frames for clip in clips]).to(device)
            columns = measure(videos.to(device), true[:, 0], true if self.clips.has_truth else None)
        numbers, conditions = [clip.number for clip in clips], [clip.condition for clip in clips]
        self.parts.write(part, videos, Part(numbers, conditions, columns, bad_files))


def _protocol(request: EvaluateRequest, opened: Opened, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """All that the numbers depend on, with which those of two evaluations can be compared."""
    pipeline, saved = opened.pipeline, opened.saved
    sampling: dict[str, Any] = {"one_call": True}
    if "scheduler" in saved.facts.parts:
        steps, scale = call_defaults(pipeline, request.steps, None, request.guidance_scale)
        scheduler = pipeline.scheduler
        settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
        sampling = {"steps": steps, "guidance_scale": scale, "use_dynamic_cfg": request.use_dynamic_cfg}
        sampling |= {"scheduler": type(scheduler).__name__, **settings}
    return {
        "model": type(pipeline).__name__,
        "weights": _weights(request, saved),
        "crop": "shorter side resized, centre cropped",
        **inputs,
        "seed": request.seed,
        "seeds": "clip i: seed + i",
        "sampling": sampling,
        "dtype": str(getattr(pipeline, saved.facts.network).dtype).removeprefix("torch."),
        "tiling": request.tiling,
        "compile": request.compile,
        "batch_size": request.batch_size,
        "device": pipeline._execution_device.type,
        "versions": package_versions(),
    }


def _weights(request: EvaluateRequest, saved: Any) -> dict[str, Any]:
    """The SHA-256 of each file of weights that is in use."""
    replaced: dict[str, Any] = {} if request.transformer is None else {"transformer": None}
    found = find_model(
        saved if saved.lora is None else find_folder(request.model),
        None,
        replaced,
        base_model=request.base,
        allow_other_base=request.allow_other_base,
    )
    folders = {part: found.folder(part) for part in found.parts if part not in ("scheduler", "tokenizer")}
    if request.transformer is not None:
        network = found.facts.network
        folders[network] = find_part(local_folder(request.transformer), network)
    weights = {
        f"{part}/{name}": digest
        for part, folder in folders.items()
        if folder is not None
        for name, digest in component_fingerprint(folder, whole=True).items()
        if name.endswith(".safetensors")
    }
    if found.lora is not None:
        weights[LORA_FILE] = file_facts(found.lora / LORA_FILE).sha256
    return weights
