"""Measures the texts that a converted model writes after prompts: their look, and their likelihood under the AR source.

Perplexity under another model is lowest for a text that repeats one word. So it always comes with the entropy of the
texts' tokens, and with the same figures for what the AR source writes itself.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import xxhash
from rich.table import Table

from decausal.data.asked import AskedPrompts
from decausal.data.reading import Reading
from decausal.data.sources import Data
from decausal.devices import best_device
from decausal.errors import UserError
from decausal.evaluation.continuations.causal import score_causally
from decausal.evaluation.continuations.scored import Continuation
from decausal.evaluation.source import source_of
from decausal.evaluation.sweep import written
from decausal.models.architecture import context_length
from decausal.models.checkpoint import Converted, load_converted
from decausal.report.texts import TextFigures, text_figures
from decausal.sampling.jobs import Ended
from decausal.sampling.settings.of_model import settings_for

MAX_NEW_TOKENS = 128
NUM_PROMPTS = 32
MAX_LENGTH = 1024
_FIRST_TEXTS = 3


@dataclass(frozen=True)
class Texts:
    """What one model wrote.

    Attributes:
        look: How the texts look.
        perplexity: Perplexity of their tokens under the AR source; None without it.
        num_ended: Texts with an end token.
        tokens_per_forward: New tokens over forward passes.
        tokens_per_second: New tokens over seconds of writing.
        first: The first few texts.
    """

    look: TextFigures
    perplexity: float | None
    num_ended: int
    tokens_per_forward: float
    tokens_per_second: float
    first: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextsOf:
    """Texts of a converted model, and of its AR source after the same prompts.

    Attributes:
        model: The texts of the converted model.
        source: The texts of the AR source in the same engine.
        agreement: Share of the AR source's tokens that come before the first different one: the mean over texts.
        same_texts: Share of texts that are the AR source's, token for token.
        source_missing: Why there are no figures of the source, nor perplexities.
        sampler: The sampler settings.
        data_hash: A hash of the prompts.
    """

    model: Texts
    source: Texts | None
    source_missing: str | None
    sampler: dict[str, Any]
    data_hash: str
    agreement: float | None = None
    same_texts: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures as JSON takes them."""
        return asdict(self)

    def as_table(self) -> Table:
        """Returns the figures as a table for a terminal."""
        table = Table("figure", "model", *(() if self.source is None else ("AR source",)), title="What is written")
        columns = [_cells(texts) for texts in (self.model, self.source) if texts is not None]
        for name, cells in zip(_CELLS, zip(*columns, strict=True), strict=True):
            table.add_row(name, *cells)
        if self.agreement is not None and self.same_texts is not None:
            table.caption = f"{self.agreement:.3f} of the AR source's tokens, {self.same_texts:.3f} of its texts"
        if self.source_missing is not None:
            table.caption = f"no AR source, and so no perplexity: {self.source_missing}"
        return table


