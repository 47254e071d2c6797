"""What a figure was measured with: hardware, versions, commit. Every report and model card carries it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def provenance() -> dict[str, str]:
    """Returns date (UTC), commit, hardware and the versions that decide numbers, as plain text by name."""
    import torch

    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "hardware": hardware(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("decausal", "torch", "transformers")},
    }


def commit() -> str:
    """Returns the commit of the checkout that the package runs from, or "installed" outside of one."""
    package = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "installed"
    is_ours = (package.parent / ".git").exists()  # not that of a project around a virtual environment
    return found.stdout.strip() if is_ours else "installed"


def hardware() -> str:
    """Returns the accelerator's name, or the processor's and its number of cores."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name(0)}"
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
