"""The table of calls that the interface is checked against is what finetrainers' trainer really does."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, ClassVar

import pytest

from framebridge_plugin.testing import CHECKS, Subject, run_check
from framebridge_plugin.testing.checks import CALLS
from tests.testing.broken import Whole
from tests.tiny_models import make_tiny_latte


class Recording(Whole):
    """Remembers with how many positional arguments and with which keywords the trainer calls it."""

    positional: ClassVar[dict[str, set[int]]] = defaultdict(set)
    keywords: ClassVar[dict[str, set[str]]] = defaultdict(set)

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in CALLS:
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            self.positional[name].add(len(args))
            self.keywords[name] |= kwargs.keys()
            return method(*args, **kwargs)

        call.__name__ = name
        return call


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory: pytest.TempPathFactory) -> None:
    Whole.folder = make_tiny_latte(tmp_path_factory.mktemp("model") / "tiny", size=32)
    subject = Subject(Recording, tmp_path_factory.mktemp("runs"))
    for name in ("run-lora-accelerate", "run-full-ptd-precomputed"):
        # What the suite itself calls in these checks, it calls as the trainer does.
        assert run_check(CHECKS[name], subject, {}).status == "ok"


@pytest.mark.parametrize("method", CALLS)
def test_the_trainer_calls_it_so(method):
    positional, keywords = CALLS[method]
    assert Recording.positional[method] == {len(positional)}
    given = Recording.keywords[method]
    if method.startswith("prepare_"):
        models = {"prepare_conditions": set(), "prepare_latents": {"vae"}}[method]
        assert given == {*keywords, "video", *models}
    elif method == "forward":
        # The base class declares it, and our trainer passes it.
        assert given == {*keywords} - {"generator"}
    elif method == "validation":
        # Which columns there are is the validation file's business.
        assert {"pipeline", "generator", "prompt", "video"} <= given <= {*keywords}
    else:
        assert given == {*keywords}
