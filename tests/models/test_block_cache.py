"""Identity: a row read in pieces against the block cache has the states of the row read whole, in any stock model."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from decausal.diffusion.layout import Layout, visible
from decausal.errors import UserError
from decausal.models.backbone import body_forward
from decausal.models.block_cache import BlockCache, cached_forward, decoding, refuse_uncacheable
from decausal.models.visible_slots import visible_by_layer
from tests.families import FAMILIES, OTHER_FAMILIES, SLIDING_WINDOW, UNUSABLE_FAMILIES

K = 4
LENGTH = 5 * K
EVERY_FAMILY = {**FAMILIES, **OTHER_FAMILIES}


def ids(num_rows: int) -> Tensor:
    return torch.randint(250, (num_rows, LENGTH), generator=torch.Generator().manual_seed(4))


def last_visible(layout: Layout, positions: Tensor) -> Tensor:
    return positions if layout.causal_context else (positions // layout.block_size + 1) * layout.block_size - 1


def read(
    model: PreTrainedModel,
    cache: BlockCache,
    row_ids: Tensor,
    windows: Sequence[range],
    layout: Layout,
    rows: slice | Tensor | None = None,
) -> list[Tensor]:
    """Reads a window of each row in one pass; windows that are shorter are padded in front."""
    width = max(map(len, windows))
    positions = torch.tensor([range(window.stop - width, window.stop) for window in windows])
    is_real = torch.tensor(
        [[position in window for position in range(window.stop - width, window.stop)] for window in windows]
    )
    positions = positions.clamp(min=0)
    is_visible = visible_by_layer(
        model.config, positions, last_visible(layout, positions), max(window.stop for window in windows)
    )
    slots = torch.where(is_real, positions, cache.scratch_slot)
    states = cached_forward(model, row_ids.gather(1, positions), positions, slots, is_visible, cache, rows)
    return [row[-len(window) :] for row, window in zip(states, windows, strict=True)]


@pytest.mark.parametrize("causal_context", [False, True])
@pytest.mark.parametrize("family", EVERY_FAMILY)
@torch.no_grad()
def test_states_in_pieces_are_those_of_the_whole_row(family: str, causal_context: bool) -> None:
    model, row_ids, layout = EVERY_FAMILY[family](), ids(2), Layout("block", K, causal_context)
    whole = body_forward(model, row_ids, layout).last_hidden_state
    cache = BlockCache(model.config, 3, LENGTH)
    passes = [
        (range(0, 2 * K), range(0, K)),
        (range(2 * K, 3 * K), range(K, 3 * K)),
        (range(3 * K, 5 * K), range(2 * K, 3 * K)),
    ]
    for windows in passes:
        found = read(model, cache, row_ids, windows, layout)
        for row, window in enumerate(windows):
            torch.testing.assert_close(found[row], whole[row, window.start : window.stop], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_family_that_can_be_converted_can_be_decoded_in_blocks(family: str) -> None:
    model = EVERY_FAMILY[family]()
    with decoding(model):
        refuse_uncacheable(model)


@pytest.mark.parametrize("family", UNUSABLE_FAMILIES)
def test_a_family_whose_attention_takes_no_such_cache_is_refused(family: str) -> None:
    model = UNUSABLE_FAMILIES[family]()
    with decoding(model), pytest.raises(UserError, match="cannot be decoded in blocks"):
        refuse_uncacheable(model)


MODEL = FAMILIES["gemma3"]()
"""Two layers: one slides, one reads everything."""


@settings(max_examples=30, deadline=None)
@given(data=st.data(), block_size=st.sampled_from([1, 2, 3, 4, 8]), causal_context=st.booleans())
@torch.no_grad()
def test_any_subset_of_rows_at_any_positions_gives_the_states_of_whole_rows(
    data: st.DataObject, block_size: int, causal_context: bool
) -> None:
    layout, row_ids = Layout("block", block_size, causal_context), ids(3)
    whole = body_forward(MODEL, row_ids, layout).last_hidden_state
    cache, num_read = BlockCache(MODEL.config, 3, LENGTH), [0, 0, 0]
    for _ in range(6):
        rows = sorted(data.draw(st.sets(st.integers(0, 2), min_size=1)))
        windows = []
        for row in rows:
            num_blocks = -(-LENGTH // block_size)
            start = data.draw(st.integers(0, num_read[row] // block_size)) * block_size
            start = min(start, (num_blocks - 1) * block_size)
            end = min(LENGTH, (data.draw(st.integers(start // block_size + 1, num_blocks))) * block_size)
            windows.append(range(start, end))
            num_read[row] = end
        found = read(MODEL, cache, row_ids[rows], windows, layout, torch.tensor(rows))
        for row, window, states in zip(rows, windows, found, strict=True):
            torch.testing.assert_close(states, whole[row, window.start : window.stop], rtol=1e-4, atol=2e-5)


@given(data=st.data(), block_size=st.integers(1, 8), causal_context=st.booleans(), num_blocks=st.integers(0, 3))
def test_the_last_visible_slot_says_what_the_layout_says(
    data: st.DataObject, block_size: int, causal_context: bool, num_blocks: int
) -> None:
    """Finished blocks are the clean stream, the block after them is a noised one."""
    layout, start = Layout("block", block_size, causal_context), num_blocks * block_size
    position = torch.arange(start + block_size)[None]
    is_noised = position >= start
    reads = torch.where(is_noised, start + block_size - 1, last_visible(layout, position))
    found = visible_by_layer(MODEL.config, position, reads, position.shape[1])
    if not isinstance(found, dict):
        found = dict.fromkeys(["full_attention", "sliding_attention"], found)
    stream, document = is_noised.long(), torch.zeros(1, 1, 1, dtype=torch.long)
    for kind, window in (("full_attention", None), ("sliding_attention", SLIDING_WINDOW)):
        query, key = (position[:, :, None], stream[:, :, None]), (position[:, None], stream[:, None])
        expected = visible(layout, query[0], key[0], document, document, window, query[1], key[1])
        assert torch.equal(found[kind], expected)


@torch.no_grad()
def test_without_a_mask_every_query_reads_all_slots_up_to_the_length() -> None:
    layout, row_ids = Layout("block", K), ids(2)
    for family in ("qwen3", "gpt2", "gemma2", "falcon"):
        model = EVERY_FAMILY[family](**({"sliding_window": LENGTH} if family == "gemma2" else {}))
        whole = body_forward(model, row_ids, layout).last_hidden_state
        cache = BlockCache(model.config, 2, LENGTH)
        for start in range(0, LENGTH, K):
            positions = torch.arange(start, start + K).expand(2, -1)
            states = cached_forward(model, row_ids.gather(1, positions), positions, positions, start + K, cache)
            torch.testing.assert_close(states, whole[:, start : start + K], rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_rows_can_be_moved_and_room_be_made_while_decoding() -> None:
    model, row_ids, layout = FAMILIES["qwen3"](), ids(3), Layout("block", K)
    whole = body_forward(model, row_ids, layout).last_hidden_state
    cache = BlockCache(model.config, 3, 2 * K)
    read(model, cache, row_ids, [range(0, 2 * K)] * 3, layout)
    cache.move_row(2, 0)
    cache.grow(LENGTH)
    (states,) = read(model, cache, row_ids[2:], [range(2 * K, 4 * K)], layout)
    torch.testing.assert_close(states, whole[2, 2 * K : 4 * K], rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_rows_of_different_lengths_change_places() -> None:
    model, row_ids, layout = FAMILIES["qwen3"](), ids(2), Layout("block", K)
    whole = body_forward(model, row_ids, layout).last_hidden_state
    cache = BlockCache(model.config, 2, LENGTH)
    read(model, cache, row_ids, [range(0, 2 * K), range(0, 3 * K)], layout)
    cache.swap_rows(0, 1)
    one, other = read(model, cache, row_ids[[1, 0]], [range(3 * K, 4 * K), range(2 * K, 3 * K)], layout)
    torch.testing.assert_close(one, whole[1, 3 * K : 4 * K], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(other, whole[0, 2 * K : 3 * K], rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_slots_that_are_never_written_take_no_memory_on_a_cpu() -> None:
    model, row_ids, layout, num_slots = FAMILIES["qwen3"](), ids(8), Layout("block", K), 2**17
    cache = BlockCache(model.config, 8, num_slots)
    before = psutil.Process().memory_info().rss
    read(model, cache, row_ids, [range(0, 2 * K)] * 8, layout)
    cache.move_row(7, 0)
    cache.swap_rows(1, 2)
    cache.grow(2 * num_slots)
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert held > 2**30
    assert psutil.Process().memory_info().rss - before < held / 10


@torch.no_grad()
def test_passes_write_in_place_and_return_slices() -> None:
    model, row_ids, layout = FAMILIES["qwen3"](), ids(2), Layout("block", K)
    cache = BlockCache(model.config, 2, LENGTH)
    read(model, cache, row_ids, [range(0, K)] * 2, layout)
    held = [layer.keys.data_ptr() for layer in cache.layers]
    read(model, cache, row_ids, [range(K, 3 * K)] * 2, layout)
    assert held == [layer.keys.data_ptr() for layer in cache.layers]
    states = torch.zeros(2, 2, 1, 16)
    cache.access.flat_slots, cache.access.rows = torch.tensor([0, LENGTH + 1]), slice(0, 2)
    keys, _ = cache.update(states, states, 0)
    assert keys.data_ptr() == held[0]


def test_decoding_leaves_the_model_as_it_was() -> None:
    model = FAMILIES["qwen3"]().train()
    model.base_model.layers[0].eval()
    model.config._attn_implementation = "flex_attention"
    before = {name: module.training for name, module in model.named_modules()}
    with decoding(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        refuse_uncacheable(model)
    assert before == {name: module.training for name, module in model.named_modules()}
    assert model.config._attn_implementation == "flex_attention"


@torch.no_grad()
def test_adapters_are_active_in_cached_passes() -> None:
    model = get_peft_model(
        FAMILIES["qwen3"](), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    row_ids, layout = ids(1), Layout("block", K)
    whole = body_forward(model, row_ids, layout).last_hidden_state
    cache = BlockCache(model.get_base_model().config, 1, LENGTH)
    positions = torch.arange(K)[None]
    states = cached_forward(model, row_ids[:, :K], positions, positions, K, cache)
    torch.testing.assert_close(states, whole[:, :K], rtol=1e-4, atol=2e-5)
