"""Rows to denoise, made of text: given tokens with gaps between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, zip_longest
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from decausal.data.encode import SpecialTokens
from decausal.data.template import render
from decausal.errors import UserError, refuse_broken_text
from decausal.models.architecture import context_length
from decausal.models.checkpoint import Converted
from decausal.sampling.bidirectional.sampler import OnStep, denoise
from decausal.sampling.borders import Allowed, AllowedTokens, Border
from decausal.sampling.settings import SamplerSettings

BATCH_SIZE = 16


@dataclass(frozen=True)
class Row:
    """Given tokens, a gap, given tokens, a gap, ..., given tokens.

    Attributes:
        given: Ids before, between and behind the gaps: one list more than there are gaps.
        gaps: Open positions of each gap.
        name: What error messages call it.
        borders: Of each gap; none where no token crosses one.
    """

    given: tuple[list[int], ...]
    gaps: tuple[int, ...]
    name: str
    borders: tuple[Border, ...] = ()

    @classmethod
    def opened(cls, ids: Sequence[int], positions: Sequence[int], name: str) -> Row:
        """A row of which some positions, in ascending order, are to be written anew."""
        given: list[list[int]] = [[]]
        gaps: list[int] = []
        is_open = set(positions)
        for position, token in enumerate(ids):
            if position not in is_open:
                given[-1].append(token)
            elif gaps and not given[-1]:
                gaps[-1] += 1
            else:
                gaps.append(1)
                given.append([])
        return cls(tuple(given), tuple(gaps), name)

    @property
    def length(self) -> int:
        return sum(map(len, self.given)) + sum(self.gaps)

    @property
    def has_borders(self) -> bool:
        """Whether a token of some gap holds given characters."""
        return any(border != Border() for border in self.borders)

    def spans(self) -> list[range]:
        """The positions of each gap."""
        sizes = [len(self.given[0]), *chain(*zip(self.gaps, map(len, self.given[1:]), strict=True))]
        ends = list(accumulate(sizes))
        return [range(start, start + gap) for start, gap in zip(ends[::2], self.gaps, strict=False)]

    def ids(self, fill: int) -> list[int]:
        """The whole row, with `fill` in the gaps."""
        pieces = zip_longest(self.given, ([fill] * gap for gap in self.gaps), fillvalue=[])
        return list(chain(*chain(*pieces)))

    def filled(self, new: Sequence[int]) -> list[int]:
        """The whole row, with `new` in the gaps."""
        ids, written = self.ids(-1), iter(new)
        for span in self.spans():
            ids[span.start : span.stop] = [next(written) for _ in span]
        return ids

    def check(self, converted: Converted) -> None:
        """Refuses a row that the model cannot read."""
        mask_token_id = converted.facts.mask_token_id
        if any(mask_token_id in ids for ids in self.given):
            token = converted.tokenizer.convert_ids_to_tokens(mask_token_id)
            raise UserError(
                f"{self.name} holds the mask token {token!r} (id {mask_token_id}), which stands for "
                "open positions: take it out, and use infill to fill a gap"
            )
        context = context_length(converted.model.config)
        if context is None or self.length <= context:
            return
        given = sum(map(len, self.given))
        if given > context:
            raise UserError(f"{self.name} has {given} tokens, the model's context {context}: shorten it")
        raise UserError(
            f"{self.name} has {given} tokens and {self.length - given} are to be written: {self.length} exceed the "
            f"model's context of {context}; write at most {context - given}, or shorten it"
        )


@dataclass(frozen=True)
class Filled:
    """A row whose gaps hold tokens.

    Attributes:
        ids: The whole row.
        step_of_token: For each of `ids` the step, from 0, in which it was kept; -1 for given ones and after an end.
        num_forwards: Forward passes that this row took part in.
        tokens_per_forward: Tokens kept, over `num_forwards`.
    """

    ids: list[int]
    step_of_token: list[int]
    num_forwards: int
    tokens_per_forward: float


def refuse_batch_size(batch_size: int) -> None:
    """Raises UserError where no row would be taken at a time."""
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is not accepted: it must be at least 1")


def fill_rows(
    converted: Converted,
    rows: Sequence[Row],
    settings: SamplerSettings,
    *,
    end_token_ids: Sequence[int] = (),
    seeds: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
    on_step: OnStep | None = None,
) -> list[Filled]:
    """Denoises rows of any lengths, `batch_size` at a time.

    Args:
        converted: Model, tokenizer and facts.
        rows: Row i draws from `settings.seed` + i where there are no `seeds`.
        settings: How open positions become tokens.
        end_token_ids: See `sampler.denoise`.
        seeds: One for each row.
        batch_size: Rows denoised together; it does not change what they become.
        on_step: See `sampler.OnStep`; called for each batch in turn.

    Raises:
        UserError: A row that the model cannot read, or a batch size below 1.
    """
    refuse_batch_size(batch_size)
    settings.refuse_speculative()
    for row in rows:
        row.check(converted)
    device = next(converted.model.parameters()).device
    row_seeds = torch.tensor([settings.seed + i for i in range(len(rows))] if seeds is None else seeds, device=device)
    filled = []
    for start in range(0, len(rows), batch_size):
        batch = slice(start, start + batch_size)
        ids, is_open, document_ids = (part.to(device) for part in padded(rows[batch], converted.facts.mask_token_id))
        allowed = allowed_in(converted, rows[batch], ids)
        denoised = denoise(
            converted.model,
            converted.facts,
            ids,
            is_open,
            settings,
            document_ids=document_ids,
            row_seeds=row_seeds[batch],
            end_token_ids=end_token_ids,
            allowed=allowed,
            on_step=on_step,
        )
        columns = (denoised.ids, denoised.step_of_token, denoised.num_forwards, denoised.tokens_per_forward)
        filled += [
            Filled(ids[: row.length], steps[: row.length], num_forwards, tokens_per_forward)
            for row, ids, steps, num_forwards, tokens_per_forward in zip(
                rows[batch], *(column.tolist() for column in columns), strict=True
            )
        ]
    return filled


def padded(
    rows: Sequence[Row], mask_token_id: int
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Returns ids, is_open and document_ids (-1 behind the end of a row)."""
    shape = (len(rows), max(row.length for row in rows))
    ids = torch.full(shape, mask_token_id)
    is_open = torch.zeros(shape, dtype=torch.bool)
    document_ids = torch.full(shape, -1)
    for index, row in enumerate(rows):
        ids[index, : row.length] = torch.tensor(row.ids(mask_token_id), dtype=torch.long)
        for span in row.spans():
            is_open[index, span.start : span.stop] = True
        document_ids[index, : row.length] = 0
    return ids, is_open, document_ids


