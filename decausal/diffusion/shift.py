"""The shift: which position's state predicts a token.

An autoregressive head reads the state at position i-1 to predict token i. Shift 1 keeps that; shift 0 moves the
prediction of token i to the state at position i.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from decausal.errors import UserError


def predicting_index(token_index: Int[Tensor, " n"], shift: int) -> Int[Tensor, " n"]:
    """Returns the index of the state that predicts each token.

    Args:
        token_index: Flat indices of `predictable` tokens in [B, T] (with shift 1 a document's first token has no
            predicting state: its predecessor belongs to another document or row).
        shift: 0 or 1.

    Raises:
        UserError: If the shift is neither 0 nor 1.
    """
    _check(shift)
    return token_index - shift


def predictable(document_ids: Int[Tensor, "B T"], shift: int) -> Bool[Tensor, "B T"]:
    """Returns which tokens have a predicting state.

    All have one except padding (document -1) and, with shift 1, the first token of each document.

    Raises:
        UserError: If the shift is neither 0 nor 1.
    """
    _check(shift)
    is_predictable = document_ids >= 0
    if shift == 1:
        follows_own_document = torch.zeros_like(is_predictable)
        follows_own_document[:, 1:] = document_ids[:, 1:] == document_ids[:, :-1]
        is_predictable = is_predictable & follows_own_document
    return is_predictable


def _check(shift: int) -> None:
    if shift not in (0, 1):
        raise UserError(f"shift {shift} is not possible; accepted: 0 (state i predicts token i) or 1 (state i-1 does)")
