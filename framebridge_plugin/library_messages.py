"""What libraries say about each other when they are loaded although nothing here is amiss, and what it means.

`finetrainers doctor` repeats what was held back. Importing this module imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator

from framebridge_plugin.errors import escaped

# Logger, beginning of its message, and what it means. No version of torchao goes without: 0.17 and later try their
# CUDA kernels beside every torch, earlier ones say that they do not fit this torch.
_MEANINGS = {
    ("torchao", "Failed to load "): "kernels for quantised models on CUDA GPUs, which nothing here uses",
    ("torchao.kernel.intmm", "Warning: Detected no triton"): "kernels for GPUs, which need Triton",
    ("torch.utils._pytree", "<enum "): "torchao registers what torch now knows by itself",
    (
        "diffusers.quantizers.torchao.torchao_quantizer",
        "Unable to import `torchao` Tensor objects",
    ): "diffusers looks for classes of an earlier torchao; only models that torchao has quantised would need them",
    (
        "bitsandbytes.backends.cpu.ops",
        "Failed to load CPU gemm_4bit_forward",
    ): "a faster product for models in 4 bits on CPUs, which nothing here uses",
    ("finetrainers", "Error during training: "): "what ends a run, which the command says in its last line",
}

_held_back: dict[str, str] = {}
_show = False


def hold_back() -> None:
    """Keeps the messages from being shown, from here on."""
    for name in {logger for logger, _ in _MEANINGS}:
        logging.getLogger(name).addFilter(_is_shown)
    # diffusers gives it to huggingface_hub, which no longer takes it.
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument")


def show() -> None:
    """Lets all messages through again."""
    global _show
    _show = True


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return "\n".join(map(escaped, super().getMessage().split("\n")))


def escape() -> None:
    """Has warnings, and what anybody logs, shown `escaped` from here on; what is logged keeps its lines."""
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _format_warning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"{filename}:{lineno}: {category.__name__}: {escaped(message)}\n"


@contextlib.contextmanager
def no_warnings(*loggers: str) -> Iterator[None]:
    """Keeps the warnings of libraries, by the names of their loggers, from being shown."""
    levels = {logger: logger.level for logger in map(logging.getLogger, loggers)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def held_back() -> dict[str, str]:
    """The messages that were held back in this process, each with what it means."""
    return dict(_held_back)


def _is_shown(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    for (logger, beginning), meaning in _MEANINGS.items():
        if record.name == logger and message.startswith(beginning):
            _held_back[re.sub(r"/\S*/", "", message.partition(": Could not")[0])] = meaning
            return _show
    return True
