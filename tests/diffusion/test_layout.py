"""Who reads whom: dense masks against the rule written out for one pair at a time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decausal.diffusion.layout import Layout, attention_mask, future_order, positions_in_documents, visible
from decausal.errors import UserError

LAYOUTS = [Layout("causal"), Layout("bidirectional"), Layout("block", 1), Layout("block", 3), Layout("block", 64)]

# Document lengths of a row, the last one being padding.
rows = st.lists(st.integers(1, 7), min_size=1, max_size=4).flatmap(
    lambda lengths: st.integers(0, 4).map(lambda padding: (lengths, padding))
)


def _document_ids(lengths: list[int], padding: int) -> torch.Tensor:
    ids = [document for document, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    return torch.tensor([ids])


def _mask(layout: Layout, document_ids: torch.Tensor, window: int | None = None, **future: object) -> torch.Tensor:
    return attention_mask(layout, document_ids, positions_in_documents(document_ids), window, **future)[0, 0]


def _reads(layout: Layout, q: int, k: int, window: int | None) -> bool:
    """The rule for one pair of positions in one document, in words as plain as they come."""
    if window is not None and not (k > q - window and k < q + window):
        return False
    if layout.kind == "causal":
        return k <= q
    if layout.kind == "block":
        end_of_block = (q // layout.block_size + 1) * layout.block_size
        return k < end_of_block
    return True


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("window", [None, 1, 3])
@settings(max_examples=15, deadline=None)
@given(row=rows)
def test_mask_is_the_rule_inside_documents_and_nothing_across_them(layout, window, row):
    document_ids = _document_ids(*row)
    documents = document_ids[0].tolist()
    mask = _mask(layout, document_ids, window)
    for q, document in enumerate(documents):
        start = documents.index(document)
        expected = [d == document and _reads(layout, q - start, k - start, window) for k, d in enumerate(documents)]
        assert mask[q].tolist() == expected


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@settings(max_examples=15, deadline=None)
@given(row=rows, window=st.sampled_from([None, 1, 2]))
def test_every_query_reads_itself_so_no_softmax_is_empty(layout, row, window):
    assert _mask(layout, _document_ids(*row), window).diagonal().all()


def test_a_document_is_masked_alike_wherever_packing_puts_it():
    layout, alone = Layout("block", 4), _document_ids([10], 0)
    packed = _mask(layout, _document_ids([3, 10], 2))[3:13, 3:13]
    assert torch.equal(packed, _mask(layout, alone))


def test_block_of_one_is_causal_and_one_block_for_all_is_bidirectional():
    document_ids = _document_ids([5, 6], 2)
    assert torch.equal(_mask(Layout("block", 1), document_ids), _mask(Layout("causal"), document_ids))
    assert torch.equal(_mask(Layout("block", 6), document_ids), _mask(Layout("bidirectional"), document_ids))


def test_bidirectional_window_is_the_causal_one_and_its_mirror_image():
    document_ids = _document_ids([9], 0)
    causal = _mask(Layout("causal"), document_ids, window=3)
    assert causal.sum(dim=1).tolist() == [1, 2, 3, 3, 3, 3, 3, 3, 3]
    assert torch.equal(_mask(Layout("bidirectional"), document_ids, window=3), causal | causal.T)


def test_visible_on_scalars_equals_the_dense_mask():
    layout, document_ids = Layout("block", 2), _document_ids([5, 4], 1)
    positions = positions_in_documents(document_ids)[0]
    documents = document_ids[0]
    pairs = torch.stack(
        [
            torch.stack([visible(layout, positions[q], positions[k], documents[q], documents[k]) for k in range(10)])
            for q in range(10)
        ]
    )
    assert torch.equal(pairs, _mask(layout, document_ids))


def _reads_in_streams(layout: Layout, query: tuple[int, int], key: tuple[int, int]) -> bool:
    """The rule for a query and a key as (stream, position), stream 0 being the clean one."""
    (query_stream, q), (key_stream, k) = query, key
    query_block, key_block = q // layout.block_size, k // layout.block_size
    if key_stream != 0:
        return key_stream == query_stream and key_block == query_block
    if query_stream != 0:
        return key_block < query_block
    return k <= q if layout.causal_context else key_block <= query_block


@pytest.mark.parametrize("causal_context", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4])
@settings(max_examples=15, deadline=None)
@given(
    block_size=st.integers(1, 5), lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3), copies=st.integers(1, 2)
)
def test_noised_copies_read_their_own_block_and_the_clean_blocks_before_it(
    causal_context, window, block_size, lengths, copies
):
    layout = Layout("block", block_size, causal_context)
    places = [
        (stream, document, position)
        for stream in range(copies + 1)
        for document, length in enumerate(lengths)
        for position in range(length)
    ] + [(-1, -1, position) for position in range(3)]
    streams, documents, positions = (torch.tensor([column]) for column in zip(*places, strict=True))
    mask = attention_mask(layout, documents, positions, window, stream_ids=streams)[0, 0]
    assert mask.diagonal().all()
    for i, (query_stream, query_document, q) in enumerate(places):
        for j, (key_stream, key_document, k) in enumerate(places):
            expected = query_document == key_document and _reads_in_streams(layout, (query_stream, q), (key_stream, k))
            assert mask[i, j] == (expected and (window is None or abs(q - k) < window))


def test_a_causal_context_is_causal_where_all_is_clean():
    document_ids = _document_ids([5, 6], 2)
    assert torch.equal(_mask(Layout("block", 3, True), document_ids), _mask(Layout("causal"), document_ids))
    clean = torch.zeros_like(document_ids)
    for layout in (Layout("block", 3), Layout("block", 3, True)):
        assert torch.equal(_mask(layout, document_ids, stream_ids=clean), _mask(layout, document_ids))


def test_a_bidirectional_layout_has_no_streams():
    document_ids = _document_ids([3], 0)
    with pytest.raises(ValueError, match="not for bidirectional layouts"):
        _mask(Layout("bidirectional"), document_ids, stream_ids=document_ids)


@pytest.mark.parametrize("window", [None, 2])
def test_branches_of_a_causal_row_see_the_trunk_and_themselves(window):
    trunk, branches = 3, (2, 4, 1)
    positions, streams = list(range(trunk)), [0] * trunk
    for stream, length in enumerate(branches, start=1):
        positions += range(trunk, trunk + length)
        streams += [stream] * length
    documents = torch.zeros(1, len(positions), dtype=torch.int64)
    places = torch.tensor([positions])
    mask = attention_mask(Layout("causal"), documents, places, window, stream_ids=torch.tensor([streams]))[0, 0]
    for stream, length in enumerate(branches, start=1):
        row = [place for place, of in enumerate(streams) if of in (0, stream)]
        alone = attention_mask(Layout("causal"), documents[:, : trunk + length], places[:, row], window)[0, 0]
        assert torch.equal(mask[row][:, row], alone)
        others = [place for place in range(len(streams)) if place not in row]
        assert not mask[row][:, others][trunk:].any()


def test_positions_restart_in_each_document_and_in_padding():
    document_ids = torch.tensor([[0, 0, 0, 1, 1, -1, -1], [0, 1, 2, 2, 2, 2, 2]])
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 2, 3, 4]]
    assert positions_in_documents(document_ids).tolist() == expected


@pytest.mark.parametrize("layout", [Layout("bidirectional"), Layout("block", 4)], ids=str)
def test_annealing_goes_from_causal_to_the_layout_and_never_closes_a_pair(layout):
    document_ids = _document_ids([7, 8], 3)
    order = future_order(20, seed=1)
    steps = [_mask(layout, document_ids, future_order=order, future_fraction=f) for f in (0.0, 0.3, 0.7, 1.0)]
    assert torch.equal(steps[0], _mask(Layout("causal"), document_ids))
    assert torch.equal(steps[-1], _mask(layout, document_ids))
    for earlier, later in pairwise(steps):
        assert (earlier <= later).all()
        assert earlier.sum() < later.sum()


def test_future_order_depends_on_its_seed_alone():
    first, global_state = future_order(16, seed=3), torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(first, future_order(16, seed=3))
    assert not torch.equal(first, future_order(16, seed=4))
    torch.set_rng_state(global_state)
    assert 0 <= first.min() < first.max() < 1


def test_annealing_needs_both_order_and_fraction():
    document_ids = _document_ids([3], 0)
    with pytest.raises(ValueError, match="together"):
        _mask(Layout("bidirectional"), document_ids, future_fraction=0.5)


@pytest.mark.parametrize(
    ("kind", "block_size", "message"),
    [
        ("casual", None, "did you mean 'causal'"),
        ("block", None, "block_size None"),
        ("block", 0, "block_size 0"),
        ("causal", 4, "block_size 4"),
    ],
)
def test_an_impossible_layout_is_refused_in_one_line(kind, block_size, message):
    with pytest.raises(UserError, match=message) as error:
        Layout(kind, block_size)
    assert "\n" not in str(error.value)


def test_a_causal_context_belongs_to_a_block_layout():
    with pytest.raises(UserError, match="'bidirectional' has causal_context"):
        Layout("bidirectional", causal_context=True)