def allowed_in(converted: Converted, rows: Sequence[Row], ids: Int[Tensor, "B T"]) -> Allowed | None:
    """Which tokens may stand at the borders of gaps; None where any may everywhere."""
    if not any(row.has_borders for row in rows):
        return None
    vocabulary_size = len(converted.model.get_output_embeddings().weight)
    table = AllowedTokens(converted.tokenizer, vocabulary_size, ids.device)
    index = torch.full_like(ids, -1)
    for number, row in enumerate(rows):
        for position, which in table.numbers(row.spans(), row.borders).items():
            index[number, position] = which
    return Allowed(index, table.tokens)


def prompt_ids(converted: Converted, text: str, chat: bool = False) -> list[int]:
    """The ids that begin a row; an empty text starts from the tokenizer's BOS or EOS token.

    Raises:
        UserError: Chat without a template, half a surrogate pair, or nothing to start from under shift 1.
    """
    refuse_broken_text(text, "the prompt")
    tokenizer = converted.tokenizer
    if chat:
        if not tokenizer.chat_template:
            raise UserError("chat=True needs a chat template, and this model's tokenizer has none: leave chat out")
        message = [{"role": "user", "content": text}]
        text = render(message, tokenizer, "the prompt", add_generation_prompt=True)
    # As documents are encoded for training: what the tokenizer puts before a text, never what it puts behind one.
    before = [] if chat else SpecialTokens(tokenizer).prefix
    ids = [*before, *text_ids(tokenizer, text)]
    if ids:
        return ids
    for start in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if start is not None:
            return [start]
    if converted.facts.shift == 0:
        return []
    raise UserError(
        "the prompt is empty and this model's tokenizer has neither a BOS nor an EOS token to start from: "
        "with shift 1 the first token cannot be predicted, so give some text"
    )


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, without what the tokenizer puts around a document.

    Raises:
        UserError: The text holds half a surrogate pair.
    """
    refuse_broken_text(text, "the text")
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def ids_behind(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that stands behind other text: some tokenizers put a space before whatever they are given."""
    ids = text_ids(tokenizer, text)
    anchor = text_ids(tokenizer, "\n")
    if not ids or text_ids(tokenizer, "\na")[len(anchor) :] == text_ids(tokenizer, "a"):
        return ids
    anchored = text_ids(tokenizer, "\n" + text)
    return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else ids


def text_after(tokenizer: Any, before: list[int], new: list[int]) -> str:
    """Decodes `new` as it reads behind `before`: some tokenizers drop the space in front of a text's first word."""
    whole = tokenizer.decode(before + new, skip_special_tokens=True)
    start = tokenizer.decode(before, skip_special_tokens=True)
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(new, skip_special_tokens=True)


def named(noun: str, texts: Sequence[Any]) -> list[str]:
    """Names texts for error messages: "the prompt", or "prompt 3" of several, counted from 1."""
    return [f"the {noun}"] if len(texts) == 1 else [f"{noun} {number}" for number in range(1, len(texts) + 1)]
