"""The doubled row, against the rule written as a loop over documents, views and blocks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decausal.diffusion.doubled import Doubled, block_starts, double, joined, needs_copy
from decausal.diffusion.layout import positions_in_documents

MASK = 999


@dataclass(frozen=True)
class Case:
    """Packed rows and what is masked in each view."""

    clean_ids: torch.Tensor
    document_ids: torch.Tensor
    is_noisable: torch.Tensor
    is_masked: torch.Tensor
    block_size: int
    context_length: int | None

    def doubled(self) -> Doubled:
        rest = (self.is_masked, MASK, self.block_size, self.context_length)
        return double(self.clean_ids, self.document_ids, self.is_noisable, *rest)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Rows of documents, each a prompt and a response of any lengths, and padding."""
    length, views = draw(st.integers(1, 20)), draw(st.integers(1, 3))
    document_ids, is_noisable = [], []
    for _ in range(draw(st.integers(1, 3))):
        documents: list[int] = []
        noisable: list[bool] = []
        for number in range(draw(st.integers(1, 3))):
            prompt, response = draw(st.integers(0, 6)), draw(st.integers(0, 9))
            documents += [number] * (prompt + response)
            noisable += [False] * prompt + [True] * response
        document_ids.append((documents + [-1] * length)[:length])
        is_noisable.append((noisable + [False] * length)[:length])
    noisable = torch.tensor(is_noisable)
    shape = (len(document_ids), views, length)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    is_masked = (torch.rand(shape, generator=generator) < 0.5) & noisable[:, None]
    context_length = draw(st.sampled_from([None, length, length + 1]))
    clean_ids = torch.arange(noisable.numel()).reshape(noisable.shape)
    return Case(clean_ids, torch.tensor(document_ids), noisable, is_masked, draw(st.integers(1, 6)), context_length)


Place = tuple[int, int, int, int, int]  # stream, document, position, id, flat index of the clean token or -1


def places_of_row(case: Case, row: int) -> list[Place]:
    documents = case.document_ids[row].tolist()
    length, size = len(documents), case.block_size
    clean = [
        (0, document, column - documents.index(document), row * length + column, row * length + column)
        for column, document in enumerate(documents)
        if document >= 0
    ]
    places: list[Place] = list(clean)
    for view in range(case.is_masked.shape[1]):
        for document in sorted(set(documents) - {-1}):
            tokens = [(position, source) for _, d, position, _, source in clean if d == document]
            for start in range(0, len(tokens), size):
                block = tokens[start : start + size]
                if not any(case.is_noisable.flatten()[source] for _, source in block):
                    continue
                for position, source in block:
                    is_masked = case.is_masked[row, view, source - row * length]
                    places.append((view + 1, document, position, MASK if is_masked else source, source))
                for position in range(start + len(block), start + size):
                    if case.context_length is None or position < case.context_length:
                        places.append((view + 1, document, position, MASK, -1))
    return places


@settings(max_examples=80, deadline=None)
@given(cases())
def test_rows_hold_what_the_rule_says_in_its_order(case):
    doubled = case.doubled()
    expected = [places_of_row(case, row) for row in range(len(case.clean_ids))]
    assert doubled.ids.shape[1] == max(1, *(len(places) for places in expected))
    for row, places in enumerate(expected):
        columns = (doubled.stream_ids, doubled.document_ids, doubled.position_ids, doubled.ids, doubled.source_index)
        found = list(zip(*(column[row].tolist() for column in columns), strict=True))
        assert found[: len(places)] == places
        padding = found[len(places) :]
        assert all((stream, document, source) == (-1, -1, -1) for stream, document, _, _, source in padding)
        assert all(position < case.clean_ids.shape[1] for _, _, position, _, _ in padding)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_each_token_is_found_in_each_stream_that_holds_it(case):
    doubled = case.doubled()
    length = case.clean_ids.shape[1]
    held = {
        (stream, source): row * doubled.ids.shape[1] + column
        for row in range(len(case.clean_ids))
        for column, (stream, _, _, _, source) in enumerate(places_of_row(case, row))
        if source >= 0
    }
    for stream in range(case.is_masked.shape[1] + 1):
        tokens = torch.arange(case.clean_ids.numel())
        places = doubled.place_of(stream, tokens)
        assert places.tolist() == [held.get((stream, token), -1) for token in tokens.tolist()]
        assert torch.equal(doubled.place_of(torch.full_like(tokens, stream), tokens), places)
    assert doubled.places.shape == (len(case.clean_ids), case.is_masked.shape[1] + 1, length)


