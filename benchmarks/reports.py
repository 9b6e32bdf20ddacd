"""What benchmarks print and write besides their numbers."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("framebridge-plugin", "torch", "diffusers", "transformers", "finetrainers")


def environment(device: torch.device) -> dict[str, Any]:
    """What numbers depend on besides the code."""
    processors = Path("/proc/cpuinfo").read_text()
    names = [line.split(":")[1].strip() for line in processors.splitlines() if "model name" in line]
    bf16 = "with" if "avx512_bf16" in processors else "without"
    cpu = f"CPU, {names[0] if names else platform.processor()} ({bf16} bfloat16)"
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }


def environment_line(about: dict[str, Any]) -> str:
    """The environment in a sentence."""
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    load = f"Load average {about['load_average_before']:.1f} before, {about['load_average_after']:.1f} after."
    return f"{about['date']}, {about['device']}, threads: {about['threads']}; {versions}. {load}"


def write_results(output: Path | None, results: dict[str, Any], as_table: Callable[[dict[str, Any]], str]) -> None:
    """Prints the table of results, which have their `environment`, and writes OUTPUT.json and OUTPUT.md."""
    results["environment"]["load_average_after"] = os.getloadavg()[0]
    table = as_table(results)
    print(table)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{output}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        Path(f"{output}.md").write_text(table, encoding="utf-8")
