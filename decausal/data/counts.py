"""What is counted in a batch: the denominators of the losses, and the tokens that a run has trained on."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor


class Count(StrEnum):
    """Names of a batch's counts. They are summed over the whole global batch.

    Attributes:
        CLEAN: Tokens of the clean rows, with prompts and without padding.
        SUPERVISED: Targets, over all views.
        GENERATED: Tokens of the rollouts that were made for the batch; absent if there are none.
        TOKENS: What the token loss is a mean over: targets, or with weights 1/t all tokens that could be masked.
        ALIGNED: Aligned states.
        NEXT_TOKENS: Sum of the targets' weights, where next-token distributions are compared.
        FINISHED: Finished tokens that the AR model can predict.
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
