"""The same sources that training rows are made of, as prompts: what a model is given to answer.

Of a prompt and its completion, the prompt; of a conversation, all before the assistant's last answer, with the
template's generation prompt; of a plain text, a prefix of each stretch of tokens that a row would hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby, islice

import numpy as np
import torch
from jaxtyping import Int, Int32, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from decausal.data.chat import refuse_without_template, render
from decausal.data.documents import read_sources
from decausal.data.encode import BATCH_RECORDS, Encoded, encode_stream
from decausal.data.forms import Record
from decausal.data.reading import Account, Reading, say
from decausal.data.rows import keep_fraction
from decausal.data.sources import Data, find_sources
from decausal.errors import UserError

Ids = Int32[np.ndarray, " _"]


class Prompts:
    """Prompts as token ids, one behind the other; prompt i is `ids[starts[i]:starts[i + 1]]`."""

    def __init__(self, ids: Ids, starts: Int64[np.ndarray, " m"]) -> None:
        self._ids, self._starts = ids, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Int[Tensor, " n"]:
        return torch.from_numpy(self._ids[self._starts[index] : self._starts[index + 1]].astype(np.int64))

    @classmethod
    def of(cls, prompts: Iterable[Ids]) -> Prompts:
        """Joins prompts."""
        held = list(prompts)
        starts = np.cumsum([0, *(len(prompt) for prompt in held)], dtype=np.int64)
        return cls(np.concatenate([np.empty(0, dtype=np.int32), *held]).astype(np.int32), starts)


def load_prompts(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    block_size: int,
    *,
    prompt_fraction: float = 0.5,
    reading: Reading | None = None,
    data_fraction: float = 1.0,
    seed: int = 0,
) -> Prompts:
    """Returns the prompts of `data`, in the order of its documents. Prompts that leave no room are left out, and told.

    Args:
        data, reading, data_fraction, seed: see `decausal.data.rows.load_rows`.
        tokenizer: of the model that will read them.
        max_length: tokens of a prompt and its answer together.
        block_size: tokens that must be left for an answer at least.
        prompt_fraction: share of a plain text to give; at least one token of it, never all.

    Raises:
        UserError: the data cannot be read or encoded, there is no prompt in it, or none leaves room for an answer.
    """
    longest = max_length - block_size
    reading, account = reading or Reading(), Account()
    sources = find_sources(data, reading.split, account)
    records = keep_fraction(read_sources(sources, reading, account), data_fraction, seed)
    on_bad = partial(account.take_bad, on_bad_record=reading.on_bad_record)
    kept: list[Ids] = []
    dropped_lengths: list[int] = []
    for ids in prompts_of(records, tokenizer, max_length, longest, prompt_fraction, on_bad):
        if 1 <= len(ids) <= longest:
            kept.append(ids)
        else:
            dropped_lengths.append(len(ids))
    if not kept and not dropped_lengths:
        account.refuse_if_all_bad()
    say(account.line(sum(map(len, kept))))
    _report_dropped(len(kept), dropped_lengths, max_length, block_size)
    return Prompts.of(kept)


def _report_dropped(num_kept: int, dropped_lengths: list[int], max_length: int, block_size: int) -> None:
    """Warns of prompts left out; raises UserError where no other was there."""
    if not dropped_lengths:
        return
    num_empty = dropped_lengths.count(0)
    why = (
        f"{num_empty} without a token, {len(dropped_lengths) - num_empty} longer than --max_length {max_length} less "
        f"one block of {block_size}; the longest has {max(dropped_lengths)} tokens"
    )
    if not num_kept:
        raise UserError(f"no prompt leaves room for an answer: {why}; raise --max_length or give other data")
    warnings.warn(f"left out {len(dropped_lengths)} of {num_kept + len(dropped_lengths)} prompts: {why}", stacklevel=3)


def prompts_of(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    longest: int,
    prompt_fraction: float,
    on_bad: Callable[[UserError], None] | None = None,
) -> Iterator[Ids]:
    """Yields the prompts of records, those without room for an answer included; see `load_prompts`."""
    for is_conversation, group in groupby(records, lambda record: "messages" in record):
        if is_conversation:
            while some := list(islice(group, BATCH_RECORDS)):
                yield from _conversation_prompts(some, tokenizer, on_bad)
        else:
            for document in encode_stream(group, tokenizer, on_bad=on_bad):
                yield from _document_prompts(document, max_length, longest, prompt_fraction)


def _document_prompts(document: Encoded, max_length: int, longest: int, prompt_fraction: float) -> Iterator[Ids]:
    if not document.splittable:
        yield document.ids[: int(document.is_maskable.argmax())]
        return
    for start in range(0, len(document.ids), max_length):
        piece = document.ids[start : start + max_length]
        length = min(int(len(piece) * prompt_fraction), len(piece) - 1, longest)
        if len(piece) > 1 or not start:  # a rest of one token is no text
            yield piece[: max(1, length)]


def _conversation_prompts(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, on_bad: Callable[[UserError], None] | None
) -> Iterator[Ids]:
    texts: list[str] = []
    for record in records:
        try:
            texts.append(_conversation_prompt(record, tokenizer))
        except UserError as error:
            if on_bad is None:
                raise
            on_bad(error)
    if texts:
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            yield np.array(ids, dtype=np.int32)


def _conversation_prompt(record: Record, tokenizer: PreTrainedTokenizerBase) -> str:
    refuse_without_template(tokenizer, record["origin"])
    messages = record["messages"]
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    if not last:  # an answer to nothing has no prompt
        return ""
    return render(messages[:last], tokenizer, record["origin"], add_generation_prompt=True)
