"""Decode windows: the open positions of a row that are decided at a time, from left to right.

A row's open positions are divided, from the left, into windows of `window` positions. Given tokens in between are not
counted. The current window is the leftmost one with a masked position. Positions are kept, and opened again, only in
the current window. Rows without a window are one window.

Source: semi-autoregressive decoding as in LLaDA (arXiv 2502.09992). The share of steps for each window is ours.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from decausal.sampling.row_settings import RowSettings


class Window(NamedTuple):
    """The current window of each row.

    Attributes:
        is_inside: Its open positions, including those already kept.
        settings: One per row, with the window's number of steps instead of the row's.
        step: Steps since the window began, under a static schedule.
    """

    is_inside: Bool[Tensor, "A T"]
    settings: RowSettings
    step: Int[Tensor, " A"]


def current_window(
    is_open: Bool[Tensor, "A T"], is_masked: Bool[Tensor, "A T"], settings: RowSettings, step: Int[Tensor, " A"]
) -> Window:
    """Finds the window that each row is in.

    Args:
        is_open: Positions that were not given.
        is_masked: Those that are not kept yet.
        settings: One per row.
        step: The row's steps so far.
    """
    if not settings.has_windows:
        return Window(is_open, settings, step)
    num_open = is_open.sum(1)
    size = torch.minimum(settings.window, num_open).clamp(min=1)
    number = (is_open.cumsum(1) - 1).clamp(min=0) // size[:, None]
    num_windows = (num_open + size - 1) // size
    current = number.masked_fill(~is_masked, torch.iinfo(number.dtype).max).amin(1).minimum(num_windows)
    is_inside = is_open & (number == current[:, None])
    # A window gets the steps between the shares of N before and after it. With at least as many steps as windows, that
    # is at least one, and never more than its positions unless there are more steps than positions.
    first, end = current * size, torch.minimum((current + 1) * size, num_open)
    most = torch.where(settings.has_remask("remdm", "remdm_loop"), settings.num_steps, num_open)
    num_steps = torch.maximum(torch.minimum(settings.num_steps, most), num_windows)
    whole = num_open.clamp(min=1)
    first_step = num_steps * first // whole
    own_steps = (num_steps * end // whole - first_step).clamp(min=1)
    return Window(is_inside, dataclasses.replace(settings, num_steps=own_steps), step - first_step)
