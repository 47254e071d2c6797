"""What is counted in a batch: what losses are means over, and the tokens that a run has trained on."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor


class Count(StrEnum):
    """Names of a batch's counts. They are summed over the whole global batch.

    Attributes:
        CLEAN: tokens of the clean rows, prompts included, padding not.
        SUPERVISED: targets, over all views.
        GENERATED: tokens of the rollouts that were made for the batch; absent where it holds none.
        TOKENS: what the token loss is a mean over: targets, or under weights 1/t all tokens that could have been.
        ALIGNED: aligned states.
        NEXT_TOKENS: weights of the targets, where next-token distributions are compared.
        FINISHED: finished tokens that the AR model can predict.
    """

    CLEAN = "clean"
    SUPERVISED = "supervised"
    GENERATED = "generated"
    TOKENS = "tokens"
    ALIGNED = "aligned"
    NEXT_TOKENS = "next_tokens"
    FINISHED = "finished"


def counted(**counts: int | float) -> dict[str, Tensor]:
    """Returns a batch's counts as scalars, by the values of `Count`."""
    return {Count(name).value: torch.tensor(float(count), dtype=torch.float64) for name, count in counts.items()}
