"""The mask token for other programs: its id there, and how they are kept from predicting it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from decausal.errors import UserError

ENGINE_MASK_TOKEN_ID = 151669
"""The id that SGLang and LMDeploy use for SDAR's mask token, whatever config.json says."""
SDAR_MASK_TOKEN = "<|MASK|>"


def engine_mask_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """Gives the tokenizer the mask token id that engines expect, in place, if the vocabulary is large enough.

    Returns:
        The mask token's new id: 151669, or the old one if the vocabulary is too small.

    Raises:
        UserError: Id 151669 belongs to another token, or the tokenizer cannot add it.
    """
    if tokenizer.mask_token_id == ENGINE_MASK_TOKEN_ID or vocab_size <= ENGINE_MASK_TOKEN_ID:
        return tokenizer.mask_token_id
    taken = tokenizer.convert_ids_to_tokens(ENGINE_MASK_TOKEN_ID) if len(tokenizer) > ENGINE_MASK_TOKEN_ID else None
    if taken is not None:
        raise UserError(
            f"SGLang and LMDeploy take token {ENGINE_MASK_TOKEN_ID} for SDAR's mask token, but here that is '{taken}'; "
            f"such a model cannot be served as SDAR (--format hf keeps it as it is)"
        )
    add_mask_token(tokenizer, ENGINE_MASK_TOKEN_ID)
    return ENGINE_MASK_TOKEN_ID


def add_mask_token(tokenizer: PreTrainedTokenizerBase, token_id: int) -> None:
    """Makes `token_id` the tokenizer's mask token, in place. It is the token with this id, or a new one.

    Raises:
        UserError: The tokenizer has no such token, and the next one that it can add has another id.
    """
    known = {found: text for text, found in tokenizer.get_vocab().items()}
    text = known.get(token_id, SDAR_MASK_TOKEN)
    if token_id not in known and (len(tokenizer) != token_id or SDAR_MASK_TOKEN in known.values()):
        raise UserError(
            f"the mask token should have id {token_id}, but the tokenizer has no such token and the next one that it "
            f"can add would have id {len(tokenizer)}"
        )
    tokenizer.add_special_tokens({"mask_token": text})


def never_predicted(head: Float[Tensor, "V D"], token_ids: list[int], trained_ids: list[int]) -> Float[Tensor, "V D"]:
    """Returns a copy of an output head under which none of `token_ids` is ever the most probable token.

    decausal never predicts the mask token, so its row of the head is not trained to stay low. But engines take the
    argmax over all rows, and an engine that answered "mask" would never finish. The rows become the mean of the trained
    ones. Their logit is then the mean of the other logits, below the largest, and their probability is below one over
    the number of tokens.

    Args:
        head: Weight of the head.
        token_ids: Rows to silence.
        trained_ids: Rows of the tokens that may be predicted.
    """
    silenced = head.clone()
    kept = sorted(set(trained_ids) - set(token_ids))
    silenced[token_ids] = head[kept].mean(dim=0, dtype=torch.float32).to(head.dtype)
    return silenced
