"""The first frames that `finetrainers sample` starts from, and the prompts or classes that go with them."""

from __future__ import annotations

from typing import Any, NamedTuple

from PIL import Image

from framebridge_plugin.commands.sample_request import SampleRequest
from framebridge_plugin.data import ClipError, load_dataset_config
from framebridge_plugin.data.decoding.exact import read_first_picture
from framebridge_plugin.data.listing import is_video
from framebridge_plugin.errors import UsageError
from framebridge_plugin.media import read_image


class SampleInput(NamedTuple):
    """First frame of one image's videos, and its condition: a prompt, the name of a class, or its label."""

    image: Image.Image
    condition: Any


def load_inputs(request: SampleRequest) -> list[SampleInput]:
    """Reads the first frames, from pictures, from videos or from the rows of the run's data set."""
    classes, inputs = None if request.saved is None else request.saved.known_classes, []
    if not request.data_rows:
        for number, path in enumerate(request.images):
            image = _first_frame(str(path), "--image") if is_video(path.name) else read_image(path)
            inputs.append(SampleInput(image, request.condition_of(number)))
        return inputs
    for number, (row, (file, caption)) in enumerate(zip(request.data_rows, _find_rows(request), strict=True)):
        condition = request.condition_of(number)
        if condition is None:
            condition = caption
            if classes is not None and (problem := classes.problem(caption)):
                raise UsageError(f"--data-index {row}: {problem}; give --class-name")
        inputs.append(SampleInput(_first_frame(file, f"--data-index {row}"), condition))
    return inputs


def _find_rows(request: SampleRequest) -> list[tuple[str, str]]:
    """File and caption of each row that is asked for; a run's data sets count as one, in their order."""
    data_file = request.data_file()
    assert data_file is not None
    indexes = [index for index, _ in load_dataset_config(data_file)]
    length = sum(map(len, indexes))
    found = []
    for row in request.data_rows:
        if row >= length:
            raise UsageError(f"--data-index {row}: {data_file} names {length} clips, rows 0 to {length - 1}")
        offset = 0
        for index in indexes:
            if row < offset + len(index):
                found.append(index[row - offset])
                break
            offset += len(index)
    return found


def _first_frame(path: str, option: str) -> Image.Image:
    try:
        return Image.fromarray(read_first_picture(path))
    except ClipError as error:
        raise UsageError(f"{option}: {error}") from error
