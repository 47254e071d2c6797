"""What a figure was measured with: hardware, versions and commit. Every report, model card and benchmark carries it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("decausal", "torch", "transformers", "accelerate", "tokenizers", "numpy", "matplotlib")


def provenance() -> dict[str, Any]:
    """Returns date (UTC), commit, hardware and versions, by name."""
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return {"date": date, "commit": commit(), "hardware": hardware(), "versions": versions()}


def commit() -> str:
    """Returns the commit of the checkout that the package runs from, or "installed" outside of one."""
    package = Path(__file__).parent
    if not (package.parent / ".git").exists():  # a project around a virtual environment has a commit of its own
        return "installed"
    command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Returns the version of Python and of each library that figures depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that is not installed
            found[package] = "not installed"
    return found


def hardware() -> dict[str, Any]:
    """Returns the processor, memory and GPUs that a run can use."""
    import torch

    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "system": platform.platform(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = f"{torch.cuda.device_count()}x {torch.cuda.get_device_name()}"
    return facts


def usable_cores() -> int:
    """Returns how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):  # not available on this system
        return None
