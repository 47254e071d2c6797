"""Results of measurements: numbers with standard errors, as JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from decausal.wording import quantity


class Ratio(NamedTuple):
    """A mean per token or byte. None if there is nothing to divide by, and without standard error for fewer than two
    rows."""

    value: float | None
    standard_error: float | None


def ratio_over_rows(sums: Float[Tensor, " R"], counts: Float[Tensor, " R"]) -> Ratio:
    """Returns the mean per token over rows that hold different numbers of tokens, and its standard error with rows as
    clusters.

    Tokens of a row are not independent, but rows nearly are. So the standard error is that between rows, ``sqrt(R / (R
    - 1) * sum_r (sums_r - mean * counts_r)^2) / sum_r counts_r``. It covers both the choice of text and the draw of
      masks.

    Args:
        sums: Each row's sum, in any unit.
        counts: The denominators: the row's tokens, bytes or weights. Some may be 0.

    Source: the ratio estimator, Cochran, Sampling techniques (3rd ed., sections 2.11 and 6.3).
    """
    total = counts.sum().item()
    if total == 0:
        return Ratio(None, None)
    mean = sums.sum().item() / total
    num_rows = len(sums)
    if num_rows < 2:
        return Ratio(mean, None)
    residuals = (sums - mean * counts).square().sum().item()
    return Ratio(mean, math.sqrt(num_rows / (num_rows - 1) * residuals) / total)


@dataclass(frozen=True)
class NoiseBin:
    """Cross-entropy of masked tokens, in nats, in documents of which a share in (low, high] is masked."""

    low: float
    high: float
    cross_entropy: float | None
    standard_error: float | None
    num_tokens: int


@dataclass(frozen=True)
class ArLikelihood:
    """Likelihood under the autoregressive model, in nats per predicted token and bits per byte of their text."""

    nll_per_token: float
    nll_standard_error: float | None
    bits_per_byte: float | None
    bits_per_byte_standard_error: float | None
    num_tokens: int
    num_bytes: int
    num_rows: int


@dataclass(frozen=True)
class Likelihood:
    """The results of `evaluate_nll`. Standard errors are over rows; None for a single row.

    Attributes:
        nelbo_per_token: Upper bound on the negative log-likelihood, in nats per predicted token.
        nelbo_standard_error: Its standard error.
        bits_per_byte: The same bound, in bits per byte of the predicted tokens' text (None if that is empty).
        bits_per_byte_standard_error: Its standard error.
        masked_cross_entropy: Mean over masked tokens at uniform noise level, in nats: what training minimises.
        masked_cross_entropy_standard_error: Its standard error.
        bins: The same by the masked share of the document.
        num_tokens: Predicted tokens.
        num_bytes: Bytes of their text.
        num_rows: Rows measured.
        samples_per_row: Mask patterns per row.
        seed: Seed of the patterns.
        ar_nll_per_token: Negative log-likelihood of the same tokens under the autoregressive source, in nats.
        ar_nll_standard_error: Its standard error.
        ar_bits_per_byte: The same in bits per byte.
        ar_bits_per_byte_standard_error: Its standard error.
        ar_missing: Why there are no figures of the source.
        data_hash: A hash of the measured rows.
        row_nelbo: NELBO of each row in nats, for comparisons row by row.
        row_num_tokens: Predicted tokens of each row.
    """

    nelbo_per_token: float
    nelbo_standard_error: float | None
    bits_per_byte: float | None
    bits_per_byte_standard_error: float | None
    masked_cross_entropy: float
    masked_cross_entropy_standard_error: float | None
    bins: tuple[NoiseBin, ...]
    num_tokens: int
    num_bytes: int
    num_rows: int
    samples_per_row: int
    seed: int
    ar_nll_per_token: float | None = None
    ar_nll_standard_error: float | None = None
    ar_bits_per_byte: float | None = None
    ar_bits_per_byte_standard_error: float | None = None
    ar_missing: str | None = None
    data_hash: str = ""
    row_nelbo: tuple[float, ...] = field(default=(), repr=False)
    row_num_tokens: tuple[int, ...] = field(default=(), repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures as JSON takes them, without those of single rows."""
        record = asdict(self)
        del record["row_nelbo"], record["row_num_tokens"]
        record["bins"] = list(record["bins"])
        return record

    def as_table(self) -> Table:
        """Returns the figures as a table for the terminal."""
        rows, tokens = quantity(self.num_rows, "row"), quantity(self.num_tokens, "token")
        patterns = quantity(self.samples_per_row, "mask pattern")
        table = Table(title=f"Likelihood of {tokens} in {rows}, {patterns} per row")
        table.add_column("measure")
        table.add_column("value", justify="right")
        table.add_column("± s.e.", justify="right")
        table.add_column("unit")
        for name, value, standard_error, unit in self._lines():
            table.add_row(name, _number(value), _number(standard_error), unit)
        if self.ar_missing is not None:
            table.caption = f"{'no ' if self.ar_bits_per_byte is None else ''}AR source: {self.ar_missing}"
        return table

    def _lines(self) -> list[tuple[str, float | None, float | None, str]]:
        lines = [
            ("NELBO", self.nelbo_per_token, self.nelbo_standard_error, "nats per token"),
            ("NELBO", self.bits_per_byte, self.bits_per_byte_standard_error, "bits per byte"),
        ]
        if self.ar_nll_per_token is not None:
            lines.append(("AR source NLL", self.ar_nll_per_token, self.ar_nll_standard_error, "nats per token"))
        if self.ar_bits_per_byte is not None:
            error = self.ar_bits_per_byte_standard_error
            lines.append(("AR source NLL", self.ar_bits_per_byte, error, "bits per byte"))
        cross_entropy = (self.masked_cross_entropy, self.masked_cross_entropy_standard_error)
        lines.append(("masked cross-entropy", *cross_entropy, "nats per masked token"))
        for noise_bin in self.bins:
            name = f"  {noise_bin.low:.0%} to {noise_bin.high:.0%} masked"
            lines.append(
                (name, noise_bin.cross_entropy, noise_bin.standard_error, quantity(noise_bin.num_tokens, "token"))
            )
        return lines


