"""Every choice that depends on the device is made here.

The choices for CUDA are computed from the rates below, not measured. docs/performance.md explains them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from decausal.gpus import GPUS

BANDWIDTH = GPUS["h200"].bandwidth
"""Bytes per second that kernels read on an H200."""
MATRIX_RATE = GPUS["h200"].matrix_rate
"""Floating-point operations per second of its large matrix products in bf16."""
LAUNCH = 5e-6
"""Seconds that the host needs to start a kernel."""
LAUNCH_IN_GRAPH = 2e-6
"""Seconds between two kernels of a CUDA graph."""
KERNELS_PER_LAYER = 62
"""Kernels of one layer in a decoding pass without fusion, counted at Qwen3-0.6B's shape."""
COMPILATION = 90.0
"""Seconds that compiling the layers of a training step takes: a guess."""
COMPILED_GAIN = 0.2
"""Share of a step's time that compiled layers save: estimated."""
USUAL_UTILISATION = 0.3
"""Share of `MATRIX_RATE` that a training step reaches without them: estimated."""


@dataclass(frozen=True)
class Choices:
    """The right choices for a device.

    Attributes:
        dtype_to_decode: Type of weights that only decode. On CUDA float32 is an order of magnitude slower.
        is_mixed: Training computes in bfloat16 on float32 weights.
        has_flex: Training uses FlexAttention, which skips what no query reads.
        row_multiple: Training rows of varying length are padded to multiples of this: FlexAttention's blocks are 128.
        logits_bytes: fp32 logits that a loss holds at a time. CPU: the fastest of 4 to 64 MB on one core at V = 4096
            and 32000; 32 rows were a quarter slower than 64 or more. CUDA: large products, small beside activations.
        free_queries: Tokens of a decoding pass that take as long as it takes to begin one and to read the weights. CPU:
            on one core 16 for a model of 135M parameters in fp32, and twice as many in bf16. CUDA: from the rates.
        prompt_tokens: Most tokens of prompts that a pass of verified decoding reads while other rows wait for it.
        records: Passes of block models and of verified decoding are recorded and replayed, and prompts are read apart.
        checks_memory: The memory of a run is counted before it begins, and a run that would not fit is refused.
    """

    dtype_to_decode: torch.dtype
    is_mixed: bool
    has_flex: bool
    row_multiple: int
    logits_bytes: int
    free_queries: float
    prompt_tokens: int
    records: bool
    checks_memory: bool


ON_CPU = Choices(
    dtype_to_decode=torch.float32,
    is_mixed=False,
    has_flex=False,
    row_multiple=1,
    logits_bytes=16 * 2**20,
    free_queries=16.0,
    prompt_tokens=512,
    records=False,
    checks_memory=False,
)
ON_CUDA = Choices(
    dtype_to_decode=torch.bfloat16,
    is_mixed=True,
    has_flex=True,
    row_multiple=128,
    logits_bytes=2**30,
    free_queries=MATRIX_RATE / BANDWIDTH,
    prompt_tokens=2048,
    records=True,
    checks_memory=True,
)


_META: ContextVar[tuple[str, torch.dtype | None]] = ContextVar("_META", default=("cpu", None))


@contextmanager
def meta_as(device: torch.device | str, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Treats tensors without numbers (`meta`) like those of another device, to count what that device would do.

    Args:
        device: The device.
        autocast: The type in which it computes matrix products, if not in that of the weights.
    """
    before = _META.set((torch.device(device).type, autocast))
    try:
        yield
    finally:
        _META.reset(before)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Returns the type in which autocast computes matrix products on a device now; None if it is off."""
    if device_type == "meta":
        return _META.get()[1]
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def clock(device: torch.device) -> float:
    """Returns the current time in seconds, once the device has finished all its work.

    On one thread of a CPU it is processor time, which leaves out what other processes used meanwhile.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    is_alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if is_alone else time.perf_counter()


def best_device() -> torch.device:
    """Returns CUDA where there is a GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choices(device: torch.device | str) -> Choices:
    """Returns the right choices for a device. Other accelerators are treated like a CPU, where nothing is assumed."""
    kind = torch.device(device).type
    return ON_CUDA if (_META.get()[0] if kind == "meta" else kind) == "cuda" else ON_CPU


def multiplies_bf16(device: torch.device) -> bool:
    """Returns whether a GPU has matrix units for bfloat16."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def is_fast_in_bf16() -> bool:
    """Returns whether the device that trains multiplies bfloat16 matrices in hardware.

    With AVX512-BF16 or AMX a step takes about 0.6 of its time in fp32. Without them it takes longer.
    """
    if torch.cuda.is_available():
        return multiplies_bf16(best_device())
    # torch has only private names for these two
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)


def decoding_dtype(device: torch.device) -> torch.dtype:
    """Returns the type of weights that only decode."""
    return choices(device).dtype_to_decode


def repays_compilation(device: torch.device, num_operations: float) -> bool:
    """Returns whether compiled layers save more time in a run of `num_operations` than compiling takes."""
    if torch.device(device).type != "cuda":
        return False
    return COMPILED_GAIN * num_operations / (USUAL_UTILISATION * MATRIX_RATE) > COMPILATION


def free_operations(device: torch.device, num_layers: int, num_weights: int) -> float:
    """Returns the floating-point operations of padding that cost less than another call of the model.

    CPU: with 8 and 32 rows out of step, 4e8 to 8e8 was faster than 0, 2e8 or no limit (embedded shape, one thread).
    CUDA: what the matrix units do while another pass is started and reads all weights in bf16.
    """
    if torch.device(device).type != "cuda":
        return 6e8
    launches = num_layers * KERNELS_PER_LAYER * LAUNCH
    return MATRIX_RATE * (launches + 2 * num_weights / BANDWIDTH)
