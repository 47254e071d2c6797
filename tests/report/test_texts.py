"""Figures of texts, by hand on small ones."""

from __future__ import annotations

import math

import pytest

from decausal.report.texts import text_figures


def test_a_text_that_repeats_itself_has_all_but_its_first_piece_repeated_and_no_entropy() -> None:
    found = text_figures([["a"] * 8])
    assert found.repetition == pytest.approx(4 / 5)  # five pieces of four, all the same
    assert found.distinct == pytest.approx((1 / 8, 1 / 7, 1 / 6))
    assert found.entropy == 0


def test_a_text_of_different_words_repeats_nothing() -> None:
    found = text_figures([["the", "rain", "stays", "on", "a", "hat"]], "words")
    assert (found.length, found.repetition, found.distinct) == (6, 0, (1, 1, 1))
    assert found.entropy == pytest.approx(math.log(6))


def test_distinct_pieces_are_counted_over_all_texts_and_the_rest_text_by_text() -> None:
    found = text_figures([[1, 2], [1, 2], []])
    assert found.distinct == (0.5, 0.5, None)
    assert (found.length, found.repetition) == (pytest.approx(4 / 3), None)
    assert found.entropy == pytest.approx(math.log(2))
