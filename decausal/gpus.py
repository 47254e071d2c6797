"""What GPUs can do, according to their makers' data sheets. Nothing here was measured by this project."""

from __future__ import annotations

from dataclasses import dataclass

REACHED_MATRIX_SHARE = 790 / 989
"""Share of a data sheet's matrix rate that large products reach: measured by others on an H200."""
REACHED_BANDWIDTH_SHARE = 4.3 / 4.8
"""Share of its bandwidth that large copies reach: also measured by others."""


@dataclass(frozen=True)
class Gpu:
    """A data sheet.

    Attributes:
        label: Its usual name.
        memory: Bytes.
        peak_rate: Floating-point operations per second of dense bf16 matrix products, summed in fp32.
        peak_bandwidth: Bytes per second.
    """

    label: str
    memory: float
    peak_rate: float
    peak_bandwidth: float

    @property
    def matrix_rate(self) -> float:
        """Operations per second that large matrix products reach."""
        return REACHED_MATRIX_SHARE * self.peak_rate

    @property
    def bandwidth(self) -> float:
        """Bytes per second that large kernels reach."""
        return REACHED_BANDWIDTH_SHARE * self.peak_bandwidth


GPUS = {
    "a100-40": Gpu("A100 SXM 40 GB", 40e9, 312e12, 1.555e12),
    "a100-80": Gpu("A100 SXM 80 GB", 80e9, 312e12, 2.039e12),
    "b200": Gpu("B200 SXM", 180e9, 2250e12, 8.0e12),
    "h100": Gpu("H100 SXM", 80e9, 989e12, 3.35e12),
    "h200": Gpu("H200 SXM", 141e9, 989e12, 4.8e12),
    "l4": Gpu("L4", 24e9, 121e12, 0.3e12),
    "l40s": Gpu("L40S", 48e9, 362e12, 0.864e12),
    "rtx4090": Gpu("GeForce RTX 4090", 24e9, 165e12, 1.008e12),
}
