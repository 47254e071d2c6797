"""Where a model runs, and in which type, when nobody says so."""

from __future__ import annotations

import torch


def best_device() -> torch.device:
    """Returns CUDA where there is a GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def decoding_dtype(device: torch.device) -> torch.dtype:
    """Returns the type of weights that only decode: bfloat16 on a GPU, where float32 is an order slower."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
