"""Counts the bytes of text in tokens, which makes models with different tokenizers comparable."""

from __future__ import annotations

import torch
from jaxtyping import Int
from tokenizers import decoders
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from decausal.data.encode import SpecialTokens


class ByteCounter:
    """Counts the UTF-8 bytes of tokens' text. Special tokens (EOS, turn markers) have none.

    The tokens of a byte-level BPE (GPT-2, Llama-3, Qwen, ...) are strings with one character per byte. So the count is
    exact and a sum over tokens, even if a row ends within a character. Tokens of other tokenizers are decoded together.
    That is exact except for characters cut at a row's end and a space that the decoder strips.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._bytes_of_token = _bytes_of_tokens(tokenizer) if _is_byte_level(tokenizer) else None

    def __call__(self, ids: Int[Tensor, " n"]) -> int:
        """Returns the number of bytes of tokens of one document, in their order."""
        if self._bytes_of_token is not None:
            return int(self._bytes_of_token[ids].sum())
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.encode("utf-8", errors="replace"))


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and isinstance(backend.decoder, decoders.ByteLevel)


def _bytes_of_tokens(tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, " V"]:
    vocabulary = tokenizer.get_vocab()
    num_bytes = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.int64)
    for token, token_id in vocabulary.items():
        num_bytes[token_id] = len(token)
    for token_id, added in tokenizer.added_tokens_decoder.items():  # these are plain text, not one character per byte
        num_bytes[token_id] = len(added.content.encode())
    num_bytes[torch.from_numpy(SpecialTokens(tokenizer).ids).long()] = 0
    return num_bytes
