"""Packing loses nothing, repeats nothing, cuts only what may be cut, and pads only the ends of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decausal.data.encode import Encoded
from decausal.data.packing import OPEN_ROWS, Packer, Row, pack
from decausal.errors import UserError

PAD = -7  # no token of any document below


@st.composite
def documents(draw: st.DrawFn, splittable: bool | None = None, max_length: int = 30) -> list[Encoded]:
    """Documents of distinct tokens, so that every token in a row tells which document it came from."""
    shapes = draw(st.lists(st.tuples(st.integers(1, max_length), st.booleans()), min_size=1, max_size=20))
    first = np.cumsum([0, *(length for length, _ in shapes)])
    return [
        Encoded(
            np.arange(start, start + length, dtype=np.int32),
            np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length))),
            f"line {index}",
            drawn if splittable is None else splittable,
        )
        for index, ((length, drawn), start) in enumerate(zip(shapes, first, strict=False))
    ]


def whole(length: int) -> Encoded:
    return Encoded(np.zeros(length, dtype=np.int32), np.ones(length, dtype=bool), "x", splittable=False)


def tokens(rows: Sequence[Row]) -> list[int]:
    return [int(token) for row in rows for token in row.clean_ids if token != PAD]


def pieces(encoded: list[Encoded], length: int) -> list[tuple[Row, int]]:
    """Returns each document of each row."""
    return [(row, document) for row in pack(encoded, length, PAD) for document in range(row.document_ids.max() + 1)]


lengths = st.integers(2, 40)


@settings(deadline=None)
@given(documents(splittable=True), lengths)
def test_rows_of_text_hold_the_stream_of_all_tokens_in_order(encoded: list[Encoded], length: int) -> None:
    rows = list(pack(encoded, length, PAD))
    assert tokens(rows) == [token for document in encoded for token in document.ids]
    assert all(PAD not in row.clean_ids for row in rows[:-1])


@settings(deadline=None)
@given(documents(splittable=False, max_length=12), st.integers(12, 40))
def test_an_unsplittable_document_stands_whole_in_one_row(encoded: list[Encoded], length: int) -> None:
    found = [row.clean_ids[row.document_ids == document].tolist() for row, document in pieces(encoded, length)]
    assert sorted(found) == sorted(document.ids.tolist() for document in encoded)


@settings(deadline=None)
@given(documents(max_length=12), st.integers(12, 40))
def test_every_token_is_packed_once_whatever_the_mix(encoded: list[Encoded], length: int) -> None:
    packer = Packer(length, PAD)
    rows = list(packer.rows(encoded))
    expected = [int(token) for document in encoded for token in document.ids]
    assert Counter(tokens(rows)) == Counter(expected)
    assert packer.counts.num_tokens == len(expected)
    assert packer.counts.num_documents == len(encoded)
    assert packer.counts.num_rows == len(rows)


@settings(deadline=None)
@given(documents(max_length=12), st.integers(12, 40))
def test_rows_are_well_formed(encoded: list[Encoded], length: int) -> None:
    for row in pack(encoded, length, PAD):
        assert len(row.clean_ids) == len(row.document_ids) == len(row.is_maskable) == length
        is_padding = row.document_ids == -1
        assert (np.diff(is_padding.astype(int)) >= 0).all(), "padding stands at the end"
        assert (is_padding == (row.clean_ids == PAD)).all()
        assert not row.is_maskable[is_padding].any()
        ids = row.document_ids[~is_padding]
        assert ids[0] == 0
        assert set(np.diff(ids)) <= {0, 1}, "documents count up from 0"


@settings(deadline=None)
@given(documents(max_length=12), st.integers(12, 40))
def test_one_document_of_a_row_comes_from_one_document(encoded: list[Encoded], length: int) -> None:
    source = {int(token): index for index, document in enumerate(encoded) for token in document.ids}
    for row, document in pieces(encoded, length):
        ids = row.clean_ids[row.document_ids == document]
        assert len({source[int(token)] for token in ids}) == 1
        assert (np.diff(ids) == 1).all(), "in order and without a gap"


@settings(deadline=None)
@given(documents(max_length=12), st.integers(12, 40))
def test_is_maskable_travels_with_its_token(encoded: list[Encoded], length: int) -> None:
    flags = {
        int(token): flag for document in encoded for token, flag in zip(document.ids, document.is_maskable, strict=True)
    }
    for row in pack(encoded, length, PAD):
        for token, flag in zip(row.clean_ids, row.is_maskable, strict=True):
            assert flag == flags.get(int(token), False)


@settings(deadline=None)
@given(documents(), lengths)
def test_documents_that_do_not_fit_are_dropped_and_counted(encoded: list[Encoded], length: int) -> None:
    too_long = [document for document in encoded if not document.splittable and len(document.ids) > length]
    packer = Packer(length, PAD)
    kept = sum(len(document.ids) for document in encoded) - sum(len(document.ids) for document in too_long)
    assert len(tokens(list(packer.rows(encoded)))) == kept
    assert packer.counts.num_dropped == len(too_long)
    assert packer.counts.longest_dropped == max((len(document.ids) for document in too_long), default=0)


def test_dropping_some_warns_with_their_number_and_the_longest() -> None:
    with pytest.warns(UserWarning, match="left out 2 documents longer than a row of 8 tokens: the longest has 20"):
        assert len(list(pack([whole(20), whole(5), whole(9)], 8, PAD))) == 1


def test_dropping_all_is_refused_with_the_longest_and_the_option() -> None:
    with pytest.raises(
        UserError, match="every document is longer than a row of 8 tokens: the longest has 20"
    ) as caught:
        list(pack([whole(20), whole(9)], 8, PAD))
    assert "--max_length" in str(caught.value)


def test_rows_are_given_out_before_all_documents_are_read() -> None:
    read = []
    documents = (read.append(index) or whole(5) for index in range(2 * OPEN_ROWS))
    assert next(Packer(8, PAD).rows(documents)) is not None
    assert len(read) == OPEN_ROWS + 1


def test_padding_of_answers_of_mixed_lengths_stays_small() -> None:
    random = np.random.default_rng(0)
    encoded = [whole(int(length)) for length in np.clip(random.lognormal(5.5, 0.8, 4000), 2, 2048)]
    packer = Packer(2048, PAD)
    num_rows = len(list(packer.rows(encoded)))
    assert packer.counts.num_tokens / (num_rows * 2048) > 0.98


def test_a_row_of_one_token_is_refused() -> None:
    with pytest.raises(UserError, match="--max_length 1: a row needs at least 2 tokens"):
        list(pack([whole(2)], 1, PAD))
