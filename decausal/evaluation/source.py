"""Loads the AR model that a converted one was made from, to measure it too."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decausal.errors import UserError
from decausal.models.adapt import load_source
from decausal.models.checkpoint import Converted


def source_of(converted: Converted) -> PreTrainedModel:
    """Loads the AR model that a converted one was made from, in its dtype and on its device.

    Raises:
        UserError: It is not available, or a model of this name has another vocabulary.
    """
    source, tokenizer = loaded_source(converted)
    if not is_same_vocabulary(converted.tokenizer, tokenizer):
        raise UserError(
            f"{converted.facts.source} has another tokenizer than the converted model, so their tokens do not compare: "
            "decausal eval nll compares bits per byte"
        )
    return source


def loaded_source(converted: Converted) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the AR model that a converted one was made from, in its dtype and on its device, whatever its tokenizer.

    Raises:
        UserError: It is not available.
    """
    model, _, facts = converted
    source, tokenizer = load_source(facts.source, dtype=model.dtype, revision=facts.source_revision, merge_adapter=True)
    return source.to(model.device), tokenizer


def is_same_vocabulary(tokenizer: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase) -> bool:
    """Returns whether every token of the source has the same id in the converted model."""
    vocabulary = tokenizer.get_vocab()
    return all(vocabulary.get(token) == token_id for token, token_id in source.get_vocab().items())
