"""What makes finetrainers 0.2.0 from the package index work with today's dependencies, on GPU and CPU.

Every repair stands behind the very condition that it repairs, and says in one line what it does and why. Where
upstream is healthy, nothing is touched. `apply_repairs` runs them all, once; `finetrainers doctor` lists them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import io
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from framebridge_plugin.errors import FrameBridgeError, UsageError
from framebridge_plugin.torchvision_repair import ensure_torchvision_operators
from framebridge_plugin.training.upstream_modules import MISSING_MODULES

_TRAINER_MODULES = (
    "finetrainers.trainer.sft_trainer.trainer",
    "finetrainers.trainer.control_trainer.trainer",
)


@dataclasses.dataclass(frozen=True)
class Repair:
    """One repair of finetrainers or of what it stands on.

    Args:
        name: Short name, as `finetrainers doctor` prints it.
        reason: What is repaired and why, in one line.
        needed: Whether the fault is there.
        apply: Repairs it.
    """

    name: str
    reason: str
    needed: Callable[[], bool]
    apply: Callable[[], object]


_active: dict[str, bool] = {}
_lock = threading.RLock()


def apply_repairs() -> dict[str, bool]:
    """Applies every repair that is needed, imports finetrainers, and is free when called again.

    Returns:
        Name of each repair -> whether it was needed.

    Raises:
        FrameBridgeError: If finetrainers still cannot be imported.
    """
    with _lock:
        if len(_active) == len(REPAIRS):
            return dict(_active)
        for repair in IMPORT_REPAIRS:
            _apply(repair)
        try:
            importlib.import_module("finetrainers")
        except Exception as error:
            raise FrameBridgeError(
                f"finetrainers cannot be imported ({type(error).__name__}: {' '.join(str(error).split())}); "
                "run `finetrainers doctor` and install the versions that it names"
            ) from error
        for repair in TRAINING_REPAIRS:
            _apply(repair)
        return dict(_active)


def _apply(repair: Repair) -> None:
    if repair.name not in _active:
        needed = repair.needed()
        if needed:
            repair.apply()
        _active[repair.name] = needed


# --- What `import finetrainers` needs ---------------------------------------------------------------------------------


class MissingModuleFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves `MISSING_MODULES`. It stands last on the meta path, so that a real module is always found first."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns a module's specification if it is one of the missing modules.

        Args:
            fullname: Dotted name of the module.
            path: Search path of the parent package; not used.
            target: Not used.

        Returns:
            The specification, or None for every other module.
        """
        if fullname not in MISSING_MODULES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=MISSING_MODULES[fullname] is None)

    def exec_module(self, module: types.ModuleType) -> None:
        """Fills a module with its functions.

        Args:
            module: The new, empty module.
        """
        vars(module).update(MISSING_MODULES[module.__name__] or {})


def _patch_modules_missing() -> bool:
    # `finetrainers` itself is only located: importing it is what fails.
    specification = importlib.util.find_spec("finetrainers")
    if specification is None or specification.origin is None:
        raise FrameBridgeError("finetrainers is not installed; run `pip install finetrainers==0.2.0`")
    patches = Path(specification.origin).parent / "patches"
    return not (patches / "dependencies").is_dir() or not (patches / "models").is_dir()


def _video_reader_missing() -> bool:
    import torchvision.io

    return not hasattr(torchvision.io, "video_reader")


def _supply_video_reader() -> None:
    import torchvision.io

    # finetrainers only asks whether a video is an instance of this class before it reads it. Where datasets decodes
    # with torchcodec, that is the class it must recognise.
    reader = types.ModuleType("torchvision.io.video_reader", "Stand-in for a module that torchvision has removed.")
    codec = load_torchcodec()
    reader.VideoReader = codec.VideoDecoder if codec else type("VideoReader", (), {})  # type: ignore[attr-defined]
    torchvision.io.video_reader = reader
    sys.modules[reader.__name__] = reader


@functools.cache
def load_torchcodec() -> types.ModuleType | None:
    """Returns `torchcodec.decoders`, or None where torchcodec is absent or does not load."""
    # A torchcodec that does not match torch or ffmpeg raises RuntimeError or OSError, not ImportError.
    with contextlib.suppress(Exception):
        return importlib.import_module("torchcodec.decoders")
    return None


