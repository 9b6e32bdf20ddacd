"""Settings as classes and as arguments: both check the same types, and take numbers of numpy and torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from framebridge_plugin.data.clips import ClipSettings
from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.settings.base import Section
from framebridge_plugin.settings.bridge import ObjectiveSettings, TrainerSettings
from framebridge_plugin.settings.checking import checked
from framebridge_plugin.settings.choices import BelowOne, Count, FrameRate, Order, Share

CLIP = {"num_frames": 9, "height": 64, "width": 96}


def test_numbers_of_numpy_and_torch_are_settings():
    sizes = {name: np.int64(value) for name, value in CLIP.items()}
    assert ClipSettings(**sizes, horizontal_flip=np.bool_(True)) == ClipSettings(**CLIP, horizontal_flip=True)
    assert ClipSettings(*sizes.values()).height == 64
    assert TrainerSettings(ema_decay=np.float64(0.5)).ema_decay == 0.5
    found = ObjectiveSettings(beta_max=torch.tensor(40.0), caption_dropout=np.float32(0.5), target=np.str_("data"))
    assert (found.beta_max, found.caption_dropout, found.target) == (40.0, 0.5, "data")
    assert {type(value) for value in found.model_dump().values()} <= {bool, int, float, str, type(None)}
    with pytest.raises(UsageError, match="num_frames is 9.0; it should be a valid integer"):
        ClipSettings(**CLIP | {"num_frames": np.float32(9)})


@pytest.mark.parametrize(
    ("values", "named", "message"),
    [
        (range(1, 30), {}, "clip settings: 29 values for .. settings; name them"),
        ((9, 64), {"height": 64, "width": 64}, "clip settings: height is given twice"),
        ((9,), {"height": 64, "width": 64, "hight": 64}, "unknown key 'hight'; did you mean 'height'?"),
    ],
)
def test_values_that_belong_to_no_setting_are_refused(values, named, message):
    with pytest.raises(UsageError, match=message) as error:
        ClipSettings(*values, **named)
    assert "\n" not in str(error.value)


class Sampled(Section):
    """Of the types that `Sampler.sample` has."""

    count: Count = 1
    order: Order = 1
    eta: Share | None = None
    rate: FrameRate = 8.0
    decay: BelowOne = 0.5
    on: bool = False


class Sampler:
    @checked
    def sample(
        self,
        count: Count = 1,
        order: Order = 1,
        eta: Share | None = None,
        rate: FrameRate = 8.0,
        decay: BelowOne = 0.5,
        on: bool = False,
        times: Sequence[float] | None = None,
        prompt: str | list[str] = "",
        callback: Callable[..., dict] | None = None,
    ) -> tuple:
        return count, order, eta, rate, decay, on


@pytest.mark.parametrize(
    ("setting", "wrong", "wanted"),
    [
        ("count", (0, -1, 2.0, "2", True, None), "a whole number, at least 1"),
        ("order", (3, True, 2.0, "2"), "1 or 2"),
        ("eta", (-0.1, 1.5, float("nan"), "half", True), "a number, from 0 to 1"),
        ("rate", (0, -1, 1001, float("inf"), "8"), "a number, above 0 and at most 1000"),
        ("decay", (1, -0.5), "a number, at least 0 and below 1"),
        ("on", (1, "yes", None), "True or False"),
        ("times", ("10", ["a"], 3), "a list of numbers"),
        ("prompt", (3, [3], None), "a text or a list of texts"),
        ("callback", ("print",), "a function"),
    ],
)
def test_arguments_are_of_the_types_of_their_signature(setting, wrong, wanted):
    for value in wrong:
        with pytest.raises(FrameBridgeError, match=f"^Sampler: {setting} is .*; it should be {wanted}$"):
            Sampler().sample(**{setting: value})
        if setting in Sampled.model_fields and setting != "order":  # pydantic takes 2.0 for the choice 2
            with pytest.raises(ValueError, match=setting):
                Sampled(**{setting: value})


def test_arguments_become_pythons_own_numbers():
    given = (np.int64(3), torch.tensor(2), np.float32(0.5), 30, np.float64(0.25), np.bool_(True))
    found = Sampler().sample(*given)
    assert found == (3, 2, 0.5, 30, 0.25, True)
    assert [type(value) for value in found] == [int, int, float, int, float, bool]
    assert Sampler().sample(times=(np.float32(3), 2), prompt=[np.str_("a")], callback=print)[0] == 1
    for call, message in (
        ({"cuont": 3}, "unknown argument 'cuont'; did you mean 'count'?"),
        ({"x": 3}, "unknown argument .x.; there are "),
    ):
        with pytest.raises(FrameBridgeError, match=message):
            Sampler().sample(**call)
    with pytest.raises(FrameBridgeError, match="Sampler: multiple values for argument 'count'"):
        Sampler().sample(3, count=3)
