"""Runs a model over held-out rows: which rows, in what batches, and the likelihood of chosen tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch
import xxhash
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from decausal.data.stream import Rows
from decausal.diffusion.doubled import block_starts, double, joined, needs_copy
from decausal.diffusion.layout import Layout, block_numbers, is_packed
from decausal.diffusion.shift import predictable, predicting_index
from decausal.errors import UserError
from decausal.models.architecture import context_length
from decausal.models.backbone import body_forward, stock_model
from decausal.models.facts import ConversionFacts
from decausal.objectives.head import Head
from decausal.objectives.tokens import chunked_cross_entropy

Item = TypeVar("Item")


def spread_indices(rows: Rows, num_rows: int | None) -> list[int]:
    """Returns the indices of `num_rows` rows, spread evenly, or of all rows if there are fewer.

    Neighbouring rows hold the same files, so the first rows would be a poor sample.

    Raises:
        UserError: There are no rows, or fewer than one is asked for.
    """
    if num_rows is not None and num_rows < 1:
        raise UserError(f"--num_rows {num_rows}: must be at least 1")
    if not len(rows):
        raise UserError("there are no rows to measure on; give other data")
    num_taken = len(rows) if num_rows is None else min(num_rows, len(rows))
    return [i * len(rows) // num_taken for i in range(num_taken)]


def hash_of_rows(rows: Rows, num_rows: int | None) -> str:
    """Returns a hash of what is measured on: the tokens of `num_rows` rows and which of them are predicted."""
    found = xxhash.xxh3_128()
    for index in spread_indices(rows, num_rows):
        row = rows[index]
        found.update(row["clean_ids"].numpy().tobytes() + predicted_tokens(row).numpy().tobytes())
    return found.hexdigest()


def in_batches(items: Iterable[Item], batch_size: int) -> Iterator[list[Item]]:
    """Yields lists of `batch_size` items; the last may be shorter.

    Raises:
        UserError: If the batch size is below 1.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: must be at least 1")
    iterator = iter(items)
    while batch := list(islice(iterator, batch_size)):
        yield batch


def predicted_tokens(row: dict[str, Tensor]) -> Bool[Tensor, " T"]:
    """Returns which tokens of a row are measured: those that may be masked, except each document's first.

    An autoregressive model cannot predict a document's first token, and neither can a converted one with shift 1. It is
    given and never masked for every model, so that all are measured on the same tokens.
    """
    return row["is_maskable"] & predictable(row["document_ids"][None], shift=1)[0]


@contextmanager
def measuring(*models: nn.Module) -> Iterator[None]:
    """Turns gradients off and eval mode on, and afterwards restores every module's mode."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, is_training in modes:
            module.training = is_training


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of the model's weights."""
    return next(model.parameters()).device