@settings(max_examples=50, deadline=None)
@given(cases(), st.integers(1, 60))
def test_joined_rows_hold_the_same_tokens_with_their_documents_apart(case, row_length):
    apart, together = case.doubled(), joined(case.doubled(), row_length)
    tokens = torch.arange(case.clean_ids.numel())
    for stream in range(case.is_masked.shape[1] + 1):
        before, after = apart.place_of(stream, tokens), together.place_of(stream, tokens)
        assert torch.equal(before < 0, after < 0)
        is_held = before >= 0
        for name in ("ids", "position_ids", "stream_ids", "source_index"):
            found = getattr(together, name).flatten()[after[is_held]]
            assert torch.equal(found, getattr(apart, name).flatten()[before[is_held]]), name
    is_real = together.stream_ids >= 0
    assert is_real.sum() == (apart.stream_ids >= 0).sum()
    assert torch.equal(is_real, together.document_ids >= 0)
    assert together.ids.shape[1] <= max(apart.ids.shape[1], row_length) + apart.ids.shape[1]
    is_clean = together.source_index >= 0
    origin = together.source_index // case.clean_ids.shape[1], case.document_ids.flatten()[together.source_index]
    where = torch.arange(len(together.ids))[:, None].expand_as(is_clean), together.document_ids
    pairs = {tuple(pair) for pair in torch.stack([*origin, *where])[:, is_clean].T.tolist()}
    assert len(pairs) == len({pair[:2] for pair in pairs}) == len({pair[2:] for pair in pairs})


@settings(max_examples=50, deadline=None)
@given(cases(), st.sampled_from([0, 1]))
def test_targets_are_predicted_inside_their_block_or_by_the_clean_state_before_it(case, shift):
    """Also where only blocks are held that have a target which a state of theirs predicts."""
    starts = block_starts(case.document_ids, case.block_size)
    is_first = positions_in_documents(case.document_ids) == 0
    is_masked = case.is_masked & ~((is_first & (shift == 1))[:, None])
    is_noised = needs_copy(is_masked, starts, shift)
    doubled = double(case.clean_ids, case.document_ids, is_noised, is_masked, MASK, case.block_size)
    length, views = case.clean_ids.shape[1], is_masked.shape[1]
    target = is_masked.flatten().nonzero()[:, 0]
    row, view, column = target // (views * length), target // length % views, target % length
    token = row * length + column
    place = doubled.predicting_place(view + 1, token, shift)
    assert (place >= 0).all()
    assert torch.equal(doubled.source_index.flatten()[place], token - shift)
    stream = doubled.stream_ids.flatten()[place]
    is_clean = starts.flatten()[token] & (shift == 1)
    assert torch.equal(stream, torch.where(is_clean, 0, view + 1))
    if case.block_size == 1 and shift == 1:
        assert doubled.ids.shape[1] <= max(1, length)  # no copy at all: the autoregressive row


def test_a_prompt_costs_once_and_the_response_once_per_view_and_once_clean():
    prompt, response, views = 8, 12, 2
    is_noisable = torch.arange(prompt + response)[None] >= prompt
    is_masked = is_noisable[:, None].expand(1, views, -1)
    ids = torch.arange(prompt + response)[None]
    doubled = double(ids, torch.zeros_like(ids), is_noisable, is_masked, MASK, block_size=4)
    assert doubled.ids.shape[1] == prompt + (1 + views) * response
    # A response that begins inside a block takes the prompt's tail into each copy, visible.
    doubled = double(ids, torch.zeros_like(ids), is_noisable, is_masked, MASK, block_size=3)
    assert doubled.ids.shape[1] == prompt + response + views * (2 + response + 1)
    copy = doubled.ids[0, 20:35].tolist()
    assert copy == [6, 7] + [MASK] * 13


def test_views_may_hold_different_blocks():
    ids = torch.arange(6)[None]
    is_masked = torch.tensor([[[True, False, False, False, False, False], [False, False, False, False, True, False]]])
    doubled = double(ids, torch.zeros_like(ids), is_masked, is_masked, MASK, block_size=2)
    assert doubled.ids[0, 6:].tolist() == [MASK, 1, MASK, 5]
    assert doubled.stream_ids[0, 6:].tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_row_of_padding_alone_has_a_place_to_stand_on(block_size):
    ids, nothing = torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 1, 5, dtype=torch.bool)
    doubled = double(ids, ids - 1, nothing, nothing, MASK, block_size)
    assert doubled.ids.shape == (1, 1)
    assert (doubled.places == -1).all()
