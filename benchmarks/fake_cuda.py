"""Tensors that claim to be on CUDA where there is no GPU: they have shapes and no numbers, and nothing is computed.

Unlike those on `meta` they take every path that is written for CUDA, autocast's included, and what mixes them with
tensors of the host is an error. PyTorch makes no backward pass on them without a GPU's driver.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.cpp_extension import get_cxx_compiler, load

CUDA = torch.device("cuda", 0)
# Some operators set the current device, and ask whoever registered for CUDA to do it.
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""


def lacking() -> str | None:
    """Returns what such tensors lack here, or None."""
    if torch.cuda.is_available():
        return "there is a GPU, whose own tensors are the real ones"
    if shutil.which(get_cxx_compiler()) is None or shutil.which("ninja") is None:
        return "there is no C++ compiler, or no ninja"
    _load_guard()
    return None


@cache
def _load_guard() -> None:
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "guard.cpp"
        source.write_text(_GUARD)
        load("fake_cuda_guard", [str(source)], build_directory=directory, is_python_module=False)


@contextmanager
def fake_cuda(autocast: torch.dtype | None = None) -> Iterator[None]:
    """Makes tensors without numbers; those of the host become such tensors where they meet.

    Args:
        autocast: The type in which matrix products are computed.
    """
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    # transformers leaves out what reads numbers when it sees such tensors, and this would hide that it reads them.
    with (
        patch("transformers.utils.import_utils.is_fake_tensor", lambda _: False),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        torch.set_autocast_enabled("cuda", autocast is not None)
        torch.set_autocast_dtype("cuda", autocast or before[1])
        try:
            yield
        finally:
            torch.clear_autocast_cache()
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])
