"""Likelihood of held-out rows: the diffusion model's NELBO, and its autoregressive source's NLL on the same tokens.

A document's NELBO (`decausal.diffusion.nelbo`) is estimated from its own mask patterns: m of its n predicted tokens are
masked, m uniform in 1..n, and their summed cross-entropy has weight n/m. Documents of a row are isolated. So a row's
NELBO is the sum over its documents, and one pass over the row scores a pattern of each. Under a block layout a document
is written block by block, so its NELBO is the sum over its blocks, each with clean blocks before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from decausal.data.stream import Rows
from decausal.diffusion.layout import Layout
from decausal.errors import UserError
from decausal.evaluation.byte_count import ByteCounter
from decausal.evaluation.passes import (
    in_batches,
    measuring,
    noised_states,
    predicted_tokens,
    spread_indices,
    state_nll,
    token_nll,
)
from decausal.evaluation.patterns import NoisedRow, noised_rows, stack
from decausal.evaluation.results import (
    ArLikelihood,
    Likelihood,
    NoiseBin,
    Ratio,
    ratio_over_rows,
)
from decausal.models.backbone import denoising_head, head_of
from decausal.models.facts import ConversionFacts
from decausal.objectives.head import Head

CAUSAL = Layout("causal")

OnProgress = Callable[[int, int], None]
"""Called with the number of noised rows that are done, and of all rows."""


def evaluate_nll(
    model: nn.Module,
    facts: ConversionFacts,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_rows: int | None = None,
    samples_per_row: int = 8,
    batch_size: int = 8,
    seed: int = 0,
    num_bins: int = 5,
    on_progress: OnProgress | None = None,
) -> Likelihood:
    """Measures a diffusion model's NELBO and masked cross-entropy on packed rows.

    Masks are a function of (seed, row index) only, so models measured with one seed see the same masks. Gradients are
    off and the model is in eval mode. Afterwards its modes are restored.

    Args:
        model: The converted model, or one in training.
        facts: Its layout, shift and mask token.
        rows: Packed rows, see `decausal.data.stream.Rows`.
        tokenizer: Counts the bytes of the tokens.
        num_rows: How many rows to measure, spread evenly. None: all.
        samples_per_row: Mask patterns per row, S, with stratified levels.
        batch_size: Noised rows per forward pass. It changes figures only by rounding.
        seed: Seed of the mask patterns.
        num_bins: Bins of equal width of the share of masked tokens.
        on_progress: Called after each forward pass.

    Returns:
        The figures, without those of the AR source (see `decausal.evaluation.checkpoint.evaluate_checkpoint`).

    Raises:
        UserError: For an option out of range, or rows without any token to predict.
    """
    _check(samples_per_row=samples_per_row, num_bins=num_bins)
    indices = spread_indices(rows, num_rows)
    sizes = _sizes(rows, indices, tokenizer)
    head = denoising_head(model, facts.mask_token_id)
    totals = _Totals(len(indices), num_bins)
    num_done, num_views = 0, len(indices) * samples_per_row
    with measuring(model):
        drawn = noised_rows(rows, indices, samples_per_row, seed, facts.block_size)
        for views, num_of_row in _passes(drawn, samples_per_row, batch_size, facts.layout == "block"):
            batch = stack(views)
            index = batch.is_masked.flatten().nonzero()[:, 0]
            nll = _masked_nll(model, head, facts, batch, index, num_of_row)
            totals.add(batch, index, nll)
            num_done += len(views)
            if on_progress is not None:
                on_progress(num_done, num_views)
    return totals.likelihood(sizes, samples_per_row, seed)


def _passes(
    views: Iterator[NoisedRow], samples_per_row: int, batch_size: int, shares_rows: bool
) -> Iterator[tuple[list[NoisedRow], int]]:
    """Yields the views of each pass, and how many of them, one after another, are of one clean row.

    Under block layouts the clean tokens of a row are read once for all its views in a pass.
    """
    if not shares_rows:
        yield from ((batch, 1) for batch in in_batches(views, batch_size))
    elif samples_per_row <= batch_size:
        whole = batch_size // samples_per_row * samples_per_row
        yield from ((batch, samples_per_row) for batch in in_batches(views, whole))
    else:
        for of_row in in_batches(views, samples_per_row):
            yield from ((part, len(part)) for part in in_batches(of_row, batch_size))


def _masked_nll(
    model: nn.Module, head: Head, facts: ConversionFacts, batch: NoisedRow, index: Int[Tensor, " n"], num_of_row: int
) -> Float[Tensor, " n"]:
    """Losses of a batch's masked tokens, `index` being their places in [B*T].

    Each `num_of_row` views are of one clean row.
    """
    is_masked = batch.is_masked.unflatten(0, (-1, num_of_row))
    states = noised_states(model, facts, batch.clean_ids[::num_of_row], batch.document_ids[::num_of_row], is_masked)
    return state_nll(states, head, batch.clean_ids.flatten()[index])


def evaluate_ar_nll(
    model: nn.Module,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_rows: int | None = None,
    batch_size: int = 8,
) -> ArLikelihood:
    """Measures an autoregressive model's NLL on exactly the tokens that `evaluate_nll` measures.

    Args:
        model: Any stock causal LM, run under the causal layout with documents isolated.
        rows, tokenizer, num_rows: As for `evaluate_nll`.
        batch_size: Rows per forward pass.

    Raises:
        UserError: For an option out of range, or rows without any token to predict.
    """
    indices = spread_indices(rows, num_rows)
    sizes = _sizes(rows, indices, tokenizer)
    head, row_nll = head_of(model), []
    with measuring(model):
        for batch in in_batches((rows[index] for index in indices), batch_size):
            clean_ids, document_ids = (
                torch.stack([row[name] for row in batch]) for name in ("clean_ids", "document_ids")
            )
            is_predicted = torch.stack([predicted_tokens(row) for row in batch])
            index = is_predicted.flatten().nonzero()[:, 0]
            nll = token_nll(model, head, CAUSAL, clean_ids, document_ids, index, clean_ids.flatten()[index], shift=1)
            row_nll.append(_sum_by(index // clean_ids.shape[1], nll, len(batch)))
    per_token, per_byte = _per_token_and_byte(torch.cat(row_nll), sizes)
    return ArLikelihood(*per_token, *per_byte, int(sizes.tokens.sum()), int(sizes.bytes.sum()), len(indices))


class _Sizes(NamedTuple):
    """Predicted tokens of each row, and bytes of their text."""

    tokens: Float[Tensor, " R"]
    bytes: Float[Tensor, " R"]


class _Totals:
    """Sums by row, and by row and bin, in fp64. Their size does not grow with the number of samples."""

    def __init__(self, num_rows: int, num_bins: int) -> None:
        self.nelbo = torch.zeros(num_rows, dtype=torch.float64)
        by_bin = (num_rows, num_bins)
        self.cross_entropy = torch.zeros(by_bin, dtype=torch.float64)
        self.share = torch.zeros(by_bin, dtype=torch.float64)
        self.num_masked = torch.zeros(by_bin, dtype=torch.float64)

    def add(self, batch: NoisedRow, index: Int[Tensor, " n"], nll: Float[Tensor, " n"]) -> None:
        """Adds the losses of a batch's masked tokens, `index` being their places in [B*T]."""
        num_rows, num_bins = self.share.shape
        slot = batch.slot[index // batch.is_masked.shape[1]]
        weight, num_masked, num_predicted = (
            tensor.flatten()[index] for tensor in (batch.weight, batch.num_masked, batch.num_predicted)
        )
        self.nelbo += _sum_by(slot, nll * weight, num_rows)
        # Bins are open below and closed above, since the share m/n is in (0, 1]. Whole numbers avoid rounding at edges.
        level_bin = (num_masked * num_bins - 1) // num_predicted
        cell = slot * num_bins + level_bin
        # At uniform t, n of n + 1 patterns mask anything, and only those are drawn here. With this factor, documents of
        # all lengths count as in training.
        share = num_predicted.double() / (num_predicted + 1)
        for total, values in (
            (self.cross_entropy, nll * share),
            (self.share, share),
            (self.num_masked, torch.ones_like(share)),
        ):
            total += _sum_by(cell, values, total.numel()).view_as(total)

    def likelihood(self, sizes: _Sizes, num_samples: int, seed: int) -> Likelihood:
        row_nelbo = self.nelbo / num_samples
        per_token, per_byte = _per_token_and_byte(row_nelbo, sizes)
        return Likelihood(
            *per_token,
            *per_byte,
            *ratio_over_rows(self.cross_entropy.sum(dim=1), self.share.sum(dim=1)),
            bins=tuple(self._bin(number) for number in range(self.share.shape[1])),
            num_tokens=int(sizes.tokens.sum()),
            num_bytes=int(sizes.bytes.sum()),
            num_rows=len(row_nelbo),
            samples_per_row=num_samples,
            seed=seed,
            row_nelbo=tuple(row_nelbo.tolist()),
            row_num_tokens=tuple(sizes.tokens.long().tolist()),
        )

    def _bin(self, number: int) -> NoiseBin:
        num_bins = self.share.shape[1]
        cross_entropy = ratio_over_rows(self.cross_entropy[:, number], self.share[:, number])
        num_tokens = int(self.num_masked[:, number].sum())
        return NoiseBin(number / num_bins, (number + 1) / num_bins, *cross_entropy, num_tokens)


def _sizes(rows: Rows, indices: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> _Sizes:
    count_bytes = ByteCounter(tokenizer)
    num_tokens, num_bytes = [], []
    for index in indices:
        row = rows[index]
        is_predicted = predicted_tokens(row)
        ids, documents = row["clean_ids"][is_predicted], row["document_ids"][is_predicted]
        num_tokens.append(len(ids))
        num_bytes.append(sum(count_bytes(ids[documents == document]) for document in documents.unique()))
    if not sum(num_tokens):
        raise UserError("the data hold no token that can be predicted; give other data")
    return _Sizes(torch.tensor(num_tokens).double(), torch.tensor(num_bytes).double())


def _per_token_and_byte(row_nats: Float[Tensor, " R"], sizes: _Sizes) -> tuple[Ratio, Ratio]:
    return ratio_over_rows(row_nats, sizes.tokens), ratio_over_rows(row_nats / math.log(2), sizes.bytes)


def _sum_by(group: Int[Tensor, " n"], values: Float[Tensor, " n"], num_groups: int) -> Float[Tensor, " num_groups"]:
    return torch.zeros(num_groups, dtype=values.dtype).index_add_(0, group, values)


def _check(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"--{name} {count}: must be at least 1")