# --- Reading videos through finetrainers' own data path ----------------------------------------------------------------


def _datasets_cannot_decode() -> bool:
    import datasets

    return int(datasets.__version__.split(".")[0]) >= 4 and load_torchcodec() is None


def _decode_with_decord() -> None:
    from datasets.features.video import Video

    def decode_example(self: Any, value: Any, token_per_repo_id: dict[str, Any] | None = None) -> Any:
        import decord
        from datasets.utils.file_utils import is_local_path, xopen

        if not self.decode:
            raise RuntimeError("Decoding is disabled for this feature; use Video(decode=True).")
        if not isinstance(value, (str, dict)):
            return value
        path, content = (value, None) if isinstance(value, str) else (value["path"], value["bytes"])
        if content is None and is_local_path(path):
            return decord.VideoReader(path)
        if content is None:
            with xopen(path, "rb") as file:
                content = file.read()
        return decord.VideoReader(io.BytesIO(content))

    Video.decode_example = decode_example


def _reads_frames_one_by_one() -> bool:
    import datasets

    # The branch that finetrainers takes from datasets 3.4 on expects torchvision's reader.
    return tuple(int(part) for part in datasets.__version__.split(".")[:2]) >= (3, 4)


def _read_whole_videos() -> None:
    module = importlib.import_module("finetrainers.data.dataset")
    original = module._preprocess_video

    @functools.wraps(original)
    def preprocess_video(video: Any) -> torch.Tensor:
        import decord

        codec = load_torchcodec()
        if isinstance(video, decord.VideoReader):
            frames = video.get_batch(range(len(video)))
            frames = frames if isinstance(frames, torch.Tensor) else torch.from_numpy(frames.asnumpy())
            video_FCHW = frames.permute(0, 3, 1, 2)
        elif codec is not None and isinstance(video, codec.VideoDecoder):
            video_FCHW = video[:]
        else:
            return original(video)
        return video_FCHW.contiguous().float() / 127.5 - 1.0

    module._preprocess_video = preprocess_video


# --- Training without a GPU --------------------------------------------------------------------------------------------


def _no_cuda() -> bool:
    return not torch.cuda.is_available()


def _no_accelerator() -> bool:
    from torch._utils import _get_available_device_type

    return _get_available_device_type() is None


def _name_the_cpu() -> None:
    for name in ("finetrainers.parallel.ptd", "finetrainers.parallel.accelerate", "finetrainers.state"):
        module = importlib.import_module(name)
        for attribute, value in {"_device_type": "cpu", "_device_module": torch.cpu}.items():
            if hasattr(module, attribute):
                setattr(module, attribute, value)


def _use_gloo() -> None:
    from finetrainers.parallel.ptd import PytorchDTensorParallelBackend

    original = PytorchDTensorParallelBackend.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "gloo"
        original(self, *args, **kwargs)

    PytorchDTensorParallelBackend.__init__ = __init__


