"""What makes a start quick, most of which is spent on imports; needs the standard library alone."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.machinery
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# Packages that most runs never use. diffusers and peft import bitsandbytes, and with it torch's compiler; finetrainers
# imports the others.
DEFERRED = ("bitsandbytes", "kornia", "wandb")

_lock = threading.RLock()


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Imports without a search for garbage, which takes a third of their time and finds none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # what has been imported stays
        if was_enabled:
            gc.enable()


def lazy_attributes(
    package: str, modules: Mapping[str, Sequence[str]], prepare: Callable[[str], None] = lambda module: None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose attributes load on first use.

    Args:
        package: Its name.
        modules: The attributes' names by the module that has them, which is named from the package on.
        prepare: Called with that module's name before it is imported.

    Returns:
        What the package assigns to these names.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        prepare(module_of[name])
        return getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)

    return get, lambda: sorted({*vars(sys.modules[package]), *module_of}), sorted(module_of)


def defer_imports() -> None:
    """Loads `DEFERRED` packages only when something of them is asked for; a missing one fails to import as ever."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _DeferredModule(types.ModuleType):
    """A package that is found and not loaded; what looks through all modules, as `inspect` does, leaves it so."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__path__", "__version__"):
            raise AttributeError(name)
        with _lock:
            if "__path__" not in vars(self):
                self._load()
        return types.ModuleType.__getattribute__(self, name)

    def _load(self) -> None:
        specification: Any = self.__spec__
        self.__path__ = specification.submodule_search_locations
        try:
            specification.loader.exec_module(self)
        except BaseException:
            del self.__path__  # so that the next one sees the error, too
            raise
        self.__class__ = types.ModuleType  # type: ignore[assignment]


class _Loader:
    """Loads a package later."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, specification: importlib.machinery.ModuleSpec) -> None:
        """Leaves it to Python."""

    def exec_module(self, module: types.ModuleType) -> None:
        module.__class__ = _DeferredModule
        specification: Any = module.__spec__
        specification.loader = module.__loader__ = self.loader
        # Importing a module of the package asks for its path, and so loads the package.
        del module.__path__


class _Finder:
    """Finds the deferred packages where they are."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        specification: Any = importlib.machinery.PathFinder.find_spec(name) if name in DEFERRED else None
        if specification is not None and specification.loader is not None:
            specification.loader = _Loader(specification.loader)
        return specification