def documents_if_packed(document_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"] | None:
    """Returns the document ids, or None if every row is one whole document and needs no explicit mask."""
    return document_ids if is_packed(document_ids) else None


def token_nll(
    model: nn.Module,
    head: Head,
    layout: Layout,
    input_ids: Int[Tensor, "B T"],
    document_ids: Int[Tensor, "B T"],
    token_index: Int[Tensor, " n"],
    token_ids: Int[Tensor, " n"],
    shift: int,
) -> Float[Tensor, " n"]:
    """Returns the negative log-likelihood in nats, on the CPU in fp64, of tokens given what the model reads.

    The head runs on the states that predict those tokens, chunk by chunk, so all logits never exist at once. Call it
    inside `measuring`.

    Args:
        model: Any stock causal LM.
        head: Its head, with the mask token banned for a diffusion model.
        layout: Who attends to whom.
        input_ids: The rows to read. Tensors are moved to the model's device.
        document_ids: Document of each token, -1 for padding.
        token_index: Flat index into [B*T] of each token to score.
        token_ids: The tokens to score.
        shift: Which state predicts a token, see `decausal.diffusion.shift`.
    """
    states = _predicting_states(model, layout, input_ids, document_ids, token_index, shift)
    return state_nll(states, head, token_ids)


def _predicting_states(
    model: nn.Module,
    layout: Layout,
    input_ids: Int[Tensor, "B T"],
    document_ids: Int[Tensor, "B T"],
    token_index: Int[Tensor, " n"],
    shift: int,
) -> Float[Tensor, "n D"]:
    """Returns the states that predict tokens, by flat index into [B*T], from one pass over whole rows."""
    device = device_of(model)
    packed = documents_if_packed(document_ids)
    output = body_forward(
        model, input_ids.to(device), layout, document_ids=None if packed is None else packed.to(device)
    )
    places = predicting_index(token_index, shift).to(device)
    return output.last_hidden_state.flatten(0, 1).index_select(0, places)


def noised_states(
    model: nn.Module,
    facts: ConversionFacts,
    clean_ids: Int[Tensor, "B T"],
    document_ids: Int[Tensor, "B T"],
    is_masked: Bool[Tensor, "B K T"],
) -> Float[Tensor, "n D"]:
    """Returns the states that predict the masked tokens of K noised views of rows, under the layout of the facts.

    Call it inside `measuring`.

    Args:
        model: Any stock causal LM.
        facts: Layout, shift and mask token.
        clean_ids: Packed rows. Tensors are moved to the model's device.
        document_ids: Document of each token, -1 for padding.
        is_masked: What each view masks. Views without masks cost nothing.

    Returns:
        One state for each masked token, in the order of their flat index into [B*K*T].
    """
    if facts.layout == "block":
        return _block_states(model, facts, clean_ids, document_ids, is_masked)
    is_read = is_masked.any(dim=2)
    if not is_read.any():
        is_read[:1, :1] = True  # a model reads at least one row
    row, _ = is_read.nonzero(as_tuple=True)
    masked = is_masked[is_read]
    noised_ids, documents = clean_ids[row].masked_fill(masked, facts.mask_token_id), document_ids[row]
    token_index = masked.flatten().nonzero()[:, 0]
    return _predicting_states(model, facts.attention, noised_ids, documents, token_index, facts.shift)


def _block_states(
    model: nn.Module,
    facts: ConversionFacts,
    clean_ids: Int[Tensor, "B T"],
    document_ids: Int[Tensor, "B T"],
    is_masked: Bool[Tensor, "B K T"],
) -> Float[Tensor, "n D"]:
    """Does what `noised_states` does for block layouts. A row's clean tokens are read once for all its views. A block
    is read again only in views where one of its states predicts a masked token, and once for views that mask the same
    of its tokens."""
    device, attention = device_of(model), facts.attention
    assert attention.block_size is not None
    block = block_numbers(document_ids, attention.block_size)
    first_view = _first_alike(is_masked, block)
    is_copied = needs_copy(is_masked, block_starts(document_ids, attention.block_size), facts.shift)
    is_copied = is_copied & (first_view == torch.arange(is_masked.shape[1])[:, None])
    context = context_length(stock_model(model).config)
    rows = joined(
        double(clean_ids, document_ids, is_copied, is_masked, facts.mask_token_id, attention.block_size, context)
    )
    output = body_forward(
        model,
        rows.ids.to(device),
        attention,
        document_ids=rows.document_ids.to(device),
        position_ids=rows.position_ids.to(device),
        stream_ids=rows.stream_ids.to(device),
    )
    row, view, column = is_masked.nonzero(as_tuple=True)
    view = first_view[row, view, column]
    places = rows.predicting_place(view + 1, row * clean_ids.shape[1] + column, facts.shift)
    return output.last_hidden_state.flatten(0, 1).index_select(0, places.to(device))


def _first_alike(is_masked: Bool[Tensor, "B K T"], block: Int[Tensor, "B T"]) -> Int[Tensor, "B K T"]:
    """Returns the first view that masks the same tokens of each token's block."""
    index = block.clamp(min=0)
    first = torch.empty_like(is_masked, dtype=torch.int64)
    for view in reversed(range(is_masked.shape[1])):
        num_other = torch.zeros_like(first).scatter_add_(
            2, index[:, None].expand_as(first), (is_masked != is_masked[:, view : view + 1]).long()
        )
        first.masked_fill_(num_other.gather(2, index[:, None].expand_as(first)) == 0, view)
    return first


def state_nll(states: Float[Tensor, "n D"], head: Head, token_ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Returns the negative log-likelihood in nats, on the CPU in fp64, of the tokens that states predict.

    The head runs chunk by chunk, so all logits never exist at once.
    """
    weights = torch.ones(len(token_ids), device=states.device)
    return chunked_cross_entropy(states, head, token_ids.to(states.device), weights).nll.double().cpu()
