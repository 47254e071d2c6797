"""Measures both runs on the same held-out rows and mask patterns, with the same AR model beside them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decausal.data.rows import PackedRows, load_rows
from decausal.devices import best_device
from decausal.evaluation.geometry import layer_cosines
from decausal.evaluation.likelihood import evaluate_ar_nll, evaluate_nll
from decausal.evaluation.results import ArLikelihood, Likelihood
from decausal.models.adapt import adapt, load_source
from decausal.models.architecture import refuse_longer_rows
from decausal.models.doctor import refuse_if_unusable
from decausal.models.facts import ConversionFacts
from decausal.training.settings import ConversionSettings

EVAL_SEED = 0  # not the run's seed: all runs are measured on the same masks
COSINE_LEVEL = 0.5  # the mean noise level of training
BATCH_SIZE = 16


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows, and the models before any training.

    Attributes:
        rows: All held-out rows, of which `num_rows` are measured, evenly spread.
        num_rows: How many rows are measured.
        samples_per_row: Mask patterns for each row.
        source: The frozen AR model.
        start: The student of both runs before training: the AR model with a mask token and opened attention.
        tokenizer: The tokenizer, with the mask token.
        facts: The student's layout, shift and mask token.
        is_bf16: Whether to measure in bfloat16, as in training.
    """

    rows: PackedRows
    num_rows: int
    samples_per_row: int
    source: PreTrainedModel
    start: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    facts: ConversionFacts
    is_bf16: bool

    def likelihood(self, model: nn.Module) -> Likelihood:
        """Measures a student's NELBO and masked cross-entropy."""
        with self._precision():
            return evaluate_nll(
                model,
                self.facts,
                self.rows,
                self.tokenizer,
                num_rows=self.num_rows,
                samples_per_row=self.samples_per_row,
                batch_size=BATCH_SIZE,
                seed=EVAL_SEED,
            )

    def ar_likelihood(self) -> ArLikelihood:
        """Measures the AR model on the same tokens."""
        with self._precision():
            return evaluate_ar_nll(
                self.source, self.rows, self.tokenizer, num_rows=self.num_rows, batch_size=BATCH_SIZE
            )

    def cosines(self, model: nn.Module) -> list[float]:
        """Returns the mean cosine of a student's states to the AR model's, for each of the L + 1 hidden states.

        The student reads noised rows and is compared where it predicts. The AR model reads the clean rows.
        """
        with self._precision():
            return layer_cosines(
                model,
                self.facts.attention,
                self.source,
                self.rows,
                num_rows=self.num_rows,
                positions="targets",
                level=COSINE_LEVEL,
                mask_token_id=self.facts.mask_token_id,
                shift=self.facts.shift,
                batch_size=BATCH_SIZE,
                seed=EVAL_SEED,
            )

    @contextmanager
    def _precision(self) -> Iterator[None]:
        with torch.autocast(self.source.device.type, torch.bfloat16, enabled=self.is_bf16):
            yield


def prepare(
    conversion: ConversionSettings, eval_data: str, *, num_rows: int, samples_per_row: int, is_bf16: bool
) -> HeldOut:
    """Loads the AR model, makes the student that both runs start from, and packs the held-out text.

    Raises:
        UserError: The model cannot be converted, or the text cannot be read.
    """
    source, tokenizer = load_source(conversion.model_name_or_path, revision=conversion.revision)
    refuse_if_unusable(source, tokenizer)
    refuse_longer_rows(conversion.max_length, source.config)
    start = copy.deepcopy(source)
    facts = ConversionFacts(
        source=conversion.model_name_or_path,
        layout=conversion.layout,
        shift=conversion.shift,
        mask_token_id=adapt(start, tokenizer, mask_token=conversion.mask_token),
    )
    rows = load_rows(eval_data, tokenizer, conversion.max_length, reading=conversion.eval_reading)
    device = best_device()
    return HeldOut(
        rows=rows,
        num_rows=min(num_rows, len(rows)),
        samples_per_row=samples_per_row,
        source=source.to(device),
        start=start.to(device),
        tokenizer=tokenizer,
        facts=facts,
        is_bf16=is_bf16,
    )