def evaluate_texts(
    directory: str | Path,
    data: Data,
    *,
    reading: Reading | None = None,
    num_prompts: int = NUM_PROMPTS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_length: int = MAX_LENGTH,
    batch_size: int = 16,
    with_source: bool = True,
    device: str | torch.device | None = None,
    **options: Any,
) -> TextsOf:
    """Has a converted model, and its AR source, continue the prompts of `data`.

    Args:
        directory: What `decausal convert` wrote.
        data, reading: The prompts, see `decausal.data.asked.AskedPrompts`.
        num_prompts: How many prompts, from the first.
        max_new_tokens: Longest text.
        max_length: Longest prompt and text together.
        batch_size: Rows written together.
        with_source: Whether the AR source also writes, and judges the texts.
        device: None: CUDA where there is one, else the CPU.
        **options: `SamplerSettings` by name.

    Raises:
        UserError: There is no such checkpoint, data cannot be read, or a setting is bad.
    """
    converted = load_converted(directory, torch.float32, device or best_device())
    longest = min(max_length, context_length(converted.model.config) or max_length)
    if max_new_tokens >= longest:
        raise UserError(f"--max_new_tokens {max_new_tokens} leaves no room for a prompt in {longest} tokens")
    asked = AskedPrompts(
        data,
        converted.tokenizer,
        max_length=longest,
        num_new_tokens=max_new_tokens,
        num_prompts=num_prompts,
        reading=reading,
    )
    prompts = [prompt.ids.tolist() for prompt in asked]
    source, missing = _source(converted) if with_source else (None, "--no_source")
    rows, model = _texts(converted, source, prompts, max_new_tokens, batch_size, options)
    found = TextsOf(
        model=model,
        source=None,
        source_missing=missing,
        sampler=asdict(settings_for(converted.facts, max_new_tokens=max_new_tokens, **options)),
        data_hash=xxhash.xxh3_128_hexdigest(repr(prompts).encode()),
    )
    if source is None:
        return found
    drawing = {name: options[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed") if name in options}
    source_rows, texts = _texts(source, source, prompts, max_new_tokens, batch_size, drawing)
    pairs = list(zip(rows, source_rows, strict=True))
    return replace(
        found,
        source=texts,
        agreement=fmean(_num_alike(ours.ids, theirs.ids) / len(theirs.ids) for ours, theirs in pairs),
        same_texts=fmean(ours.ids == theirs.ids for ours, theirs in pairs),
    )


def _source(converted: Converted) -> tuple[Converted | None, str | None]:
    """Returns the AR source as engines take it, or why there is none."""
    try:
        model = source_of(converted)
    except UserError as error:
        return None, str(error)
    return causal(model, converted), None


def causal(model: Any, converted: Converted) -> Converted:
    """Returns an AR source as a model that writes from left to right, with the converted model's tokens."""
    facts = replace(
        converted.facts.shared(),
        layout="causal",
        block_size=None,
        causal_context=False,
        causal_groups=False,
        shift=1,
        sampler={},
    )
    return Converted(model.eval(), converted.tokenizer, facts)


def _texts(
    model: Converted,
    judge: Converted | None,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    options: dict[str, Any],
) -> tuple[list[Ended], Texts]:
    rows, seconds = written(model, prompts, max_new_tokens, batch_size, options)
    decode = model.tokenizer.decode
    return rows, Texts(
        look=text_figures([row.ids for row in rows]),
        perplexity=None if judge is None else _perplexity(judge, prompts, rows, batch_size),
        num_ended=sum(row.reason == "end" for row in rows),
        tokens_per_forward=sum(len(row.ids) for row in rows) / sum(row.num_forwards for row in rows),
        tokens_per_second=sum(len(row.ids) for row in rows) / seconds,
        first=tuple(decode(row.ids, skip_special_tokens=True) for row in rows[:_FIRST_TEXTS]),
    )


def _num_alike(ours: list[int], theirs: list[int]) -> int:
    """Returns the number of tokens before the first that differs."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))


def _perplexity(judge: Converted, prompts: list[list[int]], rows: list[Ended], batch_size: int) -> float:
    asked = [Continuation(prompt, row.ids) for prompt, row in zip(prompts, rows, strict=True)]
    found = [scored.log_likelihood for _, scored, _ in score_causally(judge, asked, batch_size=batch_size)]
    return math.exp(-sum(found) / sum(len(row.ids) for row in rows))


_CELLS = (
    "tokens of a text",
    "ended",
    "repetition of 4-grams",
    "distinct 1/2/3-grams",
    "entropy of tokens, nats",
    "perplexity under the AR source",
    "tokens per forward",
    "tokens per second",
)


def _cells(texts: Texts) -> list[str]:
    look = texts.look
    return [
        f"{look.length:.1f}",
        f"{texts.num_ended} of {look.num_texts}",
        _number(look.repetition),
        "/".join(_number(share) for share in look.distinct),
        _number(look.entropy),
        _number(texts.perplexity),
        f"{texts.tokens_per_forward:.2f}",
        f"{texts.tokens_per_second:.1f}",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
