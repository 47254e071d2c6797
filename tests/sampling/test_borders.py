"""Tokens that cross from given text into a gap: what is given stays, and tokens are those of a whole text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from decausal.models.embedded import embedded_model_path
from decausal.sampling.borders import AllowedTokens, Border, Vocabulary, split_at_borders
from decausal.sampling.engines import engine_for
from decausal.sampling.filling.infilling import fill
from decausal.sampling.filling.lengths import GappedText
from decausal.sampling.jobs import Job, run
from decausal.sampling.settings import SamplerSettings
from decausal.sampling.texts import text_ids
from tests.families import tiny_tokenizer
from tests.sampling.tiny_models import converted

CODE = AutoTokenizer.from_pretrained(embedded_model_path("tiny"))
CHARACTERS = AutoTokenizer.from_pretrained(embedded_model_path("tiny-tasks"))
MODEL = converted()


@pytest.mark.parametrize(
    ("before", "gap", "after"),
    [
        ("def f():\n", "    return 1\n", "\ndef g():\n"),
        ("    if x is None:\n", "            seen = set()\n", "        x = 1\n"),
        ("    return ", "total", "\n"),
        ("import os", " as path", "\n"),
    ],
)
def test_parts_have_the_tokens_of_the_whole(before: str, gap: str, after: str) -> None:
    (first, last), (border,) = split_at_borders(CODE, [before, after], [None])
    whole = border.start + gap + border.end
    assert text_ids(CODE, first) + text_ids(CODE, whole) + text_ids(CODE, last) == text_ids(CODE, before + gap + after)
    assert border.inside(whole) == gap


@pytest.mark.parametrize("texts", [["x =", "\n"], ["def f(", ")"], ["", " x"], [" ", "x"], ["x", "  \n"]])
def test_texts_that_end_where_tokens_do_are_left_alone(texts: list[str]) -> None:
    assert split_at_borders(CODE, texts, [3]) == (texts, (Border(),))


def test_a_tokenizer_that_joins_nothing_has_no_borders() -> None:
    assert split_at_borders(CHARACTERS, ["add 12 ", "    =7"], [3])[1] == (Border(),)


class Tokens(list):
    """A tokenizer of these tokens, as far as a vocabulary asks it."""

    __hash__ = object.__hash__

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": []}

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return ["".join(self[token] for token in row) for row in rows]


def test_one_token_that_must_hold_both_sides_and_cannot_is_left_alone() -> None:
    vocabulary = Vocabulary(Tokens([" x", "\n  ", " "]))
    assert vocabulary.border("a ", "   b", 2) == Border(" ", "  ")
    assert vocabulary.border("a ", "   b", 1) == Border()
    vocabulary = Vocabulary(Tokens([" x", "\n  ", " ", " \n  "]))
    assert vocabulary.border("a ", "   b", 1) == Border(" ", "  ")


def test_long_indentations_leave_nothing_behind() -> None:
    vocabulary = Vocabulary(Tokens([" x", "\n  "]))
    for length in range(4, 20):
        assert vocabulary.border("a", " " * length + "b", 2) == Border()
    assert len(vocabulary._fitting) <= 2


def test_allowed_tokens_are_those_that_fit() -> None:
    table = AllowedTokens(CODE, len(CODE) + 3, torch.device("cpu"))
    numbers = table.numbers([range(4, 7), range(9, 10)], [Border("\n", " "), Border(" ", "  ")])
    assert numbers.keys() == {4, 6, 9}
    texts = [*Vocabulary.of(CODE).texts, "", "", ""]
    rules = {
        4: lambda text: text.startswith("\n"),
        6: lambda text: text.endswith(" ") and not text[:-1].endswith((" ", "\t")),
        9: lambda text: len(text) > 3 and text[0] == " " and text.endswith("  ") and text[-3] not in " \t",
    }
    for position, fits in rules.items():
        assert table.tokens[numbers[position]].tolist() == [fits(text) for text in texts]
    assert table.numbers([range(2)], [Border("\n")]) == {0: numbers[4]}  # made once


SPACED = st.lists(st.sampled_from(["the ", " a", "t", " ", "  he", "\n", "he \n ", "on "]), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(st.lists(SPACED.map("".join), min_size=2, max_size=3), st.data())
@pytest.mark.parametrize(
    "sampler", [{"num_steps": 1}, {"temperature": 1.5, "top_k": 9}, {"remask": "p2", "num_steps": 3}]
)
def test_what_is_given_stays_whatever_the_borders(
    sampler: dict[str, Any], texts: list[str], data: st.DataObject
) -> None:
    lengths = [data.draw(st.integers(1, 3)) for _ in texts[1:]]
    pieces: list[Any] = [texts[0]]
    for length, text in zip(lengths, texts[1:], strict=True):
        pieces += [length, text]
    filling = fill(MODEL, pieces, **sampler)
    gapped = GappedText.of(MODEL, texts, lengths, "the text", 0)
    for ids, border in zip(filling.ids, gapped.borders, strict=True):
        assert Vocabulary.of(MODEL.tokenizer).texts[ids[0]].startswith(border.start)
        assert Vocabulary.of(MODEL.tokenizer).texts[ids[-1]].endswith(border.end)
    woven = texts[0] + "".join(new + text for new, text in zip(filling.texts, texts[1:], strict=True))
    assert filling.full_text == woven
    assert MODEL.tokenizer.decode(gapped.row(lengths).filled([token for ids in filling.ids for token in ids])) == woven


def test_rows_with_borders_are_the_same_alone_and_in_an_engine() -> None:
    texts = [["the ", "  he"], ["a t", "on"], ["on ", " a"]]
    gapped = [GappedText.of(MODEL, pair, [4], "the text", index) for index, pair in enumerate(texts)]
    assert [text.borders[0] for text in gapped] == [Border(" "), Border(), Border(" ")]
    own = SamplerSettings(temperature=1.0, num_steps=3)
    jobs = [Job(text.row([4]), own, text.seed) for text in gapped]
    together = dict(run(engine_for(MODEL, max_rows=2, max_length=32), jobs))
    for index, pair in enumerate(texts):
        alone = fill(MODEL, [pair[0], 4, pair[1]], temperature=1.0, num_steps=3, seed=index)
        assert together[index].ids == alone.ids[0]


def test_the_vocabulary_is_read_behind_other_text() -> None:
    tokenizer = tiny_tokenizer()
    texts = Vocabulary.of(tokenizer).texts
    assert len(texts) == len(tokenizer)
    assert all(texts[token] == "" for token in tokenizer.all_special_ids)
    (token,) = text_ids(tokenizer, " the")
    assert texts[token] == " the"
