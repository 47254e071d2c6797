"""The machine and the libraries: what they are, and how to keep the libraries quiet."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

_PACKAGES = ("decausal", "torch", "transformers", "accelerate", "tokenizers", "numpy", "matplotlib")


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
    """Returns what the run had at its disposal."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "system": platform.platform(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def usable_cores() -> int:
    """Returns how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_fast_in_bf16() -> bool:
    """Returns whether the device that trains multiplies bfloat16 matrices in hardware.

    On processors with AVX512-BF16 or AMX a step takes about 0.6 of its time in fp32; on others it takes longer.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch tells of these two under private names only
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Turns off the libraries' own progress bars and notes; the demo has its own. Errors are told still."""
    verbosity = transformers.logging.get_verbosity()
    had_bars = transformers.logging.is_progress_bar_enabled()
    had_datasets_bars = not datasets.are_progress_bars_disabled()
    fonts = logging.getLogger("matplotlib.font_manager")
    fonts_level = fonts.level
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    fonts.setLevel(logging.ERROR)
    try:
        yield
    finally:
        fonts.setLevel(fonts_level)
        if had_datasets_bars:
            datasets.enable_progress_bars()
        if had_bars:
            transformers.logging.enable_progress_bar()
        transformers.logging.set_verbosity(verbosity)


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
    except (AttributeError, OSError, ValueError):  # no such question on this system
        return None
