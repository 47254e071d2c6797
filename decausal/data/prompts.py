"""Prompts for a model to answer, from the sources of training rows.

A prompt with a completion gives the prompt. A conversation gives everything before its last answer, with the template's
generation prompt. A plain text gives a prefix of each stretch of tokens that a row would hold. Completions and last
answers may be missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Int, Int32, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from decausal.data.answers import Warn
from decausal.data.documents import read_sources
from decausal.data.encode import (
    Encoded,
    OnBad,
    SpecialTokens,
    encode_batch,
    encode_each,
    good,
    refuse_mask_token,
)
from decausal.data.forms import Record
from decausal.data.messages import Message
from decausal.data.reading import Account, Reading, say
from decausal.data.rows import keep_fraction
from decausal.data.sources import Data, find_sources
from decausal.data.template import readable, refuse_without_template, render, template_values
from decausal.errors import UserError
from decausal.wording import quantity

Ids = Int32[np.ndarray, " _"]


@dataclass(frozen=True)
class Prompt:
    """What a model is given to answer, and how the data say it.

    Attributes:
        ids: Tokens as the model reads them before an answer.
        record: With "messages" up to the answer, maybe "tools" and "chat_template_kwargs"; or with "prompt".
    """

    ids: Ids
    record: Record


class Prompts:
    """Prompts as token ids, one after another; prompt i is `ids[starts[i]:starts[i + 1]]`.

    Attributes:
        has_conversations: Whether some of them are put through the chat template.
    """

    def __init__(self, ids: Ids, starts: Int64[np.ndarray, " m"], has_conversations: bool = False) -> None:
        self._ids, self._starts, self.has_conversations = ids, starts, has_conversations

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Int[Tensor, " n"]:
        return torch.from_numpy(self._ids[self._starts[index] : self._starts[index + 1]].astype(np.int64))

    @classmethod
    def of(cls, prompts: Iterable[Ids], has_conversations: bool = False) -> Prompts:
        """Joins prompts."""
        held = list(prompts)
        starts = np.cumsum([0, *(len(prompt) for prompt in held)], dtype=np.int64)
        return cls(np.concatenate([np.empty(0, dtype=np.int32), *held]).astype(np.int32), starts, has_conversations)


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
    """Returns the prompts of `data`, in the order of its documents.

    Prompts that leave no room for a block are skipped. A warning says how many.

    Args:
        data, reading, data_fraction, seed: See `decausal.data.rows.load_rows`.
        tokenizer: Of the model that will read them.
        max_length: Tokens of a prompt and its answer together.
        block_size: Tokens that must at least be left for an answer.
        prompt_fraction: Share of a plain text that becomes the prompt: at least one token, never all.

    Raises:
        UserError: The data cannot be read or encoded, there is no prompt in it, or none leaves room for an answer.
    """
    longest = max_length - block_size
    reading, account = replace(reading or Reading(), needs_answers=False), Account()
    sources = find_sources(data, reading.split, account)
    records = keep_fraction(read_sources(sources, reading, account), data_fraction, seed)
    on_bad = partial(account.take_unencodable, on_bad_record=reading.on_bad_record)
    kept: list[Ids] = []
    dropped_lengths: list[int] = []
    for ids in prompts_of(records, tokenizer, max_length, longest, prompt_fraction, on_bad, reading.num_proc):
        if 1 <= len(ids) <= longest:
            kept.append(ids)
        else:
            dropped_lengths.append(len(ids))
    if not kept and not dropped_lengths:
        account.refuse_if_all_bad()
    say(account.line(sum(map(len, kept))))
    report_dropped(len(kept), dropped_lengths, f"--max_length {max_length} less one block of {block_size}")
    return Prompts.of(kept, bool(account.num_conversations))


def report_dropped(num_kept: int, dropped_lengths: list[int], room: str) -> None:
    """Warns about prompts that were left out.

    Args:
        num_kept: How many were not.
        dropped_lengths: Their lengths in tokens.
        room: What they do not fit into.

    Raises:
        UserError: No others are left.
    """
    if not dropped_lengths:
        return
    num_empty = dropped_lengths.count(0)
    why = (
        f"{num_empty} without a token, {len(dropped_lengths) - num_empty} longer than {room}; the longest has "
        f"{quantity(max(dropped_lengths), 'token')}"
    )
    if not num_kept:
        raise UserError(f"no prompt leaves room for an answer: {why}; raise --max_length or give other data")
    prompts = quantity(num_kept + len(dropped_lengths), "prompt")
    warnings.warn(f"left out {len(dropped_lengths):,} of {prompts}: {why}", stacklevel=3)


def prompts_of(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    longest: int,
    prompt_fraction: float,
    on_bad: OnBad | None = None,
    num_proc: int = 1,
) -> Iterator[Ids]:
    """Yields the prompts of records, including those without room for an answer; see `load_prompts`."""
    some = partial(
        _encode_prompts, tokenizer=tokenizer, max_length=max_length, longest=longest, prompt_fraction=prompt_fraction
    )
    yield from good(encode_each(records, some, num_proc), on_bad)


def _encode_prompts(
    records: Sequence[Record],
    warn: Warn,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    longest: int,
    prompt_fraction: float,
) -> list[list[Ids]]:
    """Returns the prompts of each record."""
    found: list[list[Ids]] = [[] for _ in records]
    texts = [index for index, record in enumerate(records) if "text" in record]
    for index, document in zip(texts, encode_batch([records[index] for index in texts], tokenizer), strict=True):
        found[index] = list(pieces(document, max_length, longest, prompt_fraction))
    others = [index for index, record in enumerate(records) if "text" not in record]
    for index, prompt in zip(others, given([records[index] for index in others], tokenizer, warn), strict=True):
        found[index] = [prompt.ids]
    return found


def pieces(document: Encoded, max_length: int, longest: int, prompt_fraction: float) -> Iterator[Ids]:
    """Yields the beginning of each stretch of `max_length` tokens of a text; see `load_prompts`."""
    before, ids = np.split(document.ids, [document.num_before])
    step = max(1, max_length - len(before))
    for start in range(0, max(1, len(ids)), step):
        piece = np.concatenate([before, ids[start : start + step]])
        length = min(int(len(piece) * prompt_fraction), len(piece) - 1, longest)
        if len(piece) > len(before) + 1 or not start:  # a rest of one token is too short
            yield piece[: max(1, length)]


def given(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, warn: Warn = say) -> list[Prompt]:
    """Returns the prompts of conversations and of completions, as the model reads them before an answer.

    Args:
        records: Records with "messages" or with "prompt".
        tokenizer: The model's tokenizer.
        warn: Called with what the user should know about the template.

    Raises:
        UserError: A record cannot be used.
    """
    prefix = SpecialTokens(tokenizer).prefix
    texts: list[tuple[Record, str, list[int]]] = []
    for record in records:
        if "messages" in record:
            record = record | {"messages": before_answer(record["messages"])}
            texts.append((record, conversation_prompt(record, tokenizer, warn), []))
        else:
            texts.append((record, record["prompt"], prefix))
    if not texts:
        return []
    batch = tokenizer([text for _, text, _ in texts], add_special_tokens=False, verbose=False)
    prompts = [
        Prompt(np.array([*before, *text_ids], dtype=np.int32), record)
        for (record, _, before), text_ids in zip(texts, batch["input_ids"], strict=True)
    ]
    for prompt in prompts:
        refuse_mask_token(prompt.ids, prompt.record["origin"], tokenizer)
    return prompts


def before_answer(messages: list[Message]) -> list[Message]:
    """Returns a conversation without its last answer."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def conversation_prompt(record: Record, tokenizer: PreTrainedTokenizerBase, warn: Warn = say) -> str:
    """Returns the text that stands before an answer to a conversation; "" without messages.

    Raises:
        UserError: There is no chat template, or it refuses the conversation.
    """
    refuse_without_template(tokenizer, record["origin"])
    messages, tools = record["messages"], record.get("tools", ())
    if not messages:  # an answer without a question has no prompt
        return ""
    options = {"tools": tools, "add_generation_prompt": True, **template_values(record, tokenizer, warn)}
    messages = readable(messages, tokenizer, record["origin"], **options)
    return render(messages, tokenizer, record["origin"], **options)
