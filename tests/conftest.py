"""Settings that every test needs."""

import os
import sys
import tempfile

import pytest

# There is no model hub in the tests: a look-up that would leave the machine must fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Indexes of the tests' data sets do not belong into the user's cache; other processes of the tests share this one.
_cache = tempfile.TemporaryDirectory(prefix="framebridge-tests-")
os.environ["HF_DATASETS_CACHE"] = _cache.name

# Tests import diffusers directly, as a user's program would after importing this package.
import framebridge_plugin  # noqa: E402, F401
from framebridge_plugin import files  # noqa: E402

LONGEST = (
    *("test_upstream_mixins.py", "test_conformance.py", "test_two_processes.py", "test_stopping.py"),
    *("test_precompute.py", "test_stock_finetrainers.py", "test_benchmarks.py", "test_ema.py", "test_told.py"),
    *("test_outside_backbone.py", "test_layers.py"),
)
"""Files that take longest: whoever began with one last would keep the others waiting."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, all others as they were found."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def _no_arguments_of_another_test():
    """A specification takes what the command line parsed last in its process says; here that is another test's."""
    registration = sys.modules.get("framebridge_plugin.training.finetrainers.registration")
    parsed = getattr(registration, "_framebridge_args", None)
    if parsed is not None:
        vars(parsed).clear()
        parsed.__init__()


@pytest.fixture(autouse=True)
def _no_other_priority():
    """An encoder (SVT-AV1) can give its process real-time priority: what is started later then starves the machine."""
    before = os.sched_getscheduler(0)
    yield
    assert os.sched_getscheduler(0) == before


@pytest.fixture(autouse=True)
def _no_downloads_of_another_test():
    """A process remembers what it took from the hub, and at which commit: it is one command."""
    yield
    files.downloaded.clear()
    files.pin({})


@pytest.fixture(autouse=True)
def _no_wandb_of_another_test():
    """wandb reads its environment once in a process; a test may set another mode."""
    yield
    wandb = sys.modules.get("wandb")
    if type(wandb) is type(sys):  # loaded, and not only found
        wandb.teardown()
