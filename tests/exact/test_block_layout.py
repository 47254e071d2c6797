"""Identities 2 and 3 for block layouts: what a state of the doubled row sees, and whose logits it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from decausal.data.block_collator import BlockCollator
from decausal.data.stream import Collator, Noising, TrainingStream
from decausal.diffusion.doubled import Doubled, double
from decausal.diffusion.layout import Layout
from decausal.models.architecture import sliding_windows
from decausal.models.backbone import body_forward, decoder_layers, head_of
from decausal.objectives.head import logits
from decausal.training.losses import Supervision, loss_sums
from decausal.training.terms import TokenTerm
from tests.families import FAMILIES
from tests.runs import MAX_LENGTH, adapted, uneven_rows

MASK = 255
K = 3
# No window; experts; windows in all layers, in half of them, with capped scores; learned positions; layers without any.
FAMILIES_HERE = ["qwen3", "qwen3_moe", "mistral", "gemma2", "gemma3", "gpt2", "smollm3", "granite"]
contexts = pytest.mark.parametrize("causal_context", [False, True], ids=["block context", "causal context"])
shifts = pytest.mark.parametrize("shift", [0, 1])


# Identity 2


def small_rows() -> Doubled:
    """A row of two documents, of 5 and 4 tokens, and padding, in two views with all blocks."""
    clean_ids = torch.arange(7, 7 + 19 * 10, 19)[None] % 250
    document_ids = torch.tensor([[0] * 5 + [1] * 4 + [-1]])
    is_masked = torch.tensor([[[1, 0, 1, 0, 1, 0, 0, 1, 1, 0], [0, 1, 0, 1, 0, 1, 1, 1, 0, 0]]]).bool()
    return double(clean_ids, document_ids, document_ids >= 0, is_masked, MASK, K)


def may_read(rows: Doubled, causal_context: bool, window: int | None) -> Tensor:
    """The definition of the layout, spelled out pair by pair."""
    columns = (rows.stream_ids, rows.document_ids, rows.position_ids)
    places = list(zip(*(column[0].tolist() for column in columns), strict=True))
    allowed = torch.zeros(len(places), len(places), dtype=torch.bool)
    for i, (query_stream, query_document, q) in enumerate(places):
        for j, (key_stream, key_document, k) in enumerate(places):
            if key_stream > 0:
                reads = key_stream == query_stream and k // K == q // K
            elif query_stream > 0:
                reads = k // K < q // K
            else:
                reads = k <= q if causal_context else k // K <= q // K
            near = window is None or abs(q - k) < window
            allowed[i, j] = reads and near and query_document == key_document
    return allowed


@torch.no_grad()
def influence(model: PreTrainedModel, rows: Doubled, layout: Layout) -> list[Tensor]:
    """After each layer, [query, key]: whether the state at `query` changes when the token at `key` does."""
    length = rows.ids.shape[1]
    changed = torch.where(torch.eye(length, dtype=torch.bool), rows.ids - 3, rows.ids)
    ids = torch.cat([rows.ids, changed])
    document_ids, position_ids, stream_ids = (
        column.expand_as(ids) for column in (rows.document_ids, rows.position_ids, rows.stream_ids)
    )
    states = body_forward(
        model,
        ids,
        layout,
        document_ids=document_ids,
        position_ids=position_ids,
        stream_ids=stream_ids,
        output_hidden_states=True,
    ).hidden_states
    found = []
    for state in states[1:]:
        change = (state[1:] - state[0]).abs().amax(dim=-1).T
        assert not ((change > 1e-6) & (change < 1e-5)).any(), "neither rounding nor influence"
        found.append(change > 1e-5)
    return found


@contexts
@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_a_state_sees_its_own_blocks_copy_and_the_clean_blocks_before_it_and_nothing_else(family, causal_context):
    model, rows = FAMILIES[family](), small_rows()
    windows = sliding_windows(model.config)
    layer_types = getattr(model.config, "layer_types", None) or ["every"] * len(decoder_layers(model))
    is_read = torch.eye(rows.ids.shape[1], dtype=torch.bool)
    found = influence(model, rows, Layout("block", K, causal_context))
    for layer_type, seen in zip(layer_types, found, strict=True):
        in_layer = may_read(rows, causal_context, windows[layer_type])
        is_read = (in_layer.float() @ is_read.float()) > 0  # through this layer, what its keys had read before
        assert torch.equal(seen, is_read)


# Identity 3


def block_batch(
    layout: Layout, shift: int, mask_token_id: int, **collation: Any
) -> tuple[list[dict], dict[str, Tensor]]:
    """Items of packed rows with padding in two views, and their batch."""
    stream = TrainingStream(uneven_rows(), 8, seed=0, shift=shift, noising=Noising(2, block_size=layout.block_size))
    items = [stream[position] for position in range(3)]
    return items, BlockCollator(mask_token_id, shift, layout, MAX_LENGTH, **collation)(items)


def explicit_mask(model: PreTrainedModel, context: int, length: int, layout: Layout) -> Any:
    """Mask of one block after its clean context, as the stock model takes it: no function of ours makes it."""

    def of_window(window: int | None) -> Tensor:
        mask = torch.full((1, 1, length, length), torch.finfo(model.dtype).min, dtype=model.dtype)
        for q in range(length):
            for k in range(length):
                if q >= context or layout.causal_context:
                    reads = k <= q or q >= context
                else:
                    reads = k // layout.block_size <= q // layout.block_size and k < context
                if reads and (window is None or abs(q - k) < window):
                    mask[0, 0, q, k] = 0
        return mask

    masks = {layer_type: of_window(window) for layer_type, window in sliding_windows(model.config).items()}
    return next(iter(masks.values())) if len(masks) == 1 else masks


def brute_force(model: PreTrainedModel, items: list[dict], shift: int, layout: Layout, mask_token_id: int) -> Tensor:
    """Logits of all targets, in order of row, view and token, each from a plain forward of its block alone."""
    rows, size = [], layout.block_size
    for item in items:
        documents = item["document_ids"].tolist()
        for is_masked in item["is_masked"]:
            for target in is_masked.nonzero()[:, 0].tolist():
                first = documents.index(documents[target])
                clean = [
                    int(token) for token, d in zip(item["clean_ids"], documents, strict=True) if d == documents[first]
                ]
                context = (target - first) // size * size
                block = [
                    mask_token_id if index >= len(clean) or is_masked[first + index] else clean[index]
                    for index in range(context, min(context + size, MAX_LENGTH))
                ]
                ids = torch.tensor([clean[:context] + block])
                mask = explicit_mask(model, context, ids.shape[1], layout)
                states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                rows.append(states[0, target - first - shift])
    return logits(torch.stack(rows), head_of(model))


@shifts
@contexts
@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2", "gpt2"])
@torch.no_grad()
def test_training_logits_are_those_of_each_block_run_alone_behind_its_context(family, causal_context, shift):
    model, mask_token_id = adapted(family, torch.float64)
    layout = Layout("block", 5, causal_context)
    items, batch = block_batch(layout, shift, mask_token_id)
    model.config._attn_implementation = "eager"  # additive masks, as `explicit_mask` makes them
    states = body_forward(
        model,
        batch["student_ids"],
        layout,
        document_ids=batch["student_document_ids"],
        position_ids=batch["student_position_ids"],
        stream_ids=batch["stream_ids"],
    ).last_hidden_state
    found = logits(states.flatten(0, 1)[batch["target_index"]], head_of(model))
    expected = brute_force(model, items, shift, layout, mask_token_id)
    assert len(found) > 20
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # stock eager attention has its softmax in fp32


@shifts
@pytest.mark.parametrize("aligned_positions", ["targets", "visible", "all"])
def test_the_loss_does_not_depend_on_which_blocks_are_held_beside_those_of_the_targets(aligned_positions, shift):
    model, mask_token_id = adapted("qwen3", torch.float64)
    layout = Layout("block", 4)
    losses = []
    for positions in ("targets", aligned_positions):
        _, batch = block_batch(layout, shift, mask_token_id, aligned_positions=positions)
        losses.append(loss_sums(model, batch, Supervision(layout, mask_token_id))[TokenTerm()])
    torch.testing.assert_close(*losses)


def test_every_index_names_the_state_of_the_token_that_it_should():
    layout, length = Layout("block", 4), uneven_rows()[0]["clean_ids"].shape[0]
    for shift in (0, 1):
        for positions in ("targets", "visible", "all"):
            items, batch = block_batch(layout, shift, MASK, aligned_positions=positions)
            aligned_ids = batch["clean_ids"].flatten()[batch["teacher_index"]]
            student_ids = batch["student_ids"].flatten()[batch["aligned_index"]]
            assert torch.equal(student_ids[student_ids != MASK], aligned_ids[student_ids != MASK])
            assert (student_ids == MASK).any() == (positions != "visible")
            assert batch["counts"]["aligned"] == len(batch["aligned_index"])
        token = torch.cat(
            [row * length + mask.nonzero()[:, 0] for row, item in enumerate(items) for mask in item["is_masked"]]
        )
        assert torch.equal(batch["target_ids"], batch["clean_ids"].flatten()[token])


@contexts
def test_causal_states_have_read_what_precedes_a_predictable_token_and_nothing_else(causal_context):
    """Under a causal context and with the AR model's own weights they are its states."""
    model, mask_token_id = adapted("qwen3", torch.float64)
    layout = Layout("block", 4, causal_context)
    _, batch = block_batch(layout, 1, mask_token_id)
    states = body_forward(
        model,
        batch["student_ids"],
        layout,
        document_ids=batch["student_document_ids"],
        position_ids=batch["student_position_ids"],
        stream_ids=batch["stream_ids"],
    ).last_hidden_state.flatten(0, 1)[batch["causal_index"]]
    teacher = body_forward(
        model,
        batch["clean_ids"],
        Layout("causal"),
        document_ids=batch["document_ids"],
        position_ids=batch["position_ids"],
    ).last_hidden_state.flatten(0, 1)[batch["causal_teacher_index"]]
    assert batch["counts"]["finished"] == len(states)
    if causal_context:
        torch.testing.assert_close(states, teacher)
    position = batch["position_ids"].flatten()[batch["causal_teacher_index"]] + 1
    assert (position % 4 == 0).all() != causal_context