@dataclass(frozen=True)
class DraftFigures:
    """Figures of drafts of m tokens.

    Attributes:
        acceptance: For each draft of a group, the share that is right among groups whose earlier drafts are.
        tokens_per_pass: Tokens of the text over the passes that would write them, with a whole group after every number
            of right drafts.
        num_tokens: Tokens of the text that were counted.
    """

    acceptance: tuple[float, ...]
    tokens_per_pass: float
    num_tokens: int

    def as_logs(self) -> dict[str, float]:
        """Returns the figures by the names of logs."""
        logs = {f"eval_draft_accuracy_{place}": share for place, share in enumerate(self.acceptance, start=1)}
        return logs | {"eval_tokens_per_pass": self.tokens_per_pass}


@dataclass(frozen=True)
class DraftedLikelihood:
    """The measurements of a model whose masks only draft.

    Attributes:
        likelihood: The exact likelihood of the model as it writes, read causally.
        drafts: How good its drafts are on the same text.
        source: The likelihood of the AR source; the same if the weights are gated.
        source_missing: Why there are no figures of the source.
        data_hash: A hash of the measured rows.
    """

    likelihood: ArLikelihood
    drafts: DraftFigures
    source: ArLikelihood | None = None
    source_missing: str | None = None
    data_hash: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures as JSON takes them."""
        return asdict(self)

    def as_table(self) -> Table:
        """Returns the figures as a table for the terminal."""
        own = self.likelihood
        rows, tokens = quantity(own.num_rows, "row"), quantity(own.num_tokens, "token")
        table = Table(title=f"Likelihood of {tokens} in {rows}, read causally")
        table.add_column("measure")
        table.add_column("value", justify="right")
        table.add_column("± s.e.", justify="right")
        table.add_column("unit")
        for name, each in (("NLL", own), ("AR source NLL", self.source)):
            if each is not None:
                spread, byte_spread = each.nll_standard_error, each.bits_per_byte_standard_error
                table.add_row(name, _number(each.nll_per_token), _number(spread), "nats per token")
                table.add_row(name, _number(each.bits_per_byte), _number(byte_spread), "bits per byte")
        for place, share in enumerate(self.drafts.acceptance, start=1):
            table.add_row(f"draft {place}", _number(share), "-", "share right, where earlier ones are")
        table.add_row("if this text were written", _number(self.drafts.tokens_per_pass), "-", "tokens per pass")
        if self.source_missing is not None:
            table.caption = f"no AR source: {self.source_missing}"
        return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def beside(likelihood: Likelihood, ar: ArLikelihood) -> Likelihood:
    """Returns the likelihood together with an AR model's, for the same tokens.

    Raises:
        ValueError: When they were not measured on the same rows.
    """
    if (ar.num_rows, ar.num_tokens, ar.num_bytes) != (
        likelihood.num_rows,
        likelihood.num_tokens,
        likelihood.num_bytes,
    ):
        raise ValueError(f"measured on {likelihood.num_tokens} tokens and, for the AR model, on {ar.num_tokens}")
    return replace(
        likelihood,
        ar_nll_per_token=ar.nll_per_token,
        ar_nll_standard_error=ar.nll_standard_error,
        ar_bits_per_byte=ar.bits_per_byte,
        ar_bits_per_byte_standard_error=ar.bits_per_byte_standard_error,
        ar_missing=None,
    )


def beside_other_tokens(likelihood: Likelihood, ar: ArLikelihood) -> Likelihood:
    """Returns the likelihood together with that of an AR model with another tokenizer: in bits per byte alone."""
    return replace(
        likelihood,
        ar_bits_per_byte=ar.bits_per_byte,
        ar_bits_per_byte_standard_error=ar.bits_per_byte_standard_error,
        ar_missing=f"another tokenizer: bits per byte alone compare, on {ar.num_bytes:,} bytes in rows of its own",
    )


def nelbo_difference(first: Likelihood, second: Likelihood) -> Ratio:
    """Returns the NELBO per token of `first` minus that of `second` in nats, with the standard error of the difference.

    Rows are compared one by one on the same masks. A hard row is hard for both, which cancels. So this standard error
    is far smaller than that of either.

    Raises:
        ValueError: They were not measured on the same rows with the same masks.
    """
    first_draw, second_draw = ((run.row_num_tokens, run.samples_per_row, run.seed) for run in (first, second))
    if first_draw != second_draw:
        raise ValueError("the two were not measured on the same rows, samples_per_row and seed")
    differences = _fp64(first.row_nelbo) - _fp64(second.row_nelbo)
    return ratio_over_rows(differences, _fp64(first.row_num_tokens))


def _fp64(values: Sequence[float | int]) -> Float[Tensor, " R"]:
    return torch.tensor(values, dtype=torch.float64)
