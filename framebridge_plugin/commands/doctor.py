"""What `finetrainers doctor` prints: versions, repairs, devices, decoders, and what to do about each problem."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from dataclasses import dataclass, field

from packaging.requirements import Requirement

from framebridge_plugin import library_messages
from framebridge_plugin.backbones.facts import broken_backbones
from framebridge_plugin.errors import FrameBridgeError, in_one_line, print_line, print_lines

DISTRIBUTION = "framebridge-plugin"


@dataclass
class Problems:
    """One line for each problem that was found: what is wrong and what to do."""

    preventing: list[str] = field(default_factory=list)
    """Nothing can be trained before these are solved."""

    other: list[str] = field(default_factory=list)
    """Training may work all the same."""


def run_doctor() -> int:
    """Prints a report on this installation."""
    problems = Problems()
    _report_versions(problems)
    _report_devices(problems)
    _report_decoders(problems)
    _report_repairs(problems)
    problems.other.extend(broken_backbones())
    _report_held_back()
    if not problems.preventing and not problems.other:
        print_lines("\nNo problems found.")
    for title, lines in (("Problems that prevent training", problems.preventing), ("Other problems", problems.other)):
        if lines:
            print_lines(f"\n{title}")
            for line in lines:
                print_line(f"  {line}")
    return 1 if problems.preventing else 0


def _report_versions(problems: Problems) -> None:
    print_lines(f"Versions\n  python {platform.python_version()}")
    try:
        requirements = _requirements()
    except importlib.metadata.PackageNotFoundError:
        problems.preventing.append(f"{DISTRIBUTION} itself is not installed; run `pip install .` in its folder")
        return
    for name, requirement in requirements.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print_line(f"  {name} missing (needs {requirement.specifier or 'any version'})")
            problems.preventing.append(f"{name} is not installed; run `pip install '{requirement}'`")
            continue
        # A build such as 2.13.0+cpu counts as the version that it builds.
        fits = requirement.specifier.contains(version, prereleases=True)
        print_line(f"  {name} {version}" + ("" if fits else f" (tested: {requirement.specifier})"))
        if not fits:
            problems.other.append(
                f"{name} {version} is outside the tested range; if something fails, run `pip install '{requirement}'`"
            )


def _requirements() -> dict[str, Requirement]:
    listed = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or ()]
    return {
        requirement.name: requirement
        for requirement in listed
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }


def _report_devices(problems: Problems) -> None:
    print_lines(f"\nDevices\n  cpu with {os.cpu_count()} cores")
    try:
        import torch
    except Exception as error:
        problems.preventing.append(f"torch does not load ({_one_line(error)}); install it anew for this machine")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "with" if torch.cuda.is_bf16_supported(including_emulation=False) else "without"
        print_line(f"  cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bf16} bfloat16")
    if torch.version.cuda is not None and not torch.cuda.is_available():
        problems.other.append(
            f"torch is built for CUDA {torch.version.cuda} and finds no device, so training would run on the CPU; "
            "check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
        )


def _report_decoders(problems: Problems) -> None:
    print_lines("\nDecoders")
    needed = {"av": "reads the training clips", "decord": "finetrainers imports it", "imageio_ffmpeg": "writes videos"}
    for name, purpose in needed.items():
        try:
            module = importlib.import_module(name)
        except Exception as error:
            print_line(f"  {name} does not load")
            problems.preventing.append(
                f"{name} ({purpose}) does not load ({_one_line(error)}); run `pip install --force-reinstall "
                f"{name.replace('_', '-')}`"
            )
        else:
            print_line(f"  {name} {module.__version__} ({purpose})")


def _report_repairs(problems: Problems) -> None:
    try:
        from framebridge_plugin.training.finetrainers.compat import repair_status
        from framebridge_plugin.training.finetrainers.registration import register

        register()
    except Exception as error:
        text = str(error) if isinstance(error, FrameBridgeError) else f"registration fails: {_one_line(error)}"
        problems.preventing.append(text)
        if not isinstance(error, FrameBridgeError):
            return
    print_lines("\nRepairs of finetrainers and of what it stands on")
    states = {True: "active", False: "not needed", None: "not reached"}
    for repair, needed in repair_status():
        print_line(f"  {states[needed]:<11} {repair.name}: {repair.reason}")


def _report_held_back() -> None:
    if messages := library_messages.held_back():
        print_lines("\nWhat libraries say of each other, and is not shown elsewhere")
        for message, meaning in messages.items():
            print_line(f"  {message[:140]}")
            print_line(f"    {meaning}")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {in_one_line(error)[:200]}"
