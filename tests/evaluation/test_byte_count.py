"""Bytes of tokens equal bytes of the text they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from decausal.evaluation.byte_count import ByteCounter
from tests.families import EOS, EOS_ID, tiny_tokenizer

BYTE_LEVEL = tiny_tokenizer(chat=True)
COUNT = ByteCounter(BYTE_LEVEL)


def _sentencepiece_like() -> PreTrainedTokenizerFast:
    pieces = ["▁the", "▁ten", "t", "é", "▁", *(f"<0x{byte:02X}>" for byte in range(256)), "</s>"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 100))
def test_any_text_cut_anywhere_has_its_bytes(text, cut):
    ids = _ids(BYTE_LEVEL, text)
    assert COUNT(ids) == len(text.encode())
    assert COUNT(ids[:cut]) + COUNT(ids[cut:]) == len(text.encode())


def test_a_part_of_a_character_counts_its_own_bytes():
    ids = _ids(BYTE_LEVEL, "€")
    assert [COUNT(ids[:n]) for n in range(4)] == [0, 1, 2, 3]


def test_special_tokens_stand_for_no_text():
    assert COUNT(_ids(BYTE_LEVEL, f"<|im_start|>the<|im_end|>{EOS}")) == 3
    assert COUNT(torch.tensor([EOS_ID])) == 0


def test_an_added_token_that_is_text_counts_as_written():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<é>"])
    assert ByteCounter(tokenizer)(_ids(tokenizer, "the<é>")) == 7


@pytest.mark.parametrize("text", [" the", " the tent", " ten é€"])
def test_other_tokenizers_are_counted_by_what_they_decode_to(text):
    tokenizer = _sentencepiece_like()
    ids = tokenizer.convert_tokens_to_ids({" the": ["▁the"], " the tent": ["▁the", "▁ten", "t"]}.get(text, []))
    if not ids:
        ids = tokenizer.convert_tokens_to_ids(["▁ten", "▁", "é", "<0xE2>", "<0x82>", "<0xAC>"])
    assert ByteCounter(tokenizer)(torch.tensor([*ids, tokenizer.eos_token_id])) == len(text.encode())
