"""Characters that are spread over tokens are whole wherever a row is shown."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from decausal.sampling.texts import text_after
from decausal.sampling.token_texts import BROKEN, TokenTexts
from tests.families import EOS, EOS_ID, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = TokenTexts(TOKENIZER)
ARABIC = "مرحبا"


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama-2's and Gemma's: words begin with a space that decoding drops from a text's first, bytes are tokens."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    model = models.BPE({name: i for i, name in enumerate(names)}, [("▁", "a")], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", clean_up_tokenization_spaces=False)


def ids_of(text: str, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab é€😀م ב漢", max_size=12), st.data())
def test_open_positions_put_no_broken_character_beside_them(text: str, data: st.DataObject) -> None:
    ids = ids_of(text)
    is_open = [data.draw(st.booleans()) for _ in ids]
    pieces = TEXTS.of([None if hidden else token for hidden, token in zip(is_open, ids, strict=True)])
    assert [piece is None for piece in pieces] == is_open
    assert BROKEN not in "".join(piece or "" for piece in pieces)
    assert "".join(TEXTS.of(ids)) == text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, EOS_ID), max_size=12))
def test_a_row_without_open_positions_is_its_text_whatever_its_bytes(ids: list[int]) -> None:
    found = "".join(TEXTS.of(ids))
    assert found.replace(BROKEN, "") == text_after(TOKENIZER, ids_of("a"), ids).replace(BROKEN, "")


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    ids = ids_of("a😀b")
    assert TEXTS.of(ids) == ["a", "", "", "", "😀", "b"]
    assert TEXTS.of([*ids[:3], None, *ids[4:]]) == ["a", "", "", None, "", "b"]
    assert TEXTS.of([ids[1], EOS_ID]) == ["", BROKEN]


def test_bytes_that_begin_a_character_in_vain_take_none_from_those_behind_them() -> None:
    first, *rest = ids_of("ࡡ")  # three bytes, a token each
    for count in range(5):
        found = TEXTS.of([*[first] * count, first, *rest])
        assert "".join(found).replace(BROKEN, "") == "ࡡ"


def test_special_tokens_have_names_where_they_are_shown() -> None:
    assert TEXTS.of([EOS_ID]) == [""]
    assert TokenTexts(TOKENIZER, shows_special=True).of([EOS_ID]) == [EOS]


@pytest.mark.parametrize("tokenizer", [TOKENIZER, byte_fallback_tokenizer()], ids=["byte-level", "byte fallback"])
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    texts, text = TokenTexts(tokenizer), f"a {ARABIC} 漢😀 a"
    ids = ids_of(text, tokenizer)
    assert b"".join(map(texts.bytes_of, ids)).decode().strip() == text
    assert "".join(texts.of(ids)).strip() == text
    half = ids_of("é", tokenizer)[-2]
    assert texts.name_of(half) == "bytes:\\xc3"
    assert texts.bytes_of(half) == b"\xc3"