# Blocks of one token


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gpt2"])
def test_blocks_of_one_token_with_shift_1_are_the_autoregressive_model(family):
    """Complementary views mask each token once, so that their loss is the whole AR loss; no copies are needed."""
    model, mask_token_id = adapted(family, torch.float64)
    layout = Layout("block", 1)
    rows = uneven_rows()
    noised = TrainingStream(rows, 8, seed=0, shift=1, noising=Noising(2, complementary=True, block_size=1))
    clean = TrainingStream(rows, 8, seed=0, shift=1, noising=None)
    batch = BlockCollator(mask_token_id, 1, layout)([noised[position] for position in range(4)])
    ar_batch = Collator(mask_token_id, 1, predict_all=True)([clean[position] for position in range(4)])
    assert batch["student_ids"].shape[1] <= ar_batch["clean_ids"].shape[1]
    sums = loss_sums(model, batch, Supervision(layout, mask_token_id))
    ar_sums = loss_sums(model, ar_batch, Supervision(Layout("causal"), mask_token_id))
    assert len(batch["target_ids"]) == len(ar_batch["target_ids"])
    torch.testing.assert_close(sums[TokenTerm()], ar_sums[TokenTerm()], rtol=1e-12, atol=0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients, ar_gradients = (torch.autograd.grad(s[TokenTerm()], parameters) for s in (sums, ar_sums))
    for gradient, expected in zip(gradients, ar_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
