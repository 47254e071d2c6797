"""Opens kept tokens again at random, so that they can be decided again with more context.

Source: ReMDM (arXiv 2503.00307). Going from alpha_t kept to alpha_s kept, each kept token is opened with probability
    sigma <= min(1, (1 - alpha_s) / alpha_t). Then enough masked ones are kept to reach alpha_s. Here alpha is the kept
    share of the window's positions, and a step leaves exactly as many kept as are due.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from decausal.sampling.bidirectional.decode_windows import Window
from decausal.sampling.drawing import uniform_numbers
from decausal.sampling.selection import LOOP_START, LOOP_STOP, best, num_due

OPENING_STEPS = 2**40
"""Added to the step, so that opening a position and drawing its token use different numbers."""


def opened_at_random(
    window: Window, is_masked: Bool[Tensor, "A T"], seeds: Int[Tensor, " A"], step: Int[Tensor, " A"]
) -> Bool[Tensor, "A T"]:
    """Draws the kept positions of the current windows that are opened in this step; none in rows without remasking.

    Args:
        window: The current window of each row.
        is_masked: Its masked positions.
        seeds: One per row.
        step: The row's steps so far.
    """
    settings = window.settings
    is_kept = window.is_inside & ~is_masked & settings.has_remask("remdm", "remdm_loop")[:, None]
    num_open, num_kept = window.is_inside.sum(1), is_kept.sum(1)
    num_left = num_open - num_due(num_open, settings, window.step)
    rate = torch.minimum(settings.remask_rate, num_left / num_kept.clamp(min=1))
    if "remdm_loop" in settings.remasks:
        share = (window.step + 1) / settings.num_steps
        is_outside = settings.has_remask("remdm_loop") & ((share <= LOOP_START) | (share > LOOP_STOP))
        rate = rate.masked_fill(is_outside, 0)
    length = is_masked.shape[1]
    position = torch.arange(length, device=seeds.device).repeat(len(seeds))
    row = torch.arange(len(seeds), device=seeds.device).repeat_interleave(length)
    numbers = uniform_numbers(seeds[row], step[row] + OPENING_STEPS, position).view_as(is_masked)
    is_drawn = is_kept & (numbers < rate[:, None])
    # More may be drawn than masked positions can replace: then those with the lowest numbers are opened.
    return is_drawn & best(numbers.neg().masked_fill(~is_drawn, -torch.inf), num_left)