def _skip_cuda_peak_memory() -> None:
    original = torch.cuda.reset_peak_memory_stats

    @functools.wraps(original)
    def reset_peak_memory_stats(*args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            original(*args, **kwargs)

    torch.cuda.reset_peak_memory_stats = reset_peak_memory_stats


def _round_none() -> None:
    module = importlib.import_module("finetrainers.utils.memory")

    def round_if_known(number: float | None, ndigits: int | None = None) -> float | None:
        return None if number is None else round(number, ndigits)

    # A module's global shadows the builtin, for this module alone.
    module.round = round_if_known  # type: ignore[attr-defined]


# --- Starting processes ------------------------------------------------------------------------------------------------

_ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


@contextlib.contextmanager
def _environment(additions: dict[str, str]) -> Iterator[None]:
    """Sets environment variables that are not set yet, and removes them afterwards."""
    added = {name: value for name, value in additions.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def refuse_unsynchronised_processes(parallel_backend: str, world_size: int) -> None:
    """Refuses finetrainers' `accelerate` backend with more than one process.

    Args:
        parallel_backend: "accelerate" or "ptd".
        world_size: Number of processes.

    Raises:
        UsageError: If the combination does not train one model.
    """
    if parallel_backend == "accelerate" and world_size > 1:
        raise UsageError(
            f"parallel_backend=accelerate with {world_size} processes does not synchronise gradients (finetrainers "
            "drops the DDP wrapper), so every process would train a model of its own; use parallel_backend=ptd"
        )


def _wrap_init_distributed(wrap: Callable[[Callable[[Any], None]], Callable[[Any], None]]) -> None:
    for name in _TRAINER_MODULES:
        module = importlib.import_module(name)
        trainer = module.SFTTrainer if "sft" in name else module.ControlTrainer
        trainer._init_distributed = functools.wraps(trainer._init_distributed)(wrap(trainer._init_distributed))


def _backend_name(args: Any) -> str:
    return str(getattr(args.parallel_backend, "value", args.parallel_backend))


def _count_a_lone_process_as_one() -> None:
    def wrap(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def _init_distributed(self: Any) -> None:
            # A process that no launcher has started is alone, however many devices it sees. The other variables must
            # stay away from accelerate: it would take them for a launcher's.
            alone = {"WORLD_SIZE": "1"} | (_ONE_PROCESS if _backend_name(self.args) == "ptd" else {})
            with _environment(alone if os.environ.get("WORLD_SIZE", "1") == "1" else {}):
                original(self)

        return _init_distributed

    _wrap_init_distributed(wrap)


def _refuse_accelerate_processes() -> None:
    def wrap(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def _init_distributed(self: Any) -> None:
            refuse_unsynchronised_processes(_backend_name(self.args), int(os.environ.get("WORLD_SIZE", "1")))
            original(self)

        return _init_distributed

    _wrap_init_distributed(wrap)


def _release_0_2_0() -> bool:
    return importlib.metadata.version("finetrainers") == "0.2.0"


def _parallel_backend_default_refused() -> bool:
    from finetrainers.parallel import ParallelBackendEnum

    return str(ParallelBackendEnum.ACCELERATE) != ParallelBackendEnum.ACCELERATE.value


def _name_default_parallel_backend() -> None:
    after_adding_arguments(
        "_add_parallel_arguments",
        lambda parser: parser.set_defaults(parallel_backend="accelerate"),
    )


def after_adding_arguments(function: str, change: Callable[[Any], object]) -> None:
    """Lets `change` adapt the parser after one of finetrainers' functions has added its arguments.

    Args:
        function: Name of the function in `finetrainers.args`.
        change: Receives the parser.
    """
    module = importlib.import_module("finetrainers.args")
    original = getattr(module, function)

    @functools.wraps(original)
    def add_arguments(parser: Any) -> None:
        original(parser)
        change(parser)

    setattr(module, function, add_arguments)


# --- Saving and resuming -----------------------------------------------------------------------------------------------


def _accelerate_forgets_its_states() -> bool:
    from finetrainers.state import TrainState

    return TrainState not in torch.serialization.get_safe_globals()


def _resume_accelerate() -> None:
    from finetrainers.parallel.accelerate import AccelerateCheckpointer
    from finetrainers.state import TrainState

    torch.serialization.add_safe_globals([TrainState])
    original = AccelerateCheckpointer.load

    @functools.wraps(original)
    def load(self: Any, *args: Any, **kwargs: Any) -> bool:
        live = self.states
        loaded = original(self, *args, **kwargs)
        # finetrainers replaces its dictionary of states by what it has read, while the trainer keeps counting in the
        # objects that were in the dictionary before.
        for name, state in self.states.items():
            if name in live and state is not live[name]:
                vars(live[name]).update(vars(state))
        self.states = live
        return loaded

    AccelerateCheckpointer.load = load


_COUNTERS = ("step", "observed_data_samples", "observed_num_tokens")


def _counters_overflow() -> bool:
    from finetrainers.state import TrainState

    try:
        TrainState(observed_num_tokens=2**31).state_dict()
    except (RuntimeError, OverflowError):
        return True
    return False


def _count_in_64_bits() -> None:
    from finetrainers.state import TrainState

    original = TrainState.state_dict

    @functools.wraps(original)
    def state_dict(self: Any) -> dict[str, Any]:
        state = original(dataclasses.replace(self, **dict.fromkeys(_COUNTERS, 0)))
        return state | {name: torch.tensor(getattr(self, name), dtype=torch.int64) for name in _COUNTERS}

    TrainState.state_dict = state_dict


_WRAPPER = "_checkpoint_wrapped_module."


def _peft_overlooks_checkpointed_layers() -> bool:
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(1, 1)))
    inject_adapter_in_model(LoraConfig(r=1, target_modules=["0.0"]), model)
    _checkpoint_wrap(model, "0")
    return not get_peft_model_state_dict(model)


def _checkpoint_wrap(model: torch.nn.Module, name: str) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    setattr(model, name, checkpoint_wrapper(getattr(model, name)))


def _find_checkpointed_lora_layers() -> None:
    for name in _TRAINER_MODULES:
        module = importlib.import_module(name)
        module.get_peft_model_state_dict = _with_module_names(module.get_peft_model_state_dict)


def _with_module_names(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(original)
    def get_peft_model_state_dict(
        model: torch.nn.Module, state_dict: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        # peft looks for the modules' names in the state dict, whose names lack the checkpoint wrapper.
        state_dict = model.state_dict() if state_dict is None else state_dict
        names = {name.replace(_WRAPPER, ""): name for name, _ in model.named_parameters()}
        state_dict = {names.get(key, key): value for key, value in state_dict.items()}
        found = original(model, state_dict, *args, **kwargs)
        return {key.replace(_WRAPPER, ""): value for key, value in found.items()}

    return get_peft_model_state_dict


IMPORT_REPAIRS = (
    Repair(
        "torchvision operators",
        "declares torchvision::nms, because a CUDA build of torchvision does not load beside a CPU torch",
        ensure_torchvision_operators,
        lambda: None,
    ),
    Repair(
        "torchvision video reader",
        "a stand-in for torchvision.io.video_reader, which finetrainers names and torchvision 0.28 has removed",
        _video_reader_missing,
        _supply_video_reader,
    ),
    Repair(
        "missing modules",
        "supplies finetrainers.patches.dependencies and .models, which the wheel imports and does not contain",
        _patch_modules_missing,
        lambda: sys.meta_path.append(MissingModuleFinder()),
    ),
)
TRAINING_REPAIRS = (
    Repair(
        "video decoding",
        "lets datasets decode with decord, because datasets 4 and later need torchcodec, which does not load here",
        _datasets_cannot_decode,
        _decode_with_decord,
    ),
    Repair(
        "video reading",
        "reads decord and torchcodec readers, because finetrainers expects torchvision's from datasets 3.4 on",
        _reads_frames_one_by_one,
        _read_whole_videos,
    ),
    Repair(
        "device name",
        "names the cpu as the device, because finetrainers assumes cuda where it finds no accelerator",
        _no_accelerator,
        _name_the_cpu,
    ),
    Repair("gloo", "starts ptd with gloo, because finetrainers asks for nccl, which needs CUDA", _no_cuda, _use_gloo),
    Repair(
        "peak memory",
        "skips torch.cuda.reset_peak_memory_stats, which fails without CUDA",
        _no_cuda,
        _skip_cuda_peak_memory,
    ),
    Repair(
        "memory statistics",
        "leaves unknown memory figures None, because finetrainers rounds them all without CUDA",
        _no_cuda,
        _round_none,
    ),
    Repair(
        "single process",
        "counts a process that no launcher has started as one, because finetrainers counts the GPUs instead",
        _release_0_2_0,
        _count_a_lone_process_as_one,
    ),
    Repair(
        "accelerate processes",
        "refuses accelerate with more than one process, because finetrainers would not synchronise their gradients",
        _release_0_2_0,
        _refuse_accelerate_processes,
    ),
    Repair(
        "parallel backend default",
        "makes accelerate the default by its name, because the default as an enum is refused later",
        _parallel_backend_default_refused,
        _name_default_parallel_backend,
    ),
    Repair(
        "resume with accelerate",
        "allow-lists the training state for weights_only loading and copies it into the live objects",
        _accelerate_forgets_its_states,
        _resume_accelerate,
    ),
    Repair(
        "counters",
        "stores step, sample and token counts in 64 bits, because saving fails after 2^31 tokens",
        _counters_overflow,
        _count_in_64_bits,
    ),
    Repair(
        "checkpointed LoRA layers",
        "finds LoRA weights inside checkpoint wrappers, because peft 0.21 and later save none of them",
        _peft_overlooks_checkpointed_layers,
        _find_checkpointed_lora_layers,
    ),
)
REPAIRS = IMPORT_REPAIRS + TRAINING_REPAIRS
