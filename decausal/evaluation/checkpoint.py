"""Likelihood of a converted checkpoint on a user's data, with that of the AR model that it was made from."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from decausal.data.reading import Reading
from decausal.data.rows import load_rows
from decausal.data.sources import Data
from decausal.data.stream import Rows
from decausal.data.template import set_template
from decausal.devices import best_device
from decausal.errors import UserError
from decausal.evaluation.drafts import evaluate_drafts
from decausal.evaluation.likelihood import OnProgress, evaluate_ar_nll, evaluate_nll
from decausal.evaluation.passes import hash_of_rows
from decausal.evaluation.results import DraftedLikelihood, Likelihood, beside, beside_other_tokens
from decausal.evaluation.source import is_same_vocabulary, loaded_source, source_of
from decausal.models.architecture import refuse_longer_rows
from decausal.models.checkpoint import Converted, load_converted


def evaluate_checkpoint(
    directory: str | Path,
    data: Data,
    *,
    reading: Reading | None = None,
    chat_template: str | Path | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_length: int = 512,
    num_rows: int | None = None,
    samples_per_row: int = 8,
    batch_size: int = 8,
    seed: int = 0,
    with_source: bool = True,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Likelihood | DraftedLikelihood:
    """Measures a converted checkpoint on `data`, and beside it the AR model that it was made from.

    The measures are those of `decausal.evaluation.likelihood`.

    A model whose masks only draft is measured as what it writes: by its exact likelihood, read causally, and by its
    drafts.

    Args:
        directory: What `decausal convert` wrote.
        data, reading: See `decausal.data.rows.load_rows`.
        chat_template, chat_template_kwargs: See `decausal.data.template.set_template`.
        max_length: Tokens per row, T: how much a token can read at most.
        num_rows, samples_per_row, batch_size, seed: See `decausal.evaluation.likelihood.evaluate_nll`.
        with_source: Whether to measure the source too. If it is not available or has changed, `ar_missing` says so.
        device: None: CUDA where there is one, else the CPU.
        dtype: Type of the weights of both models.

    Raises:
        UserError: There is no such checkpoint, data cannot be read, or an option is out of range.
    """
    converted = load_converted(directory, dtype, device or best_device())
    model, tokenizer, facts = converted
    refuse_longer_rows(max_length, model.config)
    set_template(tokenizer, chat_template, chat_template_kwargs)
    rows = load_rows(data, tokenizer, max_length, reading=reading)
    if facts.only_drafts:
        drafted = _drafted(converted, rows, num_rows, batch_size, with_source)
        return replace(drafted, data_hash=hash_of_rows(rows, num_rows))
    with _shown_progress() as on_progress:
        likelihood = evaluate_nll(
            model,
            facts,
            rows,
            tokenizer,
            num_rows=num_rows,
            samples_per_row=samples_per_row,
            batch_size=batch_size,
            seed=seed,
            on_progress=on_progress,
        )
    likelihood = replace(likelihood, data_hash=hash_of_rows(rows, num_rows))
    if not with_source:
        return likelihood
    try:
        source, source_tokenizer = loaded_source(converted)
    except UserError as error:
        return replace(likelihood, ar_missing=str(error))
    if is_same_vocabulary(tokenizer, source_tokenizer):
        return beside(likelihood, evaluate_ar_nll(source, rows, tokenizer, num_rows=num_rows, batch_size=batch_size))
    set_template(source_tokenizer, chat_template, chat_template_kwargs)
    refuse_longer_rows(max_length, source.config)
    its_rows = load_rows(data, source_tokenizer, max_length, reading=reading)
    ar = evaluate_ar_nll(source, its_rows, source_tokenizer, num_rows=num_rows, batch_size=batch_size)
    return beside_other_tokens(likelihood, ar)


def _drafted(
    converted: Converted, rows: Rows, num_rows: int | None, batch_size: int, with_source: bool
) -> DraftedLikelihood:
    model, tokenizer, facts = converted
    own = evaluate_ar_nll(model, rows, tokenizer, num_rows=num_rows, batch_size=batch_size)
    drafts = evaluate_drafts(model, facts, rows, num_rows=num_rows, batch_size=batch_size)
    if not with_source:
        return DraftedLikelihood(own, drafts)
    try:
        source = source_of(converted)
    except UserError as error:
        return DraftedLikelihood(own, drafts, source_missing=str(error))
    of_source = evaluate_ar_nll(source, rows, tokenizer, num_rows=num_rows, batch_size=batch_size)
    return DraftedLikelihood(own, drafts, of_source)


@contextmanager
def _shown_progress() -> Iterator[OnProgress | None]:
    if not sys.stderr.isatty():
        yield None
        return
    with Console(stderr=True).status("measuring") as status:
        yield lambda done, total: status.update(f"measuring: {done:,} of {total:,} noised rows")
